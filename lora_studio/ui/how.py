"""The page How it works: a real 4 × 4 example of an adapter whose knobs can be turned. Everything is computed in the browser, in fp64."""

import json

import gradio as gr

# Small numbers whose products can be followed in the head. B and A have room for rank 4; only the first `rank` columns and rows act.
EXAMPLE = {
    "W0": [[1, 0, 0.5, 0], [0, 1, 0, -0.5], [0.5, 0, 1, 0], [0, -0.5, 0, 1]],
    "x": [1, 2, -1, 0.5],
    "one": {
        "rank": 1, "alpha": 2, "stable": False, "weight": 1,
        "B": [[0.5, 0, 0.2, 0], [-0.5, 0.5, 0, 0.1], [0, 1, -0.3, 0], [1, 0, 0, 0.4]],
        "A": [[0.2, 0, -0.4, 0.6], [0, 0.3, 0.3, 0], [0.5, -0.1, 0, 0.2], [0, 0, 0.7, -0.2]],
    },
    "two": {
        "rank": 1, "alpha": 1, "stable": False, "weight": 0.5,
        "B": [[0, 0.4, 0, 0], [1, 0, 0.1, 0], [-0.5, 0.2, 0, 0.3], [0.5, 0, 0.6, 0]],
        "A": [[0.4, 0.4, 0, -0.2], [0, 0.1, -0.5, 0], [0.3, 0, 0, 0.1], [0, 0.2, 0.2, 0.5]],
    },
}  # fmt: skip

TEMPLATE = """<div class="how">
<section><h3>One adapter</h3>
<p>Training with LoRA leaves the base's weight W<sub>0</sub> as it is. It learns two thin matrices, B and A, and adds their product times a scale.
Click a number and type, or press the up and down arrow keys.</p>
<div class="knobs" data-adapter="one"></div>
<div class="sum" data-row="one"></div>
<div class="facts" data-facts="one"></div>
<p><button type="button" data-act="zero">Set B to 0</button> A fresh adapter begins like this: the update is 0, so the model answers as its base does.</p>
</section>
<section><h3>Merged or not, the answer is the same</h3>
<p>A layer multiplies what comes in, x, by its weight. The adapter can run beside it, W<sub>0</sub>·x + scale·B·(A·x), or be merged into it before, (W<sub>0</sub> + ΔW)·x.
Beside it a layer does more work; merged it does exactly the base's.</p>
<div class="sum" data-row="both"></div><div class="facts" data-facts="work"></div>
</section>
<section><h3>Several adapters</h3>
<p>Adapters of one base add up: W<sub>0</sub> + Σ weight·scale·B·A. Weight 1 is the adapter as it was trained, 0 leaves it out, and below 0 it works against what it learnt.</p>
<div class="knobs" data-adapter="weights"></div>
<div class="knobs" data-adapter="two"></div>
<div class="sum" data-row="two"></div>
<div class="sum" data-row="sum"></div>
<div class="facts" data-facts="sum"></div>
<p>Adding the matrices B and A of both apart, each times the square root of its weight and scale, is not the same: the product then also holds B₁·A₂ and B₂·A₁, which nobody
trained. LoRA Studio blends by the exact sum.</p>
</section></div>"""

