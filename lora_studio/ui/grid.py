"""The grid of the Playground: adapters or checkpoints × strengths × prompts, drawn side by side and saved as one picture."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from lora_studio import grids
from lora_studio.errors import StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import LIVE, QUIET, when
from lora_studio.ui.mix import whole
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

TEMPLATE = """{{#if value.blocks}}<div class="grid" aria-busy="{{value.busy}}">{{#each value.blocks}}<section><h4>{{prompt}}</h4><div class="frame"><table><thead><tr><th></th>{{#each columns}}<th scope="col">{{label}}</th>{{/each}}</tr></thead><tbody>
{{#each rows}}<tr><th scope="row">{{label}}</th>{{#each cells}}<td>{{#if picture}}<a href="{{picture}}" target="_blank"><img src="{{picture}}" alt="{{label}}" loading="lazy"></a>{{else}}<i></i>{{/if}}</td>{{/each}}</tr>{{/each}}
</tbody></table></div></section>{{/each}}</div>{{/if}}{{#if value.file}}<p class="saved"><a href="{{value.file}}" download="{{value.name}}">Save the grid as one picture</a> <span>Its settings are inside the file.</span></p>{{/if}}"""
CSS = """
.grid{display:flex;flex-direction:column;gap:12px}
section{border:1px solid var(--border-color-primary);border-radius:10px;padding:8px 12px;background:var(--background-fill-primary);min-width:0}
h4{margin:0 0 6px;font-size:13.5px;color:var(--body-text-color);overflow-wrap:anywhere}
.frame{overflow:auto;max-height:640px}
table{border:0!important;border-collapse:separate;border-spacing:0;font-size:12.5px;color:var(--body-text-color);margin:0;width:auto}
th,td{border:0!important;padding:3px 5px!important;text-align:left;font-weight:400;color:var(--body-text-color-subdued);background:var(--background-fill-primary)}
tbody th{position:sticky;left:0;max-width:120px;overflow-wrap:anywhere}
td a{display:block}
td img,td i{width:112px;min-width:72px;border-radius:6px;display:block;margin:0}
td i{aspect-ratio:1;background:var(--background-fill-secondary)}
.saved{font-size:13.5px;margin:10px 2px 0;color:var(--body-text-color-subdued)}.saved a{color:var(--color-accent);font-weight:700}
"""
EMPTY = {"busy": "false", "blocks": [], "file": "", "name": ""}
EVERY_SECONDS = 0.3


class Grid(Seated):
    """A part of the Playground page; the mix, the base and the brush are the page's own."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.stops: set[str] = set()

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Grid: adapters × strengths × prompts", open=False, visible=False, elem_id="grid-box") as self.box:
            self.rows = gr.Dropdown(
                [], value=[], multiselect=True, label="Rows", interactive=True, elem_id="grid-rows",
                info="The mix, each adapter alone, or the checkpoints of its run.",
            )  # fmt: skip
            self.strengths = gr.Textbox("0, 0.5, 1, 1.5", label="Strengths", info="Each multiplies the weights of a row; 0 is the base.", max_lines=1, interactive=True, elem_id="grid-strengths")
            self.prompts = gr.Textbox("", label="Prompts (one a line)", info="Empty takes the prompt above.", lines=2, max_lines=8, interactive=True, elem_id="grid-prompts")
            with gr.Row():
                self.start = gr.Button("Draw the grid", variant="primary", elem_id="grid-start")
                self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="grid-stop")
            self.told = theme.sentences(elem_id="grid-sentences")
            self.shown = theme.Shown(EMPTY, html_template=TEMPLATE, css_template=CSS, elem_classes="flush", elem_id="grid")
            self.token = gr.State("")

    def connect(self, page) -> None:
        """Let the parts act, with the Playground's mix, base, prompt and brush."""
        mix, inputs = page.mix, {self.rows, self.strengths, self.prompts, page.prompt, page.base, *page.mix.inputs, *page.brushes.values()}
        when(mix.turn.change, self.follow, [self.rows, *mix.inputs], self.rows, **LIVE)

        def begin(given: dict) -> Iterator[dict]:
            yield from self.draw(page, given)

        self.start.click(begin, inputs, [self.shown, self.told, self.token, self.start, self.stop], trigger_mode="once", concurrency_limit=None, **QUIET)
        self.stop.click(self.stops.add, self.token, None, queue=False, **QUIET)

    def follow(self, picked, pick, held, *weights):
        """The rows there can be after the mix has changed; those that still are there stay."""
        known = grids.choices(self.workspace, [[id, 1.0] for id in held or []])
        stay = [key for key in picked or [] if key in {key for _, key in known}]
        return gr.update(choices=known, value=stay or [key for _, key in known[:1]])

    def draw(self, page, given: dict) -> Iterator[dict]:
        """Draw the grid cell by cell, and save it at the end. Stopped or broken off, what was drawn stays to be seen."""
        token, state = secrets.token_hex(8), EMPTY
        rest = {self.start: gr.update(interactive=True), self.stop: gr.update(interactive=False), self.token: ""}
        try:
            asked = self._asked(page, given)
            state = _blank(asked)
            yield {self.shown: state, self.told: [], self.token: token, self.start: gr.update(interactive=False), self.stop: gr.update(interactive=True)}
            events, last, said = grids.draw(self.workspace, asked), 0.0, []
            try:
                for event in events:
                    if token in self.stops:
                        said = [theme.said("note", "Stopped; nothing was saved.")]
                        break
                    said = self._take(event, state) or said
                    if time.monotonic() - last >= EVERY_SECONDS:
                        last = time.monotonic()
                        yield {self.shown: {**state}, self.told: said}
            finally:
                events.close()
            yield {self.shown: {**state, "busy": "false"}, self.told: said, **rest}
        except StudioError as error:
            yield {self.shown: {**state, "busy": "false"}, self.told: [theme.said("error", str(error))], **rest}
        finally:
            self.stops.discard(token)

    def _take(self, event: dict, state: dict) -> list[dict] | None:
        """Put what an event tells into the state. Returns what is to be said."""
        if event["event"] == "cell":
            for row, column in event["places"]:
                state["blocks"][event["prompt"]]["rows"][row]["cells"][column]["picture"] = _link(event["path"])
        if event["event"] == "grid":
            state |= {"file": _link(event["path"]), "name": f"grid-{Path(event['path']).name}"}
            bare = " The base was drawn with every adapter off." if event["base_is_bare"] else ""
            return [theme.said("ok", f"{event['pictures']} pictures were drawn.{bare}")]
        if "total" in event:
            return [theme.said("note", f"Drawing: {event['done']} of {event['total']} pictures are there.")]
        return None

    def _asked(self, page, given: dict) -> grids.Asked:
        """The grid as the page's values have it. Raises StudioError."""
        parts = page.mix.parts(*(given[component] for component in page.mix.inputs))
        prompts = [line.strip() for line in (given[self.prompts] or given[page.prompt] or "").splitlines() if line.strip()]
        rows = grids.rows(self.workspace, given[self.rows] or [], parts) or (grids.Row("Base", ()),)
        brush = {name: whole(given[component]) for name, component in page.brushes.items()}
        return grids.Asked(str(given[page.base] or "").strip(), tuple(prompts), rows, grids.strengths(given[self.strengths] or ""), brush)


def _link(path: str) -> str:
    return f"/studio/picture/{Path(path).name}"


def _blank(asked: grids.Asked) -> dict:
    """The table without its pictures."""
    columns = [{"label": f"× {strength:g}" if strength else "base"} for strength in asked.strengths]
    blocks = [
        {"prompt": prompt, "columns": columns, "rows": [{"label": row.label, "cells": [{"picture": "", "label": f"{row.label} {column['label']}"} for column in columns]} for row in asked.rows]}
        for prompt in asked.prompts
    ]
    return {"busy": "true", "blocks": blocks, "file": "", "name": ""}
