"""OFT and IA3 in the Playground: PEFT's own logits, the dense sum at every weight and in every mix, on packed bases too."""

import json

import peft
import pytest
import torch
import transformers

from lora_studio import adapters
from lora_studio.errors import AdapterError, BlendError, StudioError
from lora_studio.inference.desk import Desk
from lora_studio.inference.hooks import Hooks
from lora_studio.inference.text import Shelf
from lora_studio.multiplied import Rotated, Scaled, rotation
from lora_studio.spec import Base
from lora_studio.training import quantized, text
from tests import tiny
from tests.inference.test_by_layer import ASK, IDS, asked, logits
from tests.inference.test_dora import off, plain
from tests.test_dora import dora
from tests.test_multiplied import KINDS, biased, gpt2, moved, multiplying_one
from tests.training.test_quantized import wide  # noqa: F401

SOME = {"target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A base with biases that are not zero, an adapter of every kind on all its layers, a DoRA and a plain one."""
    place = tmp_path_factory.mktemp("biased")
    base = biased(place / "base")
    tiny.tokenizer().save_pretrained(base)
    paths = {kind: multiplying_one(base, place / kind, kind, seed=number) for number, kind in enumerate(KINDS)}
    paths["dora"] = dora(base, place / "dora", seed=20, targets=["q_proj", "down_proj"])
    paths["plain"] = place / "plain"
    tiny.write_adapter(place / "plain", base, seed=21, ends=("q_proj", "up_proj"))
    return base, paths


@pytest.fixture
def shelf(several):
    base, paths = several
    made = Shelf(Base(id=str(base)), precision="fp32")
    for id, path in paths.items():
        made.hang(id, adapters.read(path), label=id)
    return made


def dense(base, paths, weights: dict) -> torch.Tensor:
    """The logits of the base with `Σ w·ΔW` in its weights and `Σ w·Δb` in its biases, each against the untouched ones."""
    model = plain(base)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for id, weight in weights.items():
            for layer, module in adapters.read(paths[id]).modules.items():
                for name in (f"{layer}.weight", f"{layer}.bias"):
                    model.get_parameter(name).add_(weight * moved(module, before[name], name))
    return logits(model)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_answers_as_pefts_own_model_and_with_weight_zero_as_the_bare_base(shelf, several, kind):
    base, paths = several
    found, bare = shelf.logits(IDS, weights={kind: 1.0}), shelf.logits(IDS, weights={})
    assert off(found, logits(peft.PeftModel.from_pretrained(plain(base), paths[kind]))) < 1e-5 < 1e-2 < off(found, bare)
    assert torch.equal(shelf.logits(IDS, weights={kind: 0.0}), bare) and torch.equal(bare, logits(plain(base)))


@pytest.mark.parametrize("weights", [
    *({kind: weight} for kind in ("ia3", "ia3 of outputs", "oft", "oft of one block", "oft by series") for weight in (1.0, 0.5, -1.0)), {"ia3": 0.8, "plain": -0.6},
    {"oft": 0.7, "ia3": -0.5, "dora": 0.4, "plain": 1.0}, {"oft of small blocks": 0.5, "oft": 0.5, "ia3 of outputs": 0.5, "ia3": 0.5},
], ids=str)  # fmt: skip
def test_at_every_weight_and_in_every_mix_it_is_the_dense_sum(shelf, several, weights):
    assert off(shelf.logits(IDS, weights=weights), dense(*several, weights)) < 1e-5


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_weights_by_layer_act_on_it(shelf, several, kind):
    some = shelf.logits(IDS, weights={kind: {"": 0.5, "layers.1": 0.0}})
    shelf.put("part", {name: module for name, module in adapters.read(several[1][kind]).modules.items() if "layers.0" in name})
    assert torch.equal(some, shelf.logits(IDS, weights={"part": 0.5})) and off(some, shelf.logits(IDS, weights={kind: 0.5})) > 1e-3


def test_a_transposed_linear_is_pefts_for_ia3_and_the_dense_sum_for_oft(tmp_path):
    base = gpt2(tmp_path / "gpt2")
    folder = multiplying_one(base, tmp_path / "it", "ia3", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)
    model = plain(base)
    hooks = Hooks(model, "gpt2", torch.device("cpu"))
    update = Rotated(rotation(torch.randn(6, 28, generator=torch.Generator().manual_seed(0))), (192, 48))
    hooks.put("it", adapters.read(folder).modules)
    hooks.put("turn", {"transformer.h.0.mlp.c_fc": update})
    with hooks.using({"it": 1.0}):
        found = logits(model)
    with hooks.using({"turn": -0.5}):
        turned = logits(model)
    assert off(found, logits(peft.PeftModel.from_pretrained(plain(base), folder))) < 1e-5 < 1e-2 < off(found, logits(model))
    other = plain(base)
    weight = other.transformer.h[0].mlp.c_fc.weight
    weight.data -= 0.5 * update.delta(weight.T).T
    assert off(turned, logits(other)) < 1e-5 < 1e-3 < off(turned, logits(model))


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_in_16_bits_it_is_as_near_the_truth_as_pefts_own_model(several, kind):
    base, paths = several
    shelf = Shelf(Base(id=str(base)), precision="bf16")
    shelf.hang("it", adapters.read(paths[kind]), label="it")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), paths[kind])
    rounded = {name: value.bfloat16().float() for name, value in plain(base).state_dict().items()}
    truth = plain(base)
    truth.load_state_dict(rounded)
    meant = logits(peft.PeftModel.from_pretrained(truth, paths[kind]))
    found = shelf.logits(IDS, weights={"it": 1.0})
    assert found.dtype == torch.bfloat16 and float((found - meant).norm()) < 1.3 * float((logits(theirs) - meant).norm())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", ["ia3", "oft", "oft by series"])
