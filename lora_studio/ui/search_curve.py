"""The curve of a weight search: every try as a dot, the lowest loss so far as a line; it asks for what is new itself, as long as it is seen."""

import json
from collections.abc import Callable

import gradio as gr

CURVE = """<p class="cap"><b>Lowest loss so far</b> <output aria-live="polite"></output></p><canvas role="img" aria-label="lowest loss by try"></canvas>
<table class="found"><caption>The simple weights, and the best</caption><tbody></tbody></table>"""
CURVE_CSS = """
.cap{margin:0 0 4px;font-size:13.5px;color:var(--body-text-color);display:flex;flex-wrap:wrap;gap:2px 10px;justify-content:space-between}.cap output{color:var(--body-text-color-subdued)}
canvas{width:100%;height:190px;display:block}
.found{border:0!important;border-collapse:collapse;width:100%;margin:6px 0 0!important;font-size:13px;color:var(--body-text-color)}.found caption{text-align:left;font-weight:700;padding:0 0 3px}
.found tr{border:0!important;border-top:1px solid var(--border-color-primary)!important}.found td{border:0!important;padding:3px 9px 3px 0!important;overflow-wrap:anywhere;color:var(--body-text-color)}
.found td:last-child{text-align:right;font-variant-numeric:tabular-nums}.found .best td{font-weight:700;color:var(--color-accent)}
"""
CURVE_SCRIPT = r"""
const canvas = element.querySelector('canvas'), output = element.querySelector('output'), pen = canvas.getContext('2d'), body = element.querySelector('tbody'), list = element.querySelector('.found');
const L = 54, R = 14, T = 10, B = 30, OVER = ['done', 'stopped', 'failed']; let id = '', found = null, busy = false, told = '';
const NAMES = {base: 'the base alone', alone: 'alone', all: 'all as they are', equal: 'equal parts', search: 'found'};
const short = value => value === 0 ? '0' : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(4))), mix = weights => found.names.map((name, i) => `${name} ${short(weights[i])}`).join(', ');
function draw(){
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight; if(!w) return;
  if(canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)){ canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0); pen.clearRect(0, 0, w, h); if(!found) return;
  const style = getComputedStyle(element), colour = name => style.getPropertyValue(name).trim(), accent = colour('--color-accent'), quiet = colour('--body-text-color-subdued'), grid = colour('--border-color-primary');
  pen.font = '11px system-ui'; pen.setLineDash([]); pen.lineWidth = 1; pen.fillStyle = quiet; pen.textAlign = 'center'; const tries = found.tries.map(([loss], i) => [i + 1, loss]).filter(([, loss]) => loss !== null);
  if(!tries.length){ pen.fillText(found.state === 'queued' ? 'waiting for its turn' : OVER.includes(found.state) ? 'nothing was tried' : 'the base is being loaded', w / 2, h / 2); return; }
  // What is far above the base would press everything else together: it is drawn at the edge.
  const losses = tries.map(([, loss]) => loss), low = Math.min(...losses), middle = [...losses].sort((a, b) => a - b)[losses.length >> 1];
  const top = Math.max(low + 1e-9, Math.min(Math.max(...losses), low + Math.max(1.6 * (losses[0] - low), 3 * (middle - low)))), pad = (top - low) * .06, x1 = Math.max(found.evaluations, tries.length);
  const X = n => L + (n - 1) / Math.max(1, x1 - 1) * (w - L - R), Y = loss => T + (top + pad - Math.min(loss, top + pad)) / (top - low + 2 * pad) * (h - T - B);
  pen.strokeStyle = grid; pen.textAlign = 'right'; for(let i = 0; i <= 3; i++){ const y = low + (top - low) * i / 3; pen.beginPath(); pen.moveTo(L, Y(y)); pen.lineTo(w - R, Y(y)); pen.stroke(); pen.fillText(short(y), L - 7, Y(y) + 4); }
  pen.textAlign = 'center'; for(const n of [...new Set([1, Math.round(x1 / 4), Math.round(x1 / 2), Math.round(3 * x1 / 4), x1])]) if(n) pen.fillText(n, X(n), h - B + 15); pen.fillText('try', L + (w - L - R) / 2, h - 2);
  pen.fillStyle = quiet; pen.globalAlpha = .6; for(const [n, loss] of tries){ pen.beginPath(); pen.arc(X(n), Y(loss), 2.5, 0, 7); pen.fill(); } pen.globalAlpha = 1;
  pen.strokeStyle = accent; pen.lineWidth = 2; pen.beginPath(); let best = Infinity; for(const [n, loss] of tries){ if(best < Infinity) pen.lineTo(X(n), Y(best)); best = Math.min(best, loss); pen.lineTo(X(n), Y(best)); } pen.stroke();
}
function table(){
  const rows = found ? found.tries.filter(([, what]) => what !== 'search').map(([loss, what, weights]) => ['', what === 'alone' ? mix(weights) : `${NAMES[what] || what}: ${mix(weights)}`, loss]) : [];
  if(found?.best) rows.push(['best', `the best: ${mix(found.best)}`, found.loss]); list.style.display = rows.length ? '' : 'none';
  body.replaceChildren(...rows.map(([kind, text, loss]) => { const row = document.createElement('tr'); row.className = kind; for(const cell of [text, loss === null ? 'no number' : short(loss)]) row.append(Object.assign(document.createElement('td'), {textContent: cell})); return row; }));
}
async function tick(force){
  const want = props.value || ''; if(want !== id){ id = want; found = null; told = ''; output.textContent = ''; table(); draw(); }
  element.style.display = id ? '' : 'none';
  if(!id || busy || document.hidden || (!force && !canvas.offsetParent) || (found && OVER.includes(found.state) && !force && Math.random() > .2)) return;
  busy = true;
  try {
    const asked = id, next = JSON.parse(await server.tries([asked])); if(asked !== id || !next.state) return;
    found = next; element.dataset.tries = found.tries.length; element.dataset.state = found.state; table(); draw();
    output.textContent = `${found.tries.length} of ${found.evaluations} tries, ${found.state}` + (found.loss === null ? '' : `, lowest loss ${short(found.loss)}`); canvas.setAttribute('aria-label', 'lowest loss by try: ' + output.textContent);
    const now = `${found.state} ${found.best ? 1 : 0}`; if(now !== told){ told = now; trigger('turned', {id: asked}); }
  } finally { busy = false; }
}
const timer = setInterval(() => { document.body.contains(canvas) ? tick().catch(() => {}) : clearInterval(timer); }, 1000);
watch('value', () => tick(true).catch(() => {})); new ResizeObserver(draw).observe(canvas); document.addEventListener('visibilitychange', () => tick(true).catch(() => {})); tick(true).catch(() => {});
"""


class SearchCurve(gr.HTML):
    """The curve of a search. Value: its run's id, or ""; `turned` tells that the run's state has changed, or that there is a first try."""

    def __init__(self, value="", *, result: Callable[[str], dict | None] | None = None, **options):
        functions = [points_of(result)] if result else None
        super().__init__(value, html_template=CURVE, css_template=CURVE_CSS, js_on_load=CURVE_SCRIPT, server_functions=functions, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}


def points_of(result: Callable[[str], dict | None]):
    """What the page calls: [run id] to its tries as a JSON text (Gradio walks through nested values, texts are cheap)."""

    def tries(asked) -> str:
        found = result(str(asked[0])) if isinstance(asked, list) and asked else None
        if not found:
            return "{}"
        told = {
            "state": found["state"],
            "evaluations": found["evaluations"],
            "names": [one["name"] for one in found["adapters"]],
            "loss": found["loss"],
        }
        told["best"] = [weight for _, weight in found["parts"]] if found["parts"] else None
        return json.dumps({**told, "tries": [[one["loss"], one["what"], one["weights"]] for one in found["tries"]]}, separators=(",", ":"))

    return tries
