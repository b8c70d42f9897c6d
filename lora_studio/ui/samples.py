"""Sample answers of a run: words by prompt, pictures as a matrix whose rows are steps and whose columns are prompts."""

import gradio as gr

from lora_studio import studio
from lora_studio.ui import theme

MOST_TEXTS, MOST_ROWS = 8, 200
EMPTY = {"texts": [], "prompts": [], "rows": []}
TEMPLATE = """{{#each value.texts}}<section><h4>{{prompt}}</h4><dl>{{#each answers}}<dt>step {{step}}</dt><dd>{{answer}}</dd>{{/each}}</dl></section>{{/each}}
{{#if value.rows}}<div class="frame"><table><thead><tr><th scope="col">step</th>{{#each value.prompts}}<th scope="col">{{prompt}}</th>{{/each}}</tr></thead><tbody>
{{#each value.rows}}<tr><th scope="row">{{step}}<small>{{label}}</small></th>{{#each cells}}<td>{{#if picture}}<button type="button" data-step="{{step}}" data-prompt="{{prompt}}"><img src="{{picture}}" alt="step {{step}}: {{prompt}}" loading="lazy"></button>{{/if}}</td>{{/each}}</tr>{{/each}}
</tbody></table></div><p class="hint">The same prompts and seeds in every row. Click a picture to enlarge it; the arrow keys move.</p>{{/if}}
<dialog aria-label="Sample picture"><figure><img alt=""><figcaption></figcaption></figure><button type="button" class="close" aria-label="Close">✕</button></dialog>"""
CSS = """
section{border:1px solid var(--border-color-primary);border-radius:8px;padding:8px 12px;background:var(--background-fill-primary);margin-bottom:8px}
h4{margin:0 0 4px;font-size:13.5px;color:var(--body-text-color);overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;margin:0;font-size:13px}
dt{color:var(--body-text-color-subdued);font-weight:400;margin:0}dd{margin:0;color:var(--body-text-color);overflow-wrap:anywhere}
.frame{overflow:auto;max-height:560px;border:1px solid var(--border-color-primary);border-radius:10px;background:var(--background-fill-primary)}
table{border:0!important;border-collapse:separate;border-spacing:0;font-size:12.5px;color:var(--body-text-color);margin:0;width:auto}
th,td{border:0;padding:4px 6px;text-align:left;background:var(--background-fill-primary)}
thead th{position:sticky;top:0;z-index:2;max-width:180px;min-width:104px;font-weight:400;color:var(--body-text-color-subdued);overflow-wrap:anywhere;vertical-align:bottom}
tbody th,thead th:first-child{position:sticky;left:0;z-index:1;min-width:52px;font-variant-numeric:tabular-nums}
thead th:first-child{z-index:3}
th small{display:block;font-weight:400;color:var(--body-text-color-subdued)}
td button{display:block;padding:0;border:2px solid transparent;border-radius:8px;background:none;cursor:zoom-in;line-height:0}
td button:focus-visible,td button[aria-current=true]{outline:none;border-color:var(--color-accent)}
td img{width:112px;border-radius:6px;display:block;margin:0}
.hint{font-size:12px;color:var(--body-text-color-subdued);margin:6px 2px 0}
dialog{border:0;border-radius:12px;padding:14px;background:var(--background-fill-primary);color:var(--body-text-color);max-width:min(94vw,900px);max-height:94vh}
dialog::backdrop{background:rgba(0,0,0,.7)}
dialog figure{margin:0;display:flex;flex-direction:column;gap:8px;align-items:center}
dialog img{width:min(80vw,70vh,640px);height:auto;image-rendering:auto;border-radius:8px;margin:0}
dialog figcaption{font-size:13.5px;text-align:center;overflow-wrap:anywhere;max-width:640px}
dialog .close{position:absolute;top:8px;right:10px;border:0;background:none;color:inherit;font-size:16px;cursor:pointer}
"""
# The picture that is shown is known by its step and prompt, not by its place: while a run goes on the table is drawn anew.
SCRIPT = r"""
let at = null;
const grid = () => [...element.querySelectorAll('tbody tr')].map(row => [...row.querySelectorAll('td')].map(cell => cell.querySelector('button')));
function place(){ const rows = grid(); for(let r = 0; r < rows.length; r++) for(let c = 0; c < rows[r].length; c++)
  if(rows[r][c] && at && rows[r][c].dataset.step === at.step && rows[r][c].dataset.prompt === at.prompt) return [rows, r, c]; return [rows, -1, -1]; }
function mark(button){ for(const other of element.querySelectorAll('td button[aria-current]')) other.removeAttribute('aria-current');
  if(button){ button.setAttribute('aria-current', 'true'); at = {...button.dataset}; } }
function show(button){ const dialog = element.querySelector('dialog'); mark(button);
  dialog.querySelector('img').src = button.querySelector('img').src; dialog.querySelector('img').alt = button.querySelector('img').alt;
  dialog.querySelector('figcaption').textContent = `step ${button.dataset.step}: ${button.dataset.prompt}`; if(!dialog.open) dialog.showModal(); }
function move(down, right){ const [rows, r, c] = place(); if(r < 0) return;
  for(let y = r + down, x = c + right; rows[y] && x >= 0 && x < rows[y].length; y += down, x += right) if(rows[y][x]){
    const open = element.querySelector('dialog').open; open ? show(rows[y][x]) : (mark(rows[y][x]), rows[y][x].focus()); rows[y][x].scrollIntoView({block: 'nearest', inline: 'nearest'}); return; } }
const WAYS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
element.addEventListener('keydown', event => { const way = WAYS[event.key]; if(!way) return;
  const cell = event.target.closest('td button'); if(!cell && !element.querySelector('dialog')?.open) return;
  if(cell && !element.querySelector('dialog').open) mark(cell); event.preventDefault(); move(...way); });
element.addEventListener('click', event => { const cell = event.target.closest('td button'); if(cell) return show(cell);
  const dialog = element.querySelector('dialog'); if(event.target.closest('.close') || event.target === dialog) dialog.close(); });
watch('value', () => { if(!at) return; const [rows, r, c] = place(), dialog = element.querySelector('dialog'), was = open_; if(r >= 0){ mark(rows[r][c]); if(was && !dialog.open) show(rows[r][c]); } });
let open_ = false;
element.addEventListener('click', () => { open_ = !!element.querySelector('dialog')?.open; });
element.addEventListener('close', () => { open_ = false; }, true);
"""


