"""The live chart: a canvas that asks for new points itself, and stays cheap at ten thousand of them."""

import json
import threading
from dataclasses import dataclass, field

import gradio as gr

from lora_studio import runs, studio
from lora_studio.errors import StudioError
from lora_studio.workspace import Workspace

MOST = 4000


@dataclass
class _Curve:
    """What one run has reported so far; `turn` counts how often a resumed attempt voided points. `told` is everything
    that is not a step, folded."""

    offset: int = 0
    turn: int = 0
    steps: list[tuple] = field(default_factory=list)
    judged: list[tuple] = field(default_factory=list)
    told: list[dict] = field(default_factory=list)

    def take(self, events: list[dict]) -> None:
        """Add events."""
        self.told = runs.fold([*self.told, *(event for event in events if event["kind"] != "step")])
        for event in events:
            if event["kind"] == "step" and "loss" in event:
                self.steps.append((event["step"], event["loss"], event.get("lr_A", 0.0), event.get("lr_B", 0.0)))
            elif event["kind"] == "eval":
                self.judged.append((event["step"], event["loss"]))
            elif event["kind"] == "resumed":
                self.steps = [row for row in self.steps if runs.is_kept(row[0], event)]
                self.judged = [row for row in self.judged if runs.is_kept(row[0], event)]
                self.turn += 1


class Curves:
    """One incremental reader per run, however many people look: bytes are parsed once."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.guard, self.curves = workspace, threading.Lock(), {}

    def __call__(self, asked) -> str:
        """Points of a run after those the page has, as a JSON text (Gradio walks through nested values, texts are cheap).
        `asked` comes from the browser: [run id, turn, steps it has, validations it has]."""
        try:
            id, turn, have, have_judged = asked
            folder = self.workspace.run_folder(id)
            have, have_judged = max(0, int(have)), max(0, int(have_judged))
        except (TypeError, ValueError, StudioError):
            return "{}"
        with self.guard:
            curve = self._read(folder)
            if turn != curve.turn:
                have = have_judged = 0
            steps, judged = thin(curve.steps[have:]), curve.judged[have_judged:]
            answer = {"turn": curve.turn, "n": len(curve.steps), "m": len(curve.judged), "fresh": have == 0}
        answer |= {"points": [value for row in steps for value in row], "judged": [value for row in judged for value in row]}
        return json.dumps(answer | {"state": studio.show(self.workspace, folder.name).state, "curve": not runs.writes_captions(folder)}, separators=(",", ":"))

    def _read(self, folder) -> _Curve:
        curve = self.curves.setdefault(folder.name, _Curve())
        while True:
            events, after = runs.read(folder, curve.offset)
            if after == curve.offset:
                return curve
            curve.offset = after
            curve.take(events)

    def told(self, id: str) -> list[dict]:
        """Everything a run reported but its steps. Raises RunError."""
        folder = self.workspace.run_folder(id)
        with self.guard:
            return list(self._read(folder).told)


def thin(rows: list[tuple]) -> list[tuple]:
    """At most MOST rows: of each stretch the lowest and the highest loss, so that no spike disappears."""
    if len(rows) <= MOST:
        return rows
    size, kept = len(rows) * 2 / MOST, []
    for number in range(MOST // 2):
        stretch = rows[int(number * size) : int((number + 1) * size)]
        ends = {min(stretch, key=lambda row: row[1]), max(stretch, key=lambda row: row[1])}
        kept += sorted(ends)
    return kept


TEMPLATE = """<div class="bar"><button type="button" data-view="loss" aria-pressed="true">Loss</button>
<button type="button" data-view="rates" aria-pressed="false">Learning rates</button><output aria-live="off"></output></div>
<canvas role="img" aria-label="training loss"></canvas>"""
CSS = """
.bar{display:flex;gap:6px;align-items:center;padding:2px 2px 8px;flex-wrap:wrap}
.bar button{font:inherit;font-size:12.5px;padding:3px 10px;border-radius:99px;border:1px solid var(--border-color-primary);background:transparent;color:var(--body-text-color-subdued);cursor:pointer}
.bar button[aria-pressed=true]{border-color:var(--color-accent);color:var(--color-accent);font-weight:700}
.bar output{margin-left:auto;font-size:12.5px;color:var(--body-text-color-subdued)}
canvas{width:100%;height:280px;display:block}
"""
SCRIPT = r"""
const canvas = element.querySelector('canvas'), output = element.querySelector('output'), pen = canvas.getContext('2d');
let run = null, turn = -1, n = 0, m = 0, points = [], judged = [], state = '', busy = false, view = 'loss', curve = true;
const WIDTH = 4;
function number(value){ const a = Math.abs(value); return a && (a < 1e-3 || a >= 1e5) ? value.toExponential(1) : value.toPrecision(3); }
function tick_(value, span){ return span < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(1) : value.toFixed(Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(span))))); }
function series(column){ const rows = []; for(let i = 0; i < points.length; i += WIDTH) rows.push([points[i], points[i + column]]); return rows; }
function smooth(rows){ const keep = Math.min(.97, 1 - 1 / Math.max(1, rows.length / 60)); let last = null;
  return rows.map(([x, y]) => { last = last === null ? y : last * keep + y * (1 - keep); return [x, last]; }); }
function line(rows, X, Y, colour, width, alpha, dash){ pen.strokeStyle = colour; pen.lineWidth = width; pen.globalAlpha = alpha; pen.setLineDash(dash || []);
  pen.beginPath(); for(const [x, y] of rows) pen.lineTo(X(x), Y(y)); pen.stroke(); pen.globalAlpha = 1; pen.setLineDash([]); }
