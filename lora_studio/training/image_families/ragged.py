"""Texts of different lengths: kept without their padding, padded again to the longest of a batch, with a mask."""

import torch
from torch import Tensor


def trimmed(rows: Tensor, mask: Tensor) -> list[Tensor]:
    """The rows (b, length, width) without what the mask (b, length) leaves out, one tensor for each text; of none one row is kept."""
    return [row[keep.bool()] if bool(keep.any()) else row[:1] for row, keep in zip(rows, mask)]


def padded(known: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Texts as one batch: `prompt` (b, longest, width), zeros behind each; `mask` (b, longest) is true where there is text."""
    rows = [one["prompt"] for one in known]
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    places = torch.arange(int(lengths.max()), device=rows[0].device)
    return {"prompt": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "mask": places[None] < lengths[:, None]}


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption and the empty caption as the arguments of pipelines that take masks."""
    both = padded([conditions, nothing])
    return {
        "prompt_embeds": both["prompt"][:1],
        "prompt_attention_mask": both["mask"][:1],
        "negative_prompt_embeds": both["prompt"][1:],
        "negative_prompt_attention_mask": both["mask"][1:],
        "negative_prompt": None,
    }
