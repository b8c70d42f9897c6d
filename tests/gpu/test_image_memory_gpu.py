"""What saves memory on a GPU: a base in 8 or 4 bits, blocks in main memory, text encoders in 4 bits, compiled blocks. Not run yet: no GPU was at hand."""

import math

import pytest
import torch

from lora_studio import runs
from lora_studio.home import demo_base
from lora_studio.spec import parse
from lora_studio.training import blocks, image, latents, methods, order
from lora_studio.training.image_families import FAMILIES
from tests import tiny_image
from tests.training.test_job import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CARD = torch.device("cuda:0")


def tree(base, rows, **compute):
    return {
        "base": {"id": str(base)}, "data": [{"path": str(rows)}], "validation": {"size": 0}, "schedule": {"steps": 40, "batch_size": 8}, "optim": {"lr": 2e-3},
        "task": {"kind": "image", "resolution": 64, "bucket_step": 32, "sample_steps": 2}, "method": {"rank": 8, "alpha": 8},
        "compute": {"device": "cuda", "precision": "bf16", **compute}, "output": {"sample_prompts": ["a red star on a blue background"]},
    }  # fmt: skip


def ran(workspace, spec):
    folder = runs.create(workspace, spec)
    runs.set_card(folder, device="cuda:0")
    return train(folder)


def losses(history):
    return [event["loss"] for event in history if event["kind"] == "step"]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_base_learns_draws_and_starts_near_the_full_one(workspace, bits):
    full = ran(workspace, parse(tree("demo-image", "demo/stripes")))
    small = ran(workspace, parse(tree("demo-image", "demo/stripes", quantize=bits)))
    found = losses(small)
    assert small[-1]["kind"] == "done" and all(map(math.isfinite, found)) and sum(found[-10:]) < sum(found[:10])
    assert found[0] == pytest.approx(losses(full)[0], rel=0.2)
    assert [event["answer"] for event in small if event["kind"] == "sample"][-1].endswith(".png")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_base_takes_less_memory_and_a_cut_run_goes_on(workspace, tmp_path, bits):
    base, rows = wide_flux(tmp_path), tiny_image.write_pictures(tmp_path / "rows", count=4)
    peaks = []
    for quantize in ("none", bits):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        task = image.ImageTask(parse(tree(base, rows, quantize=quantize)), device="cuda:0", note=lambda _: None, folder=workspace.root)
        model = task.load()
        peaks.append(sum(value.nbytes for value in model.parameters()))
        del task, model
    assert peaks[1] < peaks[0] * {"8bit": 0.62, "4bit": 0.4}[bits]
    spec = parse({**tree(base, rows, quantize=bits, checkpointing=True), "schedule": {"steps": 4, "batch_size": 2}})
    folder = runs.create(workspace, spec)
    runs.set_card(folder, device="cuda:0")
    train(folder, stop_at=2)
    assert train(folder)[-1]["kind"] == "done"


def wide_flux(folder):
    """A FLUX whose blocks are of some size: 24 and two larger ones, about 30 MB each in bf16, beside the smallest encoders."""
    from diffusers import FluxTransformer2DModel

    pipeline = tiny_image.PIPELINES["flux"]()
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "num_layers": 2, "num_single_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
    pipeline.transformer = FluxTransformer2DModel(**{name: value for name, value in config.items() if not name.startswith("_")}).to(torch.bfloat16)
    pipeline.save_pretrained(folder / "wide-flux")
    return folder / "wide-flux"


def step_of(workspace, base, rows, **compute):
    """Peak memory, loss and gradients of one step."""
    task = image.ImageTask(parse(tree(base, rows, checkpointing=True, **compute)), device="cuda:0", note=lambda _: None, folder=workspace.root)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = methods.METHODS["lora"].attach(task.load(), task.spec, task.parts(None))
    task.prepare(model)
    loss = task.loss(model.train(), task.collate(order.Stream(task.show.plan()).step(0)[0]))
    loss.backward()
    torch.cuda.synchronize()
    size = sum(value.nbytes for block in blocks.blocks_of(model.get_base_model()) for value in block.parameters() if not value.requires_grad)
    return torch.cuda.max_memory_allocated(), loss.item(), {name: value.grad.cpu() for name, value in model.named_parameters() if value.requires_grad}, size


def test_blocks_in_main_memory_save_their_memory_and_change_no_bit(workspace, tmp_path, capsys):
    base, rows = wide_flux(tmp_path), tiny_image.write_pictures(tmp_path / "rows", count=8)
    whole, swapped = step_of(workspace, base, rows), step_of(workspace, base, rows, block_swap=22)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: peak {whole[0] / 1e6:.0f} MB, with 22 of 26 blocks in main memory {swapped[0] / 1e6:.0f} MB")
    assert whole[1] == swapped[1] and all(torch.equal(value, swapped[2][name]) for name, value in whole[2].items())
    assert whole[0] - swapped[0] > 0.6 * whole[3] * 22 / 26


def test_a_run_with_swapped_blocks_draws_and_goes_on(workspace, tmp_path):
    base, rows = wide_flux(tmp_path), tiny_image.write_pictures(tmp_path / "rows", count=8)
    spec = parse({**tree(base, rows, checkpointing=True, block_swap=20), "schedule": {"steps": 4, "batch_size": 2}})
    folder = runs.create(workspace, spec)
    runs.set_card(folder, device="cuda:0")
    train(folder, stop_at=2)
    history = train(folder)
    assert history[-1]["kind"] == "done" and [event["answer"] for event in history if event["kind"] == "sample"][-1].endswith(".png")


def test_compiled_blocks_learn_the_same(workspace):
    plain, fast = (losses(ran(workspace, parse(tree("demo-image", "demo/stripes", compile=compile)))) for compile in (False, True))
    assert fast == pytest.approx(plain, rel=0.05)


def test_text_encoders_in_4_bits_say_nearly_the_same(tmp_path):
    family, folder = FAMILIES["StableDiffusionPipeline"], demo_base("demo-image")
    made = {}
    for encoders in ("auto", "4bit", "cpu"):
        store = latents.Store(tmp_path / encoders, folder, "StableDiffusionPipeline", CARD, encoders=encoders)
        made[encoders] = store.embeddings(family, ["a red star"])["a red star"]["prompt"].flatten()
    assert float(torch.cosine_similarity(made["auto"], made["4bit"], dim=0)) > 0.95
    assert torch.allclose(made["auto"], made["cpu"], atol=1e-2)
    assert len({folder.name for encoders in ("auto", "4bit") for folder in (tmp_path / encoders).iterdir()}) == 2, "each has its own place in the cache"
