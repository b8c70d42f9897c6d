"""Whole runs on a tiny model: the adapter loads in PEFT with identical logits, and a cut run goes on to the same bytes."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_studio import durable, runs
from lora_studio.errors import BaseModelError, StudioError, TrainingError
from lora_studio.spec import parse
from lora_studio.training import job, loop
from lora_studio.worker import RunDesk
from tests import tiny


def run_of(workspace, tree) -> Path:
    return runs.create(workspace, parse(tree))


def train(folder: Path, *, stop_at: int | None = None, work=None) -> list[dict]:
    """Train in this process (or do other `work` on the folder); the run's folded history."""
    with runs.Events(folder) as events:
        desk = RunDesk(folder, events)
        if stop_at:
            emit = desk.emit

            def stopping(kind, **fields):
                emit(kind, **fields)
                if kind == "step" and fields["step"] == stop_at:
                    runs.ask(folder, "stop", save=True)

            desk.emit = stopping
        (work or job.train)(folder, desk)
    return runs.read_all(folder)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


VARIANTS = {
    "lora+": {},
    "plain lora": {"optim": {"lr": 1e-2}},
    "rank-stabilised, gaussian": {"method": {"rank": 4, "alpha": 8, "rslora": True, "init": "gaussian"}},
    "dropout": {"method": {"rank": 4, "alpha": 8, "dropout": 0.3}},
    "bf16": {"compute": {"device": "cpu", "precision": "bf16", "threads": 1}},
    "padded": {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "packing": False}},
    "checkpointing": {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": True}},
    "8-bit": {"optim": {"lr": 1e-3, "kind": "adamw_8bit"}},
    "paged 8-bit": {"optim": {"lr": 1e-3, "kind": "paged_adamw_8bit"}},
    "lion": {"optim": {"lr": 1e-4, "kind": "lion", "lora_plus_ratio": 4}},
    "lion, 8-bit": {"optim": {"lr": 1e-4, "kind": "lion_8bit"}},
    "muon": {"optim": {"lr": 1e-2, "kind": "muon", "lora_plus_ratio": 4}},
    "prodigy": {"optim": {"lr": 1.0, "kind": "prodigy"}},
    "schedule-free": {"optim": {"lr": 1e-2, "kind": "adamw_schedule_free", "lora_plus_ratio": 4}, "schedule": {"kind": "constant", "steps": 12, "batch_size": 2, "warmup": 2}},
    "loftq": {"method": {"rank": 4, "alpha": 8, "init": "loftq"}, "compute": {"device": "cpu", "precision": "bf16", "threads": 1, "quantize": "4bit"}, "optim": {"lr": 1e-2}},
    "some layers": {"method": {"rank": 2, "alpha": 4, "targets": ["q_proj", "layers.1.mlp.down_proj"]}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_to_the_identical_adapter(workspace, base, chat_rows, variant):
    tree = {**tiny.tree(base, chat_rows), **VARIANTS[variant]}
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    told = train(whole)
    assert train(cut, stop_at=5)[-1]["kind"] == "stopped" and adapter_bytes(cut) != adapter_bytes(whole)
    retold = train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    words = next(event["words"] for event in retold if event["kind"] == "resumed")
    assert words.startswith("Restored step 5 of 12: adapter, optimizer")

    def progress(events):
        return [(event["kind"], event["step"], event.get("loss"), event.get("answer")) for event in events if event["kind"] in ("step", "eval", "sample")]

    assert progress(retold) == progress(told)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "qwen3_moe", "gpt_oss"])
def test_the_result_loads_in_peft_with_identical_logits(workspace, chat_rows, tmp_path, kind):
    base = tiny.write_base(tmp_path / kind, kind)
    folder = run_of(workspace, {**tiny.tree(base, chat_rows), "validation": {"size": 8, "keep_best": False}})
    kept = {}

    class Keeping(loop.Trainer):
        def _finish(self, reason):
            outcome = super()._finish(reason)
            kept["model"] = self.model.eval()
            return outcome

    original, job.loop.Trainer = job.loop.Trainer, Keeping
    try:
        train(folder)
    finally:
        job.loop.Trainer = original
    ids = torch.tensor([[5, 9, 31, 77, 120, 44]])
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = fresh(ids).logits
    loaded = peft.PeftModel.from_pretrained(fresh, str(folder / "adapter")).eval()
    from lora_studio.training import fused

    with torch.no_grad(), fused.removed(kept["model"]):
        assert torch.equal(loaded(ids).logits, kept["model"](ids).logits)
    assert not torch.equal(loaded(ids).logits, plain)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4


def test_the_same_spec_gives_the_same_bytes_and_another_seed_others(workspace, base, chat_rows):
    tree = tiny.tree(base, chat_rows)
    first, second = run_of(workspace, tree), run_of(workspace, tree)
    third = run_of(workspace, {**tree, "compute": {**tree["compute"], "seed": 1}})
    for folder in (first, second, third):
        train(folder)
    assert adapter_bytes(first) == adapter_bytes(second) != adapter_bytes(third)
    assert (first / "adapter" / "adapter_config.json").read_bytes() == (second / "adapter" / "adapter_config.json").read_bytes()


