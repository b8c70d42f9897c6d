"""Weights by layer through the bench: what is saved or baked equals what was tried live, and what cannot be put together is refused by name."""

import json
import socket

import diffusers
import peft
import pytest
import torch
import transformers

from lora_studio import adapters, blend
from lora_studio.bench import Job
from lora_studio.errors import BlendError
from lora_studio.inference.desk import Desk
from lora_studio.inference.draw import Easel
from lora_studio.inference.text import Shelf
from lora_studio.spec import Base
from tests import tiny, tiny_image

IDS = [2, 40, 41, 42, 1, 3, 60, 61]
ASK = [{"role": "user", "content": "red fox?"}]
ONE, TWO = {"": 0.7, "model.layers.0": -0.4, "mlp": 0.0}, {"layers.0-1.self_attn.q_proj": 1.3, "": 0.5}
UNET_ONE = {"": 0.8, "mid_block": 0.0, "up_blocks.0-3": -0.5, "down_blocks.1": 1.2, "text_encoder": 0.3}


@pytest.fixture(scope="module")
def desk():
    return Desk()


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("pair")
    return [
        tiny.write_adapter(place / "one", base, seed=1, ends=("q_proj", "down_proj")),
        tiny.write_adapter(place / "two", base, seed=2, rank=5, ends=("q_proj", "v_proj")),
    ]


