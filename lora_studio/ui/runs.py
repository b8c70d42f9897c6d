"""The Runs page: what runs, what ran, and what came of it. All of it is read from the run folders."""

import time

import gradio as gr

from lora_studio import library, memory, retries, runs, settings, studio, sweeps
from lora_studio.errors import StudioError
from lora_studio.ui import ranks, samples, theme, variants
from lora_studio.ui.chart import Curves, LiveChart
from lora_studio.ui.events import QUIET
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

SYMBOLS = {"queued": "…", "starting": "◌", "running": "●", "stopping": "◍", "done": "✓", "stopped": "■", "failed": "✗"}
LIST = """<div class="runs" role="listbox" aria-label="Runs">{{#each value}}
<button type="button" role="option" class="run {{state}}" data-id="{{id}}" aria-selected="{{chosen}}">
<span class="state" aria-hidden="true">{{symbol}}</span><span class="what"><b>{{name}}</b><small>{{detail}}</small></span><span class="loss">{{loss}}</span></button>
{{/each}}{{#unless value}}<p class="none">There are no runs yet. Start one on the Train page.</p>{{/unless}}</div>"""
LIST_CSS = """
.runs{display:flex;flex-direction:column;gap:7px;max-height:640px;overflow-y:auto;padding:2px}
.run{display:flex;gap:10px;align-items:center;text-align:left;font:inherit;cursor:pointer;padding:8px 11px;border-radius:9px;border:1px solid var(--border-color-primary);background:var(--background-fill-primary);color:var(--body-text-color)}
.run:hover{border-color:var(--color-accent)}.run[aria-selected=true]{border-color:var(--color-accent);box-shadow:0 0 0 1px var(--color-accent)}
.what{min-width:0;flex:1}.what b{display:block;font-size:14px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.what small{font-size:12px;color:var(--body-text-color-subdued)}.loss{font-size:13px;color:var(--body-text-color-subdued)}
.state{width:1.1em;text-align:center}.running .state,.starting .state,.stopping .state{color:var(--color-accent)}.done .state{color:var(--studio-ok)}.failed .state{color:var(--studio-bad)}.none{color:var(--body-text-color-subdued)}
"""
LIST_SCRIPT = """
element.addEventListener('click', event => { const run = event.target.closest('.run'); if(!run) return;
  const url = new URL(location); url.searchParams.set('run', run.dataset.id); history.replaceState(null, '', url);
  trigger('pick', {id: run.dataset.id}); });
"""
LOG_BYTES = 16 * 1024


