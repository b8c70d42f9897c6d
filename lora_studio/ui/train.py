"""The Train page: a form from the spec, what will happen and what stands in the way, and one button."""

import json
from pathlib import Path

import gradio as gr

from lora_studio import albums, data, presets, settings, shelf, studio
from lora_studio.errors import SpecError, StudioError
from lora_studio.spec import TrainSpec, methods
from lora_studio.ui import forms, theme
from lora_studio.ui.choices import Choices
from lora_studio.ui.events import LIVE, QUIET, TYPED, Gathered, Newest, busy, when
from lora_studio.ui.fit import Fit, outgrown
from lora_studio.ui.recommend import Recommend
from lora_studio.ui.seat import Seated
from lora_studio.ui.sweep import Sweep
from lora_studio.workspace import Workspace

PREVIEW = """<div class="preview">{{#each value}}<article{{#if thumbnail}} class="picture"{{/if}}>{{#if thumbnail}}<img src="{{thumbnail}}" alt="">{{/if}}{{#each turns}}<p><b>{{who}}</b> {{text}}</p>{{/each}}</article>{{/each}}</div>"""
PREVIEW_CSS = """
.preview{display:flex;flex-direction:column;gap:8px}
.preview article{border:1px solid var(--border-color-primary);border-radius:8px;padding:7px 11px;background:var(--background-fill-primary)}
.preview:has(.picture){display:grid;grid-template-columns:repeat(auto-fill,minmax(120px,1fr))}
.preview .picture{display:flex;flex-direction:column;gap:4px}.preview .picture b{display:block}
.preview img{width:100%;border-radius:6px;object-fit:cover;aspect-ratio:1}
.preview p{margin:2px 0;font-size:13px;line-height:1.4;color:var(--body-text-color);overflow-wrap:anywhere}
.preview b{font-size:11px;color:var(--body-text-color-subdued);font-weight:400;display:inline-block;min-width:62px}
"""


