"""The picture of a comparison: each method's validation loss with the band of its seeds, a table, and what follows in words. It asks for what is
new itself, as long as it is seen."""

import json
from collections.abc import Callable

import gradio as gr

CHART = """<p class="cap"><b>Validation loss, mean and band of the seeds</b> <output aria-live="polite"></output></p>
<canvas role="img" aria-label="validation loss of LoRA and LoRA+"></canvas><p class="key"></p>
<div class="wide"><table class="found"><caption>Each at its best rate</caption>
<thead><tr><th>method</th><th>best rate</th><th>final loss</th><th>of the seeds</th><th>comes to the other's final loss</th><th>seconds</th></tr></thead><tbody></tbody></table></div>
<ul class="words"></ul><p class="claim"></p>"""
CHART_CSS = """
.cap{margin:0 0 4px;font-size:13.5px;color:var(--body-text-color);display:flex;flex-wrap:wrap;gap:2px 10px;justify-content:space-between}.cap output{color:var(--body-text-color-subdued)}
canvas{width:100%;height:300px;display:block}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;margin:2px 0 8px;font-size:13px;color:var(--body-text-color)}.key i{display:inline-block;width:22px;height:0;border-top:3px solid;vertical-align:middle;margin-right:6px}
.wide{overflow-x:auto}
.found{border:0!important;border-collapse:collapse;width:100%;margin:0!important;font-size:13px;color:var(--body-text-color)}.found caption{text-align:left;font-weight:700;padding:0 0 3px}
.found tr{border:0!important;border-top:1px solid var(--border-color-primary)!important}.found td,.found th{border:0!important;padding:3px 12px 3px 0!important;text-align:right;font-variant-numeric:tabular-nums;color:var(--body-text-color);white-space:nowrap}
.found td:first-child,.found th:first-child{text-align:left}
.words{margin:10px 0 0;padding-left:18px;font-size:14px;line-height:1.5;color:var(--body-text-color)}.claim{margin:8px 0 0;font-size:13px;line-height:1.5;color:var(--body-text-color-subdued)}
"""
CHART_SCRIPT = r"""
const canvas = element.querySelector('canvas'), output = element.querySelector('output'), pen = canvas.getContext('2d'), body = element.querySelector('tbody'), key = element.querySelector('.key'), words = element.querySelector('.words'), claim = element.querySelector('.claim');
const L = 54, R = 14, T = 10, B = 32, OVER = ['done', 'stopped', 'failed'], DASHES = [[], [7, 4], [2, 3]]; let id = '', found = null, busy = false, told = '';
const short = value => value === null || value === undefined ? '–' : value === 0 ? '0' : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const colours = () => { const style = getComputedStyle(element); return ['--studio-line-1', '--studio-line-0', '--studio-line-5'].map(name => style.getPropertyValue(name).trim()); };
function draw(){
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight; if(!w) return;
  if(canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)){ canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0); pen.clearRect(0, 0, w, h); if(!found) return;
  const style = getComputedStyle(element), quiet = style.getPropertyValue('--body-text-color-subdued').trim(), grid = style.getPropertyValue('--border-color-primary').trim(), paint = colours();
  pen.font = '11px system-ui'; pen.setLineDash([]); pen.lineWidth = 1; pen.fillStyle = quiet; pen.textAlign = 'center';
  const drawn = found.methods.filter(one => one.curve.length), points = drawn.flatMap(one => one.curve);
  if(!points.length){ pen.fillText(found.state === 'queued' ? 'waiting for its turn' : OVER.includes(found.state) ? 'nothing was measured' : 'the best rates are being found first', w / 2, h / 2); return; }
  const low = Math.log(Math.max(1e-9, Math.min(...points.map(point => point[2])))), high = Math.max(low + .1, Math.log(Math.max(...points.map(point => point[3])))), pad = (high - low) * .04, last = Math.max(...points.map(point => point[0]), 1);
  const X = step => L + step / last * (w - L - R), Y = loss => T + (high + pad - Math.log(Math.max(1e-9, loss))) / (high - low + 2 * pad) * (h - T - B);
  pen.strokeStyle = grid; pen.textAlign = 'right'; for(let i = 0; i <= 4; i++){ const loss = Math.exp(low + (high - low) * i / 4); pen.beginPath(); pen.moveTo(L, Y(loss)); pen.lineTo(w - R, Y(loss)); pen.stroke(); pen.fillText(short(loss), L - 7, Y(loss) + 4); }
  pen.textAlign = 'center'; for(let i = 0; i <= 4; i++) pen.fillText(Math.round(last * i / 4), X(last * i / 4), h - B + 15); pen.fillText('step', L + (w - L - R) / 2, h - 2);
  drawn.forEach(one => { const colour = paint[found.methods.indexOf(one)]; pen.fillStyle = colour; pen.globalAlpha = .16; pen.beginPath(); for(const [step,,, top] of one.curve) pen.lineTo(X(step), Y(top)); for(const [step,, bottom] of [...one.curve].reverse()) pen.lineTo(X(step), Y(bottom)); pen.closePath(); pen.fill(); pen.globalAlpha = 1; });
  drawn.forEach(one => { const at = found.methods.indexOf(one); pen.strokeStyle = paint[at]; pen.lineWidth = 2; pen.setLineDash(DASHES[at]); pen.beginPath(); for(const [step, mean] of one.curve) pen.lineTo(X(step), Y(mean)); pen.stroke(); pen.setLineDash([]); });
  found.methods.slice(0, 2).forEach((one, at) => { const goal = found.methods[1 - at]; if(one.reach === null || goal.final === null) return; pen.fillStyle = paint[at]; pen.beginPath(); pen.arc(X(one.reach), Y(goal.final), 4.5, 0, 7); pen.fill(); });
}
function text(name, content){ return Object.assign(document.createElement(name), {textContent: content}); }
function list(){
  const paint = colours();
  key.replaceChildren(...(found ? found.methods.map((one, at) => { const item = document.createElement('span'), mark = document.createElement('i'); mark.style.borderTopColor = paint[at]; mark.style.borderTopStyle = ['solid', 'dashed', 'dotted'][at]; item.append(mark, one.name); return item; }) : []));
  body.replaceChildren(...(found ? found.methods.map(one => { const row = document.createElement('tr'); row.dataset.method = one.key;
    const at = one.reach === undefined ? '' : one.final === null ? '–' : one.reach === null ? 'not reached' : `step ${Math.round(one.reach)} of ${one.steps}`;
    row.append(...[one.name, short(one.rate), short(one.final), one.spread ? `${short(one.spread[0])} to ${short(one.spread[1])}` : '–', at, one.seconds === null ? '–' : one.seconds.toFixed(1)].map(cell => text('td', cell))); return row; }) : []));
  words.replaceChildren(...(found ? found.words.map(one => text('li', one)) : [])); claim.textContent = found ? `${found.claim} ${found.ours}` : '';
}
async function tick(force){
  const want = props.value || ''; if(want !== id){ id = want; found = null; told = ''; output.textContent = ''; list(); draw(); }
  element.style.display = id ? '' : 'none';
  if(!id || busy || document.hidden || (!force && !canvas.offsetParent) || (found && OVER.includes(found.state) && !force && Math.random() > .2)) return;
  busy = true;
  try {
    const asked = id, next = JSON.parse(await server.compared([asked])); if(asked !== id || !next.state) return;
    found = next; element.dataset.state = found.state; list(); draw();
    output.textContent = found.state + (OVER.includes(found.state) || !found.steps ? '' : `, step ${found.step} of ${found.steps}`); canvas.setAttribute('aria-label', 'validation loss of LoRA and LoRA+: ' + (found.words[0] || output.textContent));
    if(found.state !== told){ told = found.state; trigger('turned', {id: asked}); }
  } finally { busy = false; }
}
const timer = setInterval(() => { document.body.contains(canvas) ? tick().catch(() => {}) : clearInterval(timer); }, 1000);
watch('value', () => tick(true).catch(() => {})); new ResizeObserver(draw).observe(canvas); document.addEventListener('visibilitychange', () => tick(true).catch(() => {})); tick(true).catch(() => {});
"""
SHOWN = ("state", "step", "steps", "words", "claim", "ours")


class VersusChart(gr.HTML):
    """The curves of a comparison. Value: its run's id, or ""; `turned` tells that the run's state has changed."""

    def __init__(self, value="", *, result: Callable[[str], dict | None] | None = None, **options):
        functions = [points_of(result)] if result else None
        super().__init__(value, html_template=CHART, css_template=CHART_CSS, js_on_load=CHART_SCRIPT, server_functions=functions, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}


def points_of(result: Callable[[str], dict | None]):
    """What the page calls: [run id] to what was found as a JSON text."""

    def compared(asked) -> str:
        found = result(str(asked[0])) if isinstance(asked, list) and asked else None
        if not found:
            return "{}"
        methods = [{"key": key, **one} for key, one in found["methods"].items()]
        return json.dumps({**{name: found[name] for name in SHOWN}, "methods": methods}, separators=(",", ":"))

    return compared
