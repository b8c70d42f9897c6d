"""Pictures with weighted adapters: they are PEFT's and diffusers' own, weights act at once, and the bare base has every adapter off."""

import json

import diffusers
import peft
import pytest
import torch
from PIL import Image

from lora_studio.errors import AdapterError, BenchError
from lora_studio.inference.draw import Brush, Easel
from lora_studio.jobs import bench
from lora_studio.lowrank import LowRank
from lora_studio.spec import Base
from tests import tiny_image
from tests.browser import made

BRUSH = Brush(seed=3, steps=3, guidance=3.0, width=32, height=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


@pytest.fixture(scope="module")
def easel(base):
    return Easel(Base(id=str(base)), precision="fp32")


def write(folder, base, modules):
    folder.mkdir()
    for name, data in tiny_image.adapter_files(base, modules).items():
        (folder / name).write_bytes(data)
    return folder


def pixels(easel, weights, tmp_path) -> torch.Tensor:
    file = easel.draw("a red circle", BRUSH, tmp_path / "drawn", weights=weights, step=lambda _: None)
    return torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).float()


def test_weighted_adapters_draw_what_diffusers_draws_with_them_merged_and_nothing_draws_the_base(base, easel, tmp_path):
    easel.put("a", tiny_image.random_adapter(base, seed=1))
    easel.put("b", tiny_image.random_adapter(base, seed=2, ends=("to_v", "conv2", "proj_in"), rank=2))
    stock = diffusers.StableDiffusionPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)

    def drawn(pipeline):
        found = pipeline("a red circle", num_inference_steps=3, guidance_scale=3.0, width=32, height=32, generator=torch.Generator().manual_seed(3)).images[0]
        return torch.frombuffer(bytearray(found.tobytes()), dtype=torch.uint8).float()

    bare = drawn(stock)
    assert torch.equal(pixels(easel, {}, tmp_path), bare) and torch.equal(pixels(easel, {"a": 0.0}, tmp_path), bare)
    for id, seed, ends, rank in (("a", 1, ("to_q", "ff.net.2", "conv1"), 3), ("b", 2, ("to_v", "conv2", "proj_in"), 2)):
        peft_unet = peft.PeftModel.from_pretrained(diffusers.UNet2DConditionModel.from_pretrained(base / "unet"), write(tmp_path / id, base, tiny_image.random_adapter(base, seed=seed, ends=ends, rank=rank)))
        stock.unet = peft_unet.merge_and_unload()
        wanted, found = drawn(stock), pixels(easel, {id: 1.0}, tmp_path)
        assert float((found - wanted).abs().max()) <= 1 and float((wanted - bare).abs().max()) > 3
    half = pixels(easel, {"a": 0.5, "b": -0.5}, tmp_path)
    assert not torch.equal(half, pixels(easel, {"a": 0.5}, tmp_path)) and torch.equal(half, pixels(easel, {"a": 0.5, "b": -0.5}, tmp_path))
    assert torch.equal(pixels(easel, {}, tmp_path), bare), "nothing stays on"


def test_the_file_tells_how_it_was_drawn(easel, tmp_path):
    file = easel.draw("a red circle", BRUSH, tmp_path / "drawn", weights={}, step=lambda _: None)
    told = json.loads(Image.open(file).text["lora-studio"])
    assert told["prompt"] == "a red circle" and told["seed"] == 3 and told["steps"] == 3 and told["base"] == easel.base.id


def test_drawing_can_be_stopped_at_any_step(easel, tmp_path):
    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        easel.draw("a red circle", BRUSH, tmp_path / "drawn", weights={}, step=stop)
    assert easel.active == () and not (tmp_path / "drawn").exists()


@pytest.mark.parametrize(("changed", "words"), [({"width": 33}, "multiple of 8"), ({"steps": 0}, "whole number"), ({"guidance": 0.5}, "from 1 to 100"), ({"seed": -1}, "from 0 on")])
def test_a_setting_that_cannot_be_is_a_sentence(changed, words):
    with pytest.raises(BenchError, match=words):
        Brush(**changed)


def test_an_adapter_of_another_model_is_refused(easel):
    with pytest.raises(AdapterError, match="None of the 1 layers"):
        easel.put("x", {"model.layers.0.self_attn.q_proj": LowRank(torch.ones(1, 3), torch.ones(3, 1))})


def test_the_bench_draws_sides_with_one_seed_and_tells_which_adapters_were_on(base, home, tmp_path):
    folder = write(tmp_path / "a", base, tiny_image.random_adapter(base, seed=1))
    brush = {"seed": 3, "steps": 2, "guidance": 3.0, "width": 32, "height": 32}
    with made.at(home):
        try:
            asked = {"base": [], "it": [[str(folder), 1.0, "it"]], "off": [[str(folder), 0.0, "it"]]}
            events = list(bench.stream("draw", base=str(base), prompt="a red circle", sides=asked, target=str(tmp_path / "out"), **brush))
            sides = events[-1]["sides"]
            assert [sides[side]["active"] for side in asked] == [[], [[str(folder), 1.0]], []]
            assert sides["base"]["path"] == sides["off"]["path"] != sides["it"]["path"]
            assert sum(event["event"] == "step" for event in events) == 6
            with pytest.raises(BenchError, match="needs a language model"):
                list(bench.stream("answer", base=str(base), messages=[{"role": "user", "content": "x"}], parts=[]))
            with pytest.raises(BenchError, match="needs an image model"):
                list(bench.stream("draw", base="demo-text", prompt="x", target=str(tmp_path / "out"), parts=[]))
        finally:
            bench.stop()
