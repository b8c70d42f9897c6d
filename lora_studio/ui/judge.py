"""The part of the Blend page that judges the adapters before they are put together: advice in a sentence, and the conflict map."""

import json
from collections.abc import Iterator

import gradio as gr

from lora_studio import judging, shelf
from lora_studio.errors import BlendError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.conflict_map import ConflictMap
from lora_studio.ui.events import LIVE, QUIET, when
from lora_studio.ui.mix import Mix
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

STALE = theme.said("note", "The mix has changed since. Compare again for the map of what it is now.")
ONES, TWOS = ("norm", "effective_rank"), ("cosine", "conflict")


class Judge(Seated):
    """A part of the Blend page; the mix and the weights by block are the page's own."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Where they help and where they fight", open=False, elem_id="judge-box"):
            self.start = gr.Button("Compare the adapters", size="md", elem_id="judge-start")
            self.told = theme.sentences(elem_id="judge-sentences")
            self.map = ConflictMap("", elem_classes="flush", elem_id="judge-map")
        self.judged = gr.State(None)

    def connect(self, mix: Mix, layers) -> None:
        """Let the parts act on the mix of the page; a block of the map leads to its weights."""
        self.mix = mix
        self.start.click(self.judge, mix.inputs, [self.told, self.map, self.judged], **LIVE)
        when([mix.turn.change, *(slider.input for slider in mix.sliders)], self.age, [self.judged, *mix.inputs], self.told, **LIVE)

        def lead(event: gr.EventData, which, *given):
            return layers.open(str(event.block), event.adapter or which, *given)

        self.map.open(lead, [layers.which, *mix.inputs], [layers.box, layers.which, layers.grid], **QUIET)

    def judge(self, *given) -> Iterator[list]:
        """Compare the adapters as they are weighed now."""
        try:
            parts = self.mix.parts(*given)
            if not parts:
                raise BlendError("tryout.empty")
            busy = shelf.bench_status()
            doing = "Starting the bench…" if busy["state"] in ("off", "starting") else "Comparing the adapters…"
            yield [[theme.said("note", doing)], gr.skip(), gr.skip()]
            found = judging.judge(self.workspace, parts)
        except StudioError as error:
            yield [[theme.said("error", str(error))], "", None]
            return
        yield [told(found), json.dumps(drawn(found, [id for id, _ in parts])), parts]

    def age(self, judged, *given):
        """A sentence when the map is of another mix than the one there is now."""
        try:
            return gr.skip() if judged is None or self.mix.parts(*given) == judged else [STALE]
        except StudioError:
            return [STALE]


def told(found: dict) -> list[dict]:
    """The advice, and how far the figures are from a sample."""
    sampled = found["sampled"]["layers"]
    some = f"The signs of {sampled} large layer{'' if sampled == 1 else 's'} are from a sample of {'its' if sampled == 1 else 'their'} rows, always the same one."
    return [*(theme.said("note", sentence) for sentence in found["advice"]), *([theme.said("note", some)] if sampled else [])]


def drawn(found: dict, ids: list[str]) -> dict:
    """A judgement as the map takes it. What two share is the smaller of what they read and write in common."""

    def table(rows: dict) -> dict:
        shared = [[_least(out, into) for out, into in zip(*row)] for row in zip(rows["overlap_out"], rows["overlap_in"])]
        return {**{key: rows[key] for key in (*ONES, *TWOS)}, "overlap": shared}

    whole = {key: [one[key] for one in found["adapters"]] for key in ONES} | {key: [pair[key] for pair in found["pairs"]] for key in TWOS}
    whole["overlap"] = [_least(pair["overlap_out"], pair["overlap_in"]) for pair in found["pairs"]]
    return {
        "ids": ids, "adapters": [one["name"] for one in found["adapters"]], "pairs": [[pair["left"], pair["right"]] for pair in found["pairs"]],
        "blocks": found["blocks"], "layers": found["layers"], "block_of": found["block_of"], "whole": whole,
        "by_block": table(found["by_block"]), "by_layer": {**table(found["by_layer"]), "spectrum": found["by_layer"]["spectrum"]},
    }  # fmt: skip


def _least(out: float | None, into: float | None) -> float | None:
    return None if out is None or into is None else min(out, into)
