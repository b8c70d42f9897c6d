"""Recommended settings: a pure function of base, rows and memory, whose numbers are the presets', and which says why."""

import subprocess
import sys

import pytest

from lora_studio import advice, memory, presets, studio
from lora_studio.advice import Situation, recommend
from lora_studio.bases import BaseInfo
from lora_studio.spec import methods, parse
from tests import tiny

GB = 10**9


def text_base(id="Qwen/Qwen3-4B", *, billions=4.0, model_type="qwen3", hidden=2560, layers=36) -> BaseInfo:
    """A language model by what its headers would say."""
    linears = tuple((f"model.layers.{number}.self_attn.q_proj", hidden, hidden) for number in range(layers))
    return BaseInfo(id, None, model_type=model_type, parameters=int(billions * GB), layers=layers, hidden=hidden, intermediate=4 * hidden, vocabulary=150_000, linears=linears)


def image_base(id="stabilityai/stable-diffusion-xl-base-1.0", *, billions=2.57, pipeline="") -> BaseInfo:
    return BaseInfo(id, None, parameters=int(billions * GB), pipeline=pipeline)


def spec_for(base: BaseInfo, kind="chat", **more):
    return parse({"base": {"id": base.id}, "data": [{"path": "x"}], "task": {"kind": kind}, **more})


def values(base: BaseInfo, kind="chat", *, spec=None, **known) -> dict:
    texts = memory.Rows(mean=200, spread=50, longest=400)
    return recommend(spec or spec_for(base, kind), Situation(base, **{"texts": texts, "free": 10**15, "device": "cuda", **known})).values


@pytest.mark.parametrize(
    ("base", "kind", "preset"),
    [
        (text_base(), "chat", "qwen3/4b"),
        (text_base("Qwen/Qwen3-0.6B", billions=0.6), "chat", "qwen3/0.6b"),
        (text_base("me/qwen3-tuned", billions=3.9), "chat", "qwen3/4b"),
        (text_base("me/qwen3-tuned", billions=1.5), "text", "qwen3/1.7b"),
        (text_base("meta-llama/Llama-3.2-3B-Instruct", billions=3.2, model_type="llama"), "chat", "llama3/3b"),
        (text_base("me/new-kind", billions=6.9, model_type="novel"), "prompt_completion", "mistral/7b"),
        (text_base("demo-text", billions=0.002, model_type="llama"), "chat", "demo/pirate"),
        (image_base(), "image", "sdxl/24gb"),
        (image_base("me/xl-tuned", pipeline="StableDiffusionXLPipeline"), "image", "sdxl/24gb"),
    ],
)
def test_the_numbers_are_those_of_the_nearest_preset(base, kind, preset):
    told, tree = recommend(spec_for(base, kind), Situation(base, device="cuda", free=10**15)), presets.find(preset).tree()
    assert told.preset == preset
    for path in ("method.rank", "method.alpha", "optim.lr"):
        assert told.values[path] == tree[path.split(".")[0]][path.split(".")[1]]
    assert all(one.reason.endswith(".") and len(one.reason) > 10 for one in told.advices)
    if base.id in {presets.find(preset).tree()["base"]["id"]}:
        assert f"is made for {base.id}" in next(one.reason for one in told.advices if one.path == "method.rank")


@pytest.mark.parametrize(("free", "preset"), [(7.6, "sdxl/8gb"), (11.5, "sdxl/12gb"), (15.5, "sdxl/12gb"), (23.6, "sdxl/24gb"), (2, "sdxl/8gb"), (None, "sdxl/8gb")])
def test_of_one_base_the_preset_for_the_card_is_taken(free, preset):
    told = recommend(spec_for(image_base(), "image"), Situation(image_base(), device="cuda", free=free and int(free * GB)))
    assert told.preset == preset and told.values["task.resolution"] == 1024


@pytest.mark.parametrize(
    ("rows", "epochs", "a_step"),
    [(0, 3.0, 16), (40, 3.0, 8), (320, 3.0, 8), (600, 3.0, 16), (2_000, 2.0, 16), (30_000, 1.0, 16), (3, 3.0, 4)],
)
def test_rows_decide_how_often_they_are_seen_and_how_many_make_a_step(rows, epochs, a_step):
    found = values(text_base(), rows=rows)
    assert (found["schedule.epochs"], found["schedule.batch_size"] * found["schedule.accumulate"]) == (epochs, a_step)
    assert found["schedule.batch_size"] <= max(1, rows or 10**9)


