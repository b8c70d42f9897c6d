"""Presets: every one is a whole spec once it has data, is sparse, and stands in the list with a description."""

import pytest

from lora_studio import families, presets, settings
from lora_studio.spec import parse, to_tree

ALL = {preset.name: preset for preset in presets.available()}


@pytest.mark.parametrize("name", ALL)
def test_every_preset_is_a_whole_spec(name):
    tree = ALL[name].tree()
    spec = parse({"data": [{"path": "x"}], **tree})
    assert spec.base.id in families.known_bases()
    assert len(ALL[name].description) > 20
    assert {"rank", "alpha"} <= set(tree["method"]) and "lr" in tree["optim"], "rank, alpha and rate stand together"


@pytest.mark.parametrize("name", ALL)
def test_a_preset_says_only_what_differs(name):
    tree = ALL[name].tree()
    spec = to_tree(parse({"data": [{"path": "x"}], **tree}))
    default = to_tree(parse({"data": [{"path": "x"}], "task": {"kind": spec["task"]["kind"]}}))
    together = {"method.rank", "method.alpha", "optim.lr", "base.id", "task.kind", "name"}
    same = [leaf.path for leaf in settings.leaves() if _has(tree, leaf.path) and _at(spec, leaf.path) == _at(default, leaf.path)]
    assert set(same) <= together


def _has(tree, path) -> bool:
    for step in path.split("."):
        if not isinstance(tree, dict) or step not in tree:
            return False
        tree = tree[step]
    return True


def _at(tree, path):
    for step in path.split("."):
        tree = tree[step]
    return tree


def test_the_demos_come_first_and_the_promised_families_are_there():
    names = list(ALL)
    assert all(name.startswith("demo/") for name in names[:2])
    assert {"qwen3/0.6b", "qwen3/1.7b", "qwen3/4b", "qwen3/8b", "llama3/1b", "llama3/3b", "llama3/8b"} <= set(names)
    assert {name.partition("/")[0] for name in names} >= {"smollm", "gemma", "mistral", "sd15", "sdxl"}
