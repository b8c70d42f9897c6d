"""Sentences: every key that is raised exists, takes the values it is given, and none is left over."""

import ast
import re
import string
from pathlib import Path

import lora_studio
from lora_studio.errors import SENTENCES


def raised():
    """(file, key, names of the values) of every StudioError made in the package."""
    for path in Path(lora_studio.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith("Error") and "." in node.args[0].value and re.fullmatch(r"[a-z]+\.[a-z0-9_]+", node.args[0].value):
                    yield path.name, node.args[0].value, {keyword.arg for keyword in node.keywords if keyword.arg}


def fields(sentence: str) -> set[str]:
    return {name.partition(":")[0] for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_every_error_raised_has_a_sentence_that_takes_its_values():
    wrong = []
    for file, key, values in raised():
        if key not in SENTENCES:
            wrong.append(f"{file}: {key} has no sentence")
        elif not (key == "spec.problems" or fields(SENTENCES[key]) == values - {"problems"}):
            wrong.append(f"{file}: {key} needs {fields(SENTENCES[key])}, is given {values}")
    assert not wrong


def test_no_sentence_is_left_over():
    text = "\n".join(path.read_text(encoding="utf-8") for path in Path(lora_studio.__file__).parent.rglob("*.py") if path.parent.name != "sentences")
    assert not [key for key in SENTENCES if f'"{key}"' not in text]


def test_every_sentence_ends_like_one():
    assert not [key for key, sentence in SENTENCES.items() if key != "spec.problems" and not sentence.rstrip("}").rstrip().endswith((".", "?", "{line", "{advice", "{reason", "{hint", "{name"))]