def build(**options) -> gr.HTML:
    """The samples of a run. Value: what `shown` gives."""
    return theme.Shown(EMPTY, html_template=TEMPLATE, css_template=CSS, js_on_load=SCRIPT, elem_classes="flush", **options)


def shown(events: list[dict], id: str) -> dict:
    """The sample answers among a run's events: words by prompt, oldest first, and pictures with a row for each step (of a sweep for each step
    of each variant), the untouched base first."""
    texts: dict[str, list] = {}
    pictures: dict[tuple[int, int], dict[str, str]] = {}
    prompts: dict[str, None] = {}
    names = next(([one["words"] for one in event["variants"]] for event in events if "variants" in event), [])
    for event in events:
        if event["kind"] != "sample":
            continue
        answer, step, prompt, variant = str(event["answer"]), event["step"], event["prompt"], event.get("variant", 0)
        if studio.SAMPLE.fullmatch(answer):
            prompts[prompt] = None
            pictures.setdefault((step, variant), {})[prompt] = f"/studio/sample/{id}/{answer}"
        else:
            texts.setdefault(prompt, []).append({"step": told(step, variant, names), "answer": answer or "(nothing)"})
    rows = [
        {"step": step, "label": "base" if step == 0 else names[variant] if names else "", "cells": [{"picture": found.get(prompt, ""), "step": told(step, variant, names), "prompt": prompt} for prompt in prompts]}
        for (step, variant), found in sorted(pictures.items())
    ]
    if len(rows) > MOST_ROWS:
        rows = [rows[0], *rows[-MOST_ROWS + 1 :]]
    return {
        "texts": [{"prompt": prompt, "answers": found[-max(MOST_TEXTS, 2 * len(names)) :]} for prompt, found in texts.items()],
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "rows": rows,
    }


def told(step: int, variant: int, names: list[str]) -> int | str:
    """A step, and of a sweep the variant whose it is."""
    return f"{step} · {names[variant]}" if names and step else step
