"""Several at once, on the Train page: the settings that vary with their values, how many adapters that makes, and one button that starts them."""

import gradio as gr

from lora_studio import settings, sweeps
from lora_studio.errors import SpecError, StudioError
from lora_studio.spec.sweep import FREE, ONLY_ALONE, SweepSpec
from lora_studio.ui import fit, forms, theme
from lora_studio.ui.events import LIVE, QUIET, Gathered, Newest, busy

ROWS = 4
FIRST = ("optim.lr", "method.rank")
# What people compare first; every other setting that may vary comes after.
USUAL = ("optim.lr", "method.rank", "method.alpha", "optim.lora_plus_ratio", "compute.seed", "method.targets", "schedule.batch_size", "optim.kind")
EXAMPLES = {
    "optim.lr": "1e-4, 3e-4", "method.rank": "4, 8, 16", "method.alpha": "8, 16", "optim.lora_plus_ratio": "4, 16", "compute.seed": "0, 1, 2",
    "data": "demo/pirate, demo/capitals", "method.targets": "[q_proj, v_proj], [q_proj, k_proj, v_proj, o_proj]", "schedule.batch_size": "4, 16", "optim.kind": "adamw, lion",
}  # fmt: skip
LABELS = {"data": "Rows to train on"}
ASK = "Name a setting and at least two values, or ask for cross-validation."


def may_vary() -> list[str]:
    """The settings that a sweep can vary, the usual ones first."""
    alone = {path for path, *_ in ONLY_ALONE} | {"method.kind"}
    found = [
        leaf.path for leaf in settings.leaves()
        if any(leaf.path == free or leaf.path.startswith(free + ".") for free in FREE) and leaf.path not in alone
        and (leaf.group != "method" or not leaf.kinds or "lora" in leaf.kinds)
    ]  # fmt: skip
    return [*USUAL, *(path for path in found if path not in USUAL)]


