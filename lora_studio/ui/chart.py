"""The live chart: a canvas that asks for new points itself, and stays cheap at ten thousand of them. A sweep has a line for each variant."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import gradio as gr

from lora_studio import runs, studio
from lora_studio.errors import StudioError
from lora_studio.workspace import Workspace

MOST = 4000


@dataclass
class _Curve:
    """What one run has reported so far; `turn` counts how often a resumed attempt voided points. `told` is everything that is not a step,
    folded. Of a sweep each point belongs to a variant (`names` says which there are), and a validation loss over folds is their mean, there
    once every fold has told its own; `latest` is the last step of each variant."""

    offset: int = 0
    turn: int = 0
    steps: list[tuple] = field(default_factory=list)
    judged: list[tuple] = field(default_factory=list)
    told: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    folds: int = 0
    by_fold: dict[tuple, dict] = field(default_factory=dict)
    latest: dict[int, dict] = field(default_factory=dict)

    def take(self, events: list[dict]) -> None:
        """Add events."""
        self.told = runs.fold([*self.told, *(event for event in events if event["kind"] != "step")])
        for event in events:
            if event["kind"] == "started" and "variants" in event:
                self.names, self.folds = [one["words"] for one in event["variants"]], event.get("folds") or 0
            elif event["kind"] == "step" and "loss" in event and "fold" not in event:
                self.steps.append((event["step"], event["loss"], event.get("lr_A", 0.0), event.get("lr_B", 0.0), event.get("variant", 0)))
                self.latest[event.get("variant", 0)] = event
            elif event["kind"] == "eval":
                self._judge(event)
            elif event["kind"] == "resumed":
                self.steps = [row for row in self.steps if runs.is_kept(row[0], event)]
                self.judged = [row for row in self.judged if runs.is_kept(row[0], event)]
                self.by_fold = {place: found for place, found in self.by_fold.items() if runs.is_kept(place[1], event)}
                self.latest = {row[4]: {"kind": "step", "step": row[0], "loss": row[1], "steps": self._steps_of(row[4]), "variant": row[4]} for row in self.steps}
                self.turn += 1

    def _steps_of(self, variant: int) -> int:
        return self.latest.get(variant, {}).get("steps", 0)

    def _judge(self, event: dict) -> None:
        variant, loss = event.get("variant", 0), event["loss"]
        if "fold" in event:
            found = self.by_fold.setdefault((variant, event["step"]), {})
            found[event["fold"]] = loss
            if len(found) < self.folds:
                return
            loss = sum(found.values()) / len(found)
        self.judged.append((event["step"], loss, variant))


class Curves:
    """One incremental reader per run, however many people look: bytes are parsed once. `place` is a workspace, or gives that of who asks."""

    def __init__(self, place: Workspace | Callable[[], Workspace]):
        self.place = place if callable(place) else lambda: place
        self.guard, self.curves = threading.Lock(), {}

    def __call__(self, asked) -> str:
        """Points of a run after those the page has, as a JSON text (Gradio walks through nested values, texts are cheap).
        `asked` comes from the browser: [run id, turn, steps it has, validations it has]. Of a sweep it also names the variants, and `whose`
        and `judge` say which one each point belongs to."""
        try:
            id, turn, have, have_judged = asked
            workspace = self.place()
            folder = workspace.run_folder(id)
            have, have_judged = max(0, int(have)), max(0, int(have_judged))
        except (TypeError, ValueError, StudioError):
            return "{}"
        with self.guard:
            curve = self._read(folder)
            if turn != curve.turn or not have:
                have = have_judged = 0
            steps, judged, names = thin(curve.steps[have:]), curve.judged[have_judged:], curve.names
            answer = {"turn": curve.turn, "n": len(curve.steps), "m": len(curve.judged), "fresh": have == 0}
        answer |= {"points": [value for row in steps for value in row[:4]], "judged": [value for row in judged for value in row[:2]]}
        if names:
            answer |= {"names": names, "whose": [row[4] for row in steps], "judge": [row[2] for row in judged]}
        return json.dumps(answer | {"state": studio.show(workspace, folder.name).state, "curve": not runs.writes_captions(folder)}, separators=(",", ":"))

    def _read(self, folder) -> _Curve:
        curve = self.curves.setdefault(folder, _Curve())
        while True:
            events, after = runs.read(folder, curve.offset)
            if after == curve.offset:
                return curve
            curve.offset = after
            curve.take(events)

    def told(self, id: str) -> list[dict]:
        """Everything a run reported but its steps. Raises RunError."""
        folder = self.place().run_folder(id)
        with self.guard:
            return list(self._read(folder).told)

    def latest(self, id: str) -> list[dict]:
        """The last step of each variant of a sweep. Raises RunError."""
        folder = self.place().run_folder(id)
        with self.guard:
            return list(self._read(folder).latest.values())


def thin(rows: list[tuple]) -> list[tuple]:
    """At most MOST rows: of each stretch of each variant the lowest and the highest loss, so that no spike disappears."""
    if len(rows) <= MOST:
        return rows
    own: dict[int, list[tuple]] = {}
    for row in rows:
        own.setdefault(row[4], []).append(row)
    return [row for one in own.values() for row in _thin(one, max(2, MOST // len(own)))]


def _thin(rows: list[tuple], most: int) -> list[tuple]:
    if len(rows) <= most:
        return rows
    size, kept = len(rows) * 2 / most, []
    for number in range(most // 2):
        stretch = rows[int(number * size) : int((number + 1) * size)]
        ends = {min(stretch, key=lambda row: row[1]), max(stretch, key=lambda row: row[1])}
        kept += sorted(ends)
    return kept


TEMPLATE = """<div class="bar"><button type="button" data-view="loss" aria-pressed="true">Loss</button>
<button type="button" data-view="rates" aria-pressed="false">Learning rates</button><output aria-live="off"></output></div>
<canvas role="img" aria-label="training loss"></canvas><input type="range" min="0" step="1" aria-label="step whose values are told" hidden>
<ul class="legend" aria-label="variants" hidden></ul>"""
CSS = """
.bar{display:flex;gap:6px;align-items:center;padding:2px 2px 8px;flex-wrap:wrap}
.bar button{font:inherit;font-size:12.5px;padding:3px 10px;border-radius:99px;border:1px solid var(--border-color-primary);background:transparent;color:var(--body-text-color-subdued);cursor:pointer}
.bar button[aria-pressed=true]{border-color:var(--color-accent);color:var(--color-accent);font-weight:700}
.bar output{margin-left:auto;font-size:12.5px;color:var(--body-text-color-subdued)}
canvas{width:100%;height:280px;display:block}
input{width:calc(100% - 54px);height:12px;margin:0 7px 0 47px;accent-color:var(--body-text-color-subdued)}
.legend{list-style:none;margin:6px 0 0;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:2px 10px;max-height:170px;overflow-y:auto}
.legend[hidden],input[hidden]{display:none}
.legend button{font:inherit;font-size:12.5px;width:100%;display:flex;gap:7px;align-items:center;padding:2px 5px;border:1px solid transparent;border-radius:6px;background:transparent;color:var(--body-text-color);cursor:pointer;text-align:left}
.legend button[aria-pressed=true]{border-color:var(--border-color-primary);background:var(--background-fill-secondary)}
.legend span{flex:1;min-width:0;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}.legend b{font-weight:400;font-variant-numeric:tabular-nums;color:var(--body-text-color-subdued)}
.legend svg{flex:none}
"""
SCRIPT = r"""
const canvas = element.querySelector('canvas'), output = element.querySelector('output'), slider = element.querySelector('input'), legend = element.querySelector('.legend'), pen = canvas.getContext('2d');
let run = null, turn = -1, n = 0, m = 0, points = [], judged = [], whose = [], judge = [], names = [], lines = [], state = '', busy = false, view = 'loss', curve = true;
let at = null, lit = null, pinned = null, frame = 0;
const WIDTH = 4, COLOURS = 8, DASHES = [[], [8, 4], [2, 3], [11, 3, 2, 3]], L = 52, R = 12, T = 10, B = 24;
function number(value){ const a = Math.abs(value); return a && (a < 1e-3 || a >= 1e5) ? value.toExponential(1) : value.toPrecision(3); }
function tick_(value, span){ return span < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(1) : value.toFixed(Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(span))))); }
function smooth(rows){ const keep = Math.min(.97, 1 - 1 / Math.max(1, rows.length / 60)); let last = null;
  return rows.map(([x, y]) => { last = last === null ? y : last * keep + y * (1 - keep); return [x, last]; }); }
