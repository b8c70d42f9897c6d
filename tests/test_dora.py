"""DoRA updates: read with their magnitudes or refused by name, never taken for a product, and baked as PEFT merges them."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file

from lora_studio import adapters, blend, checkpoints
from lora_studio.checkpoints import numbers
from lora_studio.dora import Dora
from lora_studio.errors import AdapterError, BakeError, BlendError
from lora_studio.lowrank import LowRank
from tests import tiny_image
from tests.test_checkpoints import BF16, LINEARS, baked, weights, write

CONVOLUTION = {"conv": torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), "linear": torch.nn.Linear(6, 10), "embedding": torch.nn.Embedding(12, 5)}


def stirred(model, seed: int):
    """A fresh DoRA made one that was trained: no factor is zero and no length is the weight's own."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.4 * torch.randn(parameter.shape, generator=draw).abs())
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def dora(base, target, *, seed: int = 0, targets=LINEARS, part=transformers.AutoModelForCausalLM, base_name: str = "", **more):
    """A DoRA adapter that PEFT saved, for a base that it calls `base_name`."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "use_dora": True, "target_modules": targets, **more})
    made = stirred(peft.get_peft_model(part.from_pretrained(base), config), seed)
    made.save_pretrained(target, save_embedding_layers=False)
    known = json.loads((target / adapters.CONFIG).read_text())
    (target / adapters.CONFIG).write_text(json.dumps({**known, "base_model_name_or_path": base_name or str(base)}))
    return target


def merged(base, target, part=transformers.AutoModelForCausalLM, **how):
    return peft.PeftModel.from_pretrained(part.from_pretrained(base, **how), target).merge_and_unload()


# ---- one update


def test_it_adds_what_peft_adds_to_a_linear_a_convolution_and_an_embedding_and_the_magnitude_is_the_new_length(monkeypatch):
    monkeypatch.setattr("lora_studio.dora.STRETCH", 20)  # several stretches of rows
    for name, layer in CONVOLUTION.items():
        before = layer.weight.detach().clone()
        wrapped = stirred(peft.get_peft_model(torch.nn.ModuleDict({name: layer}), peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=[name])), 1)
        own = wrapped.base_model.model[name]
        A, B, kind = own.lora_embedding_A, own.lora_embedding_B, "embedding"
        if name != "embedding":
            A, B, kind = own.lora_A["default"], own.lora_B["default"], {"conv": "conv"}.get(name, "linear")
        A, B = (one["default"] if name == "embedding" else one.weight for one in (A, B))
        update = Dora(LowRank(A.detach(), B.detach(), 3.0, kind), own.lora_magnitude_vector["default"].weight.detach().flatten())
        meant = wrapped.merge_and_unload()[name].weight.detach() - before
        assert float((update.delta(before) - meant).norm() / meant.norm()) < 1e-6 and float(meant.norm()) > 0.1
        after = before + update.delta(before)
        lengths = after.norm(dim=0) if name == "embedding" else after.flatten(1).norm(dim=1)
        assert torch.allclose(lengths, update.magnitude.abs(), rtol=1e-5) and update.shape == tuple(before.shape)


def test_some_outputs_are_an_update_of_their_own_and_a_misfit_is_refused():
    draw = torch.Generator().manual_seed(0)
    update = Dora(LowRank(torch.randn(2, 6, generator=draw), torch.randn(8, 2, generator=draw), 0.5), torch.rand(8, generator=draw) + 1)
    weight = torch.randn(8, 6, generator=draw)
    assert torch.allclose(update.part(2, 5).delta(weight[2:5]), update.delta(weight)[2:5], atol=1e-6)
    with pytest.raises(ValueError, match="8 outputs"):
        Dora(update.product, torch.ones(6))


# ---- files


def no_product(read) -> None:
    """No update of an adapter can be taken for factors: not looked at, not summed, not written."""
    for module in read.modules.values():
        assert not hasattr(module, "A") and not hasattr(module, "B")
        with pytest.raises(TypeError):
            module.delta()
    for act in (lambda: blend.stack([read.modules], [1.0]), lambda: adapters.with_modules(read.card, read.modules)):
        with pytest.raises(AttributeError):
            act()


def test_it_is_read_with_its_magnitudes_and_nothing_can_take_it_for_a_product(base, tmp_path):
    folder = dora(base, tmp_path / "dora", targets=["q_proj", "embed_tokens"])
    read = adapters.read(folder)
    tensors = load_file(folder / adapters.WEIGHTS)
    assert read.card.method == "dora" and len(read.modules) == 3
    for name, module in read.modules.items():
        assert torch.equal(module.magnitude, tensors[f"base_model.model.{name}.lora_magnitude_vector"]) and module.product.scale == 7 / 3
    no_product(read)


@pytest.mark.parametrize(("change", "words"), [
    (lambda own: {f"{own}.lora_magnitude_vector": None}, "has 0 magnitudes for 32 outputs"), (lambda own: {f"{own}.lora_magnitude_vector": torch.ones(7)}, "has 7 magnitudes for 32 outputs"),
    (lambda own: {f"{own}.lora_magnitude_vector": torch.ones(32, dtype=torch.int32)}, "has 32 magnitudes for 32 outputs"),
    (lambda own: {f"{own}x.lora_magnitude_vector": torch.ones(7)}, "q_projx has 7 magnitudes for 0 outputs"), (lambda own: {f"{own}.lora_magnitude_vector.weight": torch.ones(32)}, "twice"),
])  # fmt: skip
def test_magnitudes_that_are_missing_too_many_or_of_no_layer_are_named(base, tmp_path, change, words):
    folder = dora(base, tmp_path / "dora", targets=["q_proj"])
    tensors = {**load_file(folder / adapters.WEIGHTS), **change("base_model.model.model.layers.1.self_attn.q_proj")}
    (folder / adapters.WEIGHTS).write_bytes(save({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    with pytest.raises(AdapterError, match=words):
        adapters.read(folder)


def test_where_full_rank_will_do_it_is_let_through_and_biases_and_other_starts_still_are_not(base, tmp_path):
    card = adapters.inspect(dora(base, tmp_path / "dora", targets=["q_proj"]))
    adapters.refuse_blend({"mine": card}, takes=("dora",))
    with pytest.raises(BlendError, match=r"^mine is a DoRA.*Playground.*bake it.*`extract`"):
        adapters.refuse_blend({"mine": card})
    for options, words in (({"init_lora_weights": "pissa"}, "pissa"), ({"modules_to_save": ["lm_head"]}, "lm_head")):
        odd = adapters.inspect(dora(base, tmp_path / words, targets=["q_proj"], **options))
        with pytest.raises(BlendError, match=f"mine.*{words}"):
            adapters.refuse_blend({"mine": odd}, takes=("dora",))


# ---- baked


def same(found: dict, model) -> None:
    """Whether every tensor is PEFT's within 1e-6 of its largest number."""
    for name, value in model.state_dict().items():
        if name in found:
            assert float((found[name] - value).abs().max()) <= 1e-6 * float(value.abs().max()), name