class Train(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.fit, self.sweep, self.recommend, self.choices = workspace, Fit(), Sweep(self), Recommend(self), Choices(self)
        self.first = presets.available()[0].name if presets.available() else None

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Train an adapter\nPick a preset and your rows; the preset fills in the rest.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                self.form = self._left()
            with gr.Column(scale=2, min_width=300):
                self._right()
        self.inputs = set(self.form.values())
        self.gathered = Gathered(self.inputs)
        self.started = gr.State(None)

    def _left(self) -> forms.Form:
        form: forms.Form = {}
        self.preset = gr.Dropdown([preset.name for preset in presets.available()], value=None, label="Preset", info="Fills the form. The demos train on any CPU in a minute or two.", interactive=True)
        with gr.Row():
            form["name"], form["base.id"] = forms.widget("name"), forms.widget("base.id")
        self.data = gr.Dropdown(studio.data_choices(self.workspace), value=[], multiselect=True, allow_custom_value=True, label="Rows to train on", info="Pick, or type a path or a Hub data set.", interactive=True)
        self.upload = gr.UploadButton("Upload rows (.jsonl .json .csv .tsv .parquet), pictures, or a .zip of them", file_types=[*data.SUFFIXES, ".zip", ".txt", *albums.SUFFIXES], file_count="multiple", size="sm")
        self.captions = gr.Button("Edit captions", size="sm", visible=False, elem_id="edit-captions")
        form["task.kind"] = forms.widget("task.kind")
        self.recommend.build()
        with gr.Row():
            for path in ("method.kind", "method.rank", "method.alpha", "optim.lr"):
                form[path] = forms.widget(path)
        with gr.Row(equal_height=True):
            self.plus = gr.Checkbox(False, label="LoRA+", info="B learns faster than A. Switching it on suggests a lower base rate.", interactive=True)
            form["optim.lora_plus_ratio"] = forms.widget("optim.lora_plus_ratio")
        self.rates = gr.Markdown("", elem_id="rates")
        with gr.Row():
            for path in ("schedule.epochs", "schedule.steps", "schedule.batch_size"):
                form[path] = forms.widget(path)
        form["output.sample_prompts"] = forms.widget("output.sample_prompts")
        with gr.Accordion("Advanced: every other setting", open=False):
            form |= forms.advanced()
        self.sweep.build()
        self.choices.build()
        return form

    def _right(self) -> None:
        self.tiles = theme.tiles()
        self.problems = theme.sentences(elem_id="problems")
        self.fit.build()
        with gr.Row():
            self.check = gr.Button("Check every row", size="lg")
            self.start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
        self.targets = gr.Markdown("", elem_id="targets")
        self.preview = theme.Shown([], html_template=PREVIEW, css_template=PREVIEW_CSS, elem_classes="flush", elem_id="preview")
        self.command = gr.Code("", language="shell", label="The same on the command line", interactive=False, elem_id="command")
        with gr.Accordion("The spec as YAML", open=False):
            self.yaml = gr.Code("", language="yaml", show_label=False, interactive=False)

    # ---- wiring

    def connect(self, open_run) -> None:
        """Let the parts act. `open_run` is (function that gives the updates showing a run, its outputs)."""
        newest = Newest()
        changes = [component.change for path, component in self.form.items()]
        read = self.gathered.reads
        self.looked = self.gathered.when(changes, newest(read(self.look), self.shown), self.shown, **LIVE)
        when(self.preset.input, self.fill, self.preset, [*self.form.values(), self.data, self.plus], **TYPED)
        # Each follows what a person does to the other, never its changes: those would come back as echoes. Gradio tells no `input` of
        # rows that were typed and of text that was pasted; a key and leaving the field do.
        picked, sources = {self.data, self.form["data"]}, self.form["data"]
        gr.on([self.data.input, self.data.key_up, self.data.blur], self.pick, picked, sources, **TYPED)
        gr.on([sources.input, sources.blur], self.follow_sources, picked, self.data, **TYPED)
        kind, base = self.form["task.kind"], self.form["base.id"]
        method = self.form["method.kind"]
        hidden = list(forms.adapt(self.form, "chat", "lora"))
        when([kind.change, method.change], lambda *given: forms.adapt(self.form, *given), [kind, method], hidden, **TYPED)
        when(method.change, lambda given: gr.update(visible=given in methods.WITH_B), method, self.plus, **TYPED)
        # What a person chooses, never what a preset fills in: that brings settings of its own.
        when(method.input, self.start_afresh, [method, self.choices.known], [part for path, part in self.form.items() if path.startswith("method.") and path not in ("method.kind", "method.targets")], **TYPED)
        when(kind.change, lambda given: gr.update(visible=given == "image"), kind, self.captions, **TYPED)
        when(base.change, self.suit, [base, kind], [kind, self.form["task.resolution"]], **TYPED)
        self.upload.upload(self.keep, {self.upload, self.form["data"], *self.bringing}, self.brought, **busy(self.upload))
        self.plus.input(self.switch, {self.plus, kind, self.form["optim.lr"], self.form["optim.lora_plus_ratio"]}, [self.form["optim.lr"], self.form["optim.lora_plus_ratio"]], **TYPED)
        self.gathered.when(self.check.click, newest(read(self.look_deep), self.shown), self.shown, concurrency_limit=2, **busy(self.problems))
        self.fit.connect(self.form)
        show, outputs = open_run
        begin = self.gathered.when(self.start.click, read(self.begin), [*self.shown, self.started], concurrency_limit=2, **busy(self.problems))
        begin.then(show, self.started, outputs, **QUIET)
        self.sweep.connect(open_run)
        self.recommend.connect()
        self.choices.connect()

    @property
    def shown(self) -> list:
        """What an assessment fills."""
        return [self.tiles, self.problems, self.rates, self.targets, self.preview, self.command, self.yaml, *self.fit.shown]

    def start_afresh(self, kind: str, known: dict):
        """The settings of a kind of adapter at their own defaults; nothing where that kind is not taken."""
        return gr.skip() if self.choices.refuses("method.kind", kind, known) else forms.start_afresh(self.form, kind)

    def fill(self, name: str | None):
        """The form as a preset has it. Rows that were picked stay when the preset has none."""
        values = studio.form_values(name)
        return self.put(values, keep_rows=not values["data"])

    def put(self, values: dict, *, keep_rows: bool = False) -> list:
        """Updates that put settings into the form, its rows and its switch."""
        shown = forms.fill(self.form, values)
        updates = [gr.skip() if keep_rows and path == "data" else shown[component] for path, component in self.form.items()]
        rows = gr.skip() if keep_rows else gr.update(value=[source["path"] for source in values["data"]], choices=studio.data_choices(self.workspace))
        return [*updates, rows, values["optim.lora_plus_ratio"] is not None]

    def pick(self, given: dict):
        """The sources as YAML for the rows that were picked; what was set for a source stays with it."""
        before = {source["path"]: source for source in sources_of(given[self.form["data"]])}
        if list(before) == (given[self.data] or []):
            return gr.skip()
        return forms.show(forms.leaf("data"), [before.get(path, {"path": path}) for path in given[self.data] or []])

    def follow_sources(self, given: dict):
        """The rows that the sources name."""
        named = [source["path"] for source in sources_of(given[self.form["data"]])]
        return gr.skip() if named == given[self.data] else gr.update(value=named, choices=studio.data_choices(self.workspace))

    def keep(self, given: dict):
        """Keep uploaded files in the workspace and add them to the sources. Pictures that come one by one become an album."""
        sources, files = sources_of(given[self.form["data"]]), [Path(file.replace("\\", "/")) for file in given[self.upload] or []]
        loose = [file for file in files if file.suffix.lower() in (*albums.SUFFIXES, ".txt", ".caption")]
        try:
            paths = [studio.upload(self.workspace, str(file), file.name) for file in files if file not in loose]
            if loose:
                album, found = albums.create(self.workspace, loose)
                paths.append(albums.source_of(self.workspace, album).path)
                for sentence in found.sentences():
                    gr.Warning(sentence)
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * len(self.brought)
        if loose and given[self.form["task.kind"]] != "image":
            return self.bring(paths[-1], *(given[part] for part in self.bringing))
        sources += [{"path": path} for path in paths if path not in {source["path"] for source in sources}]
        return [gr.skip(), *self.rows_of(sources), *[gr.skip()] * (len(self.brought) - 3)]

    def rows_of(self, sources: list[dict]) -> list:
        """Updates of the sources as YAML and of the rows picked."""
        picked = gr.update(value=[source["path"] for source in sources], choices=studio.data_choices(self.workspace))
        return [forms.show(forms.leaf("data"), sources), picked]

    @property
    def bringing(self) -> list:
        """What `bring` has to know."""
        return [self.form["base.id"], self.form["task.kind"]]

    @property
    def brought(self) -> list:
        """What `bring` fills."""
        return [self.form["task.kind"], self.form["data"], self.data, *(self.form[path] for path in ("base.id", "task.resolution", "name", "output.sample_prompts"))]

    def bring(self, path: str, base, kind: str) -> list:
        """Updates for `brought`: a folder of pictures as the only source, and a base that draws where the chosen one does not."""
        rows = self.rows_of([{"path": path}])
        if shelf.picture_edge(str(base or "").strip()) != 0:
            return ["image", *rows, *[gr.skip()] * 4]
        album = albums.named(self.workspace, path)
        captions = [" ".join(text.split()) for text in albums.view(self.workspace, album).captions.values() if text] if album else []
        return ["image", *rows, "demo-image", str(shelf.picture_edge("demo-image")), Path(path).name, "\n".join(list(dict.fromkeys(captions))[:2])]

    def suit(self, base, kind: str) -> list:
        """The kind of rows that fits a base: pictures, at the size its family was trained at, or words again."""
        edge = shelf.picture_edge(str(base or "").strip())
        if edge and kind != "image":
            return ["image", str(edge)]
        return ["chat" if edge == 0 and kind == "image" else gr.skip(), gr.skip()]

    def switch(self, given: dict):
        """LoRA+ on: the usual ratio and a lower base rate, by the kind of rows; off: the other way round."""
        kind = given[self.form["task.kind"]]
        ratio = studio.suggest_ratio(kind)
        try:
            rate = float(given[self.form["optim.lr"]])
        except ValueError:
            return gr.skip(), f"{ratio:g}" if given[self.plus] else ""
        if given[self.plus]:
            lower = studio.suggest_lr(rate, kind)
            gr.Info(f"The base rate was lowered from {rate:g} to {lower:g}: with LoRA+ at {ratio:g} the best rate of A is lower by about {ratio / 2:g}.")
            return f"{lower:g}", f"{ratio:g}"
        return f"{float(f'{rate * ratio / 2:.2g}'):g}", ""

    # ---- what is shown

    def spec(self, given: dict) -> TrainSpec:
        """The spec that the form holds. Raises SpecError."""
        return studio.spec_of_values(forms.collect(self.form, given))

    def look(self, given: dict):
        """What can be said at once of what the form holds."""
        return self.assess(given, deep=False)

    def look_deep(self, given: dict):
        """The same, with every row as tokens."""
        return self.assess(given, deep=True)

    def assess(self, given: dict, *, deep: bool) -> list:
        """Tiles, sentences, rates, targets, preview, command, YAML and memory."""
        try:
            spec = self.spec(given)
        except SpecError as error:
            return [[], [theme.said("error", problem.sentence, problem.path) for problem in error.problems], "", "", [], "", "", *outgrown()]
        return self._shown(spec, studio.preflight(self.workspace, spec, deep=deep), deep)

    def _shown(self, spec: TrainSpec, report: studio.Report, deep: bool) -> list:
        told = [theme.said(problem.level, problem.sentence, problem.path) for problem in report.problems]
        if report.can_start:
            told.append(theme.said("ok", "Every row was checked. Ready to start." if deep else "Ready to start."))
        targets = report.facts.get("targets")
        where = f"Adapter on **{', '.join(targets)}**" + (" (auto)" if spec.method.targets == "auto" else "") if targets else ""
        return [tiles_of(report.facts), told, rates_in_words(spec), where, preview_of(report.preview), studio.command(spec), settings.dumps(spec, sparse=True), *self.fit.show(report.facts)]

    def begin(self, given: dict):
        """Check everything, then start. Gives what is shown and the id of the run, or None."""
        try:
            spec = self.spec(given)
            report = studio.preflight(self.workspace, spec, deep=True)
            shown = self._shown(spec, report, True)
            if not report.can_start:
                gr.Warning("It cannot start yet: see the sentences marked ✗.")
                return [*shown, None]
            id = studio.start(self.workspace, spec)
        except SpecError as error:
            gr.Warning("It cannot start yet: see the sentences marked ✗.")
            told = [theme.said("error", problem.sentence, problem.path) for problem in error.problems]
            return [gr.skip(), told, *[gr.skip()] * (len(self.shown) - 2), None]
        gr.Success(f"{spec.name} was started.")
        return [*shown, id]


def sources_of(text: str) -> list[dict]:
    try:
        found = settings.read_yaml(text or "", "Sources")
    except SpecError:
        return []
    return [source for source in found or [] if isinstance(source, dict) and isinstance(source.get("path"), str)] if isinstance(found, list) else []


def tiles_of(facts: dict) -> list[dict]:
    """The numbers of a report."""
    rows, sizes = facts.get("rows_train", facts.get("rows")), facts.get("sizes") or {}
    found = [
        ("rows to train on" if "rows_train" in facts else "rows", f"{rows:,}" if rows is not None else None),
        ("held out", f"{facts['rows_validation']:,}" if "rows_validation" in facts else None),
        ("trainable", count_in_words(facts["trainable"]) if facts.get("trainable") else None),
        ("memory", studio.gigabytes(facts["memory"]) if facts.get("memory") else None),
        ("steps", f"{facts['steps']:,}" if "steps" in facts else None),
        ("size" if len(sizes) == 1 else "sizes", next(iter(sizes)) if len(sizes) == 1 else str(len(sizes)) if sizes else None),
        ("class pictures", f"{facts['prior']:,}" if facts.get("prior") else None),
        ("with a mask", f"{facts['masks']:,}" if facts.get("masks") else None),
        ("longest row", f"{facts['longest']:,} tokens" if "longest" in facts else None),
        ("device", facts.get("device")),
    ]
    return [{"label": label, "value": value} for label, value in found if value]


def count_in_words(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k" if count >= 1e3 else str(count)


def rates_in_words(spec: TrainSpec) -> str:
    """Both rates and the scale, live; of a method without A and B the one rate."""
    rates = studio.rates(spec)
    if spec.method.kind not in methods.WITH_B:
        return f"It learns at **{rates['A']:.3g}**" + (f"; the update is scaled by **{studio.scale(spec):.3g}**." if hasattr(spec.method, "alpha") else ".")
    return f"A learns at **{rates['A']:.3g}**, B at **{rates['B']:.3g}**; the update is scaled by **{studio.scale(spec):.3g}**."


def preview_of(rows: list[dict]) -> list[dict]:
    """Rows as turns: who, and the beginning of what is said."""
    shown = []
    for row in rows[:12]:
        if "thumbnail" in row:
            shown.append({"thumbnail": row["thumbnail"], "turns": [{"who": row["picture"], "text": row["caption"] or "(no caption)"}]})
            continue
        turns = [(turn["role"], turn["content"]) for turn in row["messages"]] if "messages" in row else list(row.items())
        shown.append({"turns": [{"who": who, "text": text if len(text) <= 300 else text[:300] + " …"} for who, text in turns]})
    return json.loads(json.dumps(shown))