def asked(desk, verb: str, **request) -> dict:
    """What the bench answers last, in this process; its events go to the other end of a real socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        return desk.do(Job({"verb": verb, **request}, ours))[1]


def said(desk, base, parts, tmp_path) -> str:
    asking = {"messages": ASK, "seed": 5, "temperature": 1.0, "longest": 24, "precision": "fp32"}
    return asked(desk, "answer", base=str(base), device="cpu", lock=str(tmp_path / "lock"), parts=parts, **asking)["sides"]["answer"]["text"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def test_a_saved_blend_by_layer_and_a_baked_one_give_the_logits_and_the_words_of_the_playground(desk, base, pair, tmp_path):
    shelf, parts = Shelf(Base(id=str(base)), precision="fp32"), [[pair[0], ONE], [pair[1], TWO]]
    for path in pair:
        shelf.put(path, adapters.read(path).modules)
    live, bare = shelf.logits(IDS, weights=dict(parts)), shelf.logits(IDS, weights={})
    told = asked(desk, "blend", parts=parts, target=str(tmp_path / "saved"))
    assert told["loss"] < 1e-6 and [parent["weight"] for parent in told["parents"]] == [ONE, TWO]
    wrapped = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved")
    assert float((logits(wrapped) - live).abs().max()) <= 1e-5 < 1e-2 < float((live - bare).abs().max())
    assert float((live - shelf.logits(IDS, weights={pair[0]: ONE[""], pair[1]: TWO[""]})).abs().max()) > 1e-2, "the patterns do act"
    asked(desk, "bake", base=str(base), parts=parts, target=str(tmp_path / "baked"))
    assert float((logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked")) - live).abs().max()) <= 1e-5
    assert said(desk, base, parts, tmp_path) == said(desk, base, [[str(tmp_path / "saved"), 1.0]], tmp_path) != said(desk, base, [], tmp_path)


@pytest.mark.parametrize(("worth", "taken"), [(10_000_000, 1), (10_000, 3)])
def test_a_small_model_speaks_on_as_many_threads_as_it_is_worth_and_the_bench_has_its_own_back(desk, base, tmp_path, monkeypatch, worth, taken):
    """The tiny base has 26,944 parameters."""
    seen, before = set(), torch.get_num_threads()
    monkeypatch.setattr("lora_studio.training.crew.WORTH", worth)
    torch.set_num_threads(4)
    try:
        said(desk, base, [], tmp_path)
        handle = desk.shelf.model.register_forward_hook(lambda *given: seen.add(torch.get_num_threads()))
        said(desk, base, [], tmp_path)
        handle.remove()
        assert seen == {taken} and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_layers_of_weight_0_are_the_bases_bit_for_bit_and_uniform_weights_are_the_number(base, pair):
    shelf = Shelf(Base(id=str(base)), precision="fp32")
    shelf.put("a", adapters.read(pair[0]).modules)
    bare, half = shelf.logits(IDS, weights={}), shelf.logits(IDS, weights={"a": 0.5})
    assert torch.equal(shelf.logits(IDS, weights={"a": {"": 0.0, "mlp": -0.0}}), bare) and torch.equal(shelf.logits(IDS, weights={"a": {"model": 0.0}}), bare)
    assert torch.equal(shelf.logits(IDS, weights={"a": {"": 0.5}}), half) and torch.equal(shelf.logits(IDS, weights={"a": {"*.layers": 0.5}}), half)
    assert not torch.equal(shelf.logits(IDS, weights={"a": {"": 0.5, "layers.1": 0.0}}), half) and shelf.active == ()
    with pytest.raises(BlendError, match=r"layers\.7 means no layer"):
        shelf.answer(ASK, weights={"a": {"layers.7": 0.5}})


def test_the_same_adapter_twice_has_the_sum_of_its_weights_in_each_layer(desk, base, pair, tmp_path):
    twice = [[pair[0], ONE], [pair[0], {"layers.1": 0.25, "": 0.0}]]
    once = [[pair[0], {"": 0.7, "layers.0": -0.4, "layers.1": 0.95, "layers.1.mlp": 0.25, "layers.0.mlp": 0.0}]]
    asked(desk, "blend", parts=twice, target=str(tmp_path / "twice"))
    asked(desk, "blend", parts=once, target=str(tmp_path / "once"))
    assert blend.difference(*(adapters.read(tmp_path / name).modules for name in ("twice", "once"))).overall < 1e-6
    assert said(desk, base, twice, tmp_path) == said(desk, base, once, tmp_path) == said(desk, base, [[str(tmp_path / "twice"), 1.0]], tmp_path)


def test_a_preview_by_layer_tells_the_true_norms_angles_and_losses(desk, pair, tmp_path):
    parts = [[pair[0], ONE], [pair[1], TWO]]
    told, plain = asked(desk, "preview", parts=parts), asked(desk, "preview", parts=[[path, 1.0] for path in pair])
    assert told["norms"] == plain["norms"] == plain["sizes"] and told["cosines"] == plain["cosines"] == plain["acting"]
    read = [adapters.read(path).modules for path in pair]
    weighted = [blend.stack([modules], [weight]) for modules, (_, weight) in zip(read, parts)]
    dense = [torch.cat([(one[name].delta() if name in one else torch.zeros(read[0].get(name, read[1].get(name)).shape)).double().flatten() for name in dict.fromkeys([*read[0], *read[1]])]) for one in weighted]
    assert told["sizes"] == pytest.approx([float(one.norm()) for one in dense], rel=1e-6)
    assert told["acting"][0][1] == pytest.approx(float(dense[0] @ dense[1] / dense[0].norm() / dense[1].norm()), abs=1e-7)
    assert told["norm"] == pytest.approx(float((dense[0] + dense[1]).norm()), rel=1e-6)
    small = asked(desk, "blend", parts=parts, rank=2, target=str(tmp_path / "small"))
    assert small["loss"] == pytest.approx(told["losses"][2], rel=1e-4)


def test_an_image_adapter_by_block_is_saved_and_baked_as_it_was_drawn(desk, tmp_path):
    base = tiny_image.write_pipeline(tmp_path / "sd")
    found = tiny_image.random_adapter(base, seed=1, ends=("to_q", "ff.net.2", "conv1", "text_encoder.encoder.layers.0.self_attn.q_proj"))
    other = tiny_image.random_adapter(base, seed=2, ends=("to_q", "to_v", "conv2", "proj_in"), rank=2)
    for name, modules in (("one", found), ("two", other)):
        (tmp_path / name).mkdir()
        for file, data in tiny_image.adapter_files(base, modules).items():
            (tmp_path / name / file).write_bytes(data)
    parts = [[str(tmp_path / "one"), UNET_ONE], [str(tmp_path / "two"), {"mid_block": 1.5, "attn1.to_q": -0.3}]]
    easel = Easel(Base(id=str(base)), precision="fp32")
    for path, _ in parts:
        easel.put(path, adapters.read(path).modules)
    draw = torch.Generator().manual_seed(0)
    given = {"sample": torch.randn(1, 4, 16, 16, generator=draw), "timestep": 7, "encoder_hidden_states": torch.randn(1, 6, 16, generator=draw)}

    def seen(unet) -> torch.Tensor:
        with torch.no_grad():
            return unet.eval()(**given).sample

    with easel.using(dict(parts)):
        live = seen(easel.pipeline.unet)
    with easel.using({path: 1.0 for path, _ in parts}):
        assert float((seen(easel.pipeline.unet) - live).abs().max()) > 1e-2, "the patterns do act"
    told = asked(desk, "blend", parts=parts, target=str(tmp_path / "saved"))
    assert told["loss"] < 1e-6
    stock = diffusers.StableDiffusionPipeline.from_pretrained(base)
    from lora_studio.adapters import pipeline_files

    weights, config = (tmp_path / "saved" / adapters.WEIGHTS).read_bytes(), json.loads((tmp_path / "saved" / adapters.CONFIG).read_text())
    (tmp_path / "saved" / pipeline_files.NAME).write_bytes(pipeline_files.to_pipeline_file(weights, config, "unet"))
    stock.load_lora_weights(tmp_path / "saved", weight_name=pipeline_files.NAME)
    assert float((seen(stock.unet) - live).abs().max()) <= 1e-5
    asked(desk, "bake", base=str(base), parts=parts, target=str(tmp_path / "baked"))
    baked = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "baked")
    assert float((seen(baked.unet) - live).abs().max()) <= 1e-5
    before, after = (dict(pipeline.text_encoder.named_parameters()) for pipeline in (diffusers.StableDiffusionPipeline.from_pretrained(base), baked))
    name = next(name for name in before if name.endswith("encoder.layers.0.self_attn.q_proj.weight"))
    module = found["text_encoder.encoder.layers.0.self_attn.q_proj"]
    assert torch.allclose(after[name] - before[name], 0.3 * module.delta(), atol=1e-6) and float(module.delta().norm()) > 0.1


def odd_one(folder, base, options: dict, said: dict):
    """An adapter that PEFT saved with these options, on this base; `said` is written into its configuration where making it needs data."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options})
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)
    known = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps({**known, "base_model_name_or_path": str(base), **said}))
    return str(folder)


