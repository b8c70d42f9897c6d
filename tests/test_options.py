"""What cannot be chosen is told by the spec, the family and the machine themselves, and every other choice can."""

import pytest

from lora_studio import options, studio
from lora_studio.errors import SpecError
from tests import tiny


def reasons(preset="demo/pirate", **changes) -> options.Reasons:
    return options.impossible(studio.form_values(preset) | {path.replace("__", "."): value for path, value in changes.items()})


@pytest.mark.parametrize(
    ("preset", "changes", "path", "option", "words"),
    [
        ("demo/pirate", {"compute__quantize": "4bit"}, "method.kind", "loha", "does not work on a base in 4 bits"),
        ("demo/pirate", {"method__kind": "loha"}, "compute.quantize", "4bit", "does not work on a base in 4 bits"),
        ("demo/pirate", {"compute__quantize": "4bit"}, "method.init", "pissa", "need the base's own numbers"),
        ("demo/pirate", {"optim__kind": "muon", "optim__lora_plus_ratio": None}, "method.dora", True, "muon is for matrices"),
        ("demo/pirate", {"optim__kind": "muon"}, "method.kind", "vera", "muon is for matrices"),
        ("demo/pirate", {}, "task.kind", "image", "is a language model"),
        ("demo/stripes", {}, "task.kind", "chat", "is an image model"),
        ("demo/stripes", {}, "method.kind", "prefix", "is for language models only"),
        ("demo/stripes", {"task__text_encoder": True}, "method.kind", "full", "no text encoder"),
        ("demo/stripes", {}, "compute.quantize", "4bit", "NVIDIA"),
        ("demo/pirate", {}, "method.experts", True, "has no experts"),
        ("demo/stripes", {}, "method.experts", True, "image models, which have none"),
        ("demo/pirate", {"base__id": "someone/unknown-base", "compute__quantize": "4bit"}, "method.experts", True, "packs no experts"),
        ("demo/stripes", {"base__id": "Qwen/Qwen-Image"}, "task.text_encoder", True, "Qwen-Image"),
        ("demo/stripes", {"base__id": "Qwen/Qwen-Image"}, "task.weighting", "min_snr", "Qwen-Image"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_reason(preset, changes, path, option, words):
    assert words in reasons(preset, **changes)[path][option]


def test_nothing_is_refused_that_can_be():
    plain = reasons()
    assert "method.kind" not in plain and "optim.kind" not in {path for path, told in plain.items() if set(told) - {"adamw_schedule_free"}}
    assert "task.text_encoder" not in reasons("demo/stripes") and "compute.quantize" not in reasons()
    assert not reasons(base__id="someone/unknown-base").get("task.kind") and not reasons(base__id="").get("method.kind")
    assert not reasons(base__id="someone/unknown-base").get("method.experts")


def test_a_mixture_has_experts_that_can_learn(tmp_path):
    base = str(tiny.write_base(tmp_path / "mixture", "qwen3_moe"))
    assert "method.experts" not in reasons(base__id=base)
    assert "method.dora" in reasons(base__id=base, method__experts=True, optim__lora_plus_ratio=None)


@pytest.mark.parametrize("preset", ["demo/pirate", "demo/stripes"])
def test_a_choice_that_is_refused_is_one_that_cannot_start(preset, workspace):
    values = studio.form_values(preset)
    found = reasons(preset)
    assert found
    for path, told in found.items():
        for option in told:
            tried = {**values, path: option}
            try:
                report = studio.preflight(workspace, studio.spec_of_values(tried))
                assert not report.can_start, (path, option)
            except SpecError:
                pass


def test_a_wrong_number_elsewhere_hides_nothing():
    assert "loha" in reasons(compute__quantize="4bit", optim__lr="not a number", schedule__steps=-3)["method.kind"]