function split(){ lines = Array.from({length: Math.max(1, names.length)}, (_, number) => ({loss: [], A: [], B: [], judged: [], dash: DASHES[(number + (number >> 3)) % 4], mark: (number + (number >> 5)) % 4}));
  for(let i = 0, k = 0; i < points.length; i += WIDTH, k++){ const one = lines[whose[k] || 0]; one.loss.push([points[i], points[i + 1]]); one.A.push([points[i], points[i + 2]]); one.B.push([points[i], points[i + 3]]); }
  for(let i = 0; i < judged.length; i += 2) lines[judge[i / 2] || 0].judged.push([judged[i], judged[i + 1]]);
  for(const one of lines) one.soft = smooth(one.loss); }
function line(rows, X, Y, colour, width, alpha, dash){ pen.strokeStyle = colour; pen.lineWidth = width; pen.globalAlpha = alpha; pen.setLineDash(dash || []);
  pen.beginPath(); for(const [x, y] of rows) pen.lineTo(X(x), Y(y)); pen.stroke(); pen.globalAlpha = 1; pen.setLineDash([]); }
function dots(rows, X, Y, colour, kind, alpha){ if(rows.length > 80) return; pen.fillStyle = colour; pen.globalAlpha = alpha;
  for(const [a, b] of rows){ const x = X(a), y = Y(b); pen.beginPath(); if(kind === 0) pen.arc(x, y, 3, 0, 7); else if(kind === 1) pen.rect(x - 3, y - 3, 6, 6);
    else if(kind === 2){ pen.moveTo(x, y - 4); pen.lineTo(x + 4, y + 3); pen.lineTo(x - 4, y + 3); } else { pen.moveTo(x, y - 4); pen.lineTo(x + 4, y); pen.lineTo(x, y + 4); pen.lineTo(x - 4, y); } pen.fill(); }
  pen.globalAlpha = 1; }
