"""Checkpoints: the newest whole one is used, whatever happened to the others, and it gives back every bit."""

import pytest
import torch

from lora_studio import durable
from lora_studio.errors import TrainingError
from lora_studio.spec import Optim
from lora_studio.training import checkpoint, optim


def world(kind="adamw", seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = {f"x.lora_{part}.weight": torch.nn.Parameter(torch.randn(80, 80, generator=generator)) for part in "AB"}
    return parameters, optim.build(parameters.items(), Optim(kind=kind, lr=1e-2, lora_plus_ratio=None if kind == "prodigy" else 4))


def walk(parameters, optimizer, steps):
    for step in steps:
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(step * 10 + number))
        optimizer.step()


@pytest.mark.parametrize("kind", list(optim.OPTIMIZERS))
def test_going_on_from_a_checkpoint_gives_the_same_bits(tmp_path, kind):
    straight, optimizer = world(kind)
    walk(straight, optimizer, range(10))
    first, before = world(kind)
    walk(first, before, range(4))
    path = checkpoint.write(tmp_path, first, before, checkpoint.State(step=4))
    second, after = world(kind, seed=5)
    assert checkpoint.restore(path, second, after).step == 4
    walk(second, after, range(4, 10))
    assert all(torch.equal(straight[name], second[name]) for name in straight)


@pytest.mark.parametrize("fault", ["delete", "truncate", "zero", "flip"])
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, fault, name):
    parameters, optimizer = world()
    walk(parameters, optimizer, range(1))
    for step in (1, 2):
        checkpoint.write(tmp_path, parameters, optimizer, checkpoint.State(step=step))
    file = tmp_path / "step-000002" / name
    data = bytearray(file.read_bytes())
    if fault == "delete":
        file.unlink()
    else:
        data = data[: len(data) // 2] if fault == "truncate" else bytearray(len(data)) if fault == "zero" else data
        if fault == "flip":
            data[len(data) // 2] ^= 4
        file.write_bytes(data)
    path, broken = checkpoint.newest_whole(tmp_path)
    assert path.name == "step-000001" and len(broken) == 1 and "step-000002" in broken[0]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    parameters, optimizer = world()
    for step in range(1, 7):
        checkpoint.write(tmp_path, parameters, optimizer, checkpoint.State(step=step))
        checkpoint.prune(tmp_path, keep=2, best=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert all(durable.damage(tmp_path / f"step-{step:06d}") is None for step in (2, 5, 6))


def test_a_changed_setting_base_or_row_is_named():
    saved = checkpoint.State(settings={"method": {"rank": 4}, "name": "a", "output": {"keep": 2}}, prints={"base": "1", "rows": "2"})
    checkpoint.check_same(saved, {"method": {"rank": 4}, "name": "b", "output": {"keep": 3}}, {"base": "1", "rows": "2"})
    with pytest.raises(TrainingError, match="method.rank was 4 and is 8; the base changed since"):
        checkpoint.check_same(saved, {"method": {"rank": 8}, "name": "a"}, {"base": "x", "rows": "2"})


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    parameters, optimizer = world()
    path = checkpoint.write(tmp_path, parameters, optimizer, checkpoint.State(step=1))
    other = {"x.lora_A.weight": torch.nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(TrainingError, match="other layers or another rank"):
        checkpoint.restore(path, other, torch.optim.SGD(other.values(), lr=1.0))
