"""The family tree of the Library: ancestors above with their weights, the adapter, what was made of it below; a click opens a member."""

import gradio as gr

from lora_studio import lineage
from lora_studio.errors import BlendError
from lora_studio.ui import theme
from lora_studio.weights import check, in_words
from lora_studio.workspace import Workspace

TREE = """{{#if value.rows}}<div class="tree" role="group" aria-label="Family tree"><svg aria-hidden="true" data-links="{{value.links}}"></svg>
{{#each value.rows}}<p class="of">{{label}}</p><div class="row">{{#each members}}<button type="button" class="{{kind}}" data-key="{{key}}" data-id="{{id}}"{{#if own}} aria-current="true"{{/if}}{{#unless opens}} disabled{{/unless}}>
<b>{{name}}</b>{{#if how}}<small>{{how}}</small>{{/if}}{{#each weights}}<small class="weight">{{this}}</small>{{/each}}</button>{{/each}}</div>{{/each}}</div>{{/if}}"""
TREE_CSS = """
.tree{position:relative;display:flex;flex-direction:column;font-size:13px;color:var(--body-text-color)}
.tree svg{position:absolute;inset:0;width:100%;height:100%;pointer-events:none;overflow:visible}
.tree .of{margin:0 0 3px;font-size:12px;color:var(--body-text-color-subdued);position:relative;text-align:left}
.tree .row{display:flex;flex-wrap:wrap;gap:8px;justify-content:center;margin:0 0 22px;position:relative}.tree .row:last-child{margin-bottom:0}
.tree button{font:inherit;color:inherit;text-align:center;display:flex;flex-direction:column;gap:1px;min-width:74px;max-width:100%;padding:5px 11px;border-radius:9px;border:1px solid var(--border-color-primary);background:var(--background-fill-primary);cursor:pointer}
.tree button:hover:enabled{border-color:var(--color-accent)}.tree button:focus-visible{outline:2px solid var(--color-accent);outline-offset:2px}
.tree button[aria-current]{border-color:var(--color-accent);box-shadow:0 0 0 1px var(--color-accent)}
.tree button:disabled{cursor:default;opacity:1;color:var(--body-text-color)}.tree button.gone{border-style:dashed;color:var(--body-text-color-subdued)}.tree .gone b{text-decoration:line-through}
.tree .model{background:var(--background-fill-secondary);border-radius:2px}
.tree b{font-size:13px;overflow-wrap:anywhere}.tree small{font-size:11.5px;color:var(--body-text-color-subdued);overflow-wrap:anywhere}
.tree .weight{color:var(--color-accent);font-variant-numeric:tabular-nums}
"""
TREE_SCRIPT = """
function draw(){
  const tree = element.querySelector('.tree'); if(!tree) return;
  const svg = tree.querySelector('svg'), box = tree.getBoundingClientRect(); svg.replaceChildren();
  const place = key => tree.querySelector(`[data-key="${key}"]`)?.getBoundingClientRect();
  for(const link of (svg.dataset.links || '').split(' ').filter(Boolean)){
    const [over, under] = link.split('-').map(place); if(!over || !under) continue;
    const x = over.x + over.width / 2 - box.x, y = over.bottom - box.y, to = under.x + under.width / 2 - box.x, end = under.y - box.y, middle = (y + end) / 2;
    const line = document.createElementNS('http://www.w3.org/2000/svg', 'path');
    line.setAttribute('d', `M${x} ${y} C${x} ${middle} ${to} ${middle} ${to} ${end}`);
    line.setAttribute('fill', 'none'); line.setAttribute('stroke', 'var(--color-accent)'); line.setAttribute('stroke-opacity', '.55'); line.setAttribute('stroke-width', '1.5'); svg.append(line);
  }
}
const soon = () => requestAnimationFrame(() => requestAnimationFrame(draw));
element.addEventListener('click', event => { const member = event.target.closest('button[data-id]'); if(!member || member.disabled) return;
  const url = new URL(location); url.searchParams.set('adapter', member.dataset.id); history.replaceState(null, '', url);
  trigger('pick', {id: member.dataset.id}); });
watch('value', soon); new ResizeObserver(draw).observe(element); new MutationObserver(soon).observe(element, {childList: true}); soon();
"""
ROWS = {-1: "Made of", 0: "This adapter", 1: "Went into"}
EMPTY = {"rows": [], "links": ""}


def tree(**options) -> gr.HTML:
    """The drawing. Its value is what `drawn` gives; `pick` tells the id of a member that was clicked."""
    return theme.Shown(EMPTY, html_template=TREE, css_template=TREE_CSS, js_on_load=TREE_SCRIPT, elem_classes="flush", **options)


def drawn(workspace: Workspace, id: str) -> dict:
    """The family of an adapter as the drawing takes it; nothing for one that has none. Raises AdapterError."""
    family = lineage.family(workspace, id)
    if len(family.members) < 2:
        return EMPTY
    keys = {member: str(number) for number, member in enumerate(family.members)}
    rows: dict[int, list] = {}
    for member in family.members.values():
        rows.setdefault(member.generation, []).append(_member(member, keys, family))
    labels = {generation: ROWS.get(generation, "Before that" if generation < 0 else "After that") for generation in rows}
    if family.left_out:
        labels[max(rows)] += f" ({family.left_out:,} more are not drawn)"
    links = " ".join(f"{keys[over]}-{keys[under]}" for over, under, _ in family.links if over in keys and under in keys)
    return {"rows": [{"label": labels[generation], "members": rows[generation]} for generation in sorted(rows)], "links": links}


def _member(member: lineage.Member, keys: dict[str, str], family: lineage.Family) -> dict:
    """One member: what made it, and the weights on the lines between it and those nearer to the adapter that was asked for."""
    above = member.generation < 0
    near = [(under if above else over, weight) for over, under, weight in family.links if (over if above else under) == member.id]
    told = [(family.members[other], _times(weight)) for other, weight in near if other in keys and not (above and family.members[other].generation > 0)]
    weights = [words if other.generation == 0 else f"{words} {'in' if above else 'of'} {other.name}" for other, words in told if words and member.generation]
    opens = member.kind == "adapter" and member.present and member.generation != 0
    state = "gone" if not member.present else member.kind
    return {"key": keys[member.id], "id": member.id, "name": member.name, "kind": state, "how": member.how if member.present else "removed", "weights": weights, "opens": opens, "own": member.generation == 0}


def _times(weight) -> str:
    """A weight as it stands on a line; "" where there is none, or a card was edited into something else."""
    try:
        return "" if weight is None else f"× {in_words(check(weight))}"
    except BlendError:
        return ""