function until(rows, step){ let low = 0, high = rows.length; while(low < high){ const middle = (low + high) >> 1; if(rows[middle][0] <= step) low = middle + 1; else high = middle; } return low ? rows[low - 1] : null; }
function steps(){ let from = Infinity, to = 0; for(const one of lines) for(const rows of [one.loss, one.judged]) if(rows.length){ from = Math.min(from, rows[0][0]); to = Math.max(to, rows[rows.length - 1][0]); } return [from, Math.max(to, from + 1)]; }
function draw(){
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight; if(!w) return;
  if(canvas.width !== Math.round(w * ratio)){ canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0); pen.clearRect(0, 0, w, h);
  const style = getComputedStyle(element), colour = name => style.getPropertyValue(name).trim();
  const accent = colour('--color-accent'), quiet = colour('--body-text-color-subdued'), grid = colour('--border-color-primary'), text = colour('--body-text-color'), many = names.length > 1;
  pen.font = '11px system-ui'; pen.fillStyle = quiet; slider.hidden = !points.length; legend.hidden = !(many && points.length);
  if(!points.length){ pen.textAlign = 'center'; pen.fillText(run ? (state === 'queued' ? 'waiting for its turn' : !curve ? 'captions have no curve: the log shows them as they are written' : state === 'failed' ? 'it failed before its first step' : 'the first step is on its way') : 'no run is chosen', w / 2, h / 2); return; }
  const drawn = lines.flatMap(one => view === 'loss' ? [many ? one.soft : one.loss, one.judged] : [one.A, one.B]);
  let y0 = Infinity, y1 = -Infinity; for(const rows of drawn) for(const [, y] of rows){ if(y < y0) y0 = y; if(y > y1) y1 = y; }
  if(view === 'rates') y0 = Math.min(0, y0); if(y0 === y1){ y0 -= .5; y1 += .5; }
  const [x0, x1] = steps(); element.dataset.axis = `${x0} ${x1}`; slider.min = x0; slider.max = x1; slider.value = at ?? x1;
  // Lines that are compared end close to each other: on a logarithmic scale they stay apart.
  const logs = many && view === 'loss' && y0 > 0 && y1 / y0 > 6, up = logs ? Math.log : y => y, down = logs ? Math.exp : y => y, low = up(y0), high = up(y1);
  const X = x => L + (x - x0) / (x1 - x0) * (w - L - R), Y = y => T + (high - up(y)) / (high - low) * (h - T - B);
  pen.lineWidth = 1; pen.strokeStyle = grid;
  for(let i = 0; i <= 4; i++){ const y = down(low + (high - low) * i / 4); pen.beginPath(); pen.moveTo(L, Y(y)); pen.lineTo(w - R, Y(y)); pen.stroke(); pen.textAlign = 'right'; pen.fillText(logs ? number(y) : tick_(y, y1 - y0), L - 7, Y(y) + 4); }
  pen.textAlign = 'center'; const parts = Math.min(5, x1 - x0); for(let i = 0; i <= parts; i++){ const x = Math.round(x0 + (x1 - x0) * i / parts); pen.fillText(x, Math.min(w - R - 12, X(x)), h - 7); }
  if(at !== null) line([[at, y0], [at, y1]], X, Y, quiet, 1, .8, [3, 3]);
  if(many) draw_many(X, Y, colour); else draw_one(X, Y, accent, text);
  tell(many);
}
function draw_one(X, Y, accent, text){ const one = lines[0];
  if(view === 'loss'){ line(one.loss, X, Y, accent, 1, .35); line(one.soft, X, Y, accent, 2, 1);
    if(one.judged.length){ line(one.judged, X, Y, text, 1.5, .8, [5, 4]); pen.fillStyle = text; for(const [x, y] of one.judged){ pen.beginPath(); pen.arc(X(x), Y(y), 3, 0, 7); pen.fill(); } } }
  else { line(one.B, X, Y, accent, 2, 1); line(one.A, X, Y, text, 2, .8, [5, 4]); } }
