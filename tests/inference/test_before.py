"""A tuned prompt or prefix in the Playground: PEFT's own logits and answers, beside a plain adapter too, and a base that stays what it was."""

import peft
import pytest
import torch
import transformers

from lora_studio import adapters
from lora_studio.errors import AdapterError, BenchError, BlendError
from lora_studio.inference.desk import Desk
from lora_studio.inference.draw import Easel
from lora_studio.inference.text import Manner, Shelf
from lora_studio.spec import Base
from tests import tiny, tiny_image
from tests.inference.test_by_layer import asked
from tests.inference.test_text import ASK, IDS, bare_logits, random_adapter
from tests.training.test_job import run_of, train

CONFIGS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
KINDS = ["prompt", "prefix"]


def plain(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def write(folder, base, kind: str, *, tokens: int = 5, seed: int = 0):
    """Virtual tokens with random values, as PEFT saves them."""
    model = peft.get_peft_model(plain(base), CONFIGS[kind](num_virtual_tokens=tokens, task_type="CAUSAL_LM"))
    draw = torch.Generator().manual_seed(seed)
    weight = model.prompt_encoder["default"].embedding.weight
    weight.data = torch.randn(weight.shape, generator=draw) * 0.5
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def peft_logits(base, folder) -> torch.Tensor:
    wrapped = peft.PeftModel.from_pretrained(plain(base), folder).eval()
    with torch.no_grad():
        return wrapped(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -len(IDS) :]


def hung(base, **folders) -> Shelf:
    found = Shelf(Base(id=str(base)), precision="fp32")
    for id, folder in folders.items():
        found.hang(id, adapters.read(folder), label=id)
    return found


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def any_base(request, tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("bases") / request.param, request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_answers_are_pefts_and_the_base_stays_itself(any_base, tmp_path, kind):
    folder = write(tmp_path / "a", any_base, kind)
    shelf, bare = hung(any_base, a=folder), bare_logits(any_base)
    expected = peft_logits(any_base, folder)
    assert (shelf.logits(IDS, weights={"a": 1}) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - bare).abs().max() > 1e-2
    prompt, _ = shelf.prompt(ASK)
    wrapped = peft.PeftModel.from_pretrained(plain(any_base), folder).eval()
    row = torch.tensor([prompt])
    said = wrapped.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    answer = shelf.answer(ASK, weights={"a": 1.0}, manner=Manner(longest=12))
    "".join(answer)
    found = said[0, len(prompt) :].tolist()
    assert answer.tokens == found[: len(answer.tokens)] and (answer.ended == "end" or len(answer.tokens) == 12)
    assert torch.equal(shelf.logits(IDS, weights={"a": 0}), bare)
    shelf.take("a")
    assert torch.equal(shelf.logits(IDS, weights={}), bare) and not shelf.ids


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_plain_adapter_it_is_peft_on_the_merged_base(base, tmp_path, kind):
    folder = write(tmp_path / "a", base, kind)
    shelf = hung(base, a=folder)
    modules = random_adapter(shelf, seed=1)
    shelf.put("b", modules)
    merged = plain(base)
    for name, module in modules.items():
        merged.get_submodule(name).weight.data += 0.7 * module.delta()
    merged.save_pretrained(tmp_path / "merged")
    expected = peft_logits(tmp_path / "merged", folder)
    assert (shelf.logits(IDS, weights={"a": 1, "b": 0.7}) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (shelf.logits(IDS, weights={"a": 1}) - expected).abs().max() > 1e-2


def test_two_sides_in_turns_say_what_each_says_alone(base, tmp_path):
    shelf = hung(base, a=write(tmp_path / "a", base, "prompt", seed=1), b=write(tmp_path / "b", base, "prefix", seed=2))

    def asked(id: str):
        return shelf.answer(ASK, weights={id: 1} if id in shelf.ids else {}, manner=Manner(seed=3, temperature=1.0, longest=8))

    alone = {id: asked(id) for id in ("a", "b", "bare")}
    for answer in alone.values():
        "".join(answer)
    turns = {id: asked(id) for id in alone}
    for _ in range(9):
        for answer in turns.values():
            next(answer.pieces, None)
    tokens = {id: answer.tokens for id, answer in alone.items()}
    assert {id: answer.tokens for id, answer in turns.items()} == tokens
    assert tokens["a"] != tokens["b"] and "bare" not in shelf.ids and tokens["bare"] not in (tokens["a"], tokens["b"])


def test_half_of_it_two_of_them_and_another_base_are_sentences(base, tmp_path):
    shelf = hung(base, a=write(tmp_path / "a", base, "prompt"), b=write(tmp_path / "b", base, "prefix"))
    for weight in (0.5, -1, {"*": 1.0}):
        with pytest.raises(BlendError, match="a is a tuned prompt, which stands before the input or does not.*Give it 1, or 0"):
            shelf.answer(ASK, weights={"a": weight})
    with pytest.raises(BlendError, match="a and b both stand before the input"):
        shelf.answer(ASK, weights={"a": 1, "b": 1})
    wide = tiny.write_base(tmp_path / "wide", hidden_size=48)
    with pytest.raises(AdapterError, match="is virtual tokens of shape"):
        hung(wide, a=tmp_path / "a")
    deep = tiny.write_base(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(AdapterError, match="is virtual tokens of shape"):
        hung(deep, b=tmp_path / "b")
    assert shelf.ids == {"a", "b"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_talked_to_on_the_bench_as_peft_answers(workspace, base, chat_rows, tmp_path, kind):
    tree = {**tiny.tree(base, chat_rows), "method": {"kind": kind, "tokens": 4}, "optim": {"lr": 0.1}, "output": {"sample_prompts": []}, "validation": {"size": 0}}
    run = run_of(workspace, tree)
    train(run)
    asking = {"base": str(base), "device": "cpu", "lock": str(tmp_path / "lock"), "messages": ASK, "longest": 10, "precision": "fp32"}
    desk = Desk()
    told = asked(desk, "answer", sides={"base": [], "mine": [[str(run / "adapter"), 1.0, "mine"]]}, **asking)["sides"]
    shelf = Shelf(Base(id=str(base)), precision="fp32")
    row = torch.tensor([shelf.prompt(ASK)[0]])
    wrapped = peft.PeftModel.from_pretrained(plain(base), run / "adapter").eval()
    for side, model in (("mine", wrapped), ("base", plain(base))):
        found = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0)
        assert told[side]["text"] == shelf.decode(found[0, row.shape[1] :].tolist())
    with pytest.raises(BlendError, match="mine is a tuned .*, which stands before the input"):
        asked(desk, "answer", parts=[[str(run / "adapter"), 0.5, "mine"]], **asking)
    with pytest.raises(BlendError, match="cannot be blended or baked. Try it in the Playground"):
        asked(desk, "bake", base=str(base), parts=[[str(run / "adapter"), 1.0, "mine"]])
    with pytest.raises(BlendError, match="cannot be blended or baked"):
        asked(desk, "measure", base=str(base), device="cpu", lock=str(tmp_path / "lock"), parts=[[str(run / "adapter"), 1.0, "mine"]])
    desk.close()


def test_a_base_that_makes_pictures_takes_none(tmp_path, base):
    easel = Easel(Base(id=str(tiny_image.write_pipeline(tmp_path / "sd"))), precision="fp32")
    with pytest.raises(AdapterError, match="and .* makes pictures"):
        easel.hang("a", adapters.read(write(tmp_path / "a", base, "prompt")), label="mine")
    assert not easel.ids


def test_the_virtual_tokens_take_of_the_room(base, tmp_path):
    shelf = hung(base, a=write(tmp_path / "a", base, "prefix", tokens=40))
    room = shelf.model.config.max_position_embeddings
    text = "red fox " * room
    ids, _ = shelf.prompt(text)
    shelf.tokenizer.model_max_length = 10**9
    fits = shelf.tokenizer.decode(ids[: room - 41])
    count = len(shelf.prompt(fits)[0])
    assert count <= room - 40
    answer = shelf.answer(fits, weights={"a": 1})
    "".join(answer)
    assert len(answer.tokens) <= room - 40 - count
    with pytest.raises(BenchError, match="has room for"):
        shelf.answer(shelf.tokenizer.decode(ids[: room - 10]), weights={"a": 1})
