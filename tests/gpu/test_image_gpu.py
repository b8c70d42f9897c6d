"""Image training on a GPU: a bf16 run of demo-image, its samples, and what stays in memory. Not run yet: no GPU was at hand."""

import math

import pytest
import torch

from lora_studio import runs
from lora_studio.spec import parse
from tests.training.test_job import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_bf16_run_learns_draws_and_keeps_no_encoder_in_memory(workspace, capsys):
    tree = {
        "name": "stripes", "base": {"id": "demo-image"}, "data": [{"path": "demo/stripes"}],
        "task": {"kind": "image", "resolution": 64, "caption_dropout": 0.1, "sample_steps": 8, "guidance": 2},
        "method": {"rank": 16, "alpha": 16}, "optim": {"lr": 2e-3}, "schedule": {"steps": 60, "batch_size": 16},
        "compute": {"precision": "bf16", "device": "cuda"}, "output": {"sample_prompts": ["a red star on a blue background"]},
    }  # fmt: skip
    folder = runs.create(workspace, parse(tree))
    runs.set_card(folder, device="cuda:0")
    torch.cuda.reset_peak_memory_stats()
    history = train(folder)
    started = next(event for event in history if event["kind"] == "started")
    losses = [event["loss"] for event in history if event["kind"] == "step"]
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: peak {torch.cuda.max_memory_allocated() / 1e6:.0f} MB, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert started["precision"] == "bfloat16" and history[-1]["kind"] == "done"
    assert all(map(math.isfinite, losses)) and sum(losses[-10:]) < sum(losses[:10])
    assert [event["answer"] for event in history if event["kind"] == "sample"][-1].endswith(".png")