CSS = """
.how{color:var(--body-text-color);font-size:14px;line-height:1.5}
.how section{border:1px solid var(--border-color-primary);border-radius:10px;background:var(--background-fill-primary);padding:12px 16px;margin:0 0 12px}
.how h3{font-size:16px;margin:0 0 4px;color:var(--body-text-color)}.how p{margin:4px 0 8px;max-width:80ch}
.knobs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(250px,100%),1fr));gap:8px 18px;margin:6px 0}
.knobs label{display:block;font-weight:700;font-size:13px}.knobs small{display:block;font-weight:400;font-size:12.5px;color:var(--body-text-color-subdued);line-height:1.4}
.knobs input[type=range]{width:min(170px,60%);accent-color:var(--color-accent);vertical-align:middle}
.knobs input[type=checkbox]{accent-color:var(--color-accent);vertical-align:middle}
.knobs output{font-family:var(--font-mono);padding-left:8px;color:var(--body-text-color)}
.knobs input[type=number]{width:80px}
.sum{display:flex;flex-wrap:wrap;align-items:center;gap:8px 10px;margin:8px 0}
.sum .sign{font-size:15px;overflow-wrap:anywhere;color:var(--body-text-color-subdued);font-family:var(--font-mono)}
.sum .term{display:flex;align-items:center;gap:10px}
figure{margin:0}figcaption{font-size:12px;color:var(--body-text-color-subdued);text-align:center;margin-bottom:3px}
.matrix{display:grid;gap:2px;border-left:2px solid var(--body-text-color-subdued);border-right:2px solid var(--body-text-color-subdued);border-radius:6px;padding:2px 4px}
.matrix>*,.knobs input[type=number]{font:12.5px var(--font-mono);text-align:right;min-width:0;box-sizing:border-box;height:27px;line-height:25px;padding:0 4px;border-radius:4px;border:1px solid transparent;color:var(--body-text-color)}
.matrix>*{width:52px;white-space:nowrap;overflow:hidden}
.matrix>input,.knobs input[type=number]{background:var(--input-background-fill);border-color:var(--border-color-primary);appearance:textfield;-moz-appearance:textfield;margin:0}
.matrix>input::-webkit-inner-spin-button{display:none}
.matrix>input:focus,.knobs input:focus{outline:2px solid var(--color-accent);outline-offset:0}
.how .bad{border-color:var(--studio-bad)!important;outline-color:var(--studio-bad)!important}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:8px;margin:8px 0}
.facts div{border:1px solid var(--border-color-primary);border-radius:8px;padding:5px 10px;min-width:0}
.facts b{display:block;font-size:15px}.facts span{font-size:12px;color:var(--body-text-color-subdued)}
.how button{font:inherit;font-size:13px;padding:3px 10px;border-radius:7px;border:1px solid var(--border-color-primary);background:var(--button-secondary-background-fill);color:var(--body-text-color);cursor:pointer;margin-right:6px}
"""

