"""Adapters on experts that a model keeps in one stack: tried live as PEFT computes them, in any mix, and the base stays as it was."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_studio import adapters, checkpoints
from lora_studio.errors import AdapterError
from lora_studio.inference.desk import Desk
from lora_studio.inference.hooks import Hooks
from lora_studio.inference.mixtures import _Matrix, _Stack
from lora_studio.lowrank import LowRank
from tests import tiny
from tests.inference.test_by_layer import asked
from tests.test_experts import CONFIGS, base, merged, trained

__all__ = ["base"]  # pytest finds fixtures by their names here
IDS = torch.arange(24).view(2, 12)
CPU = torch.device("cpu")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def hooked(base, **folders):
    """A model with adapters hung on it: the model, and its hooks."""
    model = AutoModelForCausalLM.from_pretrained(base)
    hooks = Hooks(model, str(base), CPU)
    for id, folder in folders.items():
        hooks.put(id, adapters.read(folder).modules, label=id)
    return model, hooks


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "parameters": ["experts.down_proj"]}, {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}}])
def test_live_it_is_what_peft_computes_and_the_base_is_itself_bit_for_bit(base, tmp_path, settings):
    folder = trained(base, tmp_path / "adapter", **settings)
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    theirs = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    model, hooks = hooked(base, mine=folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        with hooks.using({"mine": 1.0}):
            assert apart(logits(model), theirs) < 1e-5 < 1e-3 < apart(theirs, plain)
        assert torch.equal(logits(model), plain)
    with hooks.using({"mine": 0.0}):
        assert torch.equal(logits(model), plain)
    assert before.keys() == dict(model.named_parameters()).keys() and all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_in_a_mix_with_any_weights_it_is_the_baked_sum(base, tmp_path):
    left, right = trained(base, tmp_path / "left", 1), trained(base, tmp_path / "right", 2, r=2, parameters=["experts.down_proj"])
    model, hooks = hooked(base, left=left, right=right)
    for weights in ({"left": 0.7, "right": -1.3}, {"left": 0.0, "right": 2.0}, {"left": {"": 0.5, "layers.1": -0.8, "experts.down_proj": 0.0}, "right": 1.0}):
        place = tmp_path / f"baked {len(list(tmp_path.iterdir()))}"
        checkpoints.apply(checkpoints.plan(base, [(adapters.read(folder), weights[folder.name]) for folder in (left, right)]), place)
        with hooks.using(weights):
            found = logits(model)
        assert apart(found, logits(AutoModelForCausalLM.from_pretrained(place))) < 1e-5 < 1e-3 < apart(found, logits(model))
    hooks.take("left")
    with hooks.using({"right": 1.0}):
        assert apart(logits(model), logits(merged(base, right))) < 1e-5


def test_an_adapter_of_fewer_experts_leaves_the_others_alone(base, tmp_path):
    """Where it has an update for one expert only, that one multiplies otherwise, and a token that goes elsewhere is as before."""
    folder = trained(base, tmp_path / "adapter")
    modules = {name: update for name, update in adapters.read(folder).modules.items() if name.endswith(".2")}
    assert len(modules) == 4
    model, hooks = hooked(base)
    hooks.put("one", modules)
    changed = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    for name, update in modules.items():
        stack = changed[name.rpartition(".")[0]]
        with torch.no_grad():
            stack[2] += update.delta().T if hooks.expert_of(name, update).transposed else update.delta()
    twin = AutoModelForCausalLM.from_pretrained(base)
    twin.load_state_dict(changed, strict=False)
    with hooks.using({"one": 1.0}):
        assert apart(logits(model), logits(twin)) < 1e-5


def test_in_16_bits_the_output_is_rounded_as_any_layers_is(base, tmp_path):
    folder = trained(base, tmp_path / "adapter")
    model, hooks = hooked(base, mine=folder)
    with hooks.using({"mine": 1.0}):
        wide = logits(model)
    model, hooks = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), None
    hooks = Hooks(model, str(base), CPU)
    plain = logits(model)
    hooks.put("mine", adapters.read(folder).modules)
    with hooks.using({"mine": 1.0}):
        assert logits(model).dtype == torch.bfloat16 and apart(logits(model).float(), wide) < 0.05
    assert torch.equal(logits(model), plain)


def test_an_expert_that_the_base_has_not_is_refused_and_nothing_is_hung(base, tmp_path):
    modules = adapters.read(trained(base, tmp_path / "adapter")).modules
    name = next(name for name in modules if name.endswith("down_proj.0"))
    model, hooks = hooked(base)
    with pytest.raises(AdapterError, match=r"down_proj\.9"):
        hooks.put("strange", {**modules, name[:-1] + "9": modules[name]})
    assert not hooks.ids and torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("turned", [False, True])
def test_what_stands_in_works_wherever_a_tensor_does(turned):
    draw = torch.Generator().manual_seed(0)
    stack = torch.randn(3, *((5, 4) if turned else (4, 5)), generator=draw)
    update = LowRank(torch.randn(2, 5, generator=draw), torch.randn(4, 2, generator=draw), 0.5)
    meant = stack.clone()
    meant[1] += -0.7 * (update.delta().T if turned else update.delta())
    standing, x = _Stack(stack, {1: [(update, -0.7)]}, turned), torch.randn(6, 5, generator=draw)
    assert standing.shape == stack.shape and standing.dtype == stack.dtype
    assert torch.equal(standing[0], stack[0]) and isinstance(standing[torch.tensor(1)], _Matrix)
    assert torch.allclose(standing[torch.tensor([0, 1])], meant[:2]) and torch.allclose(standing[1:], meant[1:])
    ways = [lambda one: x @ one, lambda one: torch.matmul(x, one), lambda one: torch.mm(x, one)] if turned else [
        lambda one: torch.nn.functional.linear(x, one), lambda one: torch.nn.functional.linear(x, one, torch.ones(4)), lambda one: torch.nn.functional.linear(x, one, bias=torch.ones(4)), lambda one: x @ one.T,
    ]  # fmt: skip
    for way in ways:
        assert torch.allclose(way(standing[1]), way(meant[1]), atol=1e-6)
    batch = x.expand(3, 6, 5)
    assert torch.allclose(torch.bmm(batch, standing if turned else standing.transpose(1, 2)), torch.bmm(batch, meant if turned else meant.transpose(1, 2)), atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_playground_answers_with_it(tmp_path, kind):
    """Through the bench, beside the base: greedy words as those of PEFT's merged model."""
    words = tiny.tokenizer()
    config = CONFIGS[kind]()
    config.vocab_size, config.pad_token_id = len(words), words.pad_token_id
    config.eos_token_id, config.bos_token_id = words.eos_token_id, words.bos_token_id
    torch.manual_seed(3)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)
    adapter = trained(folder, tmp_path / "adapter")
    given = {"base": str(folder), "device": "cpu", "lock": str(tmp_path / "lock"), "precision": "fp32"}
    ask, desk = [{"role": "user", "content": "red fox?"}], Desk()
    told = asked(desk, "answer", **given, longest=12, temperature=0.0, messages=ask, sides={"base": [], "mine": [[str(adapter), 1.0]]})
    said = {side: one["text"] for side, one in told["sides"].items()}
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for side, model in (("base", AutoModelForCausalLM.from_pretrained(folder)), ("mine", merged(folder, adapter))):
        out = model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)
        assert words.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip() == said[side].strip()
    assert said["base"] != said["mine"]
    before = [value.clone() for value in desk.shelf.model.parameters()]
    measured = asked(desk, "measure", **given, parts=[[str(adapter), 1.0, "mine"]], rounds=2)
    assert measured["off"] < 1e-5 < 1e-3 < measured["moved"]  # merged is unmerged, and neither is the base
    assert all(torch.equal(left, right) for left, right in zip(before, desk.shelf.model.parameters()))
