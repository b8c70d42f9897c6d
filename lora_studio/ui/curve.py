"""The curve of the Blend page: the error of every rank, the chosen one marked; a click picks a rank."""

import gradio as gr

CURVE = """<p class="cap"><b>Error when compressed to a rank</b> <output aria-live="off"></output></p>
<canvas role="img" aria-label="error at every rank"></canvas>
<input type="range" min="1" step="1" aria-label="rank of the blend">"""
CURVE_CSS = """
.cap{margin:0 0 4px;font-size:13.5px;color:var(--body-text-color);display:flex;flex-wrap:wrap;gap:2px 10px;justify-content:space-between}
.cap output{color:var(--body-text-color-subdued)}
canvas{width:100%;height:220px;display:block;cursor:crosshair}
input{width:100%;margin:2px 0 0;accent-color:var(--color-accent)}
"""
CURVE_SCRIPT = r"""
const canvas = element.querySelector('canvas'), slider = element.querySelector('input'), output = element.querySelector('output'), pen = canvas.getContext('2d');
const FLOOR = 1e-3, L = 54, R = 14, T = 10, B = 34; let found = null, over = null;
const percent = loss => loss === 0 ? '0 %' : loss < 1e-4 ? 'below 0.01 %' : (100 * loss).toPrecision(loss < .1 ? 2 : 3).replace(/\.?0+$/, '') + ' %';
const X = (rank, w) => L + rank / Math.max(1, found.exact) * (w - L - R);
const Y = (loss, h) => T + Math.log10(1 / Math.max(FLOOR, Math.min(1, loss))) / 3 * (h - T - B);
function draw(){
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight; if(!w) return;
  if(canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)){ canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0); pen.clearRect(0, 0, w, h); if(!found){ output.textContent = ''; return; }
  const style = getComputedStyle(element), colour = name => style.getPropertyValue(name).trim();
  const accent = colour('--color-accent'), quiet = colour('--body-text-color-subdued'), grid = colour('--border-color-primary'), text = colour('--body-text-color');
  pen.font = '11px system-ui'; pen.lineWidth = 1; pen.fillStyle = quiet; pen.strokeStyle = grid; pen.textAlign = 'right'; pen.setLineDash([]);
  for(const [loss, name] of [[1, '100 %'], [.1, '10 %'], [.01, '1 %'], [FLOOR, '≤ 0.1 %']]){ pen.beginPath(); pen.moveTo(L, Y(loss, h)); pen.lineTo(w - R, Y(loss, h)); pen.stroke(); pen.fillText(name, L - 7, Y(loss, h) + 4); }
  pen.textAlign = 'center'; const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find(step => found.exact / step <= 8) || 5000;
  for(let rank = 0; rank < found.exact - step * .6; rank += step) pen.fillText(rank, X(rank, w), h - B + 16);
  pen.fillText(found.exact, X(found.exact, w), h - B + 16);
  pen.fillText('rank', L + (w - L - R) / 2, h - 3);
  pen.strokeStyle = accent; pen.lineWidth = 2; pen.beginPath();
  for(let rank = 0; rank <= found.exact; rank++) pen.lineTo(X(rank, w), Y(found.losses[rank], h)); pen.stroke();
  const mark = (rank, colour, dash) => { const x = X(rank, w), y = Y(found.losses[rank], h); pen.strokeStyle = colour; pen.fillStyle = colour; pen.lineWidth = 1.5; pen.setLineDash(dash);
    pen.beginPath(); pen.moveTo(x, T); pen.lineTo(x, h - B); pen.stroke(); pen.setLineDash([]); pen.beginPath(); pen.arc(x, y, 4, 0, 7); pen.fill(); };
  mark(found.chosen, text, [5, 4]); if(over !== null && over !== found.chosen) mark(over, quiet, [2, 3]);
  const rank = over ?? found.chosen; output.textContent = rank === found.exact ? `exact at rank ${rank}: no error` : `rank ${rank}: error ${percent(found.losses[rank])}`;
  element.dataset.chosen = found.chosen; canvas.setAttribute('aria-label', 'error at every rank; ' + output.textContent);
}
function take(){ found = props.value ? JSON.parse(props.value) : null; over = null; if(found){ slider.max = found.exact; slider.value = found.chosen; } element.style.display = found ? '' : 'none'; draw(); }
function under(event){ if(!found) return null; const box = canvas.getBoundingClientRect(), share = (event.clientX - box.left - L) / (box.width - L - R);
  return Math.max(1, Math.min(found.exact, Math.round(share * found.exact))); }
canvas.addEventListener('pointermove', event => { over = under(event); draw(); });
canvas.addEventListener('pointerleave', () => { over = null; draw(); });
canvas.addEventListener('click', event => { const rank = under(event); if(rank) trigger('pick', {rank: rank === found.exact ? 0 : rank}); });
slider.addEventListener('input', () => { over = +slider.value; draw(); });
slider.addEventListener('change', () => { if(found) trigger('pick', {rank: +slider.value === found.exact ? 0 : +slider.value}); });
watch('value', take); new ResizeObserver(draw).observe(canvas); take();
"""


class ErrorCurve(gr.HTML):
    """The error of every rank, the chosen one marked. Value: {losses, exact, chosen} as JSON, or ""; a click picks a rank."""

    def __init__(self, value="", **options):
        super().__init__(value, html_template=CURVE, css_template=CURVE_CSS, js_on_load=CURVE_SCRIPT, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}
