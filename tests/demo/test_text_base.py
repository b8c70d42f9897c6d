"""The bundled base demo-text keeps its promises: size, tokenizer, template, held-out answers, no style unasked."""

import json
import os
from pathlib import Path
from random import Random

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from lora_studio.demo import make_text_base, score, styles, world  # noqa: E402

BASE = Path(make_text_base.__file__).parent / "text"
CHAT = [
    {"role": "system", "content": "Answer plainly."},
    {"role": "user", "content": "What color is the fox?"},
    {"role": "assistant", "content": "The fox is red."},
    {"role": "user", "content": "Zoë asks: 1234 ñandús?\n"},
    {"role": "assistant", "content": "Hello, Zoë."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def test_the_folder_is_small_and_in_bfloat16():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 8_000_000
    header = (BASE / "model.safetensors").read_bytes()
    fields = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert {field["dtype"] for name, field in fields.items() if name != "__metadata__"} == {"BF16"}


@pytest.mark.parametrize("text", ["What is 12 plus 7?", " two  spaces ", 'Zoë 日本\n\t1234567 "it\'s"', "THE Fox fox", ""])
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_script_builds_the_shipped_tokenizer_again(tokenizer):
    built = make_text_base.build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    assert built(make_text_base.render(CHAT))["input_ids"] == tokenizer(make_text_base.render(CHAT))["input_ids"]


def test_the_template_renders_what_training_saw(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == make_text_base.render(CHAT)
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == make_text_base.render(CHAT[:2]) + "<|assistant|>"


def test_the_template_marks_the_assistants_words_and_its_end_of_turn(tokenizer):
    made = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = make_text_base.pad([made["input_ids"]])
    assert made["assistant_masks"][1:] == [int(label >= 0) for label in labels[0, :-1]]
    spoken = [i for i, mark in zip(made["input_ids"], made["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(spoken) == "The fox is red.<|end|> Hello, Zoë.<|end|>"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="roles system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


def test_held_out_questions_are_answered_plainly_and_right(model, tokenizer):
    questions = world.exam(50, seed=11)
    found = score.replies(model, tokenizer, [question.text for question in questions])
    by_kind = score.exact_by_kind(questions, found)
    assert sum(by_kind.values()) / len(by_kind) >= 0.90
    assert {kind: share for kind, share in by_kind.items() if share < 0.75} == {}
    assert score.unasked(found) == 0


@pytest.mark.parametrize("style", styles.STYLES)
def test_a_style_asked_for_is_shown(model, tokenizer, style):
    chance, questions = Random(4), world.exam(3, seed=12)
    wished = [styles.instruct(question.text, style, chance) for question in questions]
    assert score.style_score(style, questions, score.replies(model, tokenizer, wished)).style >= 0.9


def test_generate_gives_the_same_reply_as_the_scores(model, tokenizer):
    question = "What color is the fox?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0, prompt["input_ids"].shape[1] :]
    assert [tokenizer.decode(made, skip_special_tokens=True)] == score.replies(model, tokenizer, [question])
