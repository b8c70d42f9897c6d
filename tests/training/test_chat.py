"""Chat templates: the loss is on the assistant's words and the end of its turn, whatever the template."""

import pytest

from lora_studio.training import chat
from tests import tiny

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Ho?"},
    {"role": "assistant", "content": "Hi Ho"},
]
# As Qwen3 does: thoughts of earlier turns are dropped, the last turn gets an empty thought.
THINKING = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>' }}{%- if m.role == 'assistant' and loop.last %}{{- 'THINK ' }}{%- endif %}"
    "{{- m.content + '<|end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
TRIMMING = (
    "{%- for m in messages %}{{- '[' + m.role + '] ' + m.content.strip() + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}"
)


def learnt(tokenizer, template, messages) -> list[str]:
    """The stretches of text that are learnt."""
    ids, marks = chat.encode(tokenizer, template, messages)
    stretches, open_ = [], False
    for token, mark in zip(ids, marks):
        if mark and not open_:
            stretches.append([])
        open_ = mark
        if mark:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_marks_give_the_assistants_words_and_the_end_of_its_turn():
    tokenizer = tiny.tokenizer()
    assert learnt(tokenizer, chat.choose(tokenizer, "auto"), TALK) == ["Ho<|end|>", "Hi Ho<|end|>"]


def test_without_marks_the_same_tokens_are_learnt():
    marked = tiny.tokenizer()
    plain = tiny.tokenizer(chat.MARK.sub("", tiny.TEMPLATE).replace("{%- endgeneration %}", ""))
    template = chat.choose(plain, "auto")
    assert not template.marked
    for talk in (TALK, TALK[1:3], TALK[:3], [*TALK[1:3], *TALK[1:3]], [{"role": "user", "content": "Ho Ho"}, {"role": "assistant", "content": "Ho"}]):
        assert chat.encode(plain, template, talk) == chat.encode(marked, chat.choose(marked, "auto"), talk)


def test_templates_that_rewrite_earlier_turns_still_give_every_turn():
    tokenizer = tiny.tokenizer(THINKING)
    assert learnt(tokenizer, chat.choose(tokenizer, "auto"), TALK) == ["Ho<|end|>", "THINK Hi Ho<|end|>"]


def test_templates_that_trim_and_add_line_breaks_learn_no_line_break():
    tokenizer = tiny.tokenizer(TRIMMING)
    talk = [*TALK[:4], {"role": "assistant", "content": "  Hi Ho \n"}]
    assert learnt(tokenizer, chat.choose(tokenizer, "auto"), talk) == ["Ho<|end|>", "Hi Ho<|end|>"]


def test_a_tokenizer_without_template_gets_chatml_that_ends_with_its_own_end():
    tokenizer = tiny.tokenizer(None)
    template = chat.choose(tokenizer, "auto")
    assert template.origin == "the built-in ChatML" and learnt(tokenizer, template, TALK[1:3]) == ["Ho<|end|>"]
    assert chat.render(tokenizer, template, TALK[1:2], prompt=True).endswith("<|im_start|>assistant\n")


def test_a_template_that_fails_is_named():
    tokenizer = tiny.tokenizer("{%- for m in messages %}{{ raise_exception('no system here') }}{%- endfor %}")
    with pytest.raises(chat.TemplateError, match="no system here"):
        chat.encode(tokenizer, chat.choose(tokenizer, "auto"), TALK)