function draw(){
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight; if(!w) return;
  if(canvas.width !== Math.round(w * ratio)){ canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0); pen.clearRect(0, 0, w, h);
  const style = getComputedStyle(element), colour = name => style.getPropertyValue(name).trim();
  const accent = colour('--color-accent'), quiet = colour('--body-text-color-subdued'), grid = colour('--border-color-primary'), text = colour('--body-text-color');
  pen.font = '11px system-ui'; pen.fillStyle = quiet;
  if(!points.length){ pen.textAlign = 'center'; pen.fillText(run ? (state === 'queued' ? 'waiting for its turn' : !curve ? 'captions have no curve: the log shows them as they are written' : state === 'failed' ? 'it failed before its first step' : 'the first step is on its way') : 'no run is chosen', w / 2, h / 2); return; }
  const marks = []; for(let i = 0; i < judged.length; i += 2) marks.push([judged[i], judged[i + 1]]);
  const drawn = view === 'loss' ? [series(1), marks] : [series(2), series(3)];
  let y0 = Infinity, y1 = -Infinity; for(const rows of drawn) for(const [, y] of rows){ if(y < y0) y0 = y; if(y > y1) y1 = y; }
  if(view === 'rates') y0 = Math.min(0, y0); if(y0 === y1){ y0 -= .5; y1 += .5; }
  const judgedFrom = marks.length ? marks[0][0] : Infinity, judgedTo = marks.length ? marks[marks.length - 1][0] : 0;
  const x0 = Math.min(points[0], judgedFrom), x1 = Math.max(points[points.length - WIDTH], judgedTo, x0 + 1), L = 52, R = 12, T = 10, B = 24; element.dataset.axis = `${x0} ${x1}`;
  const X = x => L + (x - x0) / (x1 - x0) * (w - L - R), Y = y => T + (y1 - y) / (y1 - y0) * (h - T - B);
  pen.lineWidth = 1; pen.strokeStyle = grid;
  for(let i = 0; i <= 4; i++){ const y = y0 + (y1 - y0) * i / 4; pen.beginPath(); pen.moveTo(L, Y(y)); pen.lineTo(w - R, Y(y)); pen.stroke(); pen.textAlign = 'right'; pen.fillText(tick_(y, y1 - y0), L - 7, Y(y) + 4); }
  pen.textAlign = 'center'; const parts = Math.min(5, x1 - x0); for(let i = 0; i <= parts; i++){ const x = Math.round(x0 + (x1 - x0) * i / parts); pen.fillText(x, Math.min(w - R - 12, X(x)), h - 7); }
  let words;
  if(view === 'loss'){
    const raw = drawn[0], soft = smooth(raw); line(raw, X, Y, accent, 1, .35); line(soft, X, Y, accent, 2, 1);
    if(marks.length){ line(marks, X, Y, text, 1.5, .8, [5, 4]); pen.fillStyle = text; for(const [x, y] of marks){ pen.beginPath(); pen.arc(X(x), Y(y), 3, 0, 7); pen.fill(); } }
    words = `step ${raw[raw.length - 1][0]}, loss ${number(soft[soft.length - 1][1])}` + (marks.length ? `, validation (dots) ${number(marks[marks.length - 1][1])}` : '');
  } else {
    line(drawn[1], X, Y, accent, 2, 1); line(drawn[0], X, Y, text, 2, .8, [5, 4]);
    const last = rows => rows[rows.length - 1][1]; words = `A (dashed) ${number(last(drawn[0]))}, B ${number(last(drawn[1]))}`;
  }
  output.textContent = words + (state ? `, ${state}` : ''); canvas.setAttribute('aria-label', (view === 'loss' ? 'training loss: ' : 'learning rates: ') + output.textContent);
}
async function tick(force){
  const want = props.value || null;
  if(want !== run){ run = want; turn = -1; n = m = 0; points = []; judged = []; state = ''; output.textContent = ''; draw(); }
  const over = ['done', 'stopped', 'failed'].includes(state);
  if(!run || busy || document.hidden || !canvas.offsetParent || (over && force !== true && Math.random() > .2)) return;
  busy = true;
  try {
    const asked = run, found = JSON.parse(await server.points([asked, turn, n, m]));
    if(asked === run && found.points){
      if(found.fresh){ points = []; judged = []; }
      for(const value of found.points) points.push(value); for(const value of found.judged) judged.push(value);
      turn = found.turn; n = found.n; m = found.m; state = found.state; curve = found.curve; element.dataset.points = n; draw();
    }
  } finally { busy = false; }
}
for(const button of element.querySelectorAll('button')) button.addEventListener('click', () => { view = button.dataset.view;
  for(const other of element.querySelectorAll('button')) other.setAttribute('aria-pressed', other === button); draw(); });
const timer = setInterval(() => { document.body.contains(canvas) ? tick().catch(() => {}) : clearInterval(timer); }, 1500);
watch('value', () => tick(true).catch(() => {})); new ResizeObserver(draw).observe(canvas);
document.addEventListener('visibilitychange', () => tick(true).catch(() => {})); tick(true).catch(() => {});
"""


class LiveChart(gr.HTML):
    """Loss, validation loss and rates of a run. Value: a run's id, or None."""

    def __init__(self, value=None, *, curves: Curves | None = None, **options):
        functions = [_named(curves)] if curves else None
        super().__init__(value, html_template=TEMPLATE, css_template=CSS, js_on_load=SCRIPT, server_functions=functions, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}


def _named(curves: Curves):
    """The reader under the name by which the page calls it."""

    def points(asked):
        return curves(asked)

    return points
