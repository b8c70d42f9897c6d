"""The experts of a mixture are trained too: what is learnt is what PEFT computes by itself, a cut run goes on to the same bytes, and the
adapter goes the way of every other."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_studio import adapters, blend, checkpoints, studio, sweeps
from lora_studio.adapters import experts
from lora_studio.errors import BaseModelError, SpecError
from lora_studio.inference.text import Shelf
from lora_studio.preflight import preflight
from lora_studio.spec import Base, parse
from lora_studio.training import job
from tests.training.test_causal_families import tree_of, write
from tests.training.test_job import adapter_bytes, run_of, train
from tests.training.test_methods import IDS, Keeping, kept, logits, plain

__all__ = ["kept"]

KINDS = ("qwen3_moe", "gpt_oss", "mixtral")
MORE = ("deepseek_v3", "llama4_text", "qwen3_next", "olmoe", "glm4_moe", "minimax_m2", "jamba", "ernie4_5_moe", "phimoe", "qwen2_moe", "deepseek_v2")
VARIANTS = {
    "plain": {"experts": True}, "rank-stabilised": {"experts": True, "rslora": True}, "frozen A": {"experts": True, "freeze_a": True},
    "gaussian": {"experts": True, "init": "gaussian"},
}  # fmt: skip


def of_experts(folder) -> dict:
    """The updates of single experts in a folder."""
    return {name: module for name, module in adapters.read(folder).modules.items() if experts.SLOT.match(name)}


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def test_experts_learn_as_told_and_go_every_way_of_an_adapter(workspace, chat_rows, tmp_path, kept, kind):
    base = write(tmp_path / kind, kind)
    tree = tree_of(base, chat_rows, experts=True)
    report = preflight(workspace, parse(tree))
    assert report.can_start and not any("not on the experts" in problem.sentence for problem in report.problems), report.problems
    folder = run_of(workspace, tree)
    (started,) = [event for event in train(folder) if event["kind"] == "started"]
    assert report.facts["trainable"] == started["trainable"] > preflight(workspace, parse(tree_of(base, chat_rows))).facts["trainable"]
    learnt, bare = logits(kept["trainer"].model), logits(plain(base))
    assert torch.allclose(kept["fresh"], bare, atol=1e-6) and not torch.allclose(learnt, bare, atol=1e-4)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(plain(base), folder / "adapter")), learnt, atol=1e-5)
    own = of_experts(folder / "adapter")
    assert own and {name.rsplit(".", 1)[0] for name, module in own.items() if bool(module.delta().any())} == {name.rsplit(".", 1)[0] for name in own}

    shelf, adapter = Shelf(Base(id=str(base)), precision="fp32"), adapters.read(folder / "adapter")
    shelf.put("mine", adapter.modules)
    assert torch.allclose(shelf.logits(IDS[0].tolist(), weights={"mine": 1.0}), learnt[0], atol=1e-5)
    checkpoints.apply(checkpoints.plan(base, [(adapter, 1.0)]), tmp_path / "baked")
    assert torch.allclose(logits(plain(tmp_path / "baked")), learnt, atol=1e-5)
    halves = blend.stack([adapter.modules, adapter.modules], [0.75, 0.25])
    (tmp_path / "blend").mkdir()
    for file, data in adapters.write(adapters.with_modules(adapter.card, halves)).items():
        (tmp_path / "blend" / file).write_bytes(data)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(plain(base), tmp_path / "blend")), learnt, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_pefts_own_model(workspace, chat_rows, tmp_path, monkeypatch, kind, checkpointing):
    """One step of plain SGD against PEFT's model in fp64 on each row by itself, without our loop, packing and kernels; from factors none of
    which is zero, so that both learn."""
    base, seen = write(tmp_path / kind, kind), {}

    class Seeing(Keeping):
        def _before(self):
            torch.manual_seed(1)
            for value in self.parameters.values():
                torch.nn.init.normal_(value, std=0.1)
            seen["before"] = {name: value.detach().double() for name, value in self.parameters.items()}
            super()._before()

        def _gradients(self, batches, step):
            seen["rows"] = [self.task.encoded.train[draw.source][draw.index] for draws in batches for draw in draws]
            return super()._gradients(batches, step)

    monkeypatch.setattr(job.loop, "Trainer", Seeing)
    tree = tree_of(base, chat_rows, experts=True)
    tree |= {"optim": {"kind": "sgd", "lr": 8.0, "clip": None}, "schedule": {"steps": 1, "batch_size": 3, "kind": "constant", "warmup": 0}}
    tree["compute"] = {**tree["compute"], "checkpointing": checkpointing, "precision": "fp32"}
    folder = run_of(workspace, tree)
    train(folder)
    one_by_one = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(one_by_one, folder / "adapter", is_trainable=True).double()
    learnt = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert learnt.keys() == seen["before"].keys()
    after = {name: value.detach().clone() for name, value in learnt.items()}
    for name, value in learnt.items():
        value.data.copy_(seen["before"][name])
    total, count = 0.0, 0
    for row in seen["rows"]:
        targets = torch.tensor([token if is_learnt else -100 for token, is_learnt in zip(row.ids, row.learnt)][1:])
        logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        total, count = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), count + int((targets >= 0).sum())
    (total / count).backward()
    for name, value in learnt.items():
        meant = -8.0 * value.grad
        moved = after[name] - seen["before"][name]
        assert float((moved - meant).norm()) <= 1e-5 * float(meant.norm()), name
    assert all(bool(value.grad.any()) for name, value in learnt.items() if "experts" in name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_run_goes_on_to_the_identical_adapter(workspace, chat_rows, tmp_path, variant):
    base = write(tmp_path / "base", "qwen3_moe")
    tree = {**tree_of(base, chat_rows, **VARIANTS[variant]), "schedule": {"steps": 6, "batch_size": 2}, "output": {"checkpoint_every": 2}}
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    (told,) = [event for event in train(whole) if event["kind"] == "started"]
    assert told["trainable"] == preflight(workspace, parse(tree)).facts["trainable"]
    assert train(cut, stop_at=3)[-1]["kind"] == "stopped"
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole) and of_experts(whole / "adapter")


def test_training_goes_on_from_an_adapter_of_experts(workspace, chat_rows, tmp_path, kept):
    base = write(tmp_path / "base", "gpt_oss")
    first = run_of(workspace, tree_of(base, chat_rows, experts=True))
    train(first)
    wanted = logits(peft.PeftModel.from_pretrained(plain(base), first / "adapter"))
    tree = tree_of(base, chat_rows, experts=True, rank=6, alpha=3, start=str(first / "adapter"))
    assert preflight(workspace, parse(tree)).can_start
    train(run_of(workspace, tree))
    assert torch.allclose(kept["fresh"], wanted, atol=1e-5) and not torch.allclose(kept["fresh"], logits(plain(base)), atol=1e-4)
    problems = preflight(workspace, parse(tree_of(base, chat_rows, start=str(first / "adapter")))).problems
    assert any("layers that this run does not train" in problem.sentence for problem in problems if problem.level == "error")


def test_what_does_not_go_with_experts_is_a_sentence_before_anything_is_loaded(workspace, base, chat_rows, tmp_path):
    for more, words in (
        ({"method": {"experts": True, "dora": True}}, "method.dora"), ({"method": {"experts": True, "dropout": 0.1}}, "method.dropout"),
        ({"method": {"experts": True, "init": "pissa"}}, "method.init"), ({"method": {"experts": True}, "compute": {"quantize": "4bit"}}, "packs no experts"),
        ({"method": {"experts": True}, "task": {"kind": "image"}}, "image models"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=words):
            parse({"data": [{"path": "x"}], **more})
    with pytest.raises(SpecError, match="A sweep cannot have an adapter of the experts"):
        sweeps.compose(parse(tree_of(base, chat_rows, experts=True)), ["compute.seed=1,2"], keep="all")
    told = {problem.path: problem.sentence for problem in preflight(workspace, parse(tree_of(base, chat_rows, experts=True))).problems}
    assert "has no experts that an adapter can go on" in told["method.experts"]
    with pytest.raises(BaseModelError, match="has no experts"):
        train(run_of(workspace, tree_of(base, chat_rows, experts=True)))
    mixture = preflight(workspace, parse(tree_of(write(tmp_path / "moe", "mixtral"), chat_rows)))
    assert any("method.experts puts one on each" in problem.sentence for problem in mixture.problems)
    assert "experts too" in studio.method_in_words(parse(tree_of(base, chat_rows, experts=True)))