def test_a_finished_adapter_is_in_the_library_with_where_it_comes_from(workspace, base, chat_rows):
    from lora_studio import library

    folder = run_of(workspace, tiny.tree(base, chat_rows))
    train(folder)
    item = library.find(workspace)[0]
    card = library.card(workspace, item.id)
    assert (item.name, item.run, item.rank, card["base"]) == ("tiny", folder.name, 4, str(base))
    assert card["metrics"]["validation_loss"] > 0 and len(card["data"]["print"]) == 64 and card["base_print"]


def test_packed_and_padded_training_agree(workspace, base, chat_rows):
    tree = tiny.tree(base, chat_rows)
    losses = []
    for packing in (True, False):
        events = train(run_of(workspace, {**tree, "compute": {**tree["compute"], "packing": packing}}))
        assert ("packed" in events[0]["fast"]) == packing
        losses.append([event["loss"] for event in events if event["kind"] in ("step", "eval")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_changed_rank_or_base_or_row_is_refused(workspace, base, chat_rows, tmp_path):
    folder = run_of(workspace, tiny.tree(base, chat_rows))
    train(folder, stop_at=4)
    spec = (folder / "spec.yaml").read_text()
    for change, words in ((("rank: 4", "rank: 8"), "method.rank was 4 and is 8"), (("lr: 0.002", "lr: 0.004"), "optim.lr was 0.002")):
        durable.write(folder / "spec.yaml", spec.replace(*change))
        with pytest.raises(TrainingError, match=words):
            train(folder)
    other = tiny.write_base(tmp_path / "other", seed=3)
    durable.write(folder / "spec.yaml", spec.replace(str(base), str(other)))
    with pytest.raises(TrainingError, match="the base changed since"):
        train(folder)
    durable.write(folder / "spec.yaml", spec.replace("checkpoint_every: 3", "checkpoint_every: 2"))
    assert train(folder)[-1]["kind"] == "done"


def test_a_damaged_newest_checkpoint_is_passed_over_in_words(workspace, base, chat_rows):
    tree = tiny.tree(base, chat_rows)
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    train(whole)
    train(cut, stop_at=8)
    newest = sorted((cut / "checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").unlink()
    events = train(cut)
    assert any("was passed over: optimizer.safetensors is missing" in event.get("text", "") for event in events)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_a_run_without_any_checkpoint_starts_again_and_says_so(workspace, base, chat_rows):
    tree = tiny.tree(base, chat_rows)
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    train(whole)
    with runs.Events(cut) as events:
        events.emit("started", steps=12)
        events.emit("sample", step=0, prompt="red fox?", answer="from the cut attempt")
        events.emit("eval", step=0, loss=9.0, best=False)
        events.emit("step", step=1, steps=12, loss=1.0)
    told = train(cut)
    assert [event["kind"] for event in told if event.get("step") == 0] == ["resumed", "sample", "eval"]
    assert [event["step"] for event in told if event["kind"] == "step"] == list(range(1, 13))
    assert adapter_bytes(cut) == adapter_bytes(whole)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"base": {"id": "nowhere/at-all"}}, BaseModelError, "is not on this machine and the Hub cannot be reached"),
        ({"base": {"id": "nowhere"}}, BaseModelError, "There is no base model"),
        ({"method": {"targets": ["no_such_layer"]}}, BaseModelError, "No layer of"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_sentence(workspace, base, chat_rows, change, error, words):
    with pytest.raises(error, match=words):
        train(run_of(workspace, {**tiny.tree(base, chat_rows), **change}))


def test_bases_that_cannot_be_used_are_named(workspace, chat_rows, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = tiny.write_base(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    torn = tiny.write_base(tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:2000])
    bert = tmp_path / "bert"
    transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=300)).save_pretrained(bert)
    tiny.tokenizer().save_pretrained(bert)
    for folder, words in ((empty, "no readable config.json"), (pickled, "no .safetensors weights"), (torn, "could not be loaded"), (bert, "not a causal")):
        with pytest.raises(StudioError, match=words):
            train(run_of(workspace, tiny.tree(folder, chat_rows)))


def test_a_full_disk_fails_in_a_sentence_and_the_run_goes_on_later(workspace, base, chat_rows, monkeypatch):
    import errno

    from lora_studio import worker

    tree = tiny.tree(base, chat_rows)
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    train(whole)
    publish, count = durable.publish_folder, []

    def full(target, files):
        count.append(target)
        if len(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        publish(target, files)

    monkeypatch.setattr(durable, "publish_folder", full)
    assert worker.work(cut) == 1
    assert "The disk is full" in runs.status(cut).reason
    assert worker.work(cut) == 0 and adapter_bytes(cut) == adapter_bytes(whole)


def test_two_sources_are_mixed_by_weight(workspace, base, chat_rows):
    tree = {**tiny.tree(base, chat_rows), "data": [{"path": str(chat_rows)}, {"path": str(chat_rows), "cap": 10, "weight": 3.0}], "schedule": {"epochs": 1, "batch_size": 4}}
    events = train(run_of(workspace, {**tree, "validation": {"size": 0}, "output": {}}))
    assert events[0]["rows"] == 70 and events[0]["steps"] == 23