@pytest.mark.parametrize("block", [1 << 20, 1 << 13], ids=["one block", "blocks"])
def test_baked_it_is_what_peft_merges(tmp_path, monkeypatch, block):
    monkeypatch.setattr(numbers, "BLOCK", block)
    base = write(tmp_path / "base", torch.float32, attention_bias=True)
    lora = dora(base, tmp_path / "dora", seed=1, targets=[*LINEARS, "embed_tokens", "lm_head"], use_rslora=True)
    found = weights(baked(base, tmp_path / "out", (lora, 1.0)))
    same(found, merged(base, lora))
    assert sum(not torch.equal(found[name], value) for name, value in weights(base).items()) == 16
    plan = checkpoints.plan(base, [(adapters.read(lora), 1.0)])
    assert checkpoints.loss(plan).overall < 1e-6


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_in_16_bits_it_is_rounded_once(tmp_path, dtype):
    """PEFT goes through the precision several times, so the truth is the fp64 formula."""
    base = write(tmp_path / "base", dtype)
    lora = dora(base, tmp_path / "dora", seed=1)
    found, read = weights(baked(base, tmp_path / "out", (lora, 1.0))), adapters.read(lora).modules
    bits = 8 if dtype == BF16 else 11
    for name, before in weights(base).items():
        module = read.get(name.removesuffix(".weight"))
        if module is None:
            assert torch.equal(found[name], before)
            continue
        V = before.double() + module.product.scale * module.product.B.double() @ module.product.A.double()
        exact = module.magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True)
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs())[1].clamp_min(-13 if bits == 11 else -125) - bits)
        assert ((found[name].double() - exact).abs() <= 0.51 * unit).all(), name


@pytest.mark.parametrize("block", [1 << 20, 1 << 13], ids=["one block", "blocks"])
def test_with_others_it_is_the_exact_sum_each_against_the_untouched_base(tmp_path, monkeypatch, block):
    from tests.test_checkpoints import adapter

    monkeypatch.setattr(numbers, "BLOCK", block)
    base = write(tmp_path / "base", torch.float32)
    parts = [(dora(base, tmp_path / "one", seed=1), 0.7), (adapter(base, tmp_path / "two", seed=2, targets=["q_proj", "down_proj"]), -0.5)]
    parts.append((dora(base, tmp_path / "three", seed=3, targets=["q_proj"], r=2), {"": -0.4, "layers.0": 0.9}))
    found, before = weights(baked(base, tmp_path / "out", *parts)), weights(base)
    for name, value in before.items():
        exact, layer = value.double(), name.removesuffix(".weight")
        for path, weight in parts:
            module = adapters.read(path).modules.get(layer)
            if module is not None:
                number = weight if isinstance(weight, float) else 0.9 if "layers.0" in name else -0.4
                exact = exact + number * (module.delta(value) if isinstance(module, Dora) else module.delta()).double()
        assert torch.allclose(found[name].double(), exact, rtol=0, atol=1e-6), name


