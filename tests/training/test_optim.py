"""Rates: LoRA+ gives B its multiple and nothing else, and schedules are those of transformers."""

import peft
import pytest
import schedulefree
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from lora_studio.errors import TrainingError
from lora_studio.spec import Optim, Schedule
from lora_studio.training import checkpoint, optim
from tests import tiny


def adapted(**config):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, **config))


def test_only_b_learns_at_the_multiple():
    model = adapted(target_modules=["q_proj", "embed_tokens"], use_dora=False, modules_to_save=["norm"])
    rates = {}
    for group in optim.groups(model.named_parameters(), Optim(lr=1e-3, lora_plus_ratio=16, weight_decay=0.1)):
        rates[group["role"], group["weight_decay"]] = group["lr"]
    assert rates == {("A", 0.1): 1e-3, ("B", 0.1): 1.6e-2, ("embedding", 0.1): 1e-3, ("other", 0.0): 1e-3}


def test_magnitudes_learn_at_the_base_rate_and_are_not_decayed():
    model = adapted(target_modules=["q_proj"], use_dora=True)
    groups = optim.groups(model.named_parameters(), Optim(lr=1e-3, lora_plus_ratio=16, weight_decay=0.1))
    magnitude = next(group for group in groups if group["role"] == "magnitude")
    assert (magnitude["lr"], magnitude["weight_decay"]) == (1e-3, 0.0)


def steps_of(model, optimizer, count=5):
    ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_plain_layers_train_as_with_pefts_loraplus():
    ours, theirs = adapted(target_modules=["q_proj", "up_proj"]), adapted(target_modules=["q_proj", "up_proj"])
    spec = Optim(lr=1e-3, lora_plus_ratio=16)
    found = steps_of(ours, optim.build(ours.named_parameters(), spec))
    wanted = steps_of(theirs, create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0))
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in optim.OPTIMIZERS if kind != "prodigy"])
def test_every_optimizer_keeps_the_ratio_and_learns(kind):
    model = adapted(target_modules=["q_proj", "v_proj"])
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    optimizer = optim.build(model.named_parameters(), Optim(kind=kind, lr=1e-3, lora_plus_ratio=8))
    assert optim.set_rates(optimizer, 0.5) == {"A": 5e-4, "B": 4e-3}
    after = steps_of(model, optimizer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items() if "lora_B" in name)


def test_prodigy_finds_its_own_rate_and_keeps_it_through_a_checkpoint(tmp_path):
    model, whole = adapted(target_modules=["q_proj", "v_proj"]), adapted(target_modules=["q_proj", "v_proj"])
    settings = Optim(kind="prodigy", lr=1.0)
    for one in (model, whole):
        torch.manual_seed(0)
        for _, value in one.named_parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value, std=0.1)
    ours, theirs = optim.build(model.named_parameters(), settings), optim.build(whole.named_parameters(), settings)
    steps_of(whole, theirs)
    steps_of(model, ours)
    assert ours.param_groups[0]["d"] > 10 * ours.param_groups[0]["d0"]
    again = optim.build(model.named_parameters(), settings)
    again.load_state_dict({"state": ours.state_dict()["state"], "param_groups": again.state_dict()["param_groups"]})
    optim.put_back(again, optim.kept(ours))
    left, right = steps_of(model, again), steps_of(whole, theirs)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_schedule_free_is_the_packages_own_and_looking_at_it_changes_nothing(tmp_path):
    ours, theirs = adapted(target_modules=["q_proj", "v_proj"]), adapted(target_modules=["q_proj", "v_proj"])
    spec = Optim(kind="adamw_schedule_free", lr=1e-2, lora_plus_ratio=4, weight_decay=0.1)
    optimizer = optim.build(ours.named_parameters(), spec)
    reference = schedulefree.AdamWScheduleFree(optim.groups(theirs.named_parameters(), spec), lr=1e-2)
    reference.train()
    steps_of(theirs, reference, count=4)
    for step in range(4):
        y = steps_of(ours, optimizer, count=1)
        with optim.averaged(optimizer):
            x = {name: value.detach().clone() for name, value in ours.named_parameters() if value.requires_grad}
            assert step == 0 or any(float((x[name] - y[name]).abs().max()) > 1e-4 for name in y)
        assert all(torch.equal(y[name], ours.get_parameter(name)) for name in y)
    reference.eval()
    optim.settle(optimizer)
    for name, value in theirs.named_parameters():
        assert torch.equal(value, ours.get_parameter(name)), name
    saved = load_file(checkpoint.write(tmp_path, dict(ours.named_parameters()), optimizer, checkpoint.State(step=4)) / "adapter.safetensors")
    assert all(torch.equal(value, x[name]) for name, value in saved.items() if name in x)


def test_muon_refuses_what_is_no_matrix():
    model = adapted(target_modules=["q_proj"], use_dora=True)
    with pytest.raises(TrainingError, match="muon is for matrices"):
        optim.build(model.named_parameters(), Optim(kind="muon", lr=1e-3))


@pytest.mark.parametrize(("kind", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine"), ("inverse_sqrt", "inverse_sqrt")])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_those_of_transformers(kind, theirs, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        ours = optim.factor(Schedule(kind=kind, warmup=warmup), step, 40)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_wsd_rises_stays_and_falls_to_zero():
    factors = [optim.factor(Schedule(kind="wsd", warmup=10), step, 100) for step in range(101)]
    assert factors[0] == 0 and factors[10] == factors[80] == 1 and factors[90] == pytest.approx(0.5) and factors[100] == 0