class Sweep:
    """A part of the Train page; `page` is that page, whose form says what the run is that is varied."""

    def __init__(self, page):
        self.page = page

    # ---- layout

    def build(self) -> None:
        """Lay it out inside the current column."""
        names = [(f"{LABELS.get(path) or forms.label(forms.leaf(path))} · {path}", path) for path in may_vary()]
        with gr.Accordion("Several at once: compare settings in one run", open=False, elem_id="sweep"):
            gr.Markdown("The form above says what is trained. Name what should differ: every combination becomes an adapter of its own, all are trained over one base side by side, and the best is kept.")
            self.paths, self.values, self.rows = [], [], []
            for number in range(ROWS):
                path = FIRST[number] if number < len(FIRST) else None
                with gr.Row(visible=number < len(FIRST)) as row:
                    self.paths.append(gr.Dropdown(names, value=path, label=f"Setting {number + 1} that varies", interactive=True, elem_id=f"sweep-path-{number}", min_width=200))
                    self.values.append(gr.Textbox("", label=f"Values of setting {number + 1}", placeholder=EXAMPLES.get(path, ""), max_lines=1, interactive=True, elem_id=f"sweep-values-{number}", min_width=200))
                self.rows.append(row)
            self.more = gr.Button("Another setting", size="sm", elem_id="sweep-more")
            with gr.Row():
                self.folds = gr.Textbox("", label="Cross-validation in parts", placeholder="none", info="For few rows: each variant is trained this often, each time judged by another part, and once with all rows.", max_lines=1, interactive=True, elem_id="sweep-folds")
                self.together = gr.Textbox("", label="At the same time at most", placeholder="all", info="Fewer take less memory and more time.", max_lines=1, interactive=True, elem_id="sweep-together")
                self.keep = gr.Radio([("The best", "best"), ("All", "all")], value="best", label="Into the library go", info="The best has the lowest validation loss.", interactive=True, elem_id="sweep-keep")
            self.tiles = theme.tiles(elem_id="sweep-tiles")
            self.memory = theme.Shown(fit.EMPTY, html_template=fit.MEMORY, css_template=fit.CSS, elem_classes="flush", elem_id="sweep-memory")
            self.problems = theme.sentences(value=[theme.said("note", ASK)], elem_id="sweep-problems")
            self.start = gr.Button("Start the sweep", variant="primary", elem_id="sweep-start")
            self.command = gr.Code("", language="shell", label="The same on the command line", interactive=False)
        self.shown_rows = gr.State(len(FIRST))
        self.started = gr.State(None)

    # ---- wiring

    @property
    def own(self) -> list:
        """What a person fills in here."""
        return [*self.paths, *self.values, *self.rows, self.folds, self.together, self.keep]

    @property
    def inputs(self) -> set:
        """What it reads: its own parts and the page's form."""
        return {*self.paths, *self.values, self.folds, self.together, self.keep, *self.page.inputs}

    @property
    def shown(self) -> list:
        """What an assessment fills."""
        return [self.tiles, self.memory, self.problems, self.command]

    def connect(self, open_run) -> None:
        """Let the parts act. `open_run` is (function that gives the updates showing a run, its outputs)."""
        changes = [component.change for component in (*self.paths, *self.values, self.folds, self.together, self.keep)]
        gathered = Gathered(self.inputs)
        look = {"fn": Newest()(gathered.reads(self.look), self.shown), "outputs": self.shown, **LIVE}
        gathered.when(changes, **look)
        gathered.when(self.page.looked, **look)  # as choices.py does, and for its reason
        for path, values in zip(self.paths, self.values, strict=True):
            path.input(lambda chosen: gr.update(placeholder=EXAMPLES.get(chosen, "")), path, values, **QUIET)
        self.more.click(self.add_row, self.shown_rows, [self.shown_rows, self.more, *self.rows], **QUIET)
        show, outputs = open_run
        begin = gathered.when(self.start.click, gathered.reads(self.begin), [*self.shown, self.started], concurrency_limit=2, **busy(self.problems))
        begin.then(show, self.started, outputs, **QUIET)

    def add_row(self, shown: int) -> list:
        """One more setting that varies."""
        shown = min(ROWS, shown + 1)
        return [shown, gr.update(visible=shown < ROWS), *(gr.update(visible=number < shown) for number in range(ROWS))]

    def put(self, spec: SweepSpec | None) -> list:
        """Updates of `own` that put a sweep's settings in; without one, or where its variants were listed one by one, what varies stays."""
        if spec is None or spec.variants or len(spec.over) > ROWS:
            return [gr.skip()] * len(self.own)
        given = [(path, settings.inline(values)[1:-1]) for path, values in spec.over.items()]
        rows = [*given, *zip(FIRST[len(given) :], [""] * ROWS)]
        paths, values = ([row[part] for row in rows] + [None if part == 0 else ""] * (ROWS - len(rows)) for part in (0, 1))
        visible = [gr.update(visible=number < len(rows)) for number in range(ROWS)]
        return [*paths, *values, *visible, str(spec.folds or ""), str(spec.together or ""), spec.keep]

    # ---- what is shown

    def is_asked(self, given: dict) -> bool:
        """Whether anything is to vary."""
        return any((given[values] or "").strip() for values in self.values) or bool((given[self.folds] or "").strip())

    def spec(self, given: dict) -> SweepSpec:
        """The sweep that the parts and the form hold. Raises SpecError."""
        over = []
        for number, (path, values) in enumerate(zip(self.paths, self.values, strict=True), 1):
            text = (given[values] or "").strip().rstrip(",")
            if text and not given[path]:
                raise SpecError("sweep.nameless", number=number, values=text[:60])
            if text:
                over.append(f"{given[path]}={text}")
        numbers = {name: (given[part] or "").strip() or None for name, part in (("folds", self.folds), ("together", self.together))}
        return sweeps.compose(self.page.spec(given), over, keep=given[self.keep], **numbers)

    def look(self, given: dict) -> list:
        """What can be said at once; nothing to be done where nothing varies."""
        if not self.is_asked(given):
            return [[], fit.EMPTY, [theme.said("note", ASK)], ""]
        try:
            spec = self.spec(given)
            return self._shown(spec, sweeps.check(self.page.workspace, spec))
        except StudioError as error:
            return [[], fit.EMPTY, told_of(error), ""]

    def _shown(self, spec: SweepSpec, report) -> list:
        told = [theme.said(problem.level, problem.sentence, problem.path) for problem in report.problems]
        if report.can_start:
            told.append(theme.said("ok", "Ready to start."))
        facts = report.facts
        return [tiles_of(spec, facts), fit.memory_of(facts) if facts.get("memory_parts") else fit.EMPTY, told, sweeps.command(spec)]

    def begin(self, given: dict) -> list:
        """Check everything, then start. Gives what is shown and the id of the run, or None. What was typed stays."""
        try:
            spec = self.spec(given)
            report = sweeps.check(self.page.workspace, spec, deep=True)
            shown = self._shown(spec, report)
            if not report.can_start:
                gr.Warning("The sweep cannot start yet: see the sentences marked ✗.")
                return [*shown, None]
            id = sweeps.start(self.page.workspace, spec)
        except StudioError as error:
            gr.Warning("The sweep cannot start yet: see the sentences marked ✗.")
            return [gr.skip(), gr.skip(), told_of(error), gr.skip(), None]
        gr.Success(f"{facts_in_words(report.facts)} were started.")
        return [*shown, id]


def told_of(error: StudioError) -> list[dict]:
    """An error as sentences, each with its field."""
    if isinstance(error, SpecError):
        return [theme.said("error", problem.sentence, problem.path) for problem in error.problems]
    return [theme.said("error", str(error))]


def facts_in_words(facts: dict) -> str:
    """How many adapters a sweep trains."""
    return f"{facts['adapters']} adapters"


def tiles_of(spec: SweepSpec, facts: dict) -> list[dict]:
    """The numbers of a sweep."""
    each = f"each {spec.folds} parts and the whole" if spec.folds else ""
    found = [
        ("variants" + (f", {each}" if each else ""), str(facts["variants"])),
        ("adapters to train", str(facts["adapters"])),
        ("at the same time", str(facts["at_once"]) if "at_once" in facts else ""),
        ("into the library", "all" if spec.keep == "all" else "the best"),
    ]
    return [{"label": label, "value": value} for label, value in found if value]
