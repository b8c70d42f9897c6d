"""The part of the Blend page that searches the weights which suit somebody's own rows best: a run of the queue, followed here."""

import json
import tempfile
from pathlib import Path

import gradio as gr

from lora_studio import search, studio
from lora_studio.errors import SpecError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import QUIET
from lora_studio.ui.mix import Mix, tab_of, whole
from lora_studio.ui.search_curve import SearchCurve
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

ARROW, RECENT = "=>", 40
OVER = ("done", "stopped", "failed")


class Search(Seated):
    """A part of the Blend page; the mix is the page's own. What is shown is read from the run, so that a reload finds it again."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Search the best weights", open=False, elem_id="search-box") as self.box:
            gr.Markdown(
                "Give rows that no adapter was trained on, or prompts with the answers you want. The weights with the lowest loss on them are searched as a job."
            )
            with gr.Row():
                self.rows = gr.Dropdown(
                    studio.data_choices(self.workspace), value=None, allow_custom_value=True, label="Rows", interactive=True, min_width=180, elem_id="search-rows",
                    info=f"Pick some, or type a file, a folder or a Hub data set. The first {search.ROWS} count.",
                )  # fmt: skip
                self.tries = gr.Number(
                    40, label="Tries", info="At most.", precision=0, interactive=True, min_width=80, elem_id="search-tries"
                )
            self.pairs = gr.Textbox(
                "", label="Or your own prompts and answers", info=f"One pair a line: prompt {ARROW} answer", lines=2, max_lines=10, interactive=True, elem_id="search-pairs",
                placeholder=f"What color is the fox? {ARROW} Arr, the fox be red!",
            )  # fmt: skip
            with gr.Row():
                self.start = gr.Button("Search", variant="primary", size="md", min_width=100, elem_id="search-start")
                self.stop = gr.Button("Stop", variant="stop", size="md", min_width=100, interactive=False, elem_id="search-stop")
                self.use = gr.Button("Use these weights", size="md", min_width=130, interactive=False, elem_id="search-use")
            self.said, self.told = theme.sentences(elem_id="search-said"), theme.sentences(elem_id="search-sentences")
            self.curve = SearchCurve("", result=self.result, elem_classes="flush", elem_id="search-curve")
        self.run = gr.State("")

    def connect(self, mix: Mix) -> None:
        """Let the parts act: it searches for the adapters of the mix, and its weights go onto the sliders."""
        self.mix = mix
        state = [self.said, self.stop, self.use]
        self.start.click(
            self.begin,
            [self.rows, self.pairs, self.tries, *mix.inputs],
            [self.told, self.run, self.curve, *state],
            trigger_mode="once",
            concurrency_limit=None,
            **QUIET,
        )
        self.curve.turned(self.turned, self.run, state, **QUIET)
        self.stop.click(self.end, self.run, [self.told, self.stop], **QUIET)
        self.use.click(self.take, self.run, [self.told, *mix.opened], **QUIET)
        tab_of(self.box).select(self.find, self.run, [self.run, self.curve, self.box, self.rows, *state], **QUIET)

    # ---- what is shown

    def result(self, id: str) -> dict | None:
        """What a search has found so far; None where there is none."""
        try:
            return search.result(self.workspace, id)
        except StudioError:
            return None

    def find(self, id: str) -> list:
        """The newest search, when the page is opened and none is shown; one that goes on is unfolded."""
        rows = gr.update(choices=studio.data_choices(self.workspace))
        if id:
            return [gr.skip(), gr.skip(), gr.skip(), rows, *self.state(id)]
        newest = next((status for status in studio.list_runs(self.workspace)[:RECENT] if self.result(status.id)), None)
        if newest is None:
            return [gr.skip(), gr.skip(), gr.skip(), rows, *[gr.skip()] * 3]
        return [newest.id, newest.id, gr.skip() if newest.state in OVER else gr.update(open=True), rows, *self.state(newest.id)]

    def turned(self, id: str) -> list:
        """What is said and may be pressed after the run has changed its state."""
        return self.state(id)

    def state(self, id: str) -> list:
        """What is said of a search, and whether it can be stopped and its weights be used."""
        found = self.result(id)
        if not found:
            return [[], gr.update(interactive=False), gr.update(interactive=False)]
        return [in_words(found), gr.update(interactive=found["state"] not in OVER), gr.update(interactive=found["parts"] is not None)]

    # ---- what the buttons do

    def begin(self, rows, pairs: str, tries, *given) -> list:
        """Start a search for the weights of the mix, and say what came of it. Nothing is lost when it cannot be."""
        try:
            parts = self.mix.parts(*given)
            ids, by_block = [id for id, _ in parts], any(isinstance(weight, dict) for _, weight in parts)
            found = read_pairs(pairs or "")
            sources = [text for text in [str(rows or "").strip()] if text]
            if not ids or not (sources or found):
                raise SpecError("search.missing")
            id = search.start(self.workspace, ids, [*sources, *([self._kept(found)] if found else [])], evaluations=whole(tries or 0))
        except StudioError as error:
            return [[theme.said("error", str(error))], *[gr.skip()] * 5]
        told = (
            [theme.said("note", "One weight is searched for each adapter; the weights by block of the mix are left out.")]
            if by_block
            else []
        )
        return [told, id, id, *self.state(id)]

    def _kept(self, pairs: list[dict]) -> str:
        """Pairs as a file of rows in the workspace. Returns its path."""
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "pairs.jsonl"
            file.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
            return studio.upload(self.workspace, file, file.name)

    def end(self, id: str) -> list:
        """Ask the search to stop after the try it is at; what it has found stays."""
        try:
            studio.stop(self.workspace, id)
        except StudioError as error:
            return [[theme.said("error", str(error))], gr.skip()]
        return [[theme.said("note", "It stops at once; the best weights so far stay.")], gr.update(interactive=False)]

    def take(self, id: str) -> list:
        """The best weights so far onto the sliders, with the adapters they are of."""
        found = self.result(id)
        if not found or not found["parts"]:
            return [[theme.said("error", "The search has found nothing yet. Wait for its first try.")], *[gr.skip()] * len(self.mix.opened)]
        return [[theme.said("ok", "The sliders have the weights that were found.")], *self.mix.open(found["parts"])]


def read_pairs(text: str) -> list[dict]:
    """Lines of prompts and answers as rows. Raises SpecError for a line that is no pair."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        prompt, sign, answer = map(str.strip, line.partition(ARROW))
        if not sign or not prompt or not answer:
            raise SpecError("search.pair", number=number, line=line.strip()[:60])
        found.append({"prompt": prompt, "completion": answer})
    return found


def in_words(found: dict) -> list[dict]:
    """The state of a search in sentences."""
    names, state = " and ".join(one["name"] for one in found["adapters"]), found["state"]
    if state == "queued":
        return [theme.said("note", f"The search for the weights of {names} waits for its turn.")]
    if state not in OVER:
        rows = f" on {found['rows']} rows" if found["rows"] else ""
        return [theme.said("note", f"Searching the weights of {names}{rows}. You may close the page; it goes on.")]
    return [theme.said({"done": "ok", "stopped": "note", "failed": "error"}[state], found["reason"] or f"The search is {state}.")]
