"""The Blend page: weights on the left, what they make of the adapters on the right, live; and the blend saved as an adapter."""

import json

import gradio as gr

from lora_studio import exports, library, shelf
from lora_studio.errors import AdapterError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.bake import Bake
from lora_studio.ui.curve import ErrorCurve
from lora_studio.ui.events import LIVE, QUIET, busy, when
from lora_studio.ui.export import Export
from lora_studio.ui.figures import (
    FIGURES,
    FIGURES_CSS,
    ROUNDING,
    SUGGESTED,
    exact_rank,
    figures_of,
    percent,
    rank_of,
    saved_in_words,
    suggestions,
)
from lora_studio.ui.judge import Judge
from lora_studio.ui.layers import Layers
from lora_studio.ui.merge import Merge
from lora_studio.ui.mix import Mix, tab_of
from lora_studio.ui.search import Search
from lora_studio.ui.seat import Seated
from lora_studio.ui.tryout import Tryout
from lora_studio.workspace import Workspace

HINT = "Pick adapters on the left. Their sizes, how alike they are, and the error of every rank appear here."


class Blend(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.mix = workspace, Mix(workspace, "mix-blend")
        self.layers, self.merge, self.bake = Layers(workspace), Merge(workspace), Bake(workspace)
        self.judge, self.tryout, self.search = Judge(workspace), Tryout(workspace), Search(workspace)
        self.export = Export(workspace, "blend-export")

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Blend adapters\nA blend is the sum of what its adapters change, each times its weight. A weight of 0 leaves one out, a negative one takes it away.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.mix.build()
                self.layers.build()
                self._save_box()
                self.export.build(visible=False)
                self.merge.build()
                self.bake.build()
            with gr.Column(scale=3, min_width=300, elem_id="blend-preview"):
                self.figures = theme.Shown({"hint": HINT}, html_template=FIGURES, css_template=FIGURES_CSS, container=True, padding=True, elem_id="blend-figures")
                self.curve = ErrorCurve("", container=True, padding=True, visible=False, elem_id="blend-curve")
                self.judge.build()
                self.tryout.build()
                self.search.build()
        self.saved, self.suggested = gr.State(None), gr.State([])
        self._wire()

    def _save_box(self) -> None:
        with gr.Row():
            self.name = gr.Textbox("", label="Name of the blend", info="As it stands in the library.", max_lines=1, max_length=80, interactive=True, elem_id="blend-name", min_width=150)
            self.rank = gr.Textbox("", label="Rank", placeholder="exact", max_lines=1, info="Empty: exact (ranks add).", interactive=True, elem_id="blend-rank", min_width=110)
        with gr.Row():
            self.exact = gr.Button("Exact", size="sm", min_width=80)
            self.ranks = [gr.Button("", size="sm", visible=False, min_width=110, elem_id=f"blend-rank-{number}") for number in range(len(SUGGESTED))]
        self.save = gr.Button("Save blend", variant="primary", size="lg", elem_id="blend-save")
        # Two, so that a preview that was under way does not take away what came of saving.
        with gr.Column(elem_id="blend-sentences"):
            self.kept, self.told = theme.sentences(), theme.sentences()
        with gr.Row():
            self.talk = gr.Button("Talk to it", size="md", min_width=90, elem_id="blend-talk")
            self.to_library = gr.Button("Show in library", size="md", interactive=False, min_width=90, elem_id="blend-to-library")
            self.to_publish = gr.Button("Publish", size="md", interactive=False, min_width=90, elem_id="blend-to-publish")

    # ---- wiring

    @property
    def opened(self) -> list:
        """What showing other parts fills; the preview follows by itself."""
        return self.mix.opened

    @property
    def seen(self) -> list:
        """What the preview fills."""
        return [self.figures, self.curve, self.exact, *self.ranks, self.suggested, self.told]

    def _wire(self) -> None:
        changes = [slider.input for slider in self.mix.sliders]
        when([*changes, self.mix.turn.change, self.rank.change], self.look, [self.rank, *self.mix.inputs], self.seen, **LIVE)
        # Its `change` and not its `input`: Gradio tells no `input` of pasted text, and the buttons set it too.
        self.exact.click(lambda: "", None, self.rank, **QUIET)
        for number, button in enumerate(self.ranks):
            button.click(self._suggestion(number), self.suggested, self.rank, **QUIET)
        self.curve.pick(self.point, None, self.rank, **QUIET)
        self.layers.connect(self.mix)
        self.judge.connect(self.mix, self.layers)
        self.merge.connect(self.mix)
        self.bake.connect(self.mix, self.merge)
        self.tryout.connect(self.mix, self.rank)
        self.search.connect(self.mix)
        self.export.connect(self.saved)
        self.save.click(
            self.keep, [self.name, self.rank, *self.mix.inputs], [self.kept, self.saved, self.to_library, self.to_publish, self.mix.pick],
            concurrency_limit=None, **busy(self.kept),
        )  # fmt: skip

    def connect(self, tabs, playground, library_page, publish) -> None:
        """Let the buttons lead to the other pages."""
        tab_of(self.mix.pick).select(self.mix.fresh, self.mix.pick, self.mix.pick, **QUIET)
        self.talk.click(lambda *given: self.jump(playground, *given), [self.saved, self.rank, *self.mix.inputs], [tabs, *playground.opened], **QUIET)
        self.to_library.click(lambda saved: [gr.Tabs(selected="library"), *library_page.open(saved["id"])], self.saved, [tabs, *library_page.opened], **QUIET)
        show = {"fn": lambda saved, owner: [gr.Tabs(selected="publish"), *publish.open(saved["id"], owner)], "inputs": [self.saved, publish.owner]}
        self.to_publish.click(**show, outputs=[tabs, *publish.opened], **QUIET)

    @staticmethod
    def _suggestion(number: int):
        return lambda suggested: str(suggested[number]) if number < len(suggested) and suggested[number] else ""

    def point(self, event: gr.EventData):
        """The rank that was clicked in the curve; 0 stands for the exact one."""
        return str(int(event.rank) or "")

    # ---- what is shown

    def open(self, parts) -> list:
        """Updates for `opened` that show other parts."""
        return self.mix.open(parts)

    def add(self, id: str, *given) -> list:
        """Updates for `opened` that add an adapter, with weight 1, to the parts there are (the values of `mix.inputs`)."""
        pick, held, *given = given
        known = self.mix.known(held, *given)
        parts = [[text, known.get(text, 1.0)] for text in pick or []]
        return self.open(parts if id in known else [*parts, [id, 1.0]])

    def look(self, rank, *given):
        """The preview of what the sliders say; a sentence first where it has to be waited for."""
        try:
            parts, chosen = self.mix.parts(*given), rank_of(rank)
            if not parts:
                yield [{"hint": HINT}, _curve(None), *self._buttons([], None), []]
                return
            waiting = _waiting(shelf.bench_status())
            if waiting:
                yield [*[gr.skip()] * (len(self.seen) - 1), [theme.said("note", waiting)]]
            found = shelf.preview(self.workspace, parts)
        except StudioError as error:
            hint = {"hint": "There is no preview of this mix: see the sentence marked ✗."}
            yield [hint, _curve(None), *self._buttons([], None), [theme.said("error", str(error))]]
            return
        cards = [library.card(self.workspace, id) for id, _ in parts]
        most, width = exports.room(self.workspace, parts)
        exact = min(most, exact_rank(found, [(card["rank"], weight) for card, (_, weight) in zip(cards, parts)]))
        suggested = suggestions(found["losses"], exact)
        told = [theme.said("warning", "Every weight is 0, so the blend would change nothing. Move a slider.")] if not exact else []
        if chosen and exact and chosen >= exact:
            told.append(theme.said("note", f"The exact blend has rank {exact}, so rank {chosen} loses nothing and saves the exact one."))
        curve = {"losses": found["losses"], "exact": exact, "chosen": min(chosen or exact, exact)} if exact else None
        figures = {"saved": saved_in_words(chosen, exact, found["losses"], width)}
        figures |= figures_of(found, [card["name"] for card in cards], [weight for _, weight in parts], exact)
        yield [figures, _curve(curve), *self._buttons(suggested, exact), told]

    def _buttons(self, suggested: list, exact: int | None) -> list:
        """The buttons that set a rank, and the ranks they set."""
        shown = [gr.update(value=f"Exact (rank {exact})" if exact else "Exact")]
        for number, limit in enumerate(SUGGESTED):
            rank = suggested[number] if number < len(suggested) else None
            shown.append(gr.update(value=f"Rank {rank}: error below {limit:.0%}" if rank else "", visible=rank is not None))
        return [*shown, suggested]

    # ---- what the buttons do

    def keep(self, name: str, rank, *given) -> list:
        """Save the blend and say what came of it. Nothing is lost when it cannot be."""
        try:
            parts, chosen = self.mix.parts(*given), rank_of(rank)
            if not parts:
                return self._refused("There is nothing to save yet. Pick at least one adapter.")
            if not (name or "").strip():
                raise AdapterError("library.name", name="of the blend is empty and")
            id, done = shelf.blend(self.workspace, parts, name=name.strip(), rank=chosen)
        except StudioError as error:
            return self._refused(str(error))
        called, kind = self.mix.label(id), "exact" if chosen is None or done["loss"] < ROUNDING else f"compressed to rank {chosen}"
        told = [theme.said("ok", f"{called} is in the library: rank {done['rank']}, {kind}, true error {percent(done['loss'])}.")]
        if called != name.strip():
            told.append(theme.said("note", f"The very same blend was there already, and keeps its name {called}. Rename it in the library."))
        saved = {"id": id, "parts": parts, "rank": chosen}
        return [told, saved, gr.update(interactive=True), gr.update(interactive=True), self.mix.fresh(given[0])]

    @staticmethod
    def _refused(sentence: str) -> list:
        return [[theme.said("error", sentence)], *[gr.skip()] * 4]

    def jump(self, playground, saved, rank, *given) -> list:
        """Updates that lead to the Playground: with the blend that was saved, or with the parts as they are now."""
        try:
            parts = self.mix.parts(*given)
            chosen = rank_of(rank)
            is_saved = saved is not None and saved["parts"] == parts and saved["rank"] == chosen
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * (1 + len(playground.opened))
        if chosen and not is_saved:
            gr.Info(f"The Playground mixes without a rank. Save the blend to talk to it at rank {chosen}, or try it on the Blend page.")
        return [gr.Tabs(selected="playground"), *playground.open([[saved["id"], 1.0]] if is_saved else parts)]


# ---- words and numbers


def _curve(found: dict | None):
    """The error of every rank as its component takes it; none is not shown."""
    return gr.update(value=json.dumps(found) if found else "", visible=found is not None)


def _waiting(status: dict) -> str:
    """What has to be waited for before a preview; "" when nothing."""
    if status["state"] in ("off", "starting"):
        return "Starting the bench…"
    return f"The bench is busy ({status['doing']}); the preview comes after that." if status.get("doing") else ""