function draw_many(X, Y, colour){ const chosen = lit ?? pinned;
  lines.forEach((one, number) => { const ink = colour(`--studio-line-${number % COLOURS}`), alpha = chosen === null || chosen === number ? 1 : .13;
    if(view === 'rates'){ line(one.B, X, Y, ink, 2, alpha, one.dash); return; }
    if(one.judged.length > 1){ line(one.soft, X, Y, ink, 1, .4 * alpha); line(one.judged, X, Y, ink, 2, alpha, one.dash); dots(one.judged, X, Y, ink, one.mark, alpha); }
    else line(one.soft, X, Y, ink, 2, alpha, one.dash); }); }
function value_of(one, step){ const found = view === 'rates' ? until(one.B, step) : until(one.judged, step) || until(one.soft, step); return found ? number(found[1]) : '–'; }
function tell(many){ const step = at ?? +slider.max; let words;
  if(many){
    const what = view === 'rates' ? 'rate of B' : lines.some(one => one.judged.length) ? 'validation loss (bold), training loss (faint)' : 'training loss';
    words = `step ${step}, ${what} of ${names.length}`; const shown = legend.querySelectorAll('b'), values = lines.map(one => value_of(one, step));
    values.forEach((value, number) => { if(shown[number] && shown[number].textContent !== value) shown[number].textContent = value; });
    slider.setAttribute('aria-valuetext', `step ${step}: ` + names.map((name, number) => `${name} ${values[number]}`).join('; '));
    element.dataset.lines = lines.filter(one => one.loss.length).length;
  } else { delete element.dataset.lines; const one = lines[0], raw = until(one.loss, step);
    if(view === 'loss'){ const soft = until(at === null ? one.soft : one.loss, step), seen = until(one.judged, step); words = `step ${raw ? raw[0] : step}` + (soft ? `, loss ${number(soft[1])}` : '') + (seen ? `, validation (dots) ${number(seen[1])}` : ''); }
    else { const last = rows => { const found = until(rows, step); return found ? number(found[1]) : '–'; }; words = (at === null ? '' : `step ${step}, `) + `A (dashed) ${last(one.A)}, B ${last(one.B)}`; }
    slider.setAttribute('aria-valuetext', words); }
  output.textContent = words + (state && at === null ? `, ${state}` : ''); canvas.setAttribute('aria-label', (view === 'loss' ? 'training loss: ' : 'learning rates: ') + output.textContent); }
