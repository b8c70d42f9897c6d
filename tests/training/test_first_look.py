"""Starts that look first: their factors are PEFT's own, and a run that goes on starts from the very same."""

import peft
import pytest
import torch
from peft.tuners.lora import corda, loraga
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils.loftq_utils import _low_rank_decomposition

from lora_studio import adapters
from lora_studio.errors import SpecError, TrainingError
from lora_studio.spec import parse
from lora_studio.training import first_look, methods, order, quantized, text
from tests import tiny
from tests.training import test_quantized
from tests.training.test_job import adapter_bytes, run_of, train
from tests.training.test_methods import logits, plain

wide = test_quantized.wide
RANK, TARGETS = 8, ["q_proj", "up_proj", "down_proj"]  # 4 · 8 directions of 32 are all of them, so that the randomised SVD is exact
LOOKERS = ("eva", "corda", "lora_ga")


def begun(tmp_path, base, chat_rows, init, **changes):
    """A fresh model that has looked, its task and its spec."""
    tree = {**tiny.tree(base, chat_rows), "validation": {"size": 0}, "method": {"rank": RANK, "alpha": 12, "init": init, "targets": TARGETS}}
    spec = parse({**tree, **changes})
    task = text.TextTask(spec, device="cpu", note=lambda sentence: None)
    method = methods.METHODS["lora"]
    bare = task.load()
    model = method.attach(bare, spec, task.parts(bare))
    tmp_path.mkdir(exist_ok=True)
    method.begin(model, task, spec, tmp_path)
    return model, task, spec


def factors(model):
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    return {name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()) for name, layer in layers.items()}