def test_on_a_packed_base_every_layer_answers_as_pefts(wide, tmp_path, bits, kind):  # noqa: F811
    own = {"feedforward_modules": ["down_proj"]} if kind == "ia3" else {}
    folder = multiplying_one(wide, tmp_path / "it", kind, **SOME, **own)
    modules = adapters.read(folder).modules
    how = quantized.options(bits, torch.bfloat16, torch.device("cpu"))
    model, other = (quantized.keep_trainable(text.load_model(wide, "wide", torch.bfloat16, **how)) for _ in range(2))
    hooks = Hooks(model, "wide", torch.device("cpu"))
    hooks.put("it", modules)
    theirs = peft.PeftModel.from_pretrained(other, folder).get_base_model()
    near = {"8bit": 1e-2, "4bit": 5e-3}[bits]  # int8 has steps of 1/127, into which an input may be rounded on either side
    draw = torch.Generator().manual_seed(3)
    for name, module in modules.items():
        given = torch.randn(1, 5, module.shape[1], generator=draw).bfloat16()
        layer, packed = model.get_submodule(name), theirs.get_submodule(name)
        with torch.no_grad():
            bare, meant = layer(given), packed(given)
            assert type(layer).__module__.startswith("bitsandbytes") and torch.equal(bare, packed.get_base_layer()(given))
            with hooks.using({"it": 1.0}):
                found = layer(given)
            with hooks.using({"it": -0.5}):
                half = layer(given)
        assert off(found.float(), meant.float()) < near < 5e-2 < off(found.float(), bare.float()), name
        assert off(half.float(), (1.5 * bare.float() - 0.5 * meant.float())) < near, name


def test_what_does_not_fit_is_a_sentence_and_what_hung_goes_on():
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4), "e": torch.nn.Embedding(4, 6), "c": torch.nn.Conv2d(6, 4, 1)})
    hooks = Hooks(model, "base", torch.device("cpu"))
    fine = Scaled(torch.ones(4), (4, 6))
    hooks.put("it", {"q": fine})
    for modules, words in (
        ({"q": Rotated(torch.ones(2, 4, 4), (4, 8))}, r"q.*\[4, 8\].*\[4, 6\]"), ({"q": fine, "e": fine}, "e is a Embedding in the base"),
        ({"c": fine, "q": fine}, "c is a Conv2d in the base"), ({"x": fine}, "mine"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=words):
            hooks.put("it", modules, label="mine")
        with pytest.raises(AdapterError, match=words):
            hooks.put("new", modules, label="mine")
        assert hooks.ids == {"it"} and hooks._parts[model["q"]]["it"].module.moves.equal(fine.moves)


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_the_bench_answers_bakes_and_measures_it_and_refuses_by_name_what_needs_factors(several, tmp_path, kind):
    base, paths = several
    desk, mine, word = Desk(), [str(paths[kind]), 0.8, "mine"], kind.upper()
    given = {"base": str(base), "device": "cpu", "lock": str(tmp_path / "lock"), "precision": "fp32"}
    said = asked(desk, "answer", **given, messages=ASK, sides={"base": [], "mine": [mine], "both": [mine, [str(paths["plain"]), 0.5]]}, longest=24, temperature=1.0, seed=5)
    assert said["sides"]["mine"]["active"] == [[mine[0], 0.8]] and said["sides"]["mine"]["text"] != said["sides"]["base"]["text"]
    told = asked(desk, "measure", **given, parts=[mine, [str(paths["dora"]), -0.5]], rounds=2)
    assert told["off"] < 1e-5 < 1e-2 < told["moved"]
    out = tmp_path / "out"
    done = asked(desk, "bake", base=str(base), parts=[mine, [str(paths["plain"]), 0.5]], target=str(out))
    assert done["changed"] == (14 if kind == "oft" else 24)
    assert off(logits(plain(out)), dense(base, paths, {kind: 0.8, "plain": 0.5})) < 1e-5
    other = str(tmp_path / "other")
    refused = {
        "preview": {"parts": [mine]}, "blend": {"parts": [mine], "target": other}, "judge": {"parts": [mine]}, "resize": {"path": mine[0], "rank": 1, "target": other},
        "merge": {"parts": [mine, [str(paths["plain"]), 1.0]], "how": "ties", "rank": 2, "target": other},
        "bake": {"base": str(base), "parts": [mine, [str(paths["plain"]), 1.0]], "merge": {"how": "ties", "density": 0.5}},
    }  # fmt: skip
    for verb, request in refused.items():
        with pytest.raises(BlendError, match=rf"is an {word} adapter.*Try it in the Playground, bake it into its base, or bake it and take a plain adapter out with `extract`") as caught:
            asked(desk, verb, **request)
        assert str(caught.value).startswith(kind if verb == "resize" else "mine"), verb
    for form in ("peft", "gguf"):
        with pytest.raises(StudioError, match=rf"An {word} adapter has no B·A.*bake it"):
            asked(desk, "export", path=mine[0], target=other, form=form)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"] and json.loads((out / "config.json").read_text())