def test_few_rows_are_told_to_be_judged_by_folds():
    assert any("cross-validation" in note for note in recommend(spec_for(text_base()), Situation(text_base(), rows=40)).notes)
    assert not recommend(spec_for(text_base()), Situation(text_base(), rows=4000)).notes


def test_less_memory_takes_less_and_says_so():
    base = text_base("me/qwen3-tuned", billions=4.0)
    texts = memory.Rows(mean=500, spread=100, longest=2000)

    def told(free):
        return recommend(spec_for(base), Situation(base, rows=5000, texts=texts, device="cuda", free=free))

    spec = spec_for(base, method={"rank": 32, "alpha": 32}, schedule={"batch_size": 2, "accumulate": 8}, compute={"checkpointing": True})
    needed = memory.estimate(spec, base, texts, trainable=base.trainable(base.targets("auto"), spec.method), device="cuda").needed
    roomy, tight = told(2 * needed), told(needed)
    assert roomy.values["schedule.batch_size"] == 2 and "About" in next(one.reason for one in roomy.advices if one.path == "compute.checkpointing")
    changed = [one for one in tight.advices if roomy.values[one.path] != one.value]
    assert changed and all("are free" in one.reason for one in changed)
    assert told(needed // 2).values["compute.quantize"] == "4bit"
    assert any("Choose a smaller base" in note for note in told(GB // 10).notes)


def test_what_needs_a_gpu_is_not_recommended_without_one():
    found = recommend(spec_for(image_base("Qwen/Qwen-Image", billions=20.4), "image"), Situation(image_base("Qwen/Qwen-Image", billions=20.4), device="cpu", free=15 * GB))
    assert found.preset == "qwen-image/16gb"
    assert (found.values["compute.quantize"], found.values["compute.encoders"], found.values["compute.block_swap"]) == ("none", "auto", 0)
    assert "NVIDIA" in next(one.reason for one in found.advices if one.path == "compute.quantize")
    assert values(image_base(), "image", free=8 * GB, has_bitsandbytes=False)["optim.kind"] == "adamw"


@pytest.mark.parametrize("kind", methods.KINDS)
def test_another_kind_of_adapter_keeps_its_own_rank_and_gets_a_whole_spec(kind):
    spec = spec_for(text_base(), method={"kind": kind})
    found = recommend(spec, Situation(text_base(), rows=100, device="cuda", free=10**15))
    assert ("method.rank" in found.values) == (kind == "lora")
    assert studio.with_values(spec, found.values).method.kind == kind


@pytest.mark.parametrize("id", sorted({preset.tree()["base"]["id"] for preset in presets.available()}))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_recommended_is_a_whole_spec(id, device):
    from lora_studio import bases
    from lora_studio.spec import Base

    info, kind = bases.inspect(Base(id=id)), next(preset.tree().get("task", {}).get("kind", "chat") for preset in presets.available() if preset.tree()["base"]["id"] == id)
    for free in (None, 6 * GB, 40 * GB):
        found = recommend(spec_for(info, kind), Situation(info, rows=50, device=device, free=free))
        assert set(found.values) <= set(advice.PATHS)
        studio.with_values(spec_for(info, kind), found.values)


def test_the_command_line_recommends(home, base, chat_rows):
    done = subprocess.run(
        [sys.executable, "-m", "lora_studio", "recommend", "--base.id", str(base), "--data", str(chat_rows)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "method.rank" in done.stdout and "cross-validation" in done.stdout and "python -m lora_studio train" in done.stdout


def test_the_verb_counts_the_rows_and_finds_the_machine(workspace, base, chat_rows):
    spec = parse(tiny.tree(base, chat_rows))
    found = studio.recommend(workspace, spec)
    assert found.preset.startswith("llama3/") and "54 rows" in next(one.reason for one in found.advices if one.path == "schedule.epochs")
    assert studio.preflight(workspace, studio.with_values(spec, found.values)).facts["rows"] == 60
