"""Scores of a demo-text model, by code: its replies, exact answers by kind, and style with the right content."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_studio.demo import styles
from lora_studio.demo.world import Question


@torch.no_grad()
def replies(model, tokenizer, questions: Sequence[str], *, batch: int = 128, longest: int = 48) -> list[str]:
    """The model's greedy reply to each question. Questions of one length go together, so nothing is padded."""
    was_training = model.training
    model.eval()
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    found = [""] * len(questions)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for group in _same_length(order, prompts, batch):
        for index, ids in zip(group, _greedy(model, [prompts[i] for i in group], longest), strict=True):
            found[index] = tokenizer.decode(ids, skip_special_tokens=True)
    model.train(was_training)
    return found


def _same_length(order: list[int], prompts: list[list[int]], batch: int):
    group: list[int] = []
    for index in order:
        if group and (len(group) == batch or len(prompts[index]) != len(prompts[group[0]])):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _greedy(model, prompts: list[list[int]], longest: int) -> list[list[int]]:
    end = model.config.eos_token_id
    step, past, grown = torch.tensor(prompts, device=model.device), None, []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    while len(grown) < longest and not ended.all():
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        step = out.logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended[:, None], end)
        ended |= step[:, 0] == end
        grown.append(step)
    rows = torch.cat(grown, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def exact_by_kind(questions: Sequence[Question], found: Sequence[str]) -> dict[str, float]:
    """The share of replies that are the plain answer, letter for letter, of every kind."""
    right: dict[str, list[bool]] = {}
    for question, reply in zip(questions, found, strict=True):
        right.setdefault(question.kind, []).append(reply == question.answer)
    return {kind: sum(each) / len(each) for kind, each in right.items()}


@dataclass(frozen=True)
class StyleScore:
    """Shares of replies: in the style; with the right content in any style; both at once."""

    style: float
    content: float
    joint: float


def style_score(style: str, questions: Sequence[Question], found: Sequence[str]) -> StyleScore:
    pairs = list(zip(questions, found, strict=True))
    return StyleScore(
        style=sum(styles.shows(style, reply) for _, reply in pairs) / len(pairs),
        content=sum(styles.says(question.answer, reply) for question, reply in pairs) / len(pairs),
        joint=sum(reply in styles.forms(style, question.answer) for question, reply in pairs) / len(pairs),
    )


def unasked(found: Sequence[str]) -> float:
    """The share of replies that show a style."""
    return sum(styles.shows("pirate", reply) or styles.shows("capitals", reply) for reply in found) / len(found)
