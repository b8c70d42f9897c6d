"""DoRA in the Playground: PEFT's own logits, the dense sum at every weight and in every mix, and refused where the base's numbers are not there."""

import diffusers
import peft
import pytest
import torch
import transformers

from lora_studio import adapters
from lora_studio.dora import Dora
from lora_studio.errors import AdapterError, BlendError, StudioError
from lora_studio.inference.desk import Desk
from lora_studio.inference.draw import Easel
from lora_studio.inference.hooks import Hooks
from lora_studio.inference.text import Shelf
from lora_studio.lowrank import LowRank
from lora_studio.spec import Base
from lora_studio.training import quantized, text
from tests import tiny, tiny_image
from tests.inference.test_by_layer import ASK, IDS, asked, logits
from tests.test_dora import dora
from tests.training.test_quantized import wide  # noqa: F401

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A base whose linear layers have biases that are not zero, with two DoRA adapters and a plain one."""
    place = tmp_path_factory.mktemp("biased")
    model = tiny.model(attention_bias=True)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(place / "base")
    tiny.tokenizer().save_pretrained(place / "base")
    one = dora(place / "base", place / "one", seed=1, targets=TARGETS)
    two = dora(place / "base", place / "two", seed=2, targets=["q_proj", "v_proj"], use_rslora=True, r=2)
    tiny.write_adapter(place / "plain", place / "base", seed=3, ends=("q_proj", "up_proj"))
    return place / "base", {"one": one, "two": two, "plain": place / "plain"}


def plain(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def dense(base, read: dict, weights: dict) -> torch.Tensor:
    """The logits of the base with `Σ w·ΔW` in its weights, each ΔW against the untouched ones."""
    model = plain(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # an adapted embedding is not its head
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for id, weight in weights.items():
        for name, module in read[id].items():
            own = before[f"{name}.weight"]
            model.get_submodule(name).weight.data += weight * (module.delta(own) if isinstance(module, Dora) else module.delta())
    return logits(model)


@pytest.fixture
def shelf(biased):
    base, paths = biased
    made = Shelf(Base(id=str(base)), precision="fp32")
    for id, path in paths.items():
        made.put(id, adapters.read(path).modules)
    return made


def off(found: torch.Tensor, meant: torch.Tensor) -> float:
    return float((found - meant).abs().max() / meant.abs().max())


@pytest.mark.parametrize("id", ["one", "two"])
def test_alone_it_answers_as_pefts_own_model(shelf, biased, id):
    base, paths = biased
    found, bare = shelf.logits(IDS, weights={id: 1.0}), shelf.logits(IDS, weights={})
    assert off(found, logits(peft.PeftModel.from_pretrained(plain(base), paths[id]))) < 1e-5 < 1e-2 < off(found, bare)
    assert torch.equal(shelf.logits(IDS, weights={id: 0.0}), bare) and torch.equal(bare, logits(plain(base)))


@pytest.mark.parametrize("weights", [{"one": 0.3}, {"one": -1.5}, {"one": 0.8, "plain": -0.6}, {"plain": 1.0, "two": 0.5, "one": 0.5}])
def test_at_every_weight_and_in_every_mix_it_is_the_dense_sum(shelf, biased, weights):
    base, paths = biased
    read = {id: adapters.read(path).modules for id, path in paths.items()}
    assert off(shelf.logits(IDS, weights=weights), dense(base, read, weights)) < 1e-5


def test_weights_by_layer_act_on_it_and_a_transposed_linear_is_pefts(shelf, tmp_path):
    some = shelf.logits(IDS, weights={"one": {"": 1.0, "layers.1": 0.0, "embed_tokens": 0.0}})
    shelf.put("part", {name: module for name, module in adapters.read(shelf_path(shelf)).modules.items() if "layers.0" in name})
    assert torch.equal(some, shelf.logits(IDS, weights={"part": 1.0}))
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=270, n_positions=32)).save_pretrained(tmp_path / "gpt2")
    lora = dora(tmp_path / "gpt2", tmp_path / "lora", targets=["c_attn", "mlp.c_fc"], fan_in_fan_out=True)
    model = plain(tmp_path / "gpt2")
    for name, value in model.named_parameters():
        if name.endswith("c_attn.bias"):
            torch.nn.init.normal_(value)
    hooks = Hooks(model, "gpt2", torch.device("cpu"))
    hooks.put("it", adapters.read(lora).modules)
    with hooks.using({"it": 1.0}):
        found = logits(model)
    assert off(found, logits(peft.PeftModel.from_pretrained(model, lora))) < 1e-5


def shelf_path(shelf):
    return shelf.base.id.removesuffix("base") + "one"


def test_an_image_model_is_drawn_with_it_as_pefts_own_linears_and_convolutions(tmp_path):
    base = tiny_image.write_pipeline(tmp_path / "sd")
    lora = dora(base / "unet", tmp_path / "lora", targets=["to_q", "to_out.0", "conv1", "conv_out"], part=diffusers.UNet2DConditionModel)
    easel, read = Easel(Base(id=str(base)), precision="fp32"), adapters.read(lora).modules
    assert {module.kind for module in read.values()} == {"linear", "conv"}
    draw = torch.Generator().manual_seed(0)
    given = {"sample": torch.randn(1, 4, 16, 16, generator=draw), "timestep": 7, "encoder_hidden_states": torch.randn(1, 6, 16, generator=draw)}
    easel.put("it", read)
    with torch.no_grad():
        with easel.using({"it": 1.0}):
            one = easel.pipeline.unet(**given).sample
        with easel.using({"it": -0.7}):
            found = easel.pipeline.unet(**given).sample
        unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet").eval()
        bare = unet(**given).sample
        for name, module in read.items():
            weight = unet.get_submodule(name).weight
            weight.data += -0.7 * module.delta(weight)
        assert off(found, unet(**given).sample) < 1e-5 < 1e-2 < off(one, bare)
        wrapped = peft.PeftModel.from_pretrained(diffusers.UNet2DConditionModel.from_pretrained(base / "unet"), lora).eval()
        assert off(one, wrapped(**given).sample) < 1e-5


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_on_a_quantised_base_it_is_refused_and_a_plain_one_is_not(wide, tmp_path, bits):  # noqa: F811
    lora = dora(wide, tmp_path / "dora", targets=["q_proj"])
    model = text.load_model(wide, "wide", torch.bfloat16, **quantized.options(bits, torch.bfloat16, torch.device("cpu")))
    hooks = Hooks(model, "wide", torch.device("cpu"))
    with pytest.raises(AdapterError, match=r"^mine is a DoRA adapter.*q_proj of wide is not kept in plain ones.*not quantised"):
        hooks.put("it", adapters.read(lora).modules, label="mine")
    assert hooks.ids == set()
    hooks.put("plain", {name: module.product for name, module in adapters.read(lora).modules.items()})


def test_a_layer_without_numbers_or_without_a_direction_is_refused_and_what_hung_goes_on():
    draw = torch.Generator().manual_seed(0)
    update = Dora(LowRank(torch.randn(2, 6, generator=draw), torch.randn(4, 2, generator=draw)), torch.ones(4))
    update.product.B[2] = 0
    for change, words in (
        (lambda layer: layer.to("meta"), "q of base is not kept in plain ones here .Linear, float32"),
        (lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn))), "float8_e4m3fn"),
        (lambda layer: layer.weight.data[2].zero_(), "an output of q is all zeros"),
    ):
        layer = torch.nn.Linear(6, 4)
        hooks = Hooks(torch.nn.ModuleDict({"q": layer}), "base", torch.device("cpu"))
        hooks.put("it", {"q": update.product})
        change(layer)
        with pytest.raises(AdapterError, match=words):
            hooks.put("it", {"q": update})
        assert hooks.ids == {"it"} and hooks._parts[layer]["it"].shift is None


def test_the_bench_answers_bakes_and_measures_it_and_refuses_by_name_what_needs_factors(biased, tmp_path):
    base, paths = biased
    desk, mine = Desk(), [str(paths["one"]), 0.8, "mine"]
    given = {"base": str(base), "device": "cpu", "lock": str(tmp_path / "lock"), "precision": "fp32"}
    said = asked(desk, "answer", **given, messages=ASK, sides={"base": [], "mine": [mine], "both": [mine, [str(paths["plain"]), 0.5]]}, longest=24, temperature=1.0, seed=5)
    assert said["sides"]["mine"]["active"] == [[mine[0], 0.8]] and said["sides"]["mine"]["text"] != said["sides"]["base"]["text"]
    told = asked(desk, "measure", **given, parts=[[str(paths["two"]), 1.3]], rounds=2)
    assert told["off"] < 1e-5 < 1e-2 < told["moved"]
    out = str(tmp_path / "out")
    done = asked(desk, "bake", base=str(base), parts=[mine, [str(paths["plain"]), 0.5]], target=out)
    read = {id: adapters.read(paths[id]).modules for id in ("one", "plain")}
    assert done["changed"] == 7 and off(logits(plain(out)), dense(base, read, {"one": 0.8, "plain": 0.5})) < 1e-5
    refused = {
        "preview": {"parts": [mine]}, "blend": {"parts": [mine], "target": f"{out}2"}, "judge": {"parts": [mine]}, "resize": {"path": mine[0], "rank": 1, "target": f"{out}2"},
        "merge": {"parts": [mine, [str(paths["plain"]), 1.0]], "how": "ties", "rank": 2, "target": f"{out}2"},
        "bake": {"base": str(base), "parts": [mine, [str(paths["plain"]), 1.0]], "merge": {"how": "ties", "density": 0.5}},
    }  # fmt: skip
    for verb, request in refused.items():
        with pytest.raises(BlendError, match=r"is a DoRA adapter.*Try it in the Playground, bake it into its base, or bake it and take a plain adapter out with `extract`") as caught:
            asked(desk, verb, **request)
        assert str(caught.value).startswith("one" if verb == "resize" else "mine"), verb
    for form in ("peft", "gguf"):
        with pytest.raises(StudioError, match="A DoRA adapter has magnitudes beside its B·A"):
            asked(desk, "export", path=mine[0], target=f"{out}2", form=form)
    assert not (tmp_path / "out2").exists()
