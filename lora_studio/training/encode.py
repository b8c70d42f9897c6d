"""Rows as tokens: what is learnt of each, what is held out, and what was cut or left out. Loads no weights."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import transformers

from lora_studio import rows
from lora_studio.errors import BaseModelError, DataError
from lora_studio.spec import TrainSpec
from lora_studio.training import chat, order


@dataclass(frozen=True)
class Example:
    """A row as tokens: `ids`, and for each whether it is learnt. The first token of a row is never learnt."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    @property
    def units(self) -> int:
        return sum(self.learnt[1:])


@dataclass
class Encoded:
    """All rows as tokens: per source those to train on, those held out, and what became of the rest."""

    train: list[list[Example]]
    held_out: list[Example]
    left_out: Counter = field(default_factory=Counter)
    cut: int = 0
    worst_cut: float = 0.0
    split_rows: int = 0
    print: str = ""

    @property
    def facts(self) -> dict[str, object]:
        """Numbers to show before Start."""
        lengths = [len(example.ids) for source in self.train for example in source]
        return {
            "rows_train": len(lengths),
            "rows_validation": len(self.held_out),
            "longest": max(lengths, default=0),
            "tokens": sum(lengths),
            "tokens_learnt": sum(example.units for source in self.train for example in source),
        }


def load_tokenizer(folder: Path, id: str):
    """The tokenizer of a base. Raises BaseModelError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError("base.broken", id=id, reason=f"its tokenizer: {first_line(error)}") from None


class Encoder:
    """Rows of one task to Examples, with one tokenizer."""

    def __init__(self, tokenizer, spec: TrainSpec):
        self.tokenizer, self.spec, self.task = tokenizer, spec, spec.task
        self.template = chat.choose(tokenizer, spec.task.template) if spec.task.kind == "chat" else None

    def __call__(self, item: dict, place: str) -> tuple[list[int], list[bool]]:
        """Token ids of a row and which are learnt. Raises BaseModelError when the chat template fails on it."""
        kind = self.task.kind
        if kind == "chat":
            try:
                return chat.encode(self.tokenizer, self.template, self.messages(item["messages"]))
            except chat.TemplateError as error:
                path, _, row = place.rpartition(", row ")
                raise BaseModelError("base.template", id=self.spec.base.id, row=row, path=path, reason=error) from None
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        if kind == "text":
            ids = list(self.tokenizer(item["text"])["input_ids"])
            ids += end if ids[-1:] != end else []
            return ids, [True] * len(ids)
        prompt = list(self.tokenizer(item["prompt"])["input_ids"])
        prompt = prompt[:-1] if prompt[-1:] == end else prompt
        answer = list(self.tokenizer(item["completion"], add_special_tokens=False)["input_ids"]) + end
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def messages(self, messages: list[dict]) -> list[dict]:
        """A conversation, with the spec's system prompt where it has none."""
        if self.task.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.task.system}, *messages]
        return messages

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, up to where the answer begins."""
        if self.task.kind == "chat":
            asked = self.messages([{"role": "user", "content": text}])
            written = chat.render(self.tokenizer, self.template, asked, prompt=True)
            return list(self.tokenizer(written, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids


def encode_all(spec: TrainSpec, encoder: Encoder, collected: list[rows.Rows], fold: tuple[int, int] | None = None) -> Encoded:
    """Every row as tokens, the held-out ones apart. Raises DataError when nothing is left to learn."""
    train, held_out = hold_out(spec, collected, fold)
    encoded = Encoded(train=[[] for _ in train], held_out=[])
    for source, items in enumerate(train):
        for item, place in items:
            encoded.train[source] += _fit(spec, encoder(item, place), encoded)
    for item, place in held_out:
        encoded.held_out += _fit(spec, encoder(item, place), encoded)
    digest = hashlib.sha256()
    for source in (*encoded.train, encoded.held_out):
        for example in source:
            digest.update(repr(example).encode())
        digest.update(b"|")
    encoded.print = digest.hexdigest()
    _check(spec, collected, encoded)
    return encoded


def hold_out(spec: TrainSpec, collected: list[rows.Rows], fold: tuple[int, int] | None = None) -> tuple[list[list[tuple]], list[tuple]]:
    """(item, place) pairs to train on per source, and those held out: the same ones for the same rows and seed, and no
    row that is held out is trained on, not even its double."""
    pool = [(source, item, place) for source, found in enumerate(collected) for item, place in zip(found.items, found.places)]
    found = [rows.fingerprint(item) for _, item, _ in pool]
    chosen = order.held_out(found, size=spec.validation.size, limit=spec.validation.limit, seed=spec.compute.seed, fold=fold)
    prints = {found[index] for index in chosen}
    train: list[list[tuple]] = [[] for _ in collected]
    for index, (source, item, place) in enumerate(pool):
        if index not in chosen and found[index] not in prints:
            train[source].append((item, place))
    return train, [pool[index][1:] for index in sorted(chosen)]


def _fit(spec: TrainSpec, tokens: tuple[list[int], list[bool]], encoded: Encoded) -> list[Example]:
    """A row within max_length: itself, cut, split, or nothing; what happens is counted."""
    (ids, learnt), most = tokens, spec.task.max_length
    if len(ids) > most and spec.task.overlength == "drop":
        encoded.left_out[f"longer than {most} tokens"] += 1
        return []
    pieces = [(ids, learnt)]
    if len(ids) > most:
        if spec.task.overlength == "split":
            encoded.split_rows += 1
            pieces = [(ids[at : at + most], learnt[at : at + most]) for at in range(0, len(ids), most)]
        else:
            encoded.cut += 1
            encoded.worst_cut = max(encoded.worst_cut, 1 - most / len(ids))
            pieces = [(ids[:most], learnt[:most])]
    found = [Example(tuple(part), tuple(marks)) for part, marks in pieces]
    usable = [example for example in found if example.units]
    if not usable:
        encoded.left_out["cut before the answer begins" if len(ids) > most else "with nothing to learn"] += 1
    return usable


def _check(spec: TrainSpec, collected: list[rows.Rows], encoded: Encoded) -> None:
    if any(encoded.train):
        return
    reasons = ", ".join(f"{count} rows {reason}" for reason, count in encoded.left_out.items()) or "every row is held out"
    if encoded.left_out.get("with nothing to learn"):
        raise DataError("data.all_masked", reason=f"{reasons}. Check the roles of the messages, or set task.template to chatml")
    raise DataError("data.nothing_left", path=", ".join(found.source.path for found in collected), reasons=reasons)


def losses_in_words(encoded: Encoded) -> list[str]:
    """What was cut, split or left out, as sentences."""
    found = []
    if encoded.cut:
        found.append(f"{encoded.cut} rows are cut to the length limit; the worst loses {encoded.worst_cut:.0%}.")
    if encoded.split_rows:
        found.append(f"{encoded.split_rows} rows are longer than the length limit and are split.")
    found += [f"{count} rows are left out: {reason}." for reason, count in encoded.left_out.items()]
    return found


def first_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
