"""The README is compared with the code: its tree, its commands, its pictures, and the files its claims point to."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> str:
    """The package's tree with the first sentence of every file's docstring."""
    lines = []
    for path in sorted((ROOT / "lora_studio").rglob("*.py"), key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name)):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = re.split(r"(?<=[^.])\.(?:\s|$)", doc.split("\n\n")[0].replace("\n", " "))[0].rstrip(":")
        depth = len(path.relative_to(ROOT).parts) - 1
        if path.name == "__init__.py":
            lines.append(f"{'  ' * (depth - 1)}{path.parent.name + '/':<{24 - 2 * (depth - 1)}} {first}")
        elif path.name != "__main__.py":
            lines.append(f"{'  ' * depth}{path.name:<{24 - 2 * depth}} {first}")
    return "\n".join(lines)


def families_table() -> str:
    """The families of models that are known, from the code."""
    from lora_studio import families

    rows = [(family.name, "language", ", ".join(f"`{target}`" for target in family.targets), family.sizes) for family in families.FAMILIES if family.name != "Demo"]
    rows += [(family.name, f"image: {family.component} of `{family.pipeline}`", ", ".join(f"`{target}`" for target in family.targets), family.sizes) for family in families.IMAGE_FAMILIES]
    lines = ["| family | what is trained | adapter on | for example |", "| --- | --- | --- | --- |"]
    for name, part, targets, sizes in rows:
        known = [base for base in sizes if not base.startswith("demo-")]
        lines.append(f"| {name} | {part} | {targets} | {known[0] if known else ''} |")
    return "\n".join(lines)


def test_the_table_of_families_in_the_readme_is_the_code():
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", README, re.DOTALL)[1]
    assert shown == families_table(), "write it again: python -m tests.test_readme"


def test_the_table_of_methods_in_the_readme_is_the_code():
    from lora_studio.spec import abilities

    shown = re.search(r"<!-- methods -->\n(.*?)\n<!-- end -->", README, re.DOTALL)[1]
    assert shown == abilities.table(), "write it again: python -m tests.test_readme"


def test_the_tree_in_the_readme_is_the_code():
    shown = re.search(r"## A tour of the code\n\n```\n(.*?)\n```", README, re.DOTALL)[1]
    assert shown == tree(), "write the tree again: python -m tests.test_readme"


def test_every_command_in_the_readme_exists():
    from lora_studio.cli import command

    known = set(command().commands)
    for line in re.findall(r"^python -m lora_studio ([^#]*?)(?:  |$)", README, re.MULTILINE):
        for words in line.split("|"):
            assert words.split()[0] in known, line


def test_the_spec_in_the_readme_is_one():
    from lora_studio import settings
    from lora_studio.spec import parse

    parse(settings.as_tree(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|lora_studio|presets)/[\w./-]+)`|\]\(((?:tests|lora_studio)/[\w./-]+)\)", README))))
def test_every_file_the_readme_names_is_there(path):
    assert (ROOT / (path[0] or path[1])).exists()


def test_the_top_level_is_what_it_should_be():
    import subprocess

    known = {"app.py", "lora_studio", "presets", "tests", "requirements.txt", "README.md", "Dockerfile", "pyproject.toml", ".ci", ".gitignore", ".dockerignore", "LICENSE"}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split("\n")
    if not any(tracked):
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked if name} <= known


if __name__ == "__main__":
    from lora_studio.spec import abilities

    text = re.sub(r"(## A tour of the code\n\n```\n).*?(\n```)", lambda found: found[1] + tree() + found[2], README, flags=re.DOTALL)
    text = re.sub(r"(<!-- families -->\n).*?(\n<!-- end -->)", lambda found: found[1] + families_table() + found[2], text, flags=re.DOTALL)
    text = re.sub(r"(<!-- methods -->\n).*?(\n<!-- end -->)", lambda found: found[1] + abilities.table() + found[2], text, flags=re.DOTALL)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
