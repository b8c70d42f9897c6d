"""The loop knows nothing of tokens: here it trains a denoiser, and does everything around the steps all the same."""

import math

import pytest
import torch

from lora_studio.errors import MachineError, TrainingError
from lora_studio.spec import parse, to_tree
from lora_studio.training import checkpoint, loop
from lora_studio.training.methods import Method
from lora_studio.training.order import key


class Denoising:
    """Thirty lines that are no language task: tell the noise in a noisy point. Noise comes from the draws alone."""

    counts, weights, held_out, prints = (24,), (1.0,), 6, {"base": "x", "rows": "y"}

    def __init__(self):
        self.points = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
        self.poison = None

    def batch(self, indices, seeds):
        noise = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return self.points[indices] + noise, noise

    def collate(self, draws):
        return self.batch([draw.index for draw in draws], [draw.seed for draw in draws])

    def collate_held_out(self, indices):
        return self.batch([24 + index for index in indices], [key("held out", index) for index in indices])

    def units(self, batch):
        return float(len(batch[0]))

    def size(self, batch):
        return len(batch[0])

    def loss(self, model, batch):
        loss = (model(batch[0]) - batch[1]).square().mean(-1).sum()
        return loss if self.poison is None else loss * self.poison

    def sample(self, model, prompt, seed):
        return f"{prompt}: {model(torch.zeros(1, 4)).sum():.3f}"


class Notebook:
    """A desk that is a list."""

    def __init__(self):
        self.events, self.requests = [], {}

    def emit(self, kind, **fields):
        self.events.append((kind, fields))

    def flush(self):
        pass

    def asked(self, request):
        return self.requests.get(request)

    def answered(self, request):
        self.requests.pop(request, None)

    def of(self, kind):
        return [fields for name, fields in self.events if name == kind]


METHOD = Method(
    attach=None, finish=None,
    groups=lambda model, spec: [{"params": list(model.parameters()), "lr": spec.optim.lr, "base_lr": spec.optim.lr, "role": "other", "weight_decay": 0.0}],
)  # fmt: skip


def trainer(folder, **changes):
    tree = {
        "data": [{"path": "x"}], "optim": {"lr": 0.02}, "schedule": {"steps": 20, "batch_size": 4, "accumulate": 2},
        "validation": {"every": 5}, "output": {"checkpoint_every": 4, "sample_prompts": ["zero"], "sample_every": 10}, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.1), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    made = loop.Trainer(Denoising(), METHOD, model, parse(tree), Notebook(), folder)
    made.at.settings = to_tree(made.spec)
    return made


def weights(made):
    return {name: value.detach().clone() for name, value in made.parameters.items()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_validates_samples_and_saves(tmp_path):
    made = trainer(tmp_path)
    outcome = made.run()
    losses = [fields["loss"] for fields in made.desk.of("step")]
    assert outcome.state == "done" and len(losses) == 20 and losses[-1] < losses[0]
    assert [fields["step"] for fields in made.desk.of("eval")] == [0, 5, 10, 15, 20]
    assert [fields["step"] for fields in made.desk.of("sample")] == [0, 10, 20]
    assert checkpoint.steps(tmp_path)[-1] == 20
    assert {"lr_other", "grad_norm", "tokens_per_second", "memory", "seconds_left", "epoch"} <= set(made.desk.of("step")[0])


@pytest.mark.parametrize("at", [1, 4, 5, 9, 12, 19])
def test_stopping_anywhere_and_going_on_gives_the_same_bits_and_the_same_story(tmp_path, at):
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "cut")
    emit = first.desk.emit

    def stop_at(kind, **fields):
        emit(kind, **fields)
        if kind == "step" and fields["step"] == at:
            first.desk.requests["stop"] = {"save": True}

    first.desk.emit = stop_at
    outcome = first.run()
    assert (outcome.state, outcome.saved, outcome.at.step) == ("stopped", True, at)
    second = trainer(tmp_path / "cut")
    path, _ = checkpoint.newest_whole(tmp_path / "cut")
    second.at = checkpoint.restore(path, second.parameters, second.optimizer)
    second.run()
    assert same(weights(whole), weights(second))

    def story(*trainers):
        return [
            (kind, fields["step"], fields.get("loss"), fields.get("answer"))
            for made in trainers for kind, fields in made.desk.events if kind in ("step", "eval", "sample")
        ]  # fmt: skip

    assert story(first, second) == story(whole)