function name_lines(){ legend.replaceChildren(...(names.length > 1 ? names : []).map((name, number) => { const item = document.createElement('li'), button = document.createElement('button'), words = document.createElement('span'), value = document.createElement('b');
    const dash = DASHES[(number + (number >> 3)) % 4].join(' '); button.type = 'button'; button.setAttribute('aria-pressed', 'false');
    button.innerHTML = `<svg width="30" height="10" aria-hidden="true"><line x1="1" x2="29" y1="5" y2="5" stroke="var(--studio-line-${number % COLOURS})" stroke-width="2.5" stroke-dasharray="${dash}"/></svg>`;
    words.textContent = words.title = name; button.append(words, value); item.append(button);
    const light = on => { lit = on ? number : null; later(); };
    button.addEventListener('pointerenter', () => light(true)); button.addEventListener('pointerleave', () => light(false)); button.addEventListener('focus', () => light(true)); button.addEventListener('blur', () => light(false));
    button.addEventListener('click', () => { pinned = pinned === number ? null : number; legend.querySelectorAll('button').forEach((other, k) => other.setAttribute('aria-pressed', k === pinned)); later(); });
    return item; })); }
function later(){ if(!frame) frame = requestAnimationFrame(() => { frame = 0; draw(); }); }
async function tick(force){
  const want = props.value || null;
  if(want !== run){ run = want; turn = -1; n = m = 0; points = []; judged = []; whose = []; judge = []; names = []; lines = []; at = lit = pinned = null; state = ''; output.textContent = ''; delete element.dataset.lines; name_lines(); draw(); }
  const over = ['done', 'stopped', 'failed'].includes(state);
  if(!run || busy || document.hidden || !canvas.offsetParent || (over && force !== true && Math.random() > .2)) return;
  busy = true;
  try {
    const asked = run, found = JSON.parse(await server.points([asked, turn, n, m]));
    if(asked === run && found.points){
      if(found.fresh){ points = []; judged = []; whose = []; judge = []; }
      for(const value of found.points) points.push(value); for(const value of found.judged) judged.push(value);
      for(const value of found.whose || []) whose.push(value); for(const value of found.judge || []) judge.push(value);
      if((found.names || []).join('\n') !== names.join('\n')){ names = found.names || []; name_lines(); }
      turn = found.turn; n = found.n; m = found.m; state = found.state; curve = found.curve; element.dataset.points = n; if(found.fresh || found.points.length || found.judged.length) split(); draw();
    }
  } finally { busy = false; }
}
for(const button of element.querySelectorAll('.bar button')) button.addEventListener('click', () => { view = button.dataset.view;
  for(const other of element.querySelectorAll('.bar button')) other.setAttribute('aria-pressed', other === button); draw(); });
canvas.addEventListener('pointermove', event => { if(!points.length) return; const box = canvas.getBoundingClientRect(), [x0, x1] = steps(), share = (event.clientX - box.left - L) / (box.width - L - R);
  at = Math.max(x0, Math.min(x1, Math.round(x0 + share * (x1 - x0)))); later(); });
canvas.addEventListener('pointerleave', () => { at = null; later(); });
slider.addEventListener('input', () => { at = +slider.value; later(); }); slider.addEventListener('blur', () => { at = null; later(); });
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
