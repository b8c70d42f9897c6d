"""The Bake part of the Blend page: what a model with the mix baked in would be and lose, and then the model itself."""

from collections.abc import Iterator

import gradio as gr

from lora_studio import baking
from lora_studio.errors import BlendError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import QUIET
from lora_studio.ui.merge import in_full, way
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

PRECISIONS = [("as the base has it", ""), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32")]


class Bake(Seated):
    """A part of the Blend page; the mix is the page's own."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Bake into the base: a model of its own", open=False, elem_id="bake-box"):
            with gr.Row():
                self.name = gr.Textbox("", label="Name of the model", info="Its folder in the studio's models.", max_lines=1, max_length=80, interactive=True, elem_id="bake-name", min_width=150)
                self.dtype = gr.Dropdown(PRECISIONS, value="", label="Precision", info="A coarser one takes more of the update.", interactive=True, elem_id="bake-dtype", min_width=130)
            self.merged = gr.Checkbox(
                False,
                label="Put together in the way chosen under Merge",
                info="In full rank. Otherwise the plain sum.",
                interactive=True,
                elem_id="bake-merged",
            )
            with gr.Row():
                self.look = gr.Button("What it would lose", size="md", min_width=110, elem_id="bake-look")
                self.start = gr.Button("Bake", variant="primary", size="md", min_width=110, elem_id="bake-start")
            self.told = theme.sentences(elem_id="bake-sentences")

    def connect(self, mix, merge) -> None:
        """Let the buttons act on the mix of the page, and on the way of its Merge box."""
        how = {"outputs": self.told, "trigger_mode": "once", "concurrency_limit": None, **QUIET}
        asked = [self.dtype, self.merged, *merge.asked]

        def look(dtype, merged, name, density, seed, *given):
            return self.say(mix, dtype, (name, density, seed) if merged else (), *given)

        def begin(name, dtype, merged, how, density, seed, *given):
            yield from self.bake(mix, name, dtype, (how, density, seed) if merged else (), *given)

        self.look.click(look, [*asked, *mix.inputs], **how)
        self.start.click(begin, [self.name, *asked, *mix.inputs], **how)

    def say(self, mix, dtype: str, typed: tuple, *given) -> list[dict]:
        """What the baked model would be; `typed` is what the Merge box says, or (). Writes nothing."""
        try:
            merge = way(*typed) if typed else None
            return [
                *_way(merge),
                *in_words(baking.preview(self.workspace, _parts(mix, given), dtype=dtype or None, merge=merge), "would change"),
            ]
        except StudioError as error:
            return [theme.said("error", str(error))]

    def bake(self, mix, name: str, dtype: str, typed: tuple, *given) -> Iterator[list[dict]]:
        """Write the model, saying how far it is. Nothing is left behind when it cannot be."""
        try:
            merge = way(*typed) if typed else None
            target = baking.folder_for(self.workspace, name or "")
            yield [theme.said("note", "Planning, and measuring what the precision takes…")]
            for event in baking.bake(self.workspace, _parts(mix, given), target, dtype=dtype or None, merge=merge):
                if event["event"] == "progress":
                    yield [theme.said("note", f"{event['done'] / 1e9:.2f} of {event['total'] / 1e9:.2f} GB are written.")]
                elif event["event"] == "done":
                    path = theme.said("ok", f"The model is in {target}. Give this path as a base model to train on it, talk to it, or bake again.")
                    yield [path, *_way(merge), *in_words(event, "were changed")]
        except StudioError as error:
            yield [theme.said("error", str(error))]


def _way(merge: dict | None) -> list[dict]:
    return [theme.said("note", in_full(merge["how"]))] if merge else []


def _parts(mix, given) -> list:
    parts = mix.parts(*given)
    if not parts:
        raise BlendError("bake.empty")
    return parts


def in_words(told: dict, verb: str) -> list[dict]:
    """The report of a bake in sentences."""
    worst = f" Most in {told['worst'][0][0]} ({told['worst'][0][1]:.2%})." if told["worst"] and told["loss"] > 1e-5 else ""
    lost = "The precision takes nothing of the update." if told["loss"] <= 1e-5 else f"The precision takes {told['loss']:.2%} of the update.{worst}"
    words = [theme.said("note", f"{told['changed']} tensors {verb}, {told['bytes'] / 1e9:.2f} GB."), theme.said("warning" if told["loss"] > 0.1 else "note", lost)]
    return [*words, *(theme.said("note", note) for note in told["notes"])]
