"""OFT and IA3 updates: made of PEFT's files or refused by name, never taken for a product, and baked as PEFT merges them, biases and all."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file

from lora_studio import adapters, checkpoints
from lora_studio.adapters import multiplying
from lora_studio.adapters.files import reheaded
from lora_studio.checkpoints import numbers
from lora_studio.errors import AdapterError, BakeError, BlendError
from lora_studio.multiplied import Multiplied, Rotated, Scaled, rotation
from tests.test_checkpoints import BF16, LINEARS, adapter, baked, weights, write
from tests.test_dora import dora, merged, no_product, only_the_third_moved, same, with_experts

IA3 = {"target_modules": LINEARS, "feedforward_modules": ["down_proj", "o_proj"]}
OFT = {"target_modules": LINEARS, "r": 0, "oft_block_size": 8, "use_cayley_neumann": False}
KINDS = {
    "ia3": (peft.IA3Config, IA3), "ia3 of outputs": (peft.IA3Config, {**IA3, "feedforward_modules": []}), "oft": (peft.OFTConfig, OFT),
    "oft of small blocks": (peft.OFTConfig, {**OFT, "oft_block_size": 2}), "oft of whole rows": (peft.OFTConfig, {**OFT, "oft_block_size": 0, "r": 1}),
    "oft of one block": (peft.OFTConfig, {**OFT, "block_share": True}), "oft by series": (peft.OFTConfig, {**OFT, "use_cayley_neumann": True}),
    "oft by a long series": (peft.OFTConfig, {**OFT, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7}), "oft held short": (peft.OFTConfig, {**OFT, "coft": True, "eps": 0.6}),
}  # fmt: skip


def multiplying_one(base, target, kind: str, *, seed: int = 0, noted: bool = True, **more):
    """An adapter that PEFT saved, as if trained; with `noted` both sides of its layers are in the header as the studio writes them."""
    config, options = KINDS[kind]
    made = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config(**{**options, **more}))
    draw, shapes = torch.Generator().manual_seed(seed), {}
    for name, layer in made.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            shapes[name] = [layer.out_features, layer.in_features]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "ia3_l" in name or "oft_R" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    made.save_pretrained(target, save_embedding_layers=False)
    known = json.loads((target / adapters.CONFIG).read_text())
    (target / adapters.CONFIG).write_text(json.dumps({**known, "base_model_name_or_path": str(base)}))
    file = target / adapters.WEIGHTS
    if noted:
        file.write_bytes(reheaded(file.read_bytes(), metadata={multiplying.SHAPES: json.dumps(shapes)}))
    return target


def biased(target, dtype=torch.float32):
    """A base whose linear layers have biases that are not zero."""
    base = write(target, dtype, attention_bias=True, mlp_bias=True)
    draw = torch.Generator().manual_seed(5)
    found = {name: torch.randn(value.shape, generator=draw).to(dtype) if name.endswith("bias") else value for name, value in weights(base).items()}
    assert sum(name.endswith("bias") for name in found) == 14
    save_file(found, base / "model.safetensors", {"format": "pt"})
    return base


# ---- updates


@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_what_peft_adds_to_weight_and_bias(tmp_path, kind):
    base = biased(tmp_path / "base")
    folder = multiplying_one(base, tmp_path / "it", kind)
    before, meant, modules = weights(base), merged(base, folder).state_dict(), adapters.read(folder).modules
    assert len(modules) == 14
    for name, module in modules.items():
        update = meant[f"{name}.weight"] - before[f"{name}.weight"]
        assert float((module.delta(before[f"{name}.weight"]) - update).norm() / update.norm()) < 1e-5 and float(update.norm()) > 0.1
        bias = before[f"{name}.bias"]
        after = bias if (moved := module.delta_of_bias(bias)) is None else bias + moved
        assert torch.allclose(after, meant[f"{name}.bias"], atol=1e-6) and (moved is None) == (not module.of_outputs)
    assert {module.of_outputs for module in modules.values()} == {"ia3": {True, False}, "ia3 of outputs": {True}}.get(kind, {False})


@pytest.mark.parametrize("terms", [None, 1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("bound", [None, 0.2, 1e3])
def test_a_rotation_is_pefts_by_every_setting_and_cayleys_own_keeps_lengths(terms, bound):
    entries = 0.3 * torch.randn(3, 28, generator=torch.Generator().manual_seed(0))
    how = {"coft": bound is not None, "eps": bound or 0.0, "use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
    theirs = peft.tuners.oft.layer.OFTRotationModule(3, 28, 8, 24, **how)
    theirs.weight.data = entries.clone()
    found = torch.eye(8) + rotation(entries, terms=terms, bound=bound)
    assert torch.allclose(torch.block_diag(*found), theirs.get_weight(), atol=1e-6)
    if terms is None:
        assert torch.allclose(found @ found.mT, torch.eye(8).expand(3, 8, 8), atol=1e-5)


def test_some_outputs_are_an_update_of_their_own_transposed_rows_are_the_same_and_a_misfit_is_refused():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 6, generator=draw)
    updates = [Scaled(torch.randn(10, generator=draw), (10, 6)), Scaled(torch.randn(6, generator=draw), (10, 6), False)]
    updates += [Rotated(torch.randn(3, 2, 2, generator=draw), (10, 6)), Rotated(torch.randn(1, 3, 3, generator=draw), (10, 6))]
    for update in updates:
        whole = update.delta(weight)
        assert torch.allclose(update.part(2, 5).delta(weight[2:5]), whole[2:5], atol=1e-6)
        for start, stop in ((0, 6), (1, 4), (3, 4), (5, 6)):
            rows = update.rows(weight.T[start:stop], start, transposed=True, stretches=lambda some: [weight.T[some.start : some.stop]])
            assert torch.allclose(rows, whole.T[start:stop], atol=1e-6)
    for act in (lambda: Scaled(torch.ones(6), (10, 6)), lambda: Rotated(torch.ones(2, 2, 2), (10, 6)), lambda: Rotated(torch.ones(1, 4, 4), (10, 6)), lambda: rotation(torch.ones(1, 4))):
        with pytest.raises(ValueError, match="are not those|do not turn|no triangle"):
            act()


# ---- files


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_nothing_can_take_it_for_a_product(base, tmp_path, kind):
    read = adapters.read(multiplying_one(base, tmp_path / "it", kind))
    assert read.card.method == kind
    no_product(read)
    adapters.refuse_blend({"mine": read.card}, takes=(kind,))
    for takes in ((), ("dora",)):
        with pytest.raises(BlendError, match=rf"^mine is an {kind.upper()}.*Playground.*bake it.*`extract`"):
            adapters.refuse_blend({"mine": read.card}, takes=takes)


@pytest.mark.parametrize(("kind", "change", "said", "words"), [
    ("oft", lambda tensor: tensor, {"use_cayley_neumann": True, "peft_version": "0.17.1"}, "older PEFT.*Train it again"),
    ("oft", lambda tensor: tensor, {"oft_block_size": None}, "older PEFT.*Train it again"),
    ("oft", lambda tensor: tensor, {"block_share": True}, "do not fit each other"), ("oft", lambda tensor: tensor[:1], {}, "do not fit each other"),
    ("oft", lambda tensor: tensor * 0 + 1e30, {"use_cayley_neumann": True}, "the rotation of .*q_proj is infinite"), ("oft", lambda tensor: tensor * 0, {}, "multiplies every layer by one"),
    ("oft", lambda tensor: tensor, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms"), ("ia3", lambda tensor: tensor[:-1], {}, "do not fit each other"),
    ("ia3", lambda tensor: tensor * 0 + 1, {}, "multiplies every layer by one"),
])  # fmt: skip
def test_what_cannot_be_computed_is_a_sentence(base, tmp_path, kind, change, said, words):
    folder = multiplying_one(base, tmp_path / "it", kind, target_modules=["q_proj"], **({"feedforward_modules": []} if kind == "ia3" else {}))
    file, config = folder / adapters.WEIGHTS, folder / adapters.CONFIG
    metadata = adapters.files.read_metadata(file.read_bytes())
    file.write_bytes(save({name: change(tensor).contiguous() for name, tensor in load_file(file).items()}, metadata))
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    with pytest.raises(AdapterError, match=words):
        adapters.read(folder)


# ---- baked


@pytest.mark.parametrize("block", [1 << 20, 1 << 12], ids=["one block", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_baked_it_is_what_peft_merges(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(numbers, "BLOCK", block)
    base = biased(tmp_path / "base")
    folder = multiplying_one(base, tmp_path / "it", kind, seed=1)
    found = weights(baked(base, tmp_path / "out", (folder, 1.0)))
    same(found, merged(base, folder))
    turned = sum(module.of_outputs for module in adapters.read(folder).modules.values())
    assert sum(not torch.equal(found[name], value) for name, value in weights(base).items()) == 14 + turned
    assert checkpoints.loss(checkpoints.plan(base, [(adapters.read(folder), 1.0)])).overall < 1e-6


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_in_16_bits_it_is_rounded_once(tmp_path, kind, dtype):
    base = biased(tmp_path / "base", dtype)
    read = adapters.read(multiplying_one(base, tmp_path / "it", kind, seed=1))
    found = weights(baked(base, tmp_path / "out", (tmp_path / "it", 0.5)))
    bits = 8 if dtype == BF16 else 11
    for name, before in weights(base).items():
        module = read.modules.get(name.rpartition(".")[0])
        own = None if module is None else module.to(torch.device("cpu"), torch.float64)
        update = None if own is None else own.delta(before) if name.endswith("weight") else own.delta_of_bias(before)
        exact = before.double() if update is None else before.double() + 0.5 * update
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs())[1].clamp_min(-13 if bits == 11 else -125) - bits)
        assert ((found[name].double() - exact).abs() <= 0.51 * unit).all(), name


def moved(module, value: torch.Tensor, name: str) -> torch.Tensor | float:
    """What an update of any kind adds to a weight or a bias of its layer."""
    if name.endswith("bias"):
        found = module.delta_of_bias(value) if isinstance(module, Multiplied) else None
        return 0.0 if found is None else found.double()
    return (module.delta(value) if hasattr(module, "moves") or hasattr(module, "product") else module.delta()).double()


@pytest.mark.parametrize("block", [1 << 20, 1 << 12], ids=["one block", "blocks"])
def test_with_others_it_is_the_exact_sum_each_against_the_untouched_base(tmp_path, monkeypatch, block):
    monkeypatch.setattr(numbers, "BLOCK", block)
    base = biased(tmp_path / "base")
    parts = [(multiplying_one(base, tmp_path / "one", "ia3", seed=1), 0.7), (adapter(base, tmp_path / "two", seed=2, targets=["q_proj", "down_proj"]), -0.5)]
    parts += [(multiplying_one(base, tmp_path / "three", "oft", seed=3), {"": -1.0, "layers.0": 0.5}), (dora(base, tmp_path / "four", seed=4, targets=["q_proj"], r=2), 0.4)]
    found = weights(baked(base, tmp_path / "out", *parts))
    for name, value in weights(base).items():
        exact = value.double()
        for path, weight in parts:
            module = adapters.read(path).modules.get(name.rpartition(".")[0])
            number = weight if isinstance(weight, float) else 0.5 if "layers.0" in name else -1.0
            exact = exact + (number * moved(module, value, name) if module is not None else 0)
        assert torch.allclose(found[name].double(), exact, rtol=0, atol=2e-6), name


def gpt2(target):
    """A base whose weights lie transposed, with biases that are not zero."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=270, n_positions=32))
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    model.save_pretrained(target)
    return target


