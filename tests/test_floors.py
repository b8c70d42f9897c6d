"""The floors of the house: imports point down only, and the pages never load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import lora_studio

PACKAGE = Path(lora_studio.__file__).parent
FLOORS = {
    0: ["errors", "sentences", "spec", "problems", "settings", "families", "presets", "home", "weights", "rates", "__init__"],
    1: ["lowrank", "dora", "multiplied", "blend", "merging", "products", "ranks", "sketch", "conflicts"],
    2: ["allotment", "durable", "steady", "fence", "hosting", "storage", "caches", "workspace", "runs", "data", "rows", "bases", "memory", "advice", "continuing", "single_files", "library", "adapters", "checkpoints", "hub", "card", "listing", "pictures"],
    3: ["worker", "bench", "zerogpu", "training", "inference", "demo"],
    4: ["jobs"],
    5: ["studio", "albums", "baking", "exports", "lineage", "tryouts", "shelf", "formats", "merges", "space", "demo_space", "judging", "search", "sweeps", "comparisons", "grids", "preflight", "options", "visits", "numbers", "retries", "doctor", "keeping"],
    6: ["cli", "cli_captions", "cli_compare", "cli_judge", "cli_keep", "cli_merge", "cli_shelf", "cli_space", "cli_sweep", "ui", "__main__"],
}
FLOOR = {name: number for number, names in FLOORS.items() for name in names}
ONLY = {"torch": {1, 2, 3}, "transformers": {3}, "peft": {3}, "diffusers": {3}, "accelerate": {3}, "cma": {3}, "gradio": {6}, "typer": {6}, "click": {6}}
# (from, to): the keeper of a run starts the next one when its own ends.
ALLOWED_UP = {("worker", "jobs")}


def imports(tree: ast.AST, top_only: bool):
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))


def test_every_module_stands_on_a_floor():
    assert not [str(path) for path, _ in files() if path.parts[0].removesuffix(".py") not in FLOOR]


def test_imports_point_down_only():
    wrong = []
    for path, tree in files():
        own = path.parts[0].removesuffix(".py")
        for name in imports(tree, top_only=False):
            parts = name.split(".")
            if parts[0] == "lora_studio" and len(parts) > 1 and parts[1] in FLOOR:
                up = FLOOR[parts[1]] > FLOOR[own]
                work = FLOOR[own] >= 4 and FLOOR[parts[1]] in (1, 3)
                if (up or work) and (own, parts[1]) not in ALLOWED_UP:
                    wrong.append(f"{path} imports {name}")
    assert not wrong


def test_heavy_packages_stay_on_their_floors():
    wrong = []
    for path, tree in files():
        own = path.parts[0].removesuffix(".py")
        for name in imports(tree, top_only=False):
            allowed = ONLY.get(name.split(".")[0])
            if allowed is not None and FLOOR[own] not in allowed:
                wrong.append(f"{path} imports {name}")
        if FLOOR[own] == 2:
            wrong += [f"{path} loads torch at import" for name in imports(tree, top_only=True) if name.startswith("torch")]
    assert not wrong


def test_no_pickle_is_ever_loaded_and_no_remote_code_run():
    for path, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                assert (owner, node.func.attr) not in {("torch", "load"), ("torch", "save"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load")}, path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


def test_the_verbs_and_pages_leave_torch_alone():
    code = "import sys, lora_studio.ui, lora_studio.studio, lora_studio.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_fit_in_a_sitting_and_functions_on_a_screen():
    wrong = []
    for path, tree in files():
        lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
        if lines > 400:
            wrong.append(f"{path}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                positional = len(node.args.posonlyargs) + len(node.args.args) - (node.args.args[:1] != [] and node.args.args[0].arg == "self")
                if node.end_lineno - node.lineno + 1 > 80 or positional > 6:
                    wrong.append(f"{path}:{node.lineno} {node.name}")
    assert not wrong


def test_every_file_says_what_it_is():
    assert not [str(path) for path, tree in files() if not ast.get_docstring(tree)]
