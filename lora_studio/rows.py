"""Tables to training rows: recognise the columns, give every row one form, and account for each row that is left out.

    chat               {"messages": [{"role": ..., "content": ...}, ...]}
    prompt_completion  {"prompt": ..., "completion": ...}
    text               {"text": ...}
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field

from lora_studio import data
from lora_studio.errors import DataError
from lora_studio.spec import Source, TrainSpec


@dataclass(frozen=True)
class Shape:
    """A known kind of row: its parts, each with the column names it goes by; `optional` parts may be absent."""

    name: str
    tasks: tuple[str, ...]
    parts: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict)


QUESTION = ("prompt", "question", "query")
ANSWER = ("completion", "response", "answer")
SHAPES = (
    Shape("messages", ("chat",), {"messages": ("messages",)}, {"system": ("system",)}),
    Shape("sharegpt", ("chat",), {"conversations": ("conversations", "conversation")}, {"system": ("system",)}),
    Shape("alpaca", ("chat", "prompt_completion"), {"instruction": ("instruction",), "output": ("output", "response")},
          {"input": ("input",), "system": ("system",)}),
    Shape("prompt_completion", ("chat", "prompt_completion"), {"prompt": QUESTION, "completion": ANSWER}, {"system": ("system",)}),
    Shape("text", ("text",), {"text": ("text", "content")}),
)  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool", "observation": "tool"}
KNOWN_ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Rows:
    """The rows of one source in one form. `skipped` lists, for each reason, the places of the rows left out."""

    source: Source
    shape: str
    items: list[dict]
    places: list[str]
    skipped: dict[str, list[str]]

    def skipped_in_words(self) -> str:
        """How many rows were left out and why, or an empty text."""
        return "; ".join(f"{len(places)} {reason} (first: {places[0]})" for reason, places in self.skipped.items())


def collect(spec: TrainSpec, *, limit: int | None = None) -> list[Rows]:
    """The rows of every source of a spec. Raises DataError; a source without a usable row is an error."""
    found = []
    for source in spec.data:
        rows = shape_rows(data.read(source, limit=limit), source, spec.task.kind)
        if not rows.items:
            raise DataError("data.nothing_left", path=source.path, reasons=rows.skipped_in_words())
        found.append(rows)
    return found


def shape_rows(table: data.Table, source: Source, task: str) -> Rows:
    """A table's rows in the form of a task. Raises DataError when its columns are not understood."""
    shape, columns = recognise(table, source, task)
    items, places, skipped = [], [], defaultdict(list)
    for index, row in enumerate(table.rows):
        parts = {part: row.get(column) for part, column in columns.items()}
        try:
            items.append(READERS[task](shape, parts))
            places.append(table.place(index))
        except _Skip as reason:
            skipped[str(reason)].append(table.place(index))
    return Rows(source, shape.name, items, places, dict(skipped))


def recognise(table: data.Table, source: Source, task: str) -> tuple[Shape, dict[str, str]]:
    """The shape of a table for a task, and the column of each of its parts. Raises DataError."""
    usable = [shape for shape in SHAPES if task in shape.tasks]
    known = sorted({part for shape in usable for part in (*shape.parts, *shape.optional)})
    for part, column in source.columns.items():
        if part not in known:
            raise DataError("data.unknown_role", path=table.path, role=part, task=task, known=", ".join(known))
        if column not in table.columns:
            raise DataError("data.no_column", path=table.path, column=column, columns=", ".join(table.columns), role=part)
    for shape in usable:
        columns = _match(shape, table.columns, source.columns)
        if columns is not None:
            return shape, columns
    example = "{prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}" if task != "text" else "{text: COLUMN}"
    raise DataError("data.unknown_shape", path=table.path, columns=", ".join(table.columns), task=task, example=example)


def _match(shape: Shape, present: tuple[str, ...], given: dict[str, str]) -> dict[str, str] | None:
    """The column of each part of a shape, or None when the shape does not fit."""
    if any(part not in shape.parts and part not in shape.optional for part in given):
        return None
    columns = {}
    for part, names in {**shape.parts, **shape.optional}.items():
        column = given.get(part) or next((name for name in names if name in present), None)
        if column is not None:
            columns[part] = column
        elif part in shape.parts:
            return None
    return columns


class _Skip(Exception):
    """A row that cannot be used, with the reason as it is shown."""


def _chat(shape: Shape, parts: dict) -> dict:
    if shape.name in ("messages", "sharegpt"):
        messages = [_message(item) for item in _list(parts.get("messages", parts.get("conversations")))]
    else:
        prompt, completion = _question_and_answer(parts)
        messages = [*_turns(prompt, "user"), *_turns(completion, "assistant")]
    system = parts.get("system")
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise _Skip("without an assistant's answer")
    while messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt from what follows the last answer
    return {"messages": messages}


def _question_and_answer(parts: dict):
    """Prompt and completion of an Alpaca or prompt/completion row; an Alpaca input follows its instruction."""
    if "instruction" not in parts:
        return parts.get("prompt"), parts.get("completion")
    prompt, extra = _text(parts["instruction"], "instruction"), parts.get("input")
    if extra is not None and _text(extra, "input", empty=True).strip():
        prompt = f"{prompt}\n\n{extra}"
    return prompt, parts.get("output")


def _turns(value, role: str) -> list[dict]:
    """A text as one turn, or a list of messages as they stand."""
    if isinstance(value, list):
        return [_message(item) for item in value]
    return [{"role": role, "content": _text(value, role)}]


def _list(value) -> list:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _Skip("whose conversation is not a list") from None
    if not isinstance(value, (list, tuple)) or not value:
        raise _Skip("whose conversation is empty or not a list")
    return list(value)


def _message(item) -> dict:
    if not isinstance(item, dict):
        raise _Skip("with a message that is not an object")
    role = item.get("role", item.get("from"))
    role = ROLES.get(role, role)
    if role not in KNOWN_ROLES:
        raise _Skip(f"with a message of the unknown role {str(role)[:20]!r}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict) and part.get("type") == "text")
    return {"role": role, "content": _text(content, role, empty=True)}


def _prompt_completion(shape: Shape, parts: dict) -> dict:
    prompt, completion = _question_and_answer(parts)
    system = parts.get("system")
    prompt = _text(prompt, "prompt", empty=True)
    if system:
        prompt = f"{_text(system, 'system')}\n\n{prompt}"
    return {"prompt": prompt, "completion": _text(completion, "completion")}


def _plain(shape: Shape, parts: dict) -> dict:
    return {"text": _text(parts.get("text"), "text")}


def _text(value, part: str, *, empty: bool = False) -> str:
    """A field as text; null, empty and broken texts are never trained on as words."""
    if value is None:
        if empty:
            return ""
        raise _Skip(f"without {part}")
    if isinstance(value, (dict, list)):
        raise _Skip(f"whose {part} is not a text")
    text = str(value)
    if not text.strip() and not empty:
        raise _Skip(f"with an empty {part}")
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Skip(f"whose {part} holds a broken character")
    return text


READERS = {"chat": _chat, "prompt_completion": _prompt_completion, "text": _plain}


def fingerprint(item: dict) -> str:
    """A hash of a row's content, equal for equal rows."""
    return hashlib.sha256(json.dumps(item, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
