"""A base with weighted adapters: exactly the weighted sum, exactly the base without, the same answer for the same seed."""

import time

import peft
import pytest
import torch

from lora_studio import adapters, blend
from lora_studio.errors import AdapterError, BenchError, BlendError
from lora_studio.home import demo_base
from lora_studio.inference.text import Manner, Shelf, choose
from lora_studio.lowrank import LowRank
from lora_studio.spec import Base
from lora_studio.training import text as training
from tests import tiny

ASK = [{"role": "user", "content": "red fox?"}]
IDS = [2, 40, 41, 42, 1, 3, 60, 61]


def random_adapter(shelf, *, seed, rank=3, ends=("q_proj", "down_proj"), size=0.3):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(rank, layer.in_features, generator=draw) * size, torch.randn(layer.out_features, rank, generator=draw) * size, 2 / rank)
        for name, layer in shelf.layers.items()
        if name.endswith(tuple(ends))
    }


@pytest.fixture
def shelf(base):
    shelf = Shelf(Base(id=str(base)), precision="fp32")
    shelf.put("a", random_adapter(shelf, seed=1, rank=3))
    shelf.put("b", random_adapter(shelf, seed=2, rank=5, ends=("q_proj", "v_proj")))
    return shelf


def bare_logits(base):
    return training.load_model(base, "base", torch.float32).eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def test_with_every_weight_zero_it_is_the_base_bit_for_bit(shelf, base):
    bare = bare_logits(base)
    for weights in ({}, {"a": 0.0}, {"a": 0.0, "b": -0.0}):
        assert torch.equal(shelf.logits(IDS, weights=weights), bare)
    shelf.logits(IDS, weights={"a": 1.0, "b": 2.0})
    assert torch.equal(shelf.logits(IDS, weights={}), bare) and shelf.active == ()
    fresh = Shelf(Base(id=str(base)), precision="fp32")
    assert list(shelf.answer(ASK, weights={"a": 0.0}).pieces) == list(fresh.answer(ASK).pieces)


