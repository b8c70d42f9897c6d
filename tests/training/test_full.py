"""Full and partial fine-tuning: the steps are plain AdamW's, the rest of the base stays as it is, and what is left is what was trained."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_studio import adapters, library, preflight, runs
from lora_studio.errors import SpecError, TrainingError
from lora_studio.spec import parse
from lora_studio.training import full, job, optim
from tests import tiny
from tests.training import test_methods
from tests.training.test_job import run_of, train

VARIANTS = {
    "all": {"kind": "full"},
    "some layers": {"kind": "full", "layers": ["model.layers.1", "model.norm"]},
    "as a LoRA": {"kind": "full", "save": "lora", "rank": 32},
    "head": {"kind": "full", "layers": ["embed_tokens"]},
}
kept = test_methods.kept
logits, plain = test_methods.logits, test_methods.plain


def tree_of(base, rows, name, **changes):
    return {**tiny.tree(base, rows), "method": VARIANTS[name], "optim": {"lr": 2e-3}, **changes}


def result(folder):
    """The bytes of what a run left."""
    files = sorted([*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")])
    assert len(files) == 1
    return files[0].read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_its_steps_are_those_of_a_plain_loop_with_adamw(workspace, base, chat_rows, kept, name):
    train(run_of(workspace, tree_of(base, chat_rows, name, optim={"lr": 2e-3, "weight_decay": 0.1}, validation={"size": 0})))
    trainer, model = kept["trainer"], plain(base)
    parameters = {key: value for key, value in model.named_parameters() if key in trainer.parameters}
    assert 0 < len(parameters) == len(trainer.parameters)
    decayed = [value for value in parameters.values() if value.ndim > 1]
    rest = [value for value in parameters.values() if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, *([{"params": rest, "weight_decay": 0.0}] if rest else [])]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.999))
    for step in range(trainer.steps):
        examples = [trainer.task.encoded.train[draw.source][draw.index] for draws in trainer.stream.step(step) for draw in draws]
        losses, count = [], 0
        for example in examples:
            ids, learnt = torch.tensor([example.ids]), torch.tensor(example.learnt)
            chances = model(ids).logits[0, :-1].log_softmax(-1)
            picked = chances.gather(-1, ids[0, 1:, None])[:, 0][learnt[1:].bool()]
            losses.append(-picked.sum())
            count += len(picked)
        (torch.stack(losses).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * optim.factor(trainer.spec.schedule, step, trainer.steps)
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
    moved = 0.0
    for key, value in parameters.items():
        assert float((value - trainer.parameters[key]).detach().abs().max()) < 1e-6, key
        moved = max(moved, float((value - plain(base).get_parameter(key)).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_run_goes_on_to_the_identical_result(workspace, base, chat_rows, name):
    whole, cut = (run_of(workspace, tree_of(base, chat_rows, name)) for _ in range(2))
    told = train(whole)
    assert told[-1]["kind"] == "done"
    assert train(cut, stop_at=8)[-1]["kind"] == "stopped"
    retold = train(cut)
    assert [event.get("loss") for event in retold if event["kind"] in ("step", "eval")] == [
        event.get("loss") for event in told if event["kind"] in ("step", "eval")
    ]
    assert result(cut) == result(whole)


def test_a_model_answers_as_it_was_trained_and_the_rest_of_the_base_is_untouched(workspace, base, chat_rows, kept):
    folder = run_of(workspace, tree_of(base, chat_rows, "some layers", validation={"size": 0}))
    told = train(folder)
    model = folder / "model"
    assert any(str(model) in event.get("text", "") for event in told if event["kind"] == "note")
    assert torch.equal(logits(plain(model)), logits(kept["trainer"].model))
    before, after = load_file(base / "model.safetensors"), load_file(model / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(kept["trainer"].parameters) and all(name.startswith(("model.layers.1.", "model.norm.")) for name in changed)
    assert json.loads((model / "lora_studio.json").read_text())["changed"] == sorted(changed)
    for name in ("config.json", "tokenizer.json"):
        assert (model / name).read_bytes() == (base / name).read_bytes()
    assert not (folder / "adapter").exists() and not library.find(workspace)


def test_a_model_has_the_precision_of_its_base_and_is_one(workspace, chat_rows, tmp_path, kept):
    half = tmp_path / "half"
    made = tiny.model().to(torch.bfloat16)
    made.save_pretrained(half)
    tiny.tokenizer().save_pretrained(half)
    folder = run_of(workspace, tree_of(half, chat_rows, "all", compute={"device": "cpu", "threads": 1}))
    train(folder)
    assert {value.dtype for value in kept["trainer"].parameters.values()} == {torch.float32}
    assert {value.dtype for value in load_file(folder / "model" / "model.safetensors").values()} == {torch.bfloat16}
    again = run_of(workspace, {**tiny.tree(folder / "model", chat_rows), "schedule": {"steps": 1, "batch_size": 2}})
    assert train(again)[-1]["kind"] == "done"


def test_as_a_lora_of_full_rank_nothing_is_lost_and_a_lower_one_says_what_is(workspace, base, chat_rows, kept):
    folder = run_of(workspace, tree_of(base, chat_rows, "as a LoRA", validation={"size": 0}))
    told = train(folder)
    assert all("_proj" in name for name in kept["trainer"].parameters)
    found = logits(peft.PeftModel.from_pretrained(plain(base), folder / "adapter"))
    assert torch.allclose(found, logits(kept["trainer"].model), atol=2e-5)
    assert any("lacks 0.0%" in event.get("text", "") for event in told)
    [entry] = library.find(workspace)
    assert adapters.inspect(library.adapter_folder(workspace, entry.id)).is_usable
    low = run_of(workspace, tree_of(base, chat_rows, "all", method={"kind": "full", "save": "lora", "rank": 2}, validation={"size": 0}))
    words = next(event["text"] for event in train(low) if "lacks" in event.get("text", ""))
    lacks = float(words.split("lacks ")[1].split("%")[0])
    trained, wrong, size = kept["trainer"].parameters, 0.0, 0.0
    for layer, module in adapters.read(low / "adapter").modules.items():
        difference = (trained[f"{layer}.weight"] - plain(base).get_submodule(layer).weight).detach()
        wrong, size = wrong + float((difference - module.delta()).square().sum()), size + float(difference.square().sum())
    assert lacks == pytest.approx(100 * (wrong / size) ** 0.5, abs=0.06) and lacks > 1


@pytest.mark.parametrize("name", VARIANTS)
def test_what_learns_is_counted_before_start_and_the_optimizer_of_all_of_it_is_in_the_memory(workspace, base, chat_rows, kept, name):
    spec = parse(tree_of(base, chat_rows, name, schedule={"steps": 1, "batch_size": 2}))
    report = preflight.preflight(workspace, spec)
    train(runs.create(workspace, spec))
    count = sum(value.numel() for value in kept["trainer"].parameters.values())
    assert report.can_start and report.facts["trainable"] == count
    parts = report.facts["memory_parts"]
    assert (parts["adapter"], parts["gradients"], parts["optimizer"], parts["checkpoint"]) == (0, 4 * count, 8 * count, 20 * count)
    assert parts["base"] == 4 * sum(value.numel() for value in plain(base).parameters())


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"optim": {"lora_plus_ratio": 16}}, "optim.lora_plus_ratio", "no B"),
        ({"compute": {"quantize": "8bit"}}, "method.kind", "quantised"),
        ({"compute": {"precision": "bf16"}}, "method.kind", "fp32"),
        ({"task": {"kind": "image", "text_encoder": True}}, "method.kind", "no text encoder"),
        ({"task": {"kind": "image"}, "compute": {"checkpointing": True, "block_swap": 1}}, "method.kind", "main memory"),
        ({"task": {"kind": "image"}, "compute": {"compile": True}}, "method.kind", "compiled"),
        ({"task": {"kind": "image"}, "base": {"id": "demo-image", "assistant": "x"}}, "method.kind", "base.assistant"),
        ({"method": {"kind": "full", "rank": 4}}, "method.rank", "no effect"),
        ({"method": {"kind": "full", "layers": []}}, "method.layers", "no layers"),
        ({"method": {"kind": "full", "layers": ["mlp", "no such"]}}, "method.layers", "no layers"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(changes, field, words):
    with pytest.raises(SpecError) as caught:
        parse({"data": [{"path": "x"}], "method": {"kind": "full"}, **changes})
    assert any(problem.path == field and words in problem.sentence for problem in caught.value.problems)


@pytest.mark.parametrize("layers", [["layers.7"], ["lm_head"], ["layers.0", "nowhere"]])
def test_layers_that_are_not_there_are_refused_before_start(workspace, base, chat_rows, layers):
    spec = parse(tree_of(base, chat_rows, "all", method={"kind": "full", "layers": layers}))
    report = preflight.preflight(workspace, spec)
    assert [problem.path for problem in report.problems if problem.level == "error"] == ["method.layers"]
    with pytest.raises(TrainingError, match=layers[-1]):
        train(runs.create(workspace, spec))


def test_weights_that_the_files_call_otherwise_are_refused(base):
    spec = parse({"data": [{"path": "x"}], "base": {"id": str(base)}, "method": {"kind": "full"}})
    with pytest.raises(Exception, match="another name"):
        full.attach(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**tiny.model().config.to_dict(), "tie_word_embeddings": False})),
            spec,
            [],
        )


def test_a_padded_model_stays_out_of_the_fast_path_of_a_frozen_head(workspace, base, chat_rows, kept):
    for name, fast in (("all", False), ("some layers", True)):
        told = train(run_of(workspace, tree_of(base, chat_rows, name, schedule={"steps": 1, "batch_size": 2})))
        assert kept["trainer"].task.fast == fast
        assert "base itself learn" in next(event["words"] for event in told if event["kind"] == "started")
    assert job.device_of(runs.create(workspace, kept["trainer"].spec)) == "cpu"
