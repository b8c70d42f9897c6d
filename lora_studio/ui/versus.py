"""The page LoRA+: LoRA and LoRA+ measured against each other on a preset's rows, with what the paper claims beside what is seen."""

import gradio as gr

from lora_studio import comparisons, presets, studio
from lora_studio.errors import StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import QUIET
from lora_studio.ui.seat import Seated
from lora_studio.ui.versus_chart import VersusChart
from lora_studio.workspace import Workspace

OVER, RECENT = ("done", "stopped", "failed"), 40
ABOUT = """## LoRA against LoRA+
LoRA learns both of its matrices, A and B, at one rate. LoRA+ lets B learn at a multiple of it. Here both are trained on the same rows with the same
seeds for the same number of steps, each at the best of a few rates, and drawn with the band of their seeds: so you see whether LoRA+ helps **on these rows**."""


class Versus(Seated):
    """The page's parts, and what they do. What is shown is read from the run, so that a reload finds it again."""

    title = "LoRA+"

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown(ABOUT)
        names = [preset.name for preset in presets.available()]
        with gr.Row():
            self.preset = gr.Dropdown(
                names,
                value=names[0] if names else None,
                label="Preset",
                info="Whose base, rows, rank and seed are taken.",
                interactive=True,
                elem_id="versus-preset",
            )
            self.steps = gr.Number(
                100, label="Steps", info="Of each training.", precision=0, interactive=True, min_width=90, elem_id="versus-steps"
            )
            self.ratio = gr.Number(16, label="Ratio", info="B's rate over A's.", interactive=True, min_width=90, elem_id="versus-ratio")
            self.seeds = gr.Number(
                3, label="Seeds", info="Trainings of each.", precision=0, interactive=True, min_width=90, elem_id="versus-seeds"
            )
            self.rates = gr.Textbox(
                "",
                label="Rates of LoRA",
                info="Empty: five around the preset's.",
                placeholder="1e-3, 2e-3, 4e-3",
                interactive=True,
                min_width=150,
                elem_id="versus-rates",
            )
            self.plus_rates = gr.Textbox(
                "",
                label="Rates of A with LoRA+",
                info="Empty: the same, lowered.",
                placeholder="1e-4, 2e-4",
                interactive=True,
                min_width=150,
                elem_id="versus-plus-rates",
            )
        self.full = gr.Checkbox(
            False,
            label="Full fine-tuning as the reference",
            info="The base's own weights learn too, for small bases; takes longer.",
            interactive=True,
            elem_id="versus-full",
        )
        with gr.Row():
            self.start = gr.Button("Compare", variant="primary", size="md", min_width=110, elem_id="versus-start")
            self.stop = gr.Button("Stop", variant="stop", size="md", min_width=90, interactive=False, elem_id="versus-stop")
        self.told, self.said = theme.sentences(elem_id="versus-told"), theme.sentences(elem_id="versus-said")
        self.chart = VersusChart("", result=self.result, elem_classes="flush", elem_id="versus-chart")
        self.run = gr.State("")
        self.asked = [self.preset, self.steps, self.ratio, self.seeds, self.rates, self.plus_rates, self.full]

    def connect(self, tab: gr.Tab) -> None:
        """Let the parts act; the newest comparison is shown when the page is opened."""
        state = [self.said, self.stop]
        self.start.click(
            self.begin, self.asked, [self.told, self.run, self.chart, *state], trigger_mode="once", concurrency_limit=None, **QUIET
        )
        self.stop.click(self.end, self.run, [self.told, self.stop], **QUIET)
        self.chart.turned(self.state, self.run, state, **QUIET)
        tab.select(self.find, self.run, [self.run, self.chart, *state], **QUIET)

    # ---- what is shown

    def result(self, id: str) -> dict | None:
        """What a comparison has found so far; None where there is none."""
        try:
            return comparisons.result(self.workspace, id)
        except StudioError:
            return None

    def find(self, id: str) -> list:
        """The newest comparison, when none is shown."""
        if id:
            return [gr.skip(), gr.skip(), *self.state(id)]
        newest = next((status.id for status in studio.list_runs(self.workspace)[:RECENT] if self.result(status.id)), None)
        return [gr.skip()] * 4 if newest is None else [newest, newest, *self.state(newest)]

    def state(self, id: str) -> list:
        """What is said of a comparison, and whether it can be stopped."""
        found = self.result(id)
        if not found:
            return [[], gr.update(interactive=False)]
        return [in_words(found), gr.update(interactive=found["state"] not in OVER)]

    # ---- what the buttons do

    def begin(self, *given) -> list:
        """Start a comparison of what the fields hold, and say what came of it. Nothing is lost when it cannot be."""
        preset, steps, ratio, seeds, rates, plus_rates, full = given
        try:
            run = studio.compose(preset or None, {"schedule": {"steps": int(steps or 0)}})
            asked = {
                name: comparisons.rates_of(text) for name, text in (("rates", rates), ("plus_rates", plus_rates)) if (text or "").strip()
            }
            spec = comparisons.compose(run, ratio=ratio or None, full=full, seeds=int(seeds or 0), **asked)
            id = comparisons.start(self.workspace, spec)
        except StudioError as error:
            return [[theme.said("error", sentence) for sentence in sentences_of(error)], *[gr.skip()] * 4]
        return [[], id, id, *self.state(id)]

    def end(self, id: str) -> list:
        """Ask the comparison to stop; what it has measured stays, and Resume on the Runs page goes on."""
        try:
            studio.stop(self.workspace, id)
        except StudioError as error:
            return [[theme.said("error", str(error))], gr.skip()]
        return [[theme.said("note", "It stops after this step. Resume it on the Runs page.")], gr.update(interactive=False)]


def sentences_of(error: StudioError) -> list[str]:
    """Every problem of an error as a sentence of its own."""
    return [problem.sentence for problem in getattr(error, "problems", [])] or [str(error)]


def in_words(found: dict) -> list[dict]:
    """The state of a comparison in a sentence."""
    state = found["state"]
    if state == "queued":
        return [theme.said("note", "The comparison waits for its turn.")]
    if state not in OVER:
        return [
            theme.said(
                "note", "It is being measured: first the rates, then each method with every seed. You may close the page; it goes on."
            )
        ]
    return [theme.said({"done": "ok", "stopped": "note", "failed": "error"}[state], found["reason"] or f"The comparison is {state}.")]
