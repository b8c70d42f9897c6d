"""Every kind of adapter: a fresh one changes nothing, a cut run goes on to the same bytes, and the file is what was trained."""

import json

import peft
import pytest
import torch
import transformers

from lora_studio import adapters
from lora_studio.errors import SpecError, StudioError
from lora_studio.spec import methods as settings
from lora_studio.spec import parse
from lora_studio.training import adalora, dylora, fused, job, loop
from lora_studio.training.methods import METHODS
from tests import tiny
from tests.training.test_job import adapter_bytes, run_of, train

VARIANTS = {
    "dora": {"rank": 4, "alpha": 8, "dora": True},
    "frozen A": {"rank": 4, "alpha": 8, "freeze_a": True},
    "orthogonal": {"rank": 4, "alpha": 8, "init": "orthogonal"},
    "pissa": {"rank": 4, "alpha": 8, "init": "pissa"},
    "olora, rank-stabilised": {"rank": 4, "alpha": 8, "init": "olora", "rslora": True},
    "eva": {"rank": 4, "alpha": 8, "init": "eva"},
    "eva, frozen A": {"rank": 4, "alpha": 8, "init": "eva", "freeze_a": True},
    "corda": {"rank": 4, "alpha": 8, "init": "corda"},
    "lora-ga, rank-stabilised": {"rank": 4, "alpha": 8, "init": "lora_ga", "rslora": True},
    "dylora": {"kind": "dylora", "rank": 6, "alpha": 8},
    "adalora": {"kind": "adalora", "rank": 2, "first_rank": 4, "alpha": 8, "every": 2},
    "vera": {"kind": "vera", "rank": 16},
    "loha": {"kind": "loha", "rank": 3, "alpha": 6},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 6},
    "lokr by 4": {"kind": "lokr", "rank": 3, "alpha": 6, "factor": 4},
    "miss": {"kind": "miss", "rank": 5},
    "oft": {"kind": "oft", "block": 8},
    "oft whose blocks do not divide": {"kind": "oft", "block": 7},
    "ia3": {"kind": "ia3"},
}
IDS = torch.tensor([[5, 9, 31, 77, 120, 44]])


def tree_of(base, rows, name, **changes):
    return {**tiny.tree(base, rows), "method": VARIANTS[name], "optim": {"lr": 1e-2}, **changes}


class Keeping(loop.Trainer):
    """A trainer whose model can be looked at afterwards."""

    kept: dict = {}

    def __post_init__(self):
        super().__post_init__()
        self.kept["trainer"] = self

    def _before(self):
        self.kept["fresh"] = logits(self.model)
        super()._before()


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(job.loop, "Trainer", Keeping)
    Keeping.kept = {}
    return Keeping.kept


@torch.no_grad()
def logits(model):
    model.eval()
    with fused.removed(model):
        return model(IDS).logits.clone()