def rows_of(task, spec):
    """Each row that is looked at as the model takes it, with its labels."""
    stream = order.Stream(order.Plan(task.counts, task.weights, 1, 1, spec.compute.seed))
    for number in range(sum(task.counts)):
        [batch] = [task.collate(stream.step(number)[0])]
        ids = batch.padded["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[0, batch.places + 1] = batch.targets
        yield ids, labels


def same_rows(one, other):
    """How far the rows of a matrix are from those of another, either way round."""
    return float((one * (one * other).sum(1, keepdim=True).sign() - other).abs().max())


def test_corda_starts_as_in_peft(tmp_path, base, chat_rows):
    model, task, spec = begun(tmp_path, base, chat_rows, "corda")
    theirs = plain(base)
    config = peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=TARGETS, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"))

    @torch.no_grad()
    def run():
        for ids, _ in rows_of(task, spec):
            theirs(ids)

    corda.preprocess_corda(theirs, config, run)
    for name, (A, B) in factors(peft.get_peft_model(theirs, config)).items():
        ours_A, ours_B = factors(model)[name]
        assert float((ours_B @ ours_A - B @ A).abs().max()) < 1e-5, name


def test_lora_ga_starts_as_in_peft(tmp_path, base, chat_rows):
    model, task, spec = begun(tmp_path, base, chat_rows, "lora_ga")
    theirs, rows = plain(base), list(rows_of(task, spec))
    config = peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    units = sum(int((labels != -100).sum()) for _, labels in rows)

    def step():
        for ids, labels in rows:
            found = theirs(ids).logits[0, :-1]
            # PEFT takes the mean over the passes
            (torch.nn.functional.cross_entropy(found, labels[0, 1:], ignore_index=-100, reduction="sum") * len(rows) / units).backward()

    loraga.preprocess_loraga(theirs, config, step)
    for name, (A, B) in factors(peft.get_peft_model(theirs, config)).items():
        ours_A, ours_B = factors(model)[name]
        assert same_rows(ours_A, A) < 1e-5 and same_rows(ours_B.T, B.T) < 1e-6, name


def test_eva_starts_as_in_peft_and_as_the_principal_directions_in_fp64(tmp_path, base, chat_rows):
    model, task, spec = begun(tmp_path, base, chat_rows, "eva")
    bare, rows = plain(base), list(rows_of(task, spec))
    seen = {}
    for name, layer in bare.named_modules():
        layer.register_forward_pre_hook(lambda layer, given, name=name: seen.setdefault(name, []).append(given[0][0].double()) if name.endswith(tuple(TARGETS)) else None)
    with torch.no_grad():
        for ids, _ in rows:
            bare(ids)
    every = {name: torch.cat(found) for name, found in seen.items()}

    # one batch of all tokens, which PEFT takes for as long as it takes to converge
    def whole(model, batch):
        for name, layer in model.named_modules():
            if name in every and isinstance(layer, torch.nn.Linear):
                layer(every[name].float()[None])

    config = peft.LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    theirs = get_eva_state_dict(plain(base), [{"all": torch.ones(1)}], config, forward_fn=whole, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False)
    for name, (A, B) in factors(model).items():
        inputs = every[name] - every[name].mean(0)
        _, values, right = torch.linalg.svd(inputs, full_matrices=False)
        assert not B.any() and same_rows(A.double(), right[:RANK]) < 1e-5, name
        kept = (A.double() @ theirs[name].double().T).square().sum() / RANK
        assert float(kept) > 0.999, (name, float(kept))


@pytest.mark.parametrize("init", LOOKERS)
def test_looking_in_portions_finds_the_same_and_padding_is_not_looked_at(tmp_path, base, chat_rows, init, monkeypatch):
    whole, *_ = begun(tmp_path / "one", base, chat_rows, init, schedule={"steps": 32, "batch_size": 1})
    monkeypatch.setattr(first_look, "PORTION", 1)
    portions, *_ = begun(tmp_path / "two", base, chat_rows, init, schedule={"steps": 4, "batch_size": 8})
    for name, pair in factors(whole).items():
        assert all(torch.equal(one, other) for one, other in zip(pair, factors(portions)[name])), name


@pytest.mark.parametrize("init", LOOKERS)
def test_a_run_that_goes_on_starts_from_what_was_kept_and_a_broken_file_is_made_again(workspace, base, chat_rows, init):
    tree = {**tiny.tree(base, chat_rows), "method": {"rank": 4, "alpha": 8, "init": init}}
    whole, cut, broken = (run_of(workspace, tree) for _ in range(3))
    train(whole)
    train(cut, stop_at=5)
    train(broken, stop_at=5)
    kept = (cut / first_look.FILE).read_bytes()
    assert kept == (whole / first_look.FILE).read_bytes()
    written = (cut / first_look.FILE).stat().st_mtime_ns
    (broken / first_look.FILE).write_bytes(kept[: len(kept) // 2])
    train(cut)
    train(broken)
    assert (cut / first_look.FILE).stat().st_mtime_ns == written and (broken / first_look.FILE).read_bytes() == kept
    assert adapter_bytes(cut) == adapter_bytes(whole) == adapter_bytes(broken)


@pytest.mark.parametrize(("init", "rank", "most"), [("corda", 33, 32), ("lora_ga", 17, 16)])
def test_a_rank_that_a_layer_does_not_have_is_refused_by_name(tmp_path, base, chat_rows, init, rank, most):
    with pytest.raises(TrainingError, match=f"at most {most} directions in model.layers.0.self_attn.q_proj"):
        begun(tmp_path, base, chat_rows, init, method={"rank": rank, "init": init, "targets": TARGETS})


@pytest.mark.parametrize("init", ["pissa", "corda"])
def test_a_weight_that_the_base_uses_twice_is_refused(tmp_path, chat_rows, init):
    base = tiny.write_base(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(TrainingError, match="weight of lm_head in two places"):
        begun(tmp_path, base, chat_rows, init, method={"rank": 4, "init": init, "targets": ["lm_head"]})


# ---- LoftQ


FOUR = {"device": "cpu", "precision": "bf16", "threads": 1, "quantize": "4bit"}


def test_loftq_starts_as_in_peft_and_nearer_to_the_base_than_its_4_bits(tmp_path, wide, chat_rows):
    from bitsandbytes.functional import dequantize_4bit

    method = {"rank": 16, "alpha": 16, "init": "loftq"}
    model, task, spec = begun(tmp_path, wide, chat_rows, "loftq", compute=FOUR, method=method)
    other, *_ = begun(tmp_path / "strong", wide, chat_rows, "loftq", compute=FOUR, method=method | {"alpha": 64})
    original = plain(wide)
    for name, (A, B) in factors(model).items():
        packed = model.get_submodule(f"base_model.model.{name}").get_base_layer().weight
        lost = original.get_submodule(name).weight.detach() - dequantize_4bit(packed.data, packed.quant_state).float()
        theirs = _low_rank_decomposition(lost, reduced_rank=16)
        assert torch.allclose(B @ A, theirs["L"] @ theirs["R"], atol=1e-6), name
        # at any strength, which PEFT's does not heed
        assert torch.allclose(4 * factors(other)[name][1] @ factors(other)[name][0], B @ A, atol=1e-6), name
    bare = quantized.keep_trainable(text.load_model(wide, "wide", torch.bfloat16, **quantized.options("4bit", torch.bfloat16, torch.device("cpu"))))
    off, without = ((logits(one) - logits(original)).float().norm() for one in (model, bare))
    assert off < 0.9 * without


def test_loftqs_file_is_what_was_learnt_for_the_untouched_base(workspace, wide, chat_rows):
    tree = {**tiny.tree(wide, chat_rows), "method": {"rank": 4, "alpha": 8, "init": "loftq"}, "compute": FOUR, "optim": {"lr": 2e-2}}
    run = run_of(workspace, {**tree, "validation": {"size": 8, "keep_best": False}})
    losses = [event["loss"] for event in train(run) if event["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.02
    assert adapters.inspect(run / "adapter").ranks == (8,)
    loaded = logits(peft.PeftModel.from_pretrained(plain(wide), run / "adapter"))
    assert float((loaded - logits(plain(wide))).abs().max()) > 1e-2


def test_loftq_refuses_a_base_whose_files_are_packed_already(tmp_path, wide, chat_rows):
    packed = text.load_model(wide, "wide", torch.bfloat16, **quantized.options("4bit", torch.bfloat16, torch.device("cpu")))
    folder = tmp_path / "packed"
    packed.save_pretrained(folder)
    spec = parse({"base": {"id": str(folder)}, "data": [{"path": str(chat_rows)}], "method": {"init": "loftq"}, "compute": FOUR})
    model = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(TrainingError, match="in its own numbers"):
        list(first_look._originals(first_look._layers(model), spec))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"method": {"init": "loftq"}}, "makes up for what 4 bits lose"),
        ({"method": {"init": "loftq"}, "compute": {"quantize": "8bit"}}, "Set compute.quantize to 4bit"),
        ({"method": {"init": "corda"}, "compute": {"quantize": "8bit"}}, "need the base's own numbers"),
        ({"method": {"init": "lora_ga", "dora": True}}, "do not go with method.dora"),
        ({"method": {"init": "corda", "freeze_a": True}}, "do not go with method.freeze_a"),
        ({"task": {"kind": "image"}, "method": {"init": "eva"}, "compute": {"block_swap": 2, "checkpointing": True}}, "block_swap to 0"),
    ],
)
def test_what_cannot_start_so_is_refused(tree, words):
    with pytest.raises(SpecError, match=words):
        parse({"data": [{"path": "x"}], **tree})