def test_logits_are_those_of_the_blend_in_peft_live_and_merged(shelf, base, tmp_path):
    parts, weights = {id: random_adapter(shelf, seed=seed, rank=rank, ends=ends) for id, seed, rank, ends in
                      (("a", 1, 3, ("q_proj", "down_proj")), ("b", 2, 5, ("q_proj", "v_proj")))}, {"a": 0.7, "b": -0.4}  # fmt: skip
    got = shelf.logits(IDS, weights=weights)
    blended = blend.stack(list(parts.values()), list(weights.values()))
    shelf.put("sum", blended)
    assert (shelf.logits(IDS, weights={"sum": 1.0}) - got).abs().max() < 1e-5
    for name, data in adapters.write(adapters.with_modules(adapters.Card("peft", base=str(base), task_type="CAUSAL_LM"), blended)).items():
        (tmp_path / name).write_bytes(data)
    wrapped = peft.PeftModel.from_pretrained(training.load_model(base, "base", torch.float32), tmp_path).eval()
    with torch.no_grad():
        live = wrapped(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
        merged = wrapped.merge_and_unload()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert (live - got).abs().max() < 1e-5 and (merged - got).abs().max() < 1e-5
    assert (got - bare_logits(base)).abs().max() > 1e-2


def test_a_weight_acts_like_peft_scaling_and_embeddings_and_heads_are_adapted_too(base, tmp_path):
    model = training.load_model(base, "base", torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "o_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    shelf = Shelf(Base(id=str(base)), precision="fp32")
    shelf.put("a", adapters.read(tmp_path).modules)
    with torch.no_grad():
        for weight in (1.0, -0.5):
            for layer in wrapped.modules():
                if hasattr(layer, "set_scale"):
                    layer.set_scale("default", weight)
            there = wrapped(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
            assert (shelf.logits(IDS, weights={"a": weight}) - there).abs().max() < 1e-5


def test_other_weights_act_at_once(shelf):
    started = time.perf_counter()
    with shelf.using({"a": 0.3, "b": 1.7}):
        seconds = time.perf_counter() - started
    print(f"weights set in {1e6 * seconds:.0f} µs")
    assert seconds < 0.1
    assert not torch.equal(shelf.logits(IDS, weights={"a": 1.0}), shelf.logits(IDS, weights={"a": 1.1}))


def test_an_adapter_taken_off_has_no_effect_and_no_name(shelf, base):
    shelf.take("a")
    assert torch.equal(shelf.logits(IDS, weights={}), bare_logits(base))
    with pytest.raises(KeyError, match="not on the shelf"):
        shelf.logits(IDS, weights={"a": 1.0})


def test_the_same_seed_gives_the_same_answer_and_another_another(shelf):
    manner = Manner(seed=7, temperature=1.0, top_p=0.95, longest=40)
    first, again = ("".join(shelf.answer(ASK, weights={"a": 1.0}, manner=manner)) for _ in range(2))
    other = "".join(shelf.answer(ASK, weights={"a": 1.0}, manner=Manner(seed=8, temperature=1.0, top_p=0.95, longest=40)))
    assert first == again != other


def test_answers_spoken_in_turns_do_not_mix(shelf):
    manner = Manner(seed=3, temperature=0.8, longest=24)
    alone = ["".join(shelf.answer(ASK, weights=weights, manner=manner)) for weights in ({}, {"a": 1.0}, {"a": 0.5, "b": 1.0})]
    turns = [iter(shelf.answer(ASK, weights=weights, manner=manner)) for weights in ({}, {"a": 1.0}, {"a": 0.5, "b": 1.0})]
    texts = ["", "", ""]
    for _ in range(30):
        for number, pieces in enumerate(turns):
            texts[number] += next(pieces, "")
    assert texts == alone and len(set(alone)) == 3


def test_greedy_answers_are_those_of_generate(shelf):
    prompt, _ = shelf.prompt(ASK)
    there = shelf.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=32, do_sample=False, use_cache=True)
    answer = shelf.answer(ASK, manner=Manner(longest=32))
    said = "".join(answer)
    assert answer.tokens == [token for token in there[0, len(prompt) :].tolist() if token != 1]
    assert said == shelf.decode(answer.tokens)


def test_a_long_answer_of_many_byte_characters_comes_in_whole_ones(shelf, monkeypatch):
    text = "Größe 東京 🦊🦉 naïve — ça va? " * 8
    wanted = iter(shelf.tokenizer(text, add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("lora_studio.inference.text.choose", lambda *_: next(wanted, 1))
    answer = shelf.answer(ASK, manner=Manner(longest=2000))
    pieces = list(answer)
    assert "".join(pieces) == text and answer.ended == "end" and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(answer.tokens) > len(text)


def test_bytes_that_are_no_text_still_come_out_as_the_whole_decodes(shelf):
    answer = shelf.answer(ASK, manner=Manner(seed=1, temperature=3.0, longest=120))
    assert "".join(answer) == shelf.decode(answer.tokens)


def test_answers_end_where_the_room_ends(shelf):
    answer = shelf.answer("x" * 500, manner=Manner(temperature=3.0, longest=100))
    assert "".join(answer) is not None and answer.ended in ("context", "end") and len(answer.tokens) <= 12
    with pytest.raises(BenchError, match="has 600 tokens.*room for 512"):
        shelf.answer("x" * 600)


def test_drawing_takes_the_likeliest_that_have_top_p():
    logits = torch.tensor([0.0, 3.0, 2.0, -9.0])
    draw = torch.Generator().manual_seed(0)
    assert {choose(logits, Manner(temperature=1.0, top_p=0.5), draw) for _ in range(50)} == {1}
    counts = torch.bincount(torch.tensor([choose(logits, Manner(temperature=1.0), draw) for _ in range(4000)]), minlength=4) / 4000
    assert (counts - torch.softmax(logits, 0)).abs().max() < 0.03
    with pytest.raises(BenchError, match="Lower the weights"):
        choose(torch.tensor([float("nan"), 1.0]), Manner(), draw)


def test_what_cannot_be_tried_is_refused_by_name(shelf):
    strange = {"model.layers.9.self_attn.q_proj": LowRank(torch.ones(1, 32), torch.ones(32, 1))}
    with pytest.raises(AdapterError, match="None of the 1 layers of Pirate"):
        shelf.put("x", strange, label="Pirate")
    with pytest.raises(AdapterError, match="shape"):
        shelf.put("x", {"model.layers.0.self_attn.q_proj": LowRank(torch.ones(1, 31), torch.ones(32, 1))})
    with pytest.raises(AdapterError, match="a conv update"):
        shelf.put("x", {"model.layers.0.self_attn.q_proj": LowRank(torch.ones(1, 3, 1, 1), torch.ones(3, 1, 1, 1), 1.0, "conv")})
    assert shelf.ids == {"a", "b"}
    for weights in ({"a": float("nan")}, {"a": float("inf")}, {"a": 1e9}):
        with pytest.raises(BlendError, match="not a number from"):
            shelf.answer(ASK, weights=weights)
    for bad in ([], [{"role": "user"}], ["hello"], None):
        with pytest.raises(BenchError):
            shelf.answer(bad)
    for setting in ({"temperature": -1}, {"top_p": 0}, {"longest": 0}, {"seed": "x"}, {"temperature": float("nan")}):
        with pytest.raises(BenchError, match=next(iter(setting))):
            Manner(**setting)


def test_the_demo_answers_and_takes_weights():
    if demo_base("demo-text") is None:
        pytest.skip("the demo base is not here")
    shelf = Shelf(Base(id="demo-text"), precision="fp32")
    shelf.put("a", random_adapter(shelf, seed=1, rank=8, ends=("q_proj", "v_proj"), size=0.05))
    bare = shelf.answer(ASK)
    text = "".join(bare)
    assert text.strip() and bare.ended == "end" and not text.startswith("<|")
    started = time.perf_counter()
    piece = next(iter(shelf.answer(ASK, weights={"a": 1.3})))
    print(f"demo-text: first piece with new weights {piece!r} after {1000 * (time.perf_counter() - started):.1f} ms")


def test_16_bit_bases_round_once(base):
    shelf = Shelf(Base(id=str(base)), precision="bf16")
    modules = random_adapter(shelf, seed=1)
    shelf.put("a", modules)
    name, layer = "model.layers.0.self_attn.q_proj", shelf.layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 32).bfloat16()
    with shelf.using({"a": 0.7}), torch.no_grad():
        got = layer(x)
    meant = torch.nn.functional.linear(x, layer.weight).float() + x.float() @ (0.7 * modules[name].delta()).T
    assert got.dtype == torch.bfloat16 and (got.float() - meant).abs().max() <= meant.abs().max() / 128


def test_gpt2_layers_with_weights_the_other_way_round(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), lora).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    shelf = Shelf(Base(id=str(tmp_path / "gpt2")), precision="fp32")
    shelf.put("a", adapters.read(tmp_path / "adapter").modules)
    with torch.no_grad():
        there = wrapped(input_ids=torch.tensor([IDS])).logits[0]
    assert (shelf.logits(IDS, weights={"a": 1.0}) - there).abs().max() < 1e-5
