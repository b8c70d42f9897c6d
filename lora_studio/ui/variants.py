"""The variants of a sweep on the Runs page: a table with the best first, the kept one marked, each with the way to its adapter."""

from lora_studio import runs, studio
from lora_studio.ui import theme

VARIANTS = """{{#if value.rows}}<div class="variants"><p class="cap"><b>{{value.title}}</b> <span>{{value.note}}</span></p>
<table><thead><tr><th>variant</th><th class="n">validation</th><th class="n wide">training</th><th class="n wide">step</th><th>state</th><th></th></tr></thead><tbody>
{{#each value.rows}}<tr><td class="name"><svg width="30" height="10" aria-hidden="true"><line x1="1" x2="29" y1="5" y2="5" stroke="var(--studio-line-{{colour}})" stroke-width="2.5" stroke-dasharray="{{dash}}"/></svg>
<span>{{words}}{{#if mark}} <em>{{mark}}</em>{{/if}}{{#if more}}<small>{{more}}</small>{{/if}}</span></td><td class="n">{{validation}}</td><td class="n wide">{{training}}</td><td class="n wide">{{step}}</td><td>{{state}}</td>
<td class="go">{{#if library}}<button type="button" data-id="{{library}}" aria-label="Open {{words}} in the Library">Open in Library</button>{{/if}}</td></tr>{{/each}}</tbody></table></div>{{/if}}"""
VARIANTS_CSS = """
.variants{color:var(--body-text-color);font-size:13.5px;max-height:420px;overflow-y:auto;padding:2px 4px}
.variants .cap{margin:0 0 6px;display:flex;flex-wrap:wrap;gap:2px 10px}.variants .cap span{color:var(--body-text-color-subdued)}
.variants table{border-collapse:collapse;width:100%;margin:0!important}.variants table,.variants tr{border:none!important}.variants tbody tr{border-top:1px solid var(--border-color-primary)!important}
.variants th,.variants td{padding:4px 9px 4px 0;border:none;text-align:left;font-weight:400;color:var(--body-text-color);vertical-align:middle}.variants thead th{color:var(--body-text-color-subdued);font-size:12px}
.variants .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.variants .name{overflow-wrap:anywhere}.variants .name svg{display:inline-block;margin-right:7px;vertical-align:middle}.variants .name small{display:block;font-size:12px;color:var(--body-text-color-subdued)}
.variants em{font-style:normal;font-size:12px;padding:0 8px;border-radius:99px;border:1px solid var(--studio-ok);color:var(--studio-ok);white-space:nowrap}
.variants .go{padding-right:0;text-align:right}.variants button{font:inherit;font-size:12.5px;padding:3px 10px;border-radius:99px;border:1px solid var(--border-color-primary);background:transparent;color:var(--body-text-color);cursor:pointer}
.variants button:hover{border-color:var(--color-accent)}
@media (max-width:640px){.variants .wide{display:none}.variants .name svg{display:block}}
"""
VARIANTS_SCRIPT = """
element.addEventListener('click', event => { const button = event.target.closest('button[data-id]'); if(button) trigger('pick', {id: button.dataset.id}); });
"""
# As the chart draws them (ui/chart.py): eight colours, and a dash beside, so that no line is told by its colour alone.
COLOURS, DASHES = 8, ("", "8 4", "2 3", "11 3 2 3")
SIGNS = {"done": "✓ done", "running": "● running", "waiting": "… waiting", "failed": "✗ failed"}


def build(**options) -> theme.Shown:
    """The part of the page; empty where a run is no sweep. `pick` is what a press on a variant's button gives."""
    return theme.Shown({}, html_template=VARIANTS, css_template=VARIANTS_CSS, js_on_load=VARIANTS_SCRIPT, **options)


def shown(found: dict) -> dict:
    """What it shows of a sweep's summary (sweeps.summary)."""
    order = sorted(found["variants"], key=lambda one: (one["state"] == "failed", one["validation"] is None, one["validation"] or 0.0, one["number"]))
    rows = [
        {
            "words": one["words"], "colour": one["number"] % COLOURS, "dash": DASHES[(one["number"] + one["number"] // COLOURS) % len(DASHES)],
            "mark": "kept" if one["number"] == found["kept"] else "best so far" if found["kept"] is None and one["number"] == found["best"] else "",
            "validation": loss(one["validation"]), "training": loss(one["loss"]), "step": f"{one['step']} / {one['steps']}" if one["steps"] else "–",
            "state": SIGNS.get(one["state"], one["state"]), "library": one["library"] or "", "more": more_of(one),
        }
        for one in order
    ]  # fmt: skip
    note = f"The validation loss is the mean over {found['folds']} parts." if found["folds"] else "The best is that with the lowest validation loss."
    return {"title": f"{len(rows)} variants", "note": note, "rows": rows}


def more_of(one: dict) -> str:
    """What is said below a variant: why it broke off, or the loss of each part."""
    if one["state"] == "failed":
        return one["reason"]
    if not any(value is not None for value in one["folds"]):
        return one["reason"] if one["state"] == "done" else ""
    return "parts: " + ", ".join(map(loss, one["folds"]))


def loss(value: float | None) -> str:
    """A loss, or a dash where there is none yet."""
    return "–" if value is None else f"{value:.4f}"


def tiles_of(status: runs.Status, found: dict, time_left: str | None) -> list[dict]:
    """The numbers of a sweep."""
    over = sum(one["state"] in ("done", "failed") for one in found["variants"])
    best = next((one for one in found["variants"] if one["number"] == (found["best"] if found["kept"] is None else found["kept"])), None)
    step = status.step_event or {}
    told = [
        ("state", status.state),
        ("step", f"{status.step} / {status.steps}" if status.steps else None),
        ("variants at their end", f"{over} of {len(found['variants'])}"),
        ("best validation", f"{best['validation']:.4f}" if best and best["validation"] is not None else None),
        ("best" if found["kept"] is not None else "best so far", best["words"] if best else None),
        ("time left", time_left),
        ("memory", studio.gigabytes(step["memory"]) if "memory" in step else None),
    ]
    return [{"label": label, "value": value} for label, value in told if value]
