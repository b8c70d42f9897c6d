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
    assert {name.partition("/")[0] for name in names} >= {"smollm", "gemma", "mistral"}
    images = {"sd15", "sdxl", "sd3", "flux", "flux2", "qwen-image", "z-image", "sana", "lumina2", "pixart", "wan"}
    assert {name.partition("/")[0] for name, preset in ALL.items() if preset.tree()["task"].get("kind") == "image"} == images | {"demo"}


IMAGES = [name for name, preset in ALL.items() if preset.tree()["task"].get("kind") == "image" and not name.startswith("demo/")]


@pytest.mark.parametrize("name", IMAGES)
def test_a_preset_of_an_image_model_suits_its_family(name):
    spec = parse({"data": [{"path": "x"}], **ALL[name].tree()})
    family = next(family for family in families.IMAGE_FAMILIES if spec.base.id in family.sizes)
    assert families.misfits(family.pipeline, spec) == []
    assert spec.task.resolution <= family.resolution
    assert spec.method.alpha == spec.method.rank and spec.optim.lr == 1e-4, "the rate that goes with a scale of 1"
    assert any(line.startswith("# From: ") for line in ALL[name].path.read_text().splitlines()), "where its numbers are from"


# Bytes of a weight, and how many blocks the models have of which some presets keep a part in main memory.
BYTES = {"none": 2, "8bit": 1.02, "4bit": 0.57}
BLOCKS = {"black-forest-labs/FLUX.1-dev": 57, "Qwen/Qwen-Image": 60}
ENCODERS = {"sd15": 0.2, "sdxl": 1.6, "sd3": 11.0, "flux": 9.8, "flux2": 8.1, "qwen-image": 16.6, "z-image": 8.1, "sana": 5.3, "lumina2": 5.3, "pixart": 9.5, "wan": 11.4}


@pytest.mark.parametrize("name", IMAGES)
def test_weights_and_encoders_of_a_preset_fit_the_card_it_names(name):
    spec = parse({"data": [{"path": "x"}], **ALL[name].tree()})
    card = int(name.removesuffix("gb").rpartition("/")[2].rpartition("-")[2])
    assert f"of {card} GB" in ALL[name].description
    there = 1 - spec.compute.block_swap / BLOCKS.get(spec.base.id, 1) * 0.9 if spec.compute.block_swap else 1
    assert families.billions(spec.base.id) * BYTES[spec.compute.quantize] * there < 0.8 * card
    encoders = ENCODERS[name.partition("/")[0]] * {"auto": 1, "4bit": 0.35, "cpu": 0}[spec.compute.encoders]
    assert encoders < 0.9 * card, "they are there before the first step only"