def plain(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_run_goes_on_to_the_identical_adapter(workspace, base, chat_rows, name):
    tree = tree_of(base, chat_rows, name)
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    told = train(whole)
    assert train(cut, stop_at=8)[-1]["kind"] == "stopped"
    assert [event.get("loss") for event in train(cut) if event["kind"] in ("step", "eval")] == [event.get("loss") for event in told if event["kind"] in ("step", "eval")]
    assert adapter_bytes(cut) == adapter_bytes(whole)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_one_changes_nothing_and_the_file_is_what_was_trained(workspace, base, chat_rows, kept, name):
    folder = run_of(workspace, tree_of(base, chat_rows, name, validation={"size": 0}))
    train(folder)
    untouched, trained = logits(plain(base)), logits(kept["trainer"].model)
    assert torch.allclose(kept["fresh"], untouched, atol=2e-5)
    assert float((trained - untouched).abs().max()) > 1e-3
    in_peft = logits(peft.PeftModel.from_pretrained(plain(base), folder / "adapter"))
    assert torch.allclose(in_peft, trained, atol=2e-5)
    merged = plain(base)
    for layer, module in adapters.read(folder / "adapter").modules.items():
        weight = merged.get_submodule(layer).weight.data
        weight += module.delta(weight) if name == "dora" or name.startswith(("oft", "ia3")) else module.delta()
    assert torch.allclose(logits(merged), trained, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_number_of_learnt_numbers_is_told_before_start(workspace, base, chat_rows, kept, name):
    train(run_of(workspace, tree_of(base, chat_rows, name, schedule={"steps": 1, "batch_size": 2})))
    method = kept["trainer"].spec.method
    linears = [layer for path, layer in plain(base).named_modules() if isinstance(layer, torch.nn.Linear) and path != "lm_head"]
    meant = sum(settings.parameters(method, *layer.weight.shape) for layer in linears)
    assert sum(value.numel() for value in kept["trainer"].parameters.values()) == meant


def test_dora_magnitudes_learn_in_a_group_of_their_own(workspace, base, chat_rows, kept):
    tree = tree_of(base, chat_rows, "dora", optim={"lr": 1e-3, "lora_plus_ratio": 8, "weight_decay": 0.1}, schedule={"steps": 1, "batch_size": 2})
    train(run_of(workspace, tree))
    rates = {group["role"]: (group["base_lr"], group["weight_decay"]) for group in kept["trainer"].optimizer.param_groups}
    assert rates == {"A": (1e-3, 0.1), "B": (8e-3, 0.1), "magnitude": (1e-3, 0.0)}


# ---- AdaLoRA


def test_adalora_chooses_what_peft_chooses():
    tree = {"kind": "adalora", "rank": 2, "first_rank": 5, "alpha": 8, "begin": 0.2, "settle": 0.25, "every": 3}
    spec = parse({"data": [{"path": "x"}], "method": tree})
    steps = 20
    config = peft.AdaLoraConfig(init_r=5, target_r=2, tinit=4, tfinal=5, deltaT=3, total_step=steps, target_modules=["q_proj", "down_proj"])
    ours, theirs = (peft.get_peft_model(tiny.model(), config) for _ in range(2))
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            theirs.get_parameter(name).data.copy_(parameter)
    adalora.follow(ours, spec)
    draw = torch.Generator().manual_seed(5)
    for step in range(steps):
        for model in (ours, theirs):
            draw.manual_seed(step)
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=draw)
        adalora.allocate(ours, step, steps)
        theirs.base_model.update_and_allocate(step)
        for name, parameter in ours.named_parameters():
            assert torch.allclose(parameter, theirs.get_parameter(name), atol=1e-7), (step, name)
    left = adalora.facts(ours)["layers"]
    assert sum(left.values()) == 2 * 4 and len(set(left.values())) > 1


def test_adaloras_penalty_is_pefts(base, chat_rows):
    spec = parse({"data": [{"path": "x"}], "method": VARIANTS["adalora"]})
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, orth_reg_weight=0.5, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny.model(), config)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adalora.follow(model, spec)
    with_penalty, without = model.base_model(IDS, labels=IDS).loss, model.base_model.model(IDS, labels=IDS).loss
    assert float(adalora.penalty(model, spec)) == pytest.approx(float(with_penalty - without), rel=1e-5)


def test_the_ranks_that_are_left_are_told(workspace, base, chat_rows):
    folder = run_of(workspace, tree_of(base, chat_rows, "adalora", validation={"size": 8, "keep_best": False}))
    (told,) = [event for event in train(folder) if event["kind"] == "ranks"]
    modules = adapters.read(folder / "adapter").modules
    assert {name: int(module.A.any(dim=1).sum()) for name, module in modules.items()} == told["layers"]
    assert sum(told["layers"].values()) == 2 * len(told["layers"])


# ---- DyLoRA


def test_a_nested_adapter_is_judged_at_every_rank_and_the_rest_of_a_step_is_untouched(workspace, base, chat_rows, kept):
    folder = run_of(workspace, tree_of(base, chat_rows, "dylora"))
    (told,) = [event for event in train(folder) if event["kind"] == "ranks"]
    assert list(told["losses"]) == ["1", "2", "4", "6"]
    model = kept["trainer"].model
    before = {name: value.clone() for name, value in kept["trainer"].parameters.items()}
    dylora.narrow(model, 3, 12)
    rank = getattr(model, dylora.KEY).drawn(3)
    for value in kept["trainer"].parameters.values():
        value.data += 1.0
    dylora.widen(model, 3, 12)
    for name, value in kept["trainer"].parameters.items():
        moved = (value - before[name]).abs() > 0.5
        assert bool(moved[:rank].all() if "lora_A" in name else moved[:, :rank].all())
        assert not bool(moved[rank:].any() if "lora_A" in name else moved[:, rank:].any())


