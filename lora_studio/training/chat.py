"""Chat templates: a conversation as tokens, and which of them are the assistant's words."""

import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Used where a tokenizer has no template. END is `<|im_end|>` where the vocabulary has it, else the end-of-text token, so
# that a model that never saw ChatML still learns when to stop.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + 'END' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


class TemplateError(ValueError):
    """A template that fails on a conversation, or whose assistant words cannot be told apart."""


@dataclass(frozen=True)
class Template:
    """A chat template in use: its text, where it comes from, and how the assistant's words are found."""

    text: str
    origin: str
    marked: bool


def choose(tokenizer, wanted: str) -> Template:
    """The template of a tokenizer, or ChatML where it has none or `chatml` is wanted."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if wanted == "auto" and own:
        return Template(own, "the tokenizer's own", bool(MARK.search(own)))
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else (tokenizer.eos_token or "<|im_end|>")
    return Template(CHATML.replace("END", end), "the built-in ChatML", True)


def render(tokenizer, template: Template, messages: list[dict], *, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt` it ends where the assistant is to speak. Raises TemplateError."""
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template.text, tokenize=False, add_generation_prompt=prompt)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise TemplateError(str(error).strip().split("\n")[0]) from None


def encode(tokenizer, template: Template, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is learnt (the assistant's words and the end of its turn)."""
    if template.marked:
        return _encode_marked(tokenizer, template, messages)
    text, spans = spoken(tokenizer, template, messages)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], _inside(found["offset_mapping"], spans)


def _encode_marked(tokenizer, template: Template, messages: list[dict]) -> tuple[list[int], list[bool]]:
    try:
        found = tokenizer.apply_chat_template(
            messages, chat_template=template.text, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise TemplateError(str(error).strip().split("\n")[0]) from None
    return list(found["input_ids"]), [bool(value) for value in found["assistant_masks"]]


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    return [end > start and any(first <= start < last for first, last in spans) for start, end in offsets]


def spoken(tokenizer, template: Template, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the spans of it that the assistant speaks, for templates without marks.

    What the template adds between the prompt before a turn and the text after it is that turn. Templates that rewrite
    earlier turns (dropping their thoughts, say) break this for all but the last turn; there the turn is found by its words,
    and its end by the special token that follows.
    """
    text, spans, cursor = render(tokenizer, template, messages), [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, template, messages[:number], prompt=True)
        after = render(tokenizer, template, messages[: number + 1])
        if text.startswith(before) and after.startswith(before) and text.startswith(after) and len(before) >= cursor:
            start, end = len(before), len(before) + len(_turn(tokenizer, after[len(before) :]))
        else:
            start, end = _find(tokenizer, text, message["content"], cursor)
        spans.append((start, end))
        cursor = end
    return text, spans


def _turn(tokenizer, text: str) -> str:
    """A turn up to and with the special token that ends it: what stands after (a line break) is the template's."""
    ends = [match.end() for token in _end_tokens(tokenizer) for match in re.finditer(re.escape(token), text)]
    return text[: max(ends)] if ends else text


def _find(tokenizer, text: str, content: str, cursor: int) -> tuple[int, int]:
    start = text.find(content.strip(), cursor)
    if start < 0 or not content.strip():
        raise TemplateError("the assistant's words do not stand in its text")
    end = start + len(content.strip())
    following = next((token for token in _end_tokens(tokenizer) if text[end:].lstrip().startswith(token)), None)
    return start, end if following is None else text.index(following, end) + len(following)


def _end_tokens(tokenizer) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return [token for token in dict.fromkeys([*(str(token) for token in tokenizer.all_special_tokens), *added]) if token]


def save(template: Template, folder: Path) -> None:
    """Write the template beside an adapter, for whoever loads it."""
    (folder / "chat_template.jinja").write_text(template.text, encoding="utf-8")