SCRIPT = r"""
const N = 4, LIMIT = 1000, state = JSON.parse(props.value), find = (name, what) => element.querySelector(`[data-${name}="${what}"]`);
const zero = () => Array.from({length: N}, () => Array(N).fill(0));
const product = (B, A) => B.map(row => A[0].map((_, column) => row.reduce((sum, value, k) => sum + value * A[k][column], 0)));
const plus = (...parts) => parts[0].map((row, i) => row.map((_, j) => parts.reduce((sum, part) => sum + part[i][j], 0)));
const times = (factor, M) => M.map(row => row.map(value => factor * value));
const apply = (M, x) => M.map(row => row.reduce((sum, value, k) => sum + value * x[k], 0));
const norm = M => Math.sqrt(M.flat().reduce((sum, value) => sum + value * value, 0));
const scale = one => one.alpha / (one.stable ? Math.sqrt(one.rank) : one.rank);
const cutB = one => one.B.map(row => row.slice(0, one.rank)), cutA = one => one.A.slice(0, one.rank);
// The rank: elimination with the largest number left as the pivot; what is below a trillionth of the largest of all counts as 0.
function rank(given){ const M = given.map(row => [...row]), top = Math.max(...M.flat().map(Math.abs)); let found = 0;
  for(; found < N; found++){ let at = [0, 0, 0];
    for(let i = found; i < N; i++) for(let j = found; j < N; j++) if(Math.abs(M[i][j]) > at[0]) at = [Math.abs(M[i][j]), i, j];
    if(at[0] <= 1e-12 * top) break;
    [M[found], M[at[1]]] = [M[at[1]], M[found]]; for(const row of M) [row[found], row[at[2]]] = [row[at[2]], row[found]];
    for(let i = found + 1; i < N; i++){ const factor = M[i][found] / M[found][found]; for(let j = found; j < N; j++) M[i][j] -= factor * M[found][j]; } }
  return found; }
// Both matrices added apart, the smaller rank filled up with zeros. A negative weight stands on B's side, as in PEFT's `linear`.
function apart(one, two){ let B = zero(), A = zero();
  for(const part of [one, two]){ const size = part.weight * scale(part), root = Math.sqrt(Math.abs(size)), sign = Math.sign(size);
    for(let i = 0; i < N; i++) for(let k = 0; k < part.rank; k++){ B[i][k] += sign * root * part.B[i][k]; A[k][i] += root * part.A[k][i]; } }
  return product(B, A); }
const short = value => { const text = (Math.abs(value) < 5e-4 ? 0 : value).toFixed(3).replace(/\.?0+$/, ''); return text; };
const tint = value => `color-mix(in srgb, ${value < 0 ? '#3b82f6' : 'var(--color-accent)'} ${Math.min(55, Math.round(28 * Math.abs(value)))}%, transparent)`;

function matrix(name, caption, rows, columns, path){
  const figure = document.createElement('figure'), label = document.createElement('figcaption'), grid = document.createElement('div');
  label.innerHTML = caption; grid.className = 'matrix'; grid.style.gridTemplateColumns = `repeat(${columns}, auto)`; grid.dataset.matrix = name;
  for(let i = 0; i < rows; i++) for(let j = 0; j < columns; j++){
    const cell = document.createElement(path ? 'input' : 'span'); cell.dataset.at = `${i},${j}`; 
    if(path){ cell.type = 'number'; cell.step = .1; cell.value = read(path)[i][j] ?? read(path)[i]; cell.dataset.path = path; cell.setAttribute('aria-label', `${label.textContent}, row ${i + 1}, column ${j + 1}`); }
    grid.append(cell); }
  figure.append(label, grid); return figure; }
const read = path => path.split('.').reduce((here, key) => here[key], state);
const sign = text => { const found = document.createElement('span'); found.className = 'sign'; found.innerHTML = text; return found; };
// A sign and what follows it stay on one line.
const lay = (row, ...parts) => { const place = find('row', row); place.replaceChildren();
  for(let at = 0; at < parts.length; at++){ const term = document.createElement('span'); term.className = 'term';
    while(typeof parts[at] === 'string') term.append(sign(parts[at++])); if(parts[at]) term.append(parts[at]); place.append(term); } };
const vector = (name, caption, path) => matrix(name, caption, N, 1, path);

function build(){ const {one, two} = state;
  lay('one', matrix('W0', 'W<sub>0</sub>, the base', N, N, 'W0'), '+', '<output data-out="scale-one"></output> ×', matrix('B1', 'B', N, one.rank, 'one.B'), '×', matrix('A1', 'A', one.rank, N, 'one.A'), '=', matrix('merged', 'W<sub>0</sub> + ΔW', N, N),
    'ΔW =', matrix('delta', 'the update', N, N));
  lay('both', vector('x', 'x', 'x'), 'W<sub>0</sub>·x + scale·B·(A·x) =', vector('beside', 'unmerged'), '(W<sub>0</sub> + ΔW)·x =', vector('inside', 'merged'));
  lay('two', '<output data-out="scale-two"></output> ×', matrix('B2', 'B<sub>2</sub>', N, two.rank, 'two.B'), '×', matrix('A2', 'A<sub>2</sub>', two.rank, N, 'two.A'), '=', matrix('delta2', 'ΔW<sub>2</sub>, its update', N, N));
  lay('sum', matrix('exact', 'W<sub>0</sub> + the exact sum', N, N), 'but', matrix('apart', 'W<sub>0</sub> + factors added apart', N, N)); }
function knob(id, label, help, attributes){ const place = document.createElement('label'), input = document.createElement('input');
  place.append(label + ' '); Object.assign(input, attributes); input.dataset.knob = id; place.append(document.createElement('br'), input);
  if(attributes.type === 'range'){ const shown = document.createElement('output'); shown.dataset.shown = id; place.append(shown); }
  input.setAttribute('aria-label', label); const words = document.createElement('small'); words.dataset.help = id; words.textContent = help; place.append(words); return place; }
function knobs(name){ const one = state[name], number = name === 'two' ? ' of the second' : '';
  find('adapter', name).replaceChildren(
    knob(name + '.rank', 'Rank r' + number, '', {type: 'range', min: 1, max: N, step: 1, value: one.rank}),
    knob(name + '.alpha', 'Alpha' + number, 'The strength: the update is multiplied by alpha / rank. Twice the rank at the same alpha halves the scale.', {type: 'number', step: .5, value: one.alpha}),
    knob(name + '.stable', 'Rank-stabilised' + number, 'The scale is alpha / √rank instead, so that the update does not fade as the rank grows.', {type: 'checkbox', checked: one.stable})); }
function facts(name, rows){ find('facts', name).replaceChildren(...rows.map(([id, label, value, unit]) => { const box = document.createElement('div'), bold = document.createElement('b'), words = document.createElement('span');
  bold.dataset.out = id; bold.dataset.value = value; bold.textContent = (Number.isInteger(value) ? value.toLocaleString('en') : short(value)) + (unit || ''); words.textContent = label; box.append(bold, words); return box; })); }
function fill(name, M){ for(const cell of find('matrix', name).children){ const [i, j] = cell.dataset.at.split(',').map(Number), value = Array.isArray(M[i]) ? M[i][j] : M[i];
  cell.dataset.value = value; cell.style.background = tint(value); if(cell.tagName === 'SPAN'){ cell.textContent = short(value); cell.title = value; } } }

function draw(){ const {one, two, W0, x} = state, update = [one, two].map(part => times(scale(part), product(cutB(part), cutA(part))));
  for(const [name, part] of [['one', one], ['two', two]]){ const out = element.querySelector(`[data-out="scale-${name}"]`); out.textContent = short(scale(part)); out.dataset.value = scale(part);
    const learnt = part.rank * 2 * 4096;
    element.querySelector(`[data-help="${name}.rank"]`).textContent = `How many directions the update can use: r × (4 + 4) numbers are learnt in place of 16. A layer of 4096 × 4096 would learn ${learnt.toLocaleString('en')} in place of 16,777,216 (${Number((100 * learnt / 4096 ** 2).toPrecision(2))} %).`; }
  for(const shown of element.querySelectorAll('[data-shown]')) shown.textContent = short(read(shown.dataset.shown));
  const merged = plus(W0, update[0]), inner = apply(cutA(one), x), beside = apply(W0, x).map((value, i) => value + scale(one) * cutB(one)[i].reduce((sum, b, k) => sum + b * inner[k], 0));
  const sum = plus(times(one.weight, update[0]), times(two.weight, update[1])), other = apart(one, two), off = norm(plus(other, times(-1, sum))), whole = norm(sum);
  fill('W0', W0); fill('B1', cutB(one)); fill('A1', cutA(one)); fill('merged', merged); fill('delta', update[0]); fill('x', x); fill('beside', beside); fill('inside', apply(merged, x));
  fill('B2', cutB(two)); fill('A2', cutA(two)); fill('delta2', update[1]); fill('exact', plus(W0, sum)); fill('apart', plus(W0, other));
  facts('one', [['rank-delta', 'rank of ΔW', rank(update[0])], ['norm-delta', 'size of ΔW (Frobenius norm)', norm(update[0])], ['norm-base', 'size of W₀', norm(W0)], ['learnt', 'numbers learnt, r × (4 + 4)', one.rank * 2 * N], ['full', 'numbers of the whole matrix', N * N]]);
  facts('work', [['work-base', 'products of the base alone, 4 × 4', N * N], ['work-beside', 'unmerged, 4 × 4 + r × (4 + 4)', N * N + one.rank * 2 * N], ['work-merged', 'merged, 4 × 4', N * N]]);
  facts('sum', [['rank-sum', 'rank of the sum', rank(sum)], ['norm-sum', 'size of the sum', whole], ['error', whole ? 'error of adding the factors apart' : 'size of what adding apart leaves; the sum is 0', whole ? 100 * off / whole : off, whole ? ' %' : '']]); }

element.addEventListener('input', event => { const input = event.target, value = input.type === 'checkbox' ? input.checked : Number(input.value);
  const wrong = input.type === 'number' && (input.value === '' || !Number.isFinite(value) || Math.abs(value) > LIMIT); input.classList.toggle('bad', wrong); if(wrong) return;
  if(input.dataset.path){ const place = read(input.dataset.path), [i, j] = input.dataset.at.split(',').map(Number); if(Array.isArray(place[i])) place[i][j] = value; else place[i] = value; }
  else if(input.dataset.knob){ const [name, key] = input.dataset.knob.split('.'); state[name][key] = value; if(key === 'rank') build(); }
  draw(); });
element.addEventListener('click', event => { if(event.target.dataset.act !== 'zero') return; state.one.B = zero(); build(); draw(); });
build(); knobs('one'); knobs('two');
find('adapter', 'weights').replaceChildren(...['one', 'two'].map((name, at) => knob(name + '.weight', `Weight of the ${at ? 'second' : 'first'} adapter`, 'How much of this adapter is in the sum: its update times this number.', {type: 'range', min: -1, max: 2, step: .05, value: state[name].weight})));
draw();
"""


class How:
    """The page's one part. It asks nothing of the server."""

    title = "How it works"

    def __init__(self, workspace=None):
        pass

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## How it works\nAn adapter in numbers small enough to follow. Turn the knobs and watch the matrices.")
        gr.HTML(json.dumps(EXAMPLE), html_template=TEMPLATE, css_template=CSS, js_on_load=SCRIPT, elem_classes="flush", elem_id="how")
