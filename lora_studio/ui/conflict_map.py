"""The conflict map: a table of colours, a row for every block or layer, columns for each adapter and each pair, read by pointer and keys."""

import gradio as gr

MAP = """<div class="bar"><span role="group" aria-label="Rows"><button type="button" data-rows="block" aria-pressed="true">Blocks</button>
<button type="button" data-rows="layer" aria-pressed="false">Layers</button></span><select aria-label="Columns"></select></div>
<p class="names"></p><div class="frame"><table role="grid" aria-label="Conflict map"><thead></thead><tbody></tbody></table></div>
<div class="under"><output aria-live="polite"></output><svg class="spectrum" role="img" viewBox="0 0 160 40" preserveAspectRatio="none"></svg></div>
<p class="legend"><span><i class="size"></i>size, up to the largest</span><span><i class="alike"></i>the same way, shared</span><span><i class="fight"></i>against each other</span>
<span class="how">Arrow keys move, Enter opens the weights of a block.</span></p>"""
MAP_CSS = """
.bar{display:flex;gap:8px;justify-content:space-between;flex-wrap:wrap;margin:0 0 6px}.bar span{display:flex;gap:6px}
.bar button,.bar select{font:inherit;font-size:12.5px;padding:3px 10px;border-radius:99px;border:1px solid var(--border-color-primary);background:var(--background-fill-primary);color:var(--body-text-color-subdued);cursor:pointer;max-width:100%}
.bar button[aria-pressed=true]{border-color:var(--color-accent);color:var(--color-accent);font-weight:700}
.names{margin:0 0 6px;font-size:12.5px;color:var(--body-text-color);overflow-wrap:anywhere}
.frame{overflow:auto;max-height:380px;border:1px solid var(--border-color-primary);border-radius:8px}
table{border:0!important;border-collapse:separate!important;border-spacing:1px;font-size:12px;margin:0!important;width:100%;color:var(--body-text-color)}
tr{border:0!important}th,td{border:0!important;padding:3px 6px!important;text-align:right;font-weight:400;white-space:nowrap;font-variant-numeric:tabular-nums;color:var(--body-text-color)}
thead th{position:sticky;top:0;z-index:2;background:var(--background-fill-primary);color:var(--body-text-color-subdued);text-align:center}thead tr+tr th{top:22px}
tbody th,thead th.row{position:sticky;left:0;z-index:1;background:var(--background-fill-primary);text-align:left;max-width:190px;overflow:hidden;text-overflow:ellipsis}thead th.row{z-index:3}
tbody th[tabindex]{cursor:pointer;text-decoration:underline dotted;text-underline-offset:3px}td[tabindex]{cursor:pointer}.all th,.all td{font-weight:700}
td{background:color-mix(in srgb,var(--tint,transparent) calc(var(--share,0)*1%),var(--background-fill-primary));border-radius:4px}
th:focus-visible,td:focus-visible,td:hover,tbody th:hover{outline:2px solid var(--color-accent);outline-offset:-2px}
.under{display:flex;gap:10px;align-items:center;min-height:44px;margin-top:6px}output{flex:1;min-width:0;font-size:12.5px;color:var(--body-text-color);overflow-wrap:anywhere}
.spectrum{width:120px;height:40px;flex:none}.spectrum rect{fill:var(--color-accent)}
.legend{display:flex;flex-wrap:wrap;gap:3px 14px;margin:4px 0 0;font-size:12px;color:var(--body-text-color-subdued)}.legend i{display:inline-block;width:13px;height:13px;border-radius:3px;margin-right:5px;vertical-align:-2px}
.legend .size{background:var(--studio-size)}.legend .alike{background:var(--studio-alike)}.legend .fight{background:var(--studio-fight)}
@media (max-width:640px){th,td{padding:3px 4px!important}tbody th,thead th.row{max-width:104px}}
"""
MAP_SCRIPT = r"""
const $ = name => element.querySelector(name), frame = $('.frame'), select = $('select'), output = $('output'), spectrum = $('.spectrum'), head = $('thead'), body = $('tbody');
let found = null, rows = 'block', at = [0, 0];
const percent = value => Math.round(100 * value) + ' %', two = value => (Math.abs(value) < .005 ? 0 : value).toFixed(2), three = value => value === 0 ? '0' : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(1) : value.toPrecision(3).replace(/\.?0+$/, match => match.includes('.') ? '' : match);
// What each group of columns shows: of adapters or pairs, its number in a cell and in words, and its colour: which, and how strong.
const GROUPS = [
  {key: 'norm', name: 'size', ones: true, cell: three, words: (v, a) => `${a} has size ${three(v)}`, tint: (v, most) => ['size', 70 * v / (most || 1)]},
  {key: 'effective_rank', name: 'effective rank', ones: true, cell: v => v.toFixed(1), words: (v, a) => `${a} has effective rank ${v.toFixed(2)}`, tint: (v, most) => ['size', 35 * v / (most || 1)]},
  {key: 'cosine', name: 'cosine', cell: two, words: v => `cosine ${two(v)}`, tint: v => [v < 0 ? 'fight' : 'alike', 85 * Math.min(1, Math.abs(v))]},
  {key: 'overlap', name: 'shared directions', cell: percent, words: v => `${percent(v)} of their directions shared`, tint: v => ['alike', 70 * v]},
  {key: 'conflict', name: 'signs against', cell: percent, words: v => `signs disagree in ${percent(v)} by weight (unrelated ones in half)`, tint: v => [v > .5 ? 'fight' : 'alike', Math.min(85, 170 * Math.abs(v - .5))]},
];
function make(tag, text, more){ const node = document.createElement(tag); if(text !== undefined) node.textContent = text; return Object.assign(node, more || {}); }
const pair = ([left, right]) => `${left + 1}×${right + 1}`;
function columns(){ return GROUPS.filter(group => select.value === 'all' || select.value === group.key).flatMap(group => (group.ones ? found.adapters : found.pairs).map((one, i) => ({...group, i, head: group.ones ? `${i + 1}` : pair(one)}))); }
function table(){ return rows === 'block' ? {names: found.blocks, values: found.by_block} : {names: found.layers, values: found.by_layer}; }
function cell(column, value, most, place, key){
  const td = make('td', value === null || value === undefined ? '–' : column.cell(value), {tabIndex: -1}); td.dataset.at = place; td.setAttribute('role', 'gridcell');
  if(value !== null && value !== undefined){ const [tint, share] = column.tint(value, most); td.style.setProperty('--tint', `var(--studio-${tint})`); td.style.setProperty('--share', Math.max(0, Math.min(100, share)).toFixed(1)); }
  td.dataset.words = words(column, value, key); return td;
}
function words(column, value, name){
  const who = column.ones ? found.adapters[column.i] : found.pairs[column.i].map(n => found.adapters[n]).join(' and ');
  const said = value === null || value === undefined ? 'nothing to compare here' : column.words(value, who); return column.ones && value !== null ? `${name}: ${said}` : `${name}: ${who}: ${said}`;
}
function draw(){
  head.replaceChildren(); body.replaceChildren(); output.textContent = ''; spectrum.style.display = 'none'; if(!found) return;
  const shown = columns(), {names, values} = table(), over = make('tr'), under = make('tr');
  over.append(make('th', rows, {className: 'row', rowSpan: 2})); let last = null;
  for(const column of shown){ if(column.key !== last){ over.append(make('th', column.name, {colSpan: shown.filter(one => one.key === column.key).length, scope: 'colgroup'})); last = column.key; } under.append(make('th', column.head, {scope: 'col'})); }
  head.append(over, under);
  const most = shown.map(column => column.ones ? Math.max(...values[column.key].flat().filter(value => value !== null)) : 1);
  const all = make('tr', undefined, {className: 'all'}); all.append(make('th', 'all together', {scope: 'row'}));
  shown.forEach((column, c) => all.append(cell({...column, tint: column.ones ? () => ['size', 0] : column.tint}, found.whole[column.key][column.i], 1, `0 ${c + 1}`, 'all together'))); body.append(all);
  names.forEach((name, r) => {
    const row = make('tr'), title = make('th', name, {scope: 'row', tabIndex: -1, title: name}); title.dataset.at = `${r + 1} 0`; title.dataset.words = `${name}: Enter opens its weights`; row.append(title);
    shown.forEach((column, c) => row.append(cell(column, values[column.key][r][column.i], most[c], `${r + 1} ${c + 1}`, name))); body.append(row);
  });
  at = [Math.min(at[0], names.length), Math.min(at[1], shown.length)]; if(at[0] === 0 && at[1] === 0) at = [1, 0]; element.dataset.rows = names.length; reach(false);
}
function reach(focus){ for(const other of body.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1; const now = body.querySelector(`[data-at="${at.join(' ')}"]`); if(now){ now.tabIndex = 0; if(focus) now.focus(); } }
function tell(node){
  output.textContent = node.dataset.words; const [r, c] = node.dataset.at.split(' ').map(Number), column = columns()[c - 1];
  const values = rows === 'layer' && r && column?.ones ? found.by_layer.spectrum[r - 1][column.i] : null; spectrum.style.display = values?.length ? '' : 'none'; spectrum.replaceChildren();
  if(!values?.length) return; const wide = 160 / values.length, top = Math.max(...values) || 1; spectrum.setAttribute('aria-label', 'singular values: ' + values.map(three).join(', '));
  output.textContent += `; its ${values.length} singular values fall from ${three(values[0])} to ${three(values[values.length - 1])}`;
  values.forEach((value, i) => { const bar = document.createElementNS('http://www.w3.org/2000/svg', 'rect'), high = Math.max(1, 40 * value / top);
    for(const [key, one] of [['x', i * wide + wide * .1], ['y', 40 - high], ['width', wide * .8], ['height', high]]) bar.setAttribute(key, one); spectrum.append(bar); });
}
function open(node){ const [r, c] = node.dataset.at.split(' ').map(Number); if(!r) return; const column = columns()[c - 1];
  trigger('open', {block: rows === 'block' ? found.blocks[r - 1] : found.blocks[found.block_of[r - 1]], adapter: column?.ones ? found.ids[column.i] : ''}); }
const target = event => event.target.closest?.('[data-at]');
body.addEventListener('pointerover', event => { const node = target(event); if(node) tell(node); });
body.addEventListener('focusin', event => { const node = target(event); if(node){ at = node.dataset.at.split(' ').map(Number); reach(false); tell(node); } });
body.addEventListener('click', event => { const node = target(event); if(node) open(node); });
body.addEventListener('keydown', event => {
  const node = target(event), step = {ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1]}[event.key]; if(!node) return;
  if(event.key === 'Enter' || event.key === ' '){ event.preventDefault(); open(node); } else if(step){ event.preventDefault();
    const next = [at[0] + step[0], at[1] + step[1]]; if(body.querySelector(`[data-at="${next.join(' ')}"]`)){ at = next; reach(true); } } });
for(const button of element.querySelectorAll('button')) button.addEventListener('click', () => { rows = button.dataset.rows; at = [1, 0];
  for(const other of element.querySelectorAll('button')) other.setAttribute('aria-pressed', other === button); draw(); });
select.addEventListener('change', () => { at = [1, 0]; draw(); });
function take(){
  found = props.value ? JSON.parse(props.value) : null; element.style.display = found ? '' : 'none'; if(!found){ draw(); return; }
  const groups = GROUPS.filter(group => group.ones || found.pairs.length), many = found.pairs.length > 3;
  select.replaceChildren(...[{key: 'all', name: 'All figures'}, ...groups].map(group => make('option', group.name, {value: group.key}))); select.value = many ? 'cosine' : 'all';
  $('.names').textContent = found.adapters.map((name, i) => `${i + 1} ${name}`).join(', '); at = [1, 0]; draw();
}
watch('value', take); take();
"""


class ConflictMap(gr.HTML):
    """The map. Value: what `Judge` makes of a judgement as JSON, or ""; `open` tells the block, and the adapter where one was meant."""

    def __init__(self, value="", **options):
        super().__init__(value, html_template=MAP, css_template=MAP_CSS, js_on_load=MAP_SCRIPT, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}
