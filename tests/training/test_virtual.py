"""Prompt and prefix tuning: a fresh one is the real tokens it starts as, loss and gradients are PEFT's, a cut run goes on to the same bytes,
the file loads in PEFT, and what they cannot do is said before anything is loaded."""

import json

import peft
import pytest
import torch

from lora_studio import adapters, advice, exports, library, numbers, preflight, runs, shelf
from lora_studio.adapters.files import reheaded
from lora_studio.errors import AdapterError, BaseModelError, BlendError, SpecError, TrainingError
from lora_studio.formats import export_as
from lora_studio.spec import parse
from lora_studio.training import job, text, virtual
from lora_studio.training.methods import METHODS
from tests import tiny
from tests.training.test_job import adapter_bytes, run_of, train
from tests.training.test_methods import Keeping, plain

VARIANTS = {
    "prompt": {"kind": "prompt", "tokens": 5},
    "prompt from words": {"kind": "prompt", "tokens": 7, "text": "fox"},
    "prefix": {"kind": "prefix", "tokens": 5},
    "prefix from words": {"kind": "prefix", "tokens": 3, "text": "red fox runs"},
}
IDS = torch.tensor([[5, 9, 31, 77, 120, 44], [8, 7, 6, 0, 0, 0]])
MASK = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])


def tree_of(base, rows, name, **changes):
    return {**tiny.tree(base, rows), "method": VARIANTS[name], "optim": {"lr": 5e-2}, **changes}