def test_weights_that_lie_transposed_are_baked_as_peft_merges_them(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "BLOCK", 1 << 11)
    base = gpt2(tmp_path / "gpt2")
    folder = multiplying_one(base, tmp_path / "it", "ia3", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)
    baked(base, tmp_path / "out", (folder, 1.0))
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(base, folder))
    # PEFT turns no such layer, so the update is made by hand; blocks of 3 and more are cut by the 16 rows that are done at a time
    before = weights(base)["transformer.h.0.mlp.c_fc.weight"]
    for side in (3, 8, 24, 48):
        update = Rotated(rotation(torch.randn(48 // side, side * (side - 1) // 2)), (192, 48))
        own = adapters.Adapter({"transformer.h.0.mlp.c_fc": update}, {}, adapters.Card("peft", "oft", base=str(base), fan_in_fan_out=True))
        checkpoints.apply(checkpoints.plan(base, [(own, 0.5)]), tmp_path / f"out-{side}")
        after = weights(tmp_path / f"out-{side}")["transformer.h.0.mlp.c_fc.weight"]
        assert torch.allclose(after, before + 0.5 * update.delta(before.T).T, atol=1e-6) and not torch.equal(after, before)


@pytest.mark.parametrize("turned", [False, True], ids=["as they are", "transposed"])
def test_an_expert_in_a_stack_goes_by_its_own_rows_only_and_one_with_a_bias_apart_is_refused(tmp_path, turned):
    """No trainer makes these, so the updates are made by hand."""
    base = with_experts(tmp_path / "base", turned)
    layer = "model.layers.0.mlp.experts.down_proj.2"
    card = adapters.Card("peft", "oft", base=str(base))
    update = Rotated(rotation(torch.randn(3, 120)), (32, 48))
    checkpoints.apply(checkpoints.plan(base, [(adapters.Adapter({layer: update}, {}, card), 0.5)]), tmp_path / "out")
    only_the_third_moved(base, tmp_path / "out", update, turned)
    if turned:
        with pytest.raises(AdapterError, match=r"mine.*experts\.down_proj\.2"):
            checkpoints.plan(base, [(adapters.Adapter({layer: Scaled(torch.ones(32), (32, 48))}, {}, card), 1.0)], labels=["mine"])


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_a_tied_head_is_written_apart_and_packed_numbers_are_refused(tmp_path, kind):
    base = write(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    folder = multiplying_one(base, tmp_path / "it", kind, target_modules=["lm_head"], **({"feedforward_modules": []} if kind == "ia3" else {}))
    found, before = weights(baked(base, tmp_path / "out", (folder, 1.0))), weights(base)["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], before)
    update = adapters.read(folder).modules["lm_head"].delta(before)
    assert torch.allclose(found["lm_head.weight"], before + update, atol=1e-6) and float(update.norm()) > 0.1
    packed = weights(base)
    packed["model.embed_tokens.weight"] = before.to(torch.int8)
    save_file(packed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BakeError, match="holds packed numbers"):
        checkpoints.plan(base, [(adapters.read(folder), 1.0)])