def test_the_loss_told_at_a_rank_is_that_of_the_slice(workspace, base, chat_rows, kept):
    folder = run_of(workspace, tree_of(base, chat_rows, "dylora"))
    told = next(event for event in train(folder) if event["kind"] == "ranks")
    trainer = kept["trainer"]
    for name, value in trainer.parameters.items():
        value.data[2:] = 0 if "lora_A" in name else value.data[2:]
        if "lora_B" in name:
            value.data[:, 2:] = 0
    assert trainer.evaluate() == pytest.approx(told["losses"]["2"], rel=1e-6)


# ---- going on from an adapter


def test_training_goes_on_from_an_adapter(workspace, base, chat_rows, kept):
    first = run_of(workspace, {**tiny.tree(base, chat_rows), "validation": {"size": 8, "keep_best": False}})
    end = [event["loss"] for event in train(first) if event["kind"] == "eval"][-1]
    for method in ({"rank": 4, "alpha": 8}, {"rank": 7, "alpha": 3, "rslora": True}):
        again = run_of(workspace, {**tiny.tree(base, chat_rows), "method": {**method, "start": str(first / "adapter")}})
        told = train(again)
        assert next(event["loss"] for event in told if event["kind"] == "eval") == pytest.approx(end, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rank": 2, "alpha": 8}, "has rank 4"), ({"rank": 4, "alpha": 8, "targets": ["q_proj"]}, "layers that this run does not train")],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(workspace, base, chat_rows, change, words):
    first = run_of(workspace, tiny.tree(base, chat_rows))
    train(first)
    with pytest.raises(StudioError, match=words):
        train(run_of(workspace, {**tiny.tree(base, chat_rows), "method": {**change, "start": str(first / "adapter")}}))


# ---- the spec


def test_every_kind_has_a_row_and_every_row_a_kind():
    from tests.training import test_full, test_virtual  # which have the kinds that put no adapter on any layer

    tried = [*VARIANTS.values(), *test_full.VARIANTS.values(), *test_virtual.VARIANTS.values()]
    kinds = {json.dumps(parse({"data": [{"path": "x"}], "method": tree}).method.kind) for tree in tried}
    assert kinds == {json.dumps(kind) for kind in METHODS}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"method": {"kind": "vera"}, "optim": {"lora_plus_ratio": 4}}, "no B to learn faster"),
        ({"method": {"freeze_a": True}, "optim": {"lora_plus_ratio": 4}}, "no A to learn slower"),
        ({"method": {"init": "orthogonal", "rank": 3}}, "even"),
        ({"method": {"init": "pissa", "dora": True}}, "do not go with method.dora"),
        ({"method": {"init": "olora", "freeze_a": True}}, "freeze_a"),
        ({"method": {"start": "x", "init": "gaussian"}}, "method.start does not go"),
        ({"method": {"kind": "adalora", "rank": 20}}, "above method.first_rank"),
        ({"method": {"kind": "adalora", "begin": 0.6, "settle": 0.5}}, "leave no part"),
        ({"method": {"kind": "dylora", "rank": 4, "rank_step": 4}}, "single rank"),
        ({"method": {"kind": "vera", "alpha": 4}}, "alpha has no effect on vera"),
        ({"method": {"kind": "lorra"}}, "must be one of"),
        ({"method": {"kind": "ia3"}, "compute": {"quantize": "8bit"}}, "ia3 does not work on a quantised base"),
        ({"method": {"kind": "oft"}, "task": {"kind": "image"}}, "oft is for language models only"),
        ({"method": {"kind": "oft"}, "optim": {"kind": "muon"}}, "muon is for matrices"),
        ({"method": {"kind": "oft"}, "optim": {"lora_plus_ratio": 4}}, "no B to learn faster"),
        ({"method": {"kind": "ia3", "rank": 4}}, "rank has no effect on ia3"),
        ({"optim": {"kind": "adamw_schedule_free"}}, "schedule.kind must be constant"),
        ({"optim": {"kind": "adamw_schedule_free", "beta1": 0}, "schedule": {"kind": "constant"}}, "beta1 must be above 0"),
        ({"method": {"kind": "adalora"}, "optim": {"kind": "adamw_schedule_free"}, "schedule": {"kind": "constant"}}, "brings back the rank"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(tree, words):
    with pytest.raises(SpecError, match=words):
        parse({"data": [{"path": "x"}], **tree})


def test_old_specs_are_lora(tmp_path):
    assert parse({"data": [{"path": "x"}], "method": {"rank": 3}}).method == settings.Lora(rank=3)
