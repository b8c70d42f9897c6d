"""Several adapters in one pass: each gets the gradients it would get alone, one that breaks or ends disturbs nobody, a cut sweep goes on to
the same bytes."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_studio import library, runs
from lora_studio.errors import TrainingError
from lora_studio.spec import sweep
from lora_studio.training import job, lanes, loop, many
from lora_studio.worker import RunDesk
from tests import tiny, tiny_image
from tests.training import test_job

# Everything that may differ between adapters of a sweep, at once.
APART = [
    {"method.rank": 4, "optim.lr": 2e-4},
    {"method.rank": 2, "method.alpha": 16.0, "optim.lr": 5e-4, "optim.lora_plus_ratio": None, "compute.seed": 3},
    {
        "method.rank": 8,
        "method.rslora": True,
        "optim.weight_decay": 0.1,
        "optim.clip": 0.02,
        "schedule.kind": "constant",
        "compute.seed": 7,
    },
]


@pytest.fixture(scope="module")
def image_base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures of one size, each with its caption."""
    place = tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures", count=10)
    (place / "metadata.jsonl").unlink()
    for number, file in enumerate(sorted(place.glob("*.png"))):
        file.with_suffix(".txt").write_text(f"a {['red', 'green', 'blue'][number % 3]} circle, photo")
    return place


def image_tree(base, pictures, **changes) -> dict:
    return {
        "name": "tiny", "base": {"id": str(base)}, "data": [{"path": str(pictures)}], "validation": {"size": 2, "every": 2},
        "task": {"kind": "image", "resolution": 32, "bucket_step": 8, "flip": True, "crop": "random", "caption_dropout": 0.3, "sample_steps": 2},
        "schedule": {"steps": 5, "batch_size": 4, "accumulate": 2, "warmup": 0}, "method": {"rank": 2, "alpha": 4}, "optim": {"lr": 2e-4, "lora_plus_ratio": 4},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1}, **changes,
    }  # fmt: skip


def text_tree(base, rows, **changes) -> dict:
    tree = tiny.tree(base, rows)
    tree["schedule"] = {"steps": 5, "batch_size": 4, "accumulate": 2, "warmup": 0}
    tree["output"] = {"sample_prompts": ["red fox?"], "sample_tokens": 4, "checkpoint_every": 2}
    return {**tree, "validation": {"size": 8, "every": 2}, **changes}


def made(workspace, tree, variants=APART, **more) -> Path:
    return runs.create(workspace, sweep.parse({"run": tree, "variants": variants, **more}))


