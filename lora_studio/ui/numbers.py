"""The Numbers part of the Library: what the papers promise of an adapter, computed from its files, and its latency, measured when asked for."""

from collections.abc import Iterator

import gradio as gr

from lora_studio import numbers
from lora_studio.errors import StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import QUIET, TYPED, when
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

ROWS = """<dl class="numbers">{{#each value}}<dt>{{label}}</dt><dd>{{value}}</dd>{{/each}}</dl>"""
ROWS_CSS = """
.numbers{display:grid;grid-template-columns:minmax(84px,max-content) 1fr;gap:3px 14px;margin:0;font-size:13px}
.numbers dt{color:var(--body-text-color-subdued);font-weight:400;margin:0}.numbers dd{margin:0;color:var(--body-text-color);overflow-wrap:anywhere;min-width:0}
"""


class Numbers(Seated):
    """A part of a page; whose numbers they are is in a state of that page: an id, or None."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Numbers", open=False, elem_id="adapter-numbers"):
            self.rows = theme.Shown([], html_template=ROWS, css_template=ROWS_CSS, elem_classes="flush", elem_id="numbers")
            self.start = gr.Button("Measure latency", size="md", elem_id="numbers-measure")
            self.told = theme.sentences(elem_id="numbers-told")

    def connect(self, chosen: gr.State) -> None:
        """Let the parts act on the adapter in a state."""
        when(chosen.change, self.show, chosen, [self.rows, self.told], **TYPED)
        self.start.click(self.measure, chosen, self.told, trigger_mode="once", concurrency_limit=1, **QUIET)

    def show(self, id: str | None) -> list:
        """The figures of an adapter."""
        try:
            found = numbers.of(self.workspace, id).rows() if id else []
        except StudioError as error:
            return [[], [theme.said("error", str(error))]]
        return [[{"label": what, "value": words} for what, words in found], []]

    def measure(self, id: str | None) -> Iterator[list]:
        """Time the base, the adapter beside it and merged into it, and say what came of it."""
        if not id:
            yield []
            return
        yield [theme.said("note", "The base, the adapter beside it and merged are timed in turns. The first time, the model is loaded.")]
        try:
            told = numbers.measure(self.workspace, id)
        except StudioError as error:
            yield [theme.said("error", str(error))]
            return
        yield [theme.said("ok", numbers.measured_in_words(told))]