def test_weights_that_lie_transposed_and_a_tied_embedding_or_head_are_baked_as_peft_merges_them(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "BLOCK", 1 << 12)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    lora = dora(tmp_path / "gpt2", tmp_path / "lora", targets=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    baked(tmp_path / "gpt2", tmp_path / "out", (lora, 1.0))
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(tmp_path / "gpt2", lora))

    base = write(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    before = weights(base)["model.embed_tokens.weight"]
    for target, changed, kept in (("embed_tokens", "model.embed_tokens", "lm_head"), ("lm_head", "lm_head", "model.embed_tokens")):
        lora = dora(base, tmp_path / target, targets=[target])
        found = weights(baked(base, tmp_path / f"out-{target}", (lora, 1.0)))
        assert torch.equal(found[f"{kept}.weight"], before) and not torch.equal(found[f"{changed}.weight"], before)
        assert torch.allclose(found[f"{changed}.weight"], merged(base, lora).get_submodule(changed).weight, atol=1e-6)


def test_a_pipelines_linears_and_convolutions_are_baked_as_peft_merges_them(tmp_path):
    import diffusers

    base = tiny_image.write_pipeline(tmp_path / "sd")
    lora = dora(base / "unet", tmp_path / "lora", targets=["to_q", "ff.net.2", "conv1", "conv_in"], part=diffusers.UNet2DConditionModel)
    baked(base, tmp_path / "out", (lora, 1.0))
    found, before = weights(tmp_path / "out" / "unet"), weights(base / "unet")
    same(found, merged(base / "unet", lora, diffusers.UNet2DConditionModel))
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in adapters.read(lora).modules} and "conv_in.weight" in changed


def with_experts(folder, turned: bool):
    """A mixture whose experts are kept in one stack, `turned` as transposed matrices, or by name; each (32, 48)."""
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.GptOssConfig if turned else transformers.Qwen3MoeConfig
    more = {"intermediate_size": 48, "num_local_experts": 4} if turned else {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
    transformers.AutoModelForCausalLM.from_config(config(**common, **more), dtype=torch.float32).save_pretrained(folder)
    return folder


def only_the_third_moved(base, out, update, turned: bool) -> None:
    """Of the experts the one numbered 2 has half of the update, and nothing else has changed."""
    before, after = weights(base), weights(out)
    (changed,) = [name for name, value in after.items() if not torch.equal(value, before[name])]
    old, new = before[changed], after[changed]
    if old.ndim == 3:
        assert all(torch.equal(old[number], new[number]) for number in (0, 1, 3))
        old, new = old[2], new[2]
    old, new = (old.T, new.T) if turned else (old, new)
    assert torch.allclose(new, old + 0.5 * update.delta(old), atol=1e-6)


@pytest.mark.parametrize("turned", [False, True], ids=["as they are", "transposed"])
def test_an_expert_in_a_stack_goes_by_its_own_rows_only(tmp_path, turned):
    """No trainer makes these, so the update is made by hand."""
    base = with_experts(tmp_path / "base", turned)
    layer = "model.layers.0.mlp.experts.down_proj.2"
    update = Dora(LowRank(torch.randn(2, 48), torch.randn(32, 2), 0.5), torch.rand(32) + 0.5)
    adapter = adapters.Adapter({layer: update}, {}, adapters.Card("peft", "dora", base=str(base)))
    checkpoints.apply(checkpoints.plan(base, [(adapter, 0.5)]), tmp_path / "out")
    only_the_third_moved(base, tmp_path / "out", update, turned)


def test_packed_numbers_and_an_output_without_a_direction_are_refused_and_nothing_is_written(tmp_path):
    base = write(tmp_path / "base", torch.float32)
    lora = dora(base, tmp_path / "dora", targets=["q_proj"])
    found, name = weights(base), "model.layers.0.self_attn.q_proj.weight"
    found[name][3] = 0
    save_file(found, base / "model.safetensors", {"format": "pt"})
    files, tensors = lora / adapters.WEIGHTS, load_file(lora / adapters.WEIGHTS)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3] = 0
    files.write_bytes(save(tensors, {"format": "pt"}))
    plan = checkpoints.plan(base, [(adapters.read(lora), 1.0)], labels=["mine"])
    for act in (lambda: checkpoints.loss(plan), lambda: checkpoints.apply(plan, tmp_path / "out")):
        with pytest.raises(AdapterError, match=r"mine: an output of model\.layers\.0\.self_attn\.q_proj is all zeros"):
            act()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "dora"}
    found[name] = found[name].to(torch.int8)
    save_file(found, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BakeError, match="holds packed numbers"):
        checkpoints.plan(base, [(adapters.read(lora), 1.0)])