REFUSED = [
    ("dora", {"use_dora": True}, {}, "DoRA", "`extract`"), ("bias", {"bias": "lora_only"}, {}, "biases", "bias none"),
    ("lora_bias", {"lora_bias": True}, {}, "biases", "without lora_bias"), ("pissa", {"init_lora_weights": "pissa"}, {}, "pissa", "path_initial_model_for_weight_conversion"),
    ("olora", {"init_lora_weights": "olora"}, {}, "olora", "path_initial_model_for_weight_conversion"),
    ("corda", {}, {"init_lora_weights": "corda"}, "corda", "path_initial_model_for_weight_conversion"),
    ("loftq", {}, {"init_lora_weights": "loftq"}, "loftq", "train it without loftq"),
    ("whole", {"modules_to_save": ["lm_head"]}, {}, "lm_head", "without modules_to_save"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "said_", "what", "way_out"), REFUSED, ids=[row[0] for row in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_low_rank_is_refused_by_name_with_the_way_out_in_blend_bake_and_playground(desk, pair, tmp_path, name, options, said_, what, way_out):
    base = tiny.write_base(tmp_path / "base", attention_bias=True)
    odd = odd_one(tmp_path / name, base, options, said_)
    fine = tiny.write_adapter(tmp_path / "fine", base, seed=1)
    for parts in ([[odd, 1.0]], [[fine, 1.0], [odd, {"": 0.5, "q_proj": 1.0}]]):
        acts = {
            "preview": {}, "blend": {"target": str(tmp_path / "out")}, "bake": {"base": str(base), "target": str(tmp_path / "out")},
            "answer": {"base": str(base), "device": "cpu", "lock": str(tmp_path / "lock"), "messages": ASK}, "merge": {"how": "ties", "rank": 2, "target": str(tmp_path / "out")},
        }  # fmt: skip
        for verb, request in acts.items():
            if (verb == "merge" and len(parts) < 2) or (name == "dora" and verb in ("bake", "answer")):  # these take it: see test_dora.py
                continue
            with pytest.raises(BlendError) as caught:
                asked(desk, verb, parts=parts, **request)
            sentence = str(caught.value)
            assert sentence.startswith(f"{name} ") and what in sentence and way_out in sentence, (verb, sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("weight", "words"), [
    ({"layers.9": 0.5}, r"layers\.9 means no layer of one.*model\.layers\.0, model\.layers\.1"), ({"layers..1": 0.5}, "no pattern of layers"),
    ({"mlp": "much"}, "of mlp is not a number"), ([1.0], "is not a number"), ({"transformer_blocks.0": 1.0}, "means no layer of one"),
])  # fmt: skip
def test_a_weight_that_cannot_be_is_one_sentence_wherever_it_is_given(desk, base, pair, tmp_path, weight, words):
    parts = [[pair[1], 1.0], [pair[0], weight, "one"]]
    for verb, request in {"preview": {}, "blend": {"target": str(tmp_path / "out")}, "bake": {"base": str(base)}, "merge": {"how": "slerp", "target": str(tmp_path / "out")}}.items():
        with pytest.raises(BlendError, match=words):
            asked(desk, verb, parts=parts, **request)
    with pytest.raises(BlendError, match=words):
        said(desk, base, parts, tmp_path)
    assert not (tmp_path / "out").exists()