class Runs(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Runs")
        self.chosen = gr.State(None)
        self.asking = gr.State(False)
        self.seen = gr.State(None)
        self.curves = Curves(lambda: self.workspace)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                self.list = theme.Shown([], html_template=LIST, css_template=LIST_CSS, js_on_load=LIST_SCRIPT, elem_classes="flush", elem_id="runs")
            with gr.Column(scale=4, min_width=320):
                self._detail()
        self.timer = gr.Timer(2, active=False)

    def _detail(self) -> None:
        self.tiles = theme.tiles(elem_id="run-tiles")
        self.chart = LiveChart(None, curves=self.curves, container=True, padding=True, elem_id="chart")
        self.variants = variants.build(elem_id="variants")
        with gr.Row():
            self.stop = gr.Button("Stop", variant="stop", size="md", min_width=130, interactive=False)
            self.save_now = gr.Button("Save now", size="md", min_width=130, interactive=False)
            self.sample_now = gr.Button("Sample now", size="md", min_width=130, interactive=False)
            self.resume = gr.Button("Resume", size="md", min_width=130, interactive=False)
            self.again = gr.Button("Reuse settings", size="md", min_width=130, interactive=False)
            self.shelved = gr.Button("Show in library", size="md", min_width=130, interactive=False)
            self.download = gr.Button("Download adapter", size="md", link_target="_self", interactive=False)
        with gr.Column(visible=False, elem_id="stop-box") as self.box:
            self.question = gr.Markdown("")
            with gr.Row():
                self.save = gr.Button("Stop and save", variant="primary")
                self.discard = gr.Button("Stop without saving", variant="stop")
                self.go_on = gr.Button("Keep going")
        self.notes = theme.sentences(elem_id="notes")
        self.ranks = ranks.build(elem_id="ranks")
        self.retry = gr.Button("", variant="primary", size="md", visible=False, elem_id="retry")
        self.samples = samples.build(elem_id="samples")
        self.log = gr.Textbox("", label="Log", lines=8, max_lines=14, interactive=False, autoscroll=True, buttons=["copy"], elem_classes="mono", elem_id="log")
        with gr.Accordion("Settings of this run", open=False):
            self.command = gr.Code("", language="shell", label="The same on the command line", interactive=False)
            self.yaml = gr.Code("", language="yaml", label="The spec", interactive=False)

    # ---- wiring

    @property
    def shown(self) -> list:
        """What changes while a run goes on."""
        return [self.list, self.tiles, self.notes, self.ranks, self.variants, self.samples, self.log, self.stop, self.save_now, self.sample_now, self.resume, self.again, self.shelved, self.download, self.box, self.retry]

    @property
    def opened(self) -> list:
        """What showing another run fills."""
        return [self.chosen, self.chart, self.command, self.yaml, self.asking, *self.shown]

    def connect(self, train, shelf_page, tabs) -> None:
        """Let the parts act."""
        self.list.pick(self.pick, None, self.opened, **QUIET)
        self.timer.tick(self.tick, [self.chosen, self.asking, self.seen], [self.seen, *self.shown], queue=False, **QUIET)
        self.stop.click(self.ask, self.chosen, [self.asking, self.box, self.question], **QUIET)
        for button, save in ((self.save, True), (self.discard, False)):
            button.click(self.end_saving if save else self.end_discarding, self.chosen, [self.asking, self.box], **QUIET)
        self.go_on.click(self.keep_going, self.chosen, [self.asking, self.box], **QUIET)
        self.save_now.click(lambda id: self.request(studio.save_now, id), self.chosen, None, **QUIET)
        self.sample_now.click(lambda id: self.request(studio.sample_now, id), self.chosen, None, **QUIET)
        self.resume.click(self.go, self.chosen, None, **QUIET).then(self.refresh, [self.chosen, self.asking], self.shown, **QUIET)
        self.retry.click(self.go_lighter, self.chosen, self.opened, **QUIET)
        self.again.click(self.reuse, self.chosen, [*train.form.values(), train.data, train.plus, *train.sweep.own, tabs], **QUIET)
        self.shelved.click(lambda id: self.to_library(shelf_page, id), self.chosen, [tabs, *shelf_page.opened], **QUIET)
        self.variants.pick(self.to_adapter, None, [tabs, *shelf_page.opened], **QUIET)
        self.train, self.shelf_page = train, shelf_page

    def open(self, id: str | None) -> list:
        """Everything about one run; without an id, about the newest."""
        found = studio.list_runs(self.workspace)
        known = {status.id for status in found}
        id = id if id in known else (found[0].id if found else None)
        command = yaml = ""
        if id:
            try:
                if self.is_sweep(id):
                    spec = sweeps.read(self.workspace.run_folder(id))[0]
                    command, yaml = sweeps.command(spec), sweeps.as_yaml(spec)
                else:
                    spec = studio.spec_of(self.workspace, id)
                    command, yaml = studio.command(spec), settings.dumps(spec, sparse=True)
            except StudioError as error:
                yaml = f"# {error}"
        return [id, id, command, yaml, False, *self.refresh(id, False)]

    def pick(self, event: gr.EventData) -> list:
        """The run that was clicked."""
        return self.open(str(event.id))

    def tick(self, id: str | None, asking: bool, seen: str | None) -> list:
        """The same as `refresh`, or nothing where nothing has happened since."""
        found = studio.list_runs(self.workspace)
        now = repr([(status.id, status.state, status.step, status.changed) for status in found] + [id, asking, self._log_size(id)])
        if now == seen:
            return [seen, *[gr.skip()] * len(self.shown)]
        return [now, *self.refresh_quietly(id, asking)]

    def refresh_quietly(self, id: str | None, asking: bool) -> list:
        """The same as `refresh`, for what nobody pressed a button for: it may be sent before a question is asked and be answered after, so
        that only the end of the run takes the question away."""
        return self._leave_question(self.refresh(id, asking), self.shown, id) if not asking else self.refresh(id, asking)

    def land(self, id: str | None) -> list:
        """The same as `open`, for a page that is just being loaded: a question that was asked meanwhile stays."""
        updates = self.open(id)
        asking = [component is self.asking for component in self.opened].index(True)
        return self._leave_question([*updates[:asking], gr.skip(), *updates[asking + 1 :]], self.opened, updates[0])

    def _leave_question(self, updates: list, outputs: list, id: str | None) -> list:
        live = any(status.id == id and status.is_live for status in studio.list_runs(self.workspace))
        return [gr.skip() if live and component is self.box else update for component, update in zip(outputs, updates, strict=True)]

    def _log_size(self, id: str | None) -> int:
        try:
            return studio.log_size(self.workspace, id) if id else 0
        except StudioError:
            return 0

    def refresh(self, id: str | None, asking: bool) -> list:
        """The list, and what the chosen run does now."""
        found = studio.list_runs(self.workspace)
        listed = [entry(status, id) for status in found]
        status = next((status for status in found if status.id == id), None)
        if status is None:
            return [listed, [], [], {}, {}, samples.EMPTY, "", *[gr.update(interactive=False) for _ in range(7)], gr.update(visible=False), gr.update(visible=False)]
        events = self.curves.told(status.id)
        found = self.summary(status, events)
        live, trains = status.is_live or status.state == "queued", bool(found) or studio.trains(self.workspace, status.id)
        ready = next((event for event in reversed(events) if event["kind"] == "saved" and event["what"].startswith("adapter")), None)
        return [
            listed,
            variants.tiles_of(status, found, time_left(status)) if found else tiles_of(status, events),
            notes_of(status, events),
            ranks.shown(events),
            variants.shown(found) if found else {},
            samples.shown(events, status.id),
            studio.log(self.workspace, status.id, LOG_BYTES),
            gr.update(interactive=live),
            gr.update(interactive=status.is_live and trains),
            gr.update(interactive=status.is_live and any(event["kind"] == "sample" for event in events)),
            gr.update(interactive=status.state in ("stopped", "failed")),
            gr.update(interactive=trains),
            gr.update(interactive=ready is not None and not live),
            gr.update(interactive=ready is not None and not live, link=f"/studio/adapter/{status.id}" if ready and not live else None),
            gr.update(visible=bool(asking and live)),
            self.offer(status.id, events),
        ]

    def is_sweep(self, id: str) -> bool:
        """Whether a run is a sweep."""
        return runs.kind_of(self.workspace.run_folder(id)) == "sweep"

    def summary(self, status: runs.Status, events: list[dict]) -> dict | None:
        """What a sweep has found so far; None for any other run, and for one whose spec someone broke."""
        try:
            return sweeps.summary(self.workspace.run_folder(status.id), status, [*events, *self.curves.latest(status.id)]) if self.is_sweep(status.id) else None
        except StudioError:
            return None

    def offer(self, id: str, events: list[dict]) -> dict:
        """The button that tries a run again which memory ran out on."""
        values = retries.offer(self.workspace, id) if retries.ran_out(events) else {}
        return gr.update(visible=bool(values), value=f"Try again with {memory.in_words(values)}" if values else "")

    # ---- what the buttons do

    def ask(self, id: str):
        """Ask how to stop; the run goes on meanwhile."""
        status = studio.show(self.workspace, id)
        return True, gr.update(visible=True), f"Stop **{theme.plain(status.name)}** at step {status.step} of {status.steps}? The run goes on until you choose."

    def end_saving(self, id: str):
        return self.end(id, save=True)

    def end_discarding(self, id: str):
        return self.end(id, save=False)

    def end(self, id: str, *, save: bool):
        """Ask the run to stop."""
        try:
            gr.Info(studio.stop(self.workspace, id, save=save))
        except StudioError as error:
            gr.Warning(str(error))
        return False, gr.update(visible=False)

    def request(self, verb, id: str) -> None:
        """Ask the run for something while it goes on."""
        try:
            gr.Info(verb(self.workspace, id))
        except StudioError as error:
            gr.Warning(str(error))

    def keep_going(self, id: str):
        """Take the question away, and a request to stop that was not acted on yet."""
        studio.keep_going(self.workspace, id)
        return False, gr.update(visible=False)

    def go(self, id: str) -> None:
        """Go on with the run."""
        try:
            studio.resume(self.workspace, id)
            gr.Success("It goes on from its newest whole checkpoint.")
        except StudioError as error:
            gr.Warning(str(error))

    def go_lighter(self, id: str) -> list:
        """Start it again with less memory, and show the new run."""
        try:
            new = retries.again(self.workspace, id)
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * len(self.opened)
        gr.Success("It was started again with less memory.")
        return self.open(new)

    def to_library(self, page, id: str) -> list:
        """The Library page with the adapter of a run."""
        found = next((item for item in library.find(self.workspace, id) if item.run == id), None)
        if found is None:
            gr.Warning("The adapter of this run is not in the library; it may have been removed. Bring it back there, or resume the run.")
        return [gr.Tabs(selected="library"), *page.open(found.id if found else None)]

    def to_adapter(self, event: gr.EventData) -> list:
        """The Library page with the adapter of the variant whose button was pressed."""
        return [gr.Tabs(selected="library"), *self.shelf_page.open(str(event.id))]

    def reuse(self, id: str):
        """The Train form with this run's settings; of a sweep also what varied."""
        asked = sweeps.read(self.workspace.run_folder(id))[0] if self.is_sweep(id) else None
        spec = asked.run if asked else studio.spec_of(self.workspace, id)
        return [*self.train.put(studio.values_of(spec)), *self.train.sweep.put(asked), gr.Tabs(selected="train")]


def entry(status: runs.Status, chosen: str | None) -> dict:
    """A run in the list."""
    share = f"{100 * status.step // status.steps} %" if status.steps else ""
    state = f"queued, number {status.place} in line" if status.place else status.state
    detail = " · ".join(part for part in (state, share if status.is_live else "", time.strftime("%d %b %H:%M", time.localtime(status.created))) if part)
    loss = "" if status.loss is None else f"{status.loss:.3f}"
    return {"id": status.id, "name": status.name, "state": status.state, "symbol": SYMBOLS.get(status.state, "?"), "detail": detail, "loss": loss, "chosen": "true" if status.id == chosen else "false"}


def tiles_of(status: runs.Status, events: list[dict]) -> list[dict]:
    """The numbers of a run."""
    step = status.step_event or {}
    judged = [event["loss"] for event in events if event["kind"] == "eval" and event["step"]]
    saved = [event["step"] for event in events if event["kind"] == "saved" and event["what"] == "checkpoint"]
    unit = next((event.get("unit") for event in events if event["kind"] == "started"), None) or "tokens"
    found = [
        ("state", status.state),
        ("step", f"{status.step} / {status.steps}" if status.steps else None),
        ("loss", f"{status.loss:.4f}" if status.loss is not None else None),
        ("best validation", f"{min(judged):.4f}" if judged else None),
        ("last checkpoint", f"step {saved[-1]}" if saved else None),
        ("time left", time_left(status)),
        (f"{unit}/s", f"{step['tokens_per_second']:,.{0 if unit == 'tokens' else 1}f}" if step else None),
        ("rate of A", f"{step['lr_A']:.2g}" if "lr_A" in step else None),
        ("rate of B", f"{step['lr_B']:.2g}" if "lr_B" in step else None),
        ("gradient norm", f"{step['grad_norm']:.3g}" if "grad_norm" in step else None),
        ("memory", studio.gigabytes(step["memory"]) if step else None),
    ]
    return [{"label": label, "value": value} for label, value in found if value]


def time_left(status: runs.Status) -> str | None:
    """How long a run still takes, in words, where that is known."""
    return duration(status.seconds_left) if status.seconds_left is not None else None


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def notes_of(status: runs.Status, events: list[dict]) -> list[dict]:
    """What the run said in words: how it began, what it restored, how it ended."""
    told = []
    for event in events:
        if event["kind"] == "started" and event.get("unit") == "tries":
            told.append(theme.said("note", f"Searching weights on {event['device']} in {event['precision']}, with {event['rows']} rows."))
        elif event["kind"] == "started":
            told.append(theme.said("note", event.get("words") or f"Training on {event['device']} in {event['precision']}: {event['fast']}. Adapter on {', '.join(event['targets'])}."))
        elif event["kind"] in ("note", "resumed"):
            told.append(theme.said("note", event.get("text") or event.get("words") or ""))
    if status.state == "failed":
        told.append(theme.said("error", status.reason))
    elif status.state in ("done", "stopped"):
        last = next((event for event in reversed(events) if event["kind"] == status.state), {})
        at = f"The adapter is that of step {last['adapter_step']}." if "adapter_step" in last else ""
        told.append(theme.said("ok", f"{status.reason} {at}".strip() or "Done."))
    return told[-8:]