def test_validation_touches_neither_weights_nor_draws(tmp_path):
    plain = trainer(tmp_path / "a", validation={"size": 0}, output={})
    plain.task.held_out = 0
    watched = trainer(tmp_path / "b", validation={"every": 1, "keep_best": False}, output={"sample_prompts": ["x"], "sample_every": 1})
    plain.run()
    watched.run()
    assert same(weights(plain), weights(watched))


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    many = trainer(tmp_path / "a", schedule={"steps": 3, "batch_size": 2, "accumulate": 4}, output={})
    one = trainer(tmp_path / "b", schedule={"steps": 3, "batch_size": 8, "accumulate": 1}, output={})
    for made in (many, one):
        made.model[1].p = 0.0
        made.run()
    for first, second in zip(weights(many).values(), weights(one).values()):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_the_best_weights_are_kept_and_no_better_loss_stops_early(tmp_path):
    made = trainer(tmp_path, validation={"every": 1, "patience": 3})
    losses = iter([9.0, 5.0, 3.0, 4.0, 4.5, 4.2, 1.0])
    made.evaluate = lambda: next(losses)
    outcome = made.run()
    assert outcome.at.step == 5 and outcome.at.best_step == 2 and outcome.best and "no better validation loss" in outcome.reason
    assert same(weights(made), checkpoint.read_parameters(tmp_path / "step-000002"))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_broken_loss_stops_within_the_step_and_nothing_broken_is_saved(tmp_path, poison, at):
    made = trainer(tmp_path)
    collate = made.task.collate
    seen = []

    def poisoned(draws):
        seen.append(1)
        made.task.poison = poison if len(seen) > 2 * (at - 1) else None
        return collate(draws)

    made.task.collate = poisoned
    with pytest.raises(TrainingError, match=f"at step {at}; the last good step is {at - 1}"):
        made.run()
    assert all(torch.isfinite(value).all() for value in weights(made).values())
    for step in checkpoint.steps(tmp_path):
        assert all(torch.isfinite(value).all() for value in checkpoint.read_parameters(tmp_path / f"step-{step:06d}").values())


def test_a_broken_weight_is_never_saved(tmp_path):
    made = trainer(tmp_path)
    made.at.step = 3
    with torch.no_grad():
        next(iter(made.parameters.values()))[0] = math.nan
    with pytest.raises(TrainingError, match="weight"):
        made.save()
    assert checkpoint.steps(tmp_path) == []


def test_clipping_bounds_the_gradient_and_null_never_clips(tmp_path):
    for clip, bounded in ((1e-3, True), (None, False)):
        made = trainer(tmp_path / str(clip), optim={"lr": 0.02, "clip": clip, "kind": "sgd", "beta1": 0.0}, output={})
        before = weights(made)
        made.spec.output.sample_prompts.clear()
        made._step()
        moved = math.sqrt(sum(float((before[name] - value).square().sum()) for name, value in weights(made).items()))
        assert (moved <= 1e-3 * 0.02 * 1.001) == bounded


def test_checkpoints_and_samples_come_when_asked_for(tmp_path):
    made = trainer(tmp_path, output={"checkpoint_every": 100, "sample_prompts": ["x"], "sample_every": 100}, validation={"keep_best": False})
    made.desk.requests.update(save={}, sample={})
    made.run()
    assert made.desk.of("saved")[0]["step"] == 1 and made.desk.requests == {}
    assert [fields["step"] for fields in made.desk.of("sample")] == [0, 1, 20]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_says_what_to_change(tmp_path, error):
    made = trainer(tmp_path)

    def fail(model, batch):
        raise error

    made.task.loss = fail
    with pytest.raises(MachineError, match=r"ran out of memory at step 1. Set schedule.batch_size to 2 and schedule.accumulate to 4"):
        made.run()