def logits(model):
    """Of two rows, one of them padded: only where there are words."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[:, -6:][MASK.bool()]


def with_words(model, ids):
    """What the untouched base says of these rows with real tokens before them: no virtual token plays a part."""
    before = ids.expand(2, -1)
    with torch.no_grad():
        found = model(input_ids=torch.cat([before, IDS], 1), attention_mask=torch.cat([torch.ones_like(before), MASK], 1), use_cache=False)
    return found.logits[:, len(ids) :][MASK.bool()]


@pytest.fixture
def kept(monkeypatch):
    class Looking(Keeping):
        def _before(self):
            self.kept["fresh"] = logits(self.model)
            self.kept["answer"] = self.task.sample(self.model, "red fox?", 0)
            super(Keeping, self)._before()

    monkeypatch.setattr(job.loop, "Trainer", Looking)
    Keeping.kept = {}
    return Keeping.kept


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_one_answers_as_the_base_does_with_its_tokens_before_the_input(workspace, chat_rows, tmp_path, kept, name, kind):
    base = tiny.write_base(tmp_path / kind, kind)
    train(run_of(workspace, tree_of(base, chat_rows, name, schedule={"steps": 1, "batch_size": 2})))
    task, spec, model = kept["trainer"].task, kept["trainer"].spec, plain(base)
    ids = virtual.start(task.tokenizer, spec)
    if spec.method.text:
        words = task.tokenizer(spec.method.text, add_special_tokens=False)["input_ids"]
        assert ids.tolist() == (words * 9)[: spec.method.tokens]
    assert torch.allclose(kept["fresh"], with_words(model, ids), atol=1e-6)
    assert float((kept["fresh"] - logits(model)).abs().max()) > 1e-4
    asked = torch.cat([ids, torch.tensor(task.encoder.prompt("red fox?"))])[None]
    said = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=1)
    assert kept["answer"] == task.tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True).strip()


def test_another_seed_draws_other_tokens_and_the_same_one_the_same(base, chat_rows):
    tokenizer = tiny.tokenizer()

    def drawn(seed):
        return virtual.start(tokenizer, parse(tree_of(base, chat_rows, "prefix", compute={"seed": seed}))).tolist()

    assert drawn(0) == drawn(0) != drawn(1) and max(drawn(0)) < len(tokenizer)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_loss_and_gradients_are_those_of_peft_row_by_row(base, chat_rows, name):
    """Of PEFT's own model with labels, each row alone and without padding, against our batch of ragged ones."""
    spec = parse(tree_of(base, chat_rows, name))
    task = text.TextTask(spec, device="cpu", note=print)
    model = METHODS[name].attach(task.load(), spec, [])
    METHODS[name].begin(model, task, spec, None, None)
    assert task.prepare(model).startswith("padded batches, plain layers (this kind of adapter")
    rows = task.encoded.train[0][:5]
    assert len({len(row.ids) for row in rows}) > 1
    learnt = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        learnt += torch.randn(learnt.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    model.eval()
    ours = task.loss(model, task._batch(rows))
    ours.backward()
    found, learnt.grad = learnt.grad.clone(), None
    theirs = 0.0
    for row in rows:
        labels = torch.tensor([[token if learns else -100 for token, learns in zip(row.ids, row.learnt)]])
        count = int((labels[:, 1:] != -100).sum())
        loss = model(input_ids=torch.tensor([row.ids]), attention_mask=torch.ones_like(labels), labels=labels).loss * count
        loss.backward()
        theirs += float(loss.detach())
    assert float(ours) == pytest.approx(theirs, rel=1e-6)
    assert torch.allclose(found, learnt.grad, rtol=1e-5, atol=1e-5 * float(learnt.grad.abs().max())) and float(found.abs().max()) > 1e-2
    assert all(value.grad is None for title, value in model.named_parameters() if "prompt_encoder" not in title)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_run_goes_on_to_the_identical_adapter(workspace, base, chat_rows, name):
    tree = tree_of(base, chat_rows, name)
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    told = train(whole)
    assert train(cut, stop_at=8)[-1]["kind"] == "stopped" and adapter_bytes(cut) != adapter_bytes(whole)
    retold = train(cut)

    def progress(events):
        return [(event["kind"], event["step"], event.get("loss"), event.get("answer")) for event in events if event["kind"] in ("step", "eval", "sample")]

    assert progress(retold) == progress(told) and adapter_bytes(cut) == adapter_bytes(whole)
    losses = [event["loss"] for event in told if event["kind"] == "step"]
    assert losses[-1] < losses[0]


def test_a_prompt_learns_the_same_with_checkpointing(workspace, base, chat_rows):
    told = []
    for checkpointing in (False, True):
        tree = tree_of(base, chat_rows, "prompt", compute={"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": checkpointing})
        told.append([event["loss"] for event in train(run_of(workspace, tree)) if event["kind"] in ("step", "eval")])
    assert told[0] == pytest.approx(told[1], rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_file_is_what_was_trained_and_is_known_from_its_header(workspace, base, chat_rows, kept, name):
    folder = run_of(workspace, tree_of(base, chat_rows, name, validation={"size": 0}))
    told = train(folder)
    trained, method = logits(kept["trainer"].model), kept["trainer"].spec.method
    assert float((trained - kept["fresh"]).abs().max()) > 1e-2
    assert torch.equal(logits(peft.PeftModel.from_pretrained(plain(base), folder / "adapter")), trained)
    assert f"{method.tokens} virtual tokens" in next(event["words"] for event in told if event["kind"] == "started")
    card = adapters.inspect(folder / "adapter")
    assert card.is_usable and (card.method, card.rank, card.layers, card.base) == (method.kind, 0, {}, str(base))
    assert card.parameters == method.tokens * (32 if method.kind == "prompt" else 2 * 2 * 16)
    adapter = adapters.read(folder / "adapter")
    assert not adapter.modules and torch.equal(adapter.extras["prompt_embeddings"], kept["trainer"].parameters["prompt_encoder.default.embedding.weight"].detach())
    assert not adapters.check(card, adapters.base_shapes(base), base=str(base))
    [item] = library.find(workspace)
    assert (item.method, item.rank) == (method.kind, 0)
    assert [form.name for form in exports.forms(workspace, item.id) if not form.against] == ["peft"]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_learns_is_counted_before_start(workspace, base, chat_rows, kept, name):
    spec = parse(tree_of(base, chat_rows, name, schedule={"steps": 1, "batch_size": 2}))
    report = preflight.preflight(workspace, spec, deep=False)
    train(runs.create(workspace, spec))
    (learnt,) = kept["trainer"].parameters.values()
    assert report.can_start and report.facts["targets"] == [] and report.facts["trainable"] == learnt.numel()
    parts = report.facts["memory_parts"]
    assert (parts["adapter"], parts["gradients"], parts["optimizer"]) == (4 * learnt.numel(), 4 * learnt.numel(), 8 * learnt.numel())
    groups = kept["trainer"].optimizer.param_groups
    assert [(group["role"], group["base_lr"]) for group in groups] == [("virtual", 5e-2)]


def test_rows_are_padded_and_a_prompt_makes_them_longer_in_the_estimate(workspace, base, chat_rows):
    def parts(method, **compute):
        tree = {**tiny.tree(base, chat_rows), "optim": {"lr": 1e-2}, "method": method, "compute": {"device": "cpu", "precision": "fp32", **compute}}
        return preflight.preflight(workspace, parse(tree)).facts["memory_parts"]

    padded, prefix, prompt, longer = (parts(one, packing=False) for one in ({"rank": 4}, VARIANTS["prefix"], VARIANTS["prompt"], {"kind": "prompt", "tokens": 50}))
    assert prefix == parts(VARIANTS["prefix"]) and prefix["logits"] == padded["logits"] < prompt["logits"] < longer["logits"]
    assert prefix["activations"] < prompt["activations"] < longer["activations"] and prefix["activations"] < padded["activations"]


def test_a_rate_of_lora_is_told_to_be_low_and_the_advice_is_another(workspace, base, chat_rows):
    told = preflight.preflight(workspace, parse(tree_of(base, chat_rows, "prompt", optim={"lr": 2e-4}))).problems
    assert any(problem.path == "optim.lr" and problem.level == "warning" and "hardly move" in problem.sentence for problem in told)
    spec = parse(tree_of(base, chat_rows, "prompt"))
    assert not [problem for problem in preflight.preflight(workspace, spec).problems if problem.path == "optim.lr"]
    advised = advice.recommend(spec, advice.Situation(preflight.bases.inspect(spec.base), 40)).values
    assert advised["optim.lr"] == 0.02 and "method.rank" not in advised and "optim.lora_plus_ratio" not in advised


# ---- the file


@pytest.fixture(scope="module", params=["prompt", "prefix"])
def trained(request, tmp_path_factory, base, chat_rows):
    """(kind, workspace, run) of a small trained one."""
    from lora_studio.workspace import Workspace

    workspace = Workspace(tmp_path_factory.mktemp(request.param))
    run = run_of(workspace, tree_of(base, chat_rows, request.param, schedule={"steps": 2, "batch_size": 2}, validation={"size": 0}, output={}))
    train(run)
    return request.param, workspace, run


def changed(run, config=None, tensors=None):
    """The files of a run's adapter with other fields, or other tensors."""
    from safetensors.torch import load, save

    files = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    files[adapters.CONFIG] = json.dumps({**json.loads(files[adapters.CONFIG]), **(config or {})}).encode()
    return {**files, adapters.WEIGHTS: save(tensors(load(files[adapters.WEIGHTS]))) if tensors else reheaded(files[adapters.WEIGHTS])}


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"num_virtual_tokens": 4}, None, "shape .* but adapter_config.json says"),
        ({"num_virtual_tokens": "5"}, None, "whole number"),
        ({"token_dim": None}, None, "lacks token_dim"),
        ({}, lambda found: {**found, "more": torch.ones(2, 2)}, "its tensor more is not one of that method"),
        ({}, lambda found: {"prompt_embeddings": found["prompt_embeddings"].long()}, "not one of that method"),
        ({}, lambda found: {"prompt_embeddings": found["prompt_embeddings"] / 0}, "NaN|Inf"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(trained, config, tensors, words):
    with pytest.raises(AdapterError, match=words):
        adapters.read(changed(trained[2], config, tensors))


def test_another_base_is_told_by_its_width(trained, tmp_path):
    kind, _, run = trained
    card = adapters.inspect(run / "adapter")
    wider = adapters.base_shapes(tiny.write_base(tmp_path / "wide", hidden_size=64, head_dim=16))
    (problem,) = adapters.check(card, wider, label="mine", base=card.base)
    assert problem.level == "error" and "mine is virtual tokens of shape" in problem.sentence
    deeper = adapters.base_shapes(tiny.write_base(tmp_path / "deep", num_hidden_layers=3))
    assert len(adapters.check(card, deeper, base=card.base)) == (kind == "prefix")


def test_it_is_no_sum_and_every_refusal_says_what_to_do(trained, with_bench, tmp_path):
    kind, workspace, run = trained
    card = adapters.inspect(run / "adapter")
    with pytest.raises(BlendError, match=f"mine is a tuned {kind}: .* Try it in the Playground, or load it with PEFT"):
        adapters.refuse_blend({"mine": card})
    [item] = library.find(workspace)
    with pytest.raises(AdapterError, match="changes no weight"):
        export_as(workspace, item.id, tmp_path / "out", form="peft")
    assert not (tmp_path / "out").exists()


def test_what_it_costs_is_the_attention_to_its_tokens(trained):
    _, _, run = trained
    found = numbers.of_folder(run / "adapter")
    assert found.work == 2 * 5 * 2 * 32  # keys and values of 5 tokens in 2 layers, queries 32 wide
    words = dict(found.rows())["extra work unmerged"]
    assert "virtual tokens" in words and "merged" not in words


def test_its_card_says_what_it_is_and_how_to_load_it(trained):
    kind, workspace, _ = trained
    [item] = library.find(workspace)
    draft = shelf.draft(workspace, item.id, shelf.Push("me/mine", license="apache-2.0"))
    assert f"A tuned {kind} for" in draft.readme and "PeftModel.from_pretrained" in draft.readme and "- lora\n" not in draft.readme
    assert {name for name, _ in draft.files} >= {adapters.WEIGHTS, adapters.CONFIG, "README.md"} and not draft.findings


# ---- before anything is loaded


@pytest.mark.parametrize(
    ("tree", "path", "words"),
    [
        ({"method": {"kind": "prefix"}, "compute": {"checkpointing": True}}, "compute.checkpointing", "throws away"),
        ({"method": {"kind": "prompt"}, "task": {"kind": "image"}}, "method.kind", "language models only"),
        ({"method": {"kind": "prefix"}, "optim": {"lora_plus_ratio": 4}}, "optim.lora_plus_ratio", "no B"),
        ({"method": {"kind": "prompt", "tokens": 0}}, "method.tokens", "1"),
        ({"method": {"kind": "prompt", "text": "  "}}, "method.text", "no words"),
        ({"method": {"kind": "prompt", "rank": 4}}, "method.rank", "no effect on prompt"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_loaded(tree, path, words):
    with pytest.raises(SpecError, match=words) as caught:
        parse({"data": [{"path": "x"}], **tree})
    assert path in [problem.path for problem in caught.value.problems]


def test_a_base_on_which_virtual_tokens_would_go_wrong_is_refused_by_name(workspace, base, chat_rows, monkeypatch):
    """PEFT takes such a base without a word: here one whose attention does not see what stands before the input."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaModel.forward

    def blind(self, *args, inputs_embeds=None, past_key_values=None, **given):
        if inputs_embeds is not None:
            return original(self, *args, inputs_embeds=inputs_embeds * 2, past_key_values=past_key_values, **given)
        return original(self, *args, past_key_values=past_key_values, **given)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", blind)
    with pytest.raises(BaseModelError, match="does not take virtual tokens as it takes words"):
        train(run_of(workspace, tree_of(base, chat_rows, "prompt")))


def test_a_text_without_a_token_is_named(base, chat_rows):
    spec = parse(tree_of(base, chat_rows, "prompt from words"))

    class Mute:
        def __call__(self, text, **how):
            return {"input_ids": []}

    with pytest.raises(TrainingError, match="method.text 'fox' has no token"):
        virtual.start(Mute(), spec)