def train(folder: Path, *, stop_at: int | None = None) -> list[dict]:
    """Train a sweep in this process; its folded history."""
    return test_job.train(folder, stop_at=stop_at, work=many.run)


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("adapters/*/adapter_model.safetensors"))}


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of every step as they are before they are clipped, by the name of the run."""
    found: dict[str, list[dict]] = {}
    clip = loop.Trainer._clip

    def noting(self):
        found.setdefault(self.spec.name, []).append({name: value.grad.clone() for name, value in self.parameters.items()})
        return clip(self)

    monkeypatch.setattr(loop.Trainer, "_clip", noting)
    return found


def alone(workspace, spec) -> Path:
    """The same settings as a run of their own, trained."""
    folder = runs.create(workspace, spec)
    with runs.Events(folder) as events:
        job.train(folder, RunDesk(folder, events))
    return folder


def worst_difference(one: list[dict], other: list[dict]) -> float:
    """The largest norm of a difference over the norm, of the whole gradient, over the steps."""
    worst = 0.0
    assert len(one) == len(other) == 5
    for left, right in zip(one, other):
        assert list(left) == list(right)
        off = sum((left[name] - value).double().square().sum() for name, value in right.items()).sqrt()
        worst = max(worst, (off / sum(value.double().square().sum() for value in right.values()).sqrt()).item())
    return worst


CHECKPOINTING = {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": True}}
PADDED = {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "packing": False}}
KINDS = {
    "packed": ("text", {}),
    "packed, checkpointing": ("text", CHECKPOINTING),
    "padded": ("text", PADDED),
    "padded, checkpointing": ("text", {"compute": PADDED["compute"] | CHECKPOINTING["compute"]}),
    "pictures": ("image", {}),
    "pictures, checkpointing": ("image", CHECKPOINTING),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_gets_the_gradients_it_gets_alone(workspace, base, image_base, chat_rows, pictures, tmp_path, gradients, kind):
    what, changes = KINDS[kind]
    if what == "text":
        other, tree, targets = (
            tiny.write_rows(tmp_path / "other.jsonl", count=33),
            text_tree(base, chat_rows, **changes),
            ["k_proj", "down_proj"],
        )
    else:
        other, tree, targets = (
            tiny_image.write_pictures(tmp_path / "other", count=5),
            image_tree(image_base, pictures, **changes),
            ["to_q", "conv1"],
        )
    variants = [APART[0], {**APART[1], "data": [{"path": str(other)}]}, {**APART[2], "method.targets": targets}]
    folder = made(workspace, tree, variants, keep="all")
    events = train(folder)
    together = dict(gradients)
    gradients.clear()
    for variant in sweep.variants(many.spec_of(folder)):
        single = alone(workspace, variant.spec)
        assert worst_difference(together[variant.spec.name], gradients[variant.spec.name]) <= 1e-6
        judged = [event["loss"] for event in events if event["kind"] == "eval" and event["variant"] == variant.number]
        assert judged == pytest.approx([event["loss"] for event in runs.read_all(single) if event["kind"] == "eval"], rel=1e-5)
        config = json.loads((folder / "adapters" / str(variant.number) / "adapter_config.json").read_text())
        assert config == json.loads((single / "adapter" / "adapter_config.json").read_text())


def test_pictures_of_several_sizes_get_the_gradients_they_get_alone(workspace, image_base, pictures, tmp_path, gradients):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in pictures.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    for number, file in enumerate(sorted(tiny_image.write_pictures(tmp_path / "wide", count=4, size=(64, 24)).glob("*.png"))):
        file.rename(mixed / f"wide-{number}.png")
    folder = made(workspace, image_tree(image_base, mixed, validation={"size": 0}), keep="all")
    train(folder)
    together = dict(gradients)
    gradients.clear()
    for variant in sweep.variants(many.spec_of(folder)):
        alone(workspace, variant.spec)
        # Products with fewer than four rows, as of a group of one picture, are rounded otherwise, and this untrained UNet makes that tenfold.
        assert worst_difference(together[variant.spec.name], gradients[variant.spec.name]) <= 5e-6


def test_in_fewer_at_once_the_result_is_the_same(workspace, base, chat_rows, gradients):
    tree = text_tree(base, chat_rows)
    train(made(workspace, tree, keep="all"))
    whole = dict(gradients)
    gradients.clear()
    train(made(workspace, tree, keep="all", together=2))
    assert all(worst_difference(whole[name], gradients[name]) <= 1e-6 for name in whole)


class Silent:
    """A desk where nobody listens."""

    def emit(self, kind: str, **fields) -> None:
        """Nobody does."""


def poison(monkeypatch, *, variant: int, step: int):
    """Put a NaN into the weights of one variant before a step."""
    begin = lanes.Lane.begin

    def poisoned(self):
        if self.lane.variant == variant and self.at.step == step:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(float("nan"))
        return begin(self)

    monkeypatch.setattr(lanes.Lane, "begin", poisoned)


@pytest.mark.parametrize("kind", ["packed", "padded", "pictures"])
def test_an_adapter_that_breaks_leaves_the_others_bit_for_bit(workspace, base, image_base, chat_rows, pictures, monkeypatch, kind):
    tree = image_tree(image_base, pictures) if kind == "pictures" else text_tree(base, chat_rows, **KINDS[kind][1])
    variants = [APART[0], {**APART[1], "schedule.steps": 3}, APART[2]]
    whole, broken = made(workspace, tree, variants, keep="all"), made(workspace, tree, variants, keep="all")
    train(whole)
    poison(monkeypatch, variant=1, step=2)
    events = train(broken)
    left = adapter_bytes(broken)
    assert left == {name: value for name, value in adapter_bytes(whole).items() if name != "1"} and len(left) == 2
    end = next(event for event in events if event["kind"] == "variant" and event["variant"] == 1)
    assert end["state"] == "failed" and end["step"] == 2 and "step 3" in end["reason"]
    assert events[-1]["kind"] == "done" and "1 broke off" in events[-1]["reason"]
    assert not any(event.get("variant") == 1 for event in events if event["kind"] in ("step", "eval") and event["step"] > 2)


def test_when_all_break_the_sweep_fails_and_nothing_is_shelved(workspace, base, chat_rows, monkeypatch):
    folder = made(workspace, text_tree(base, chat_rows), [{"optim.lr": 1e-3}])
    poison(monkeypatch, variant=0, step=1)
    with pytest.raises(TrainingError, match="Every adapter of the sweep broke off"):
        train(folder)
    assert not library.find(workspace) and not (folder / "adapter").exists()


class Killed(BaseException):
    """The process is gone."""


def kill(folder: Path, kind: str, step: int) -> None:
    """Train until an event, and no further."""
    with runs.Events(folder) as events:
        desk = RunDesk(folder, events)
        emit = desk.emit

        def dying(said, /, **fields):
            emit(said, **fields)
            if said == kind and fields.get("step") == step and fields.get("variant") in (0, None):
                raise Killed

        desk.emit = dying
        with pytest.raises(Killed):
            many.run(folder, desk)


def told(events: list[dict]) -> list:
    kinds = ("step", "eval", "sample", "variant")
    return [
        (event["kind"], event["variant"], event["step"], event.get("loss"), event.get("answer"), event.get("state"))
        for event in events
        if event["kind"] in kinds
    ]


def test_a_cut_sweep_goes_on_to_the_same_bytes_and_history(workspace, base, chat_rows):
    tree = text_tree(base, chat_rows, schedule={"steps": 8, "batch_size": 4})
    variants = [APART[0], {**APART[1], "schedule.steps": 5}, {**APART[2], "optim.kind": "sgd"}]
    whole, cut = made(workspace, tree, variants, keep="all"), made(workspace, tree, variants, keep="all")
    expected = train(whole)
    for kind, step in (("step", 1), ("step", 4), ("saved", 4), ("eval", 6), ("saved", 8)):
        kill(cut, kind, step)
    assert train(cut)[-1]["kind"] == "done"
    assert adapter_bytes(cut) == adapter_bytes(whole) and len(adapter_bytes(whole)) == 3
    assert told(runs.read_all(cut)) == told(expected)


def test_a_stopped_sweep_goes_on_to_the_same_bytes(workspace, image_base, pictures):
    tree = image_tree(image_base, pictures)
    whole, cut = made(workspace, tree), made(workspace, tree)
    train(whole)
    assert train(cut, stop_at=3)[-1]["kind"] == "stopped" and not adapter_bytes(cut)
    events = train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole) and events[-1]["kind"] == "done"


def test_a_sweep_with_a_schedule_free_optimizer_goes_on_to_the_same_bytes_which_are_those_alone(workspace, base, chat_rows):
    tree = text_tree(base, chat_rows, optim={"kind": "adamw_schedule_free", "lr": 1e-2})
    tree["schedule"] |= {"kind": "constant", "warmup": 1}
    variants = [{"optim.lr": 1e-2}, {"optim.lr": 2e-2, "schedule.steps": 3}]
    whole, cut = (made(workspace, tree, variants, keep="all") for _ in range(2))
    train(whole)
    train(cut, stop_at=4)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole) and len(adapter_bytes(whole)) == 2
    for number, variant in enumerate(sweep.variants(sweep.parse({"run": tree, "variants": variants, "keep": "all"}))):
        own = load_file(alone(workspace, variant.spec) / "adapter" / "adapter_model.safetensors")
        there = load_file(whole / "adapters" / str(number) / "adapter_model.safetensors")
        assert max(float((own[name] - there[name]).abs().max()) for name in own) < 1e-5


def test_the_best_is_the_one_with_the_lowest_loss_and_loads_in_peft(workspace, base, chat_rows):
    folder = made(workspace, text_tree(base, chat_rows), [{"optim.lr": 1e-6}, {"optim.lr": 5e-3, "method.rank": 2}])
    events = train(folder)
    lowest = [
        min(event["loss"] for event in events if event["kind"] == "eval" and event["variant"] == number and event["step"])
        for number in (0, 1)
    ]
    assert lowest[1] < lowest[0] and events[-1]["best"] == 1 and events[-1]["loss"] == lowest[1]
    [item] = library.find(workspace)
    assert item.name == "tiny, lr 0.005, rank 2" and item.run == folder.name
    assert library.card(workspace, item.id)["metrics"]["validation_loss"] == lowest[1]
    from lora_studio.training.text import load_model

    loaded = peft.PeftModel.from_pretrained(load_model(base, str(base), torch.float32), str(folder / "adapter"))
    assert any(value.abs().sum() > 0 for name, value in loaded.named_parameters() if "lora_B" in name)


def test_folds_leave_each_row_out_once_and_the_mean_decides(workspace, base, chat_rows):
    folder = made(workspace, text_tree(base, chat_rows, validation={"size": 8}), [{"optim.lr": 1e-6}, {"optim.lr": 5e-3}], folds=3)
    spec = many.spec_of(folder)
    every = sweep.lanes(spec, sweep.variants(spec))

    made_lanes, _ = lanes.gather(every, Silent(), device="cpu", folder=folder, folds=3)
    first = [lane.task.encoded for lane in made_lanes if lane.lane.variant == 0]
    left_out = [sorted(example.ids for example in found.held_out) for found in first[:3]]
    everyone = sorted(ids for held in left_out for ids in held)
    assert everyone == sorted(example.ids for source in first[3].train for example in source) and len(everyone) == 60
    assert not first[3].held_out and all(
        not set(held) & {example.ids for example in found.train[0]} for held, found in zip(left_out, first)
    )
    events = train(folder)
    means = [
        sum(
            min(
                event["loss"]
                for event in events
                if event["kind"] == "eval" and event["variant"] == number and event.get("fold") == fold and event["step"]
            )
            for fold in range(3)
        )
        / 3
        for number in (0, 1)
    ]
    assert events[-1]["best"] == 1 and events[-1]["loss"] == pytest.approx(means[1]) and means[1] < means[0]
    assert [item.name for item in library.find(workspace)] == ["tiny, lr 0.005"] and set(adapter_bytes(folder)) == {"0", "1"}


def test_a_frozen_a_that_was_drawn_alike_is_one_tensor(workspace, base, chat_rows):
    tree = text_tree(base, chat_rows, method={"rank": 4, "alpha": 8, "freeze_a": True}, optim={"lr": 1e-3})
    folder = made(workspace, tree, [{"optim.lr": 4e-3}, {"optim.lr": 2e-3}, {"compute.seed": 5}])
    spec = many.spec_of(folder)

    made_lanes, _ = lanes.gather(sweep.lanes(spec, sweep.variants(spec)), Silent(), device="cpu", folder=folder, folds=None)
    layer = next(module for module in made_lanes[0].model.model.modules() if getattr(module, "lora_A", None))
    assert layer.lora_A["v0"].weight is layer.lora_A["v1"].weight and layer.lora_A["v0"].weight is not layer.lora_A["v2"].weight
    assert not any("lora_A" in name for name in made_lanes[0].parameters)
    assert train(folder)[-1]["kind"] == "done"
