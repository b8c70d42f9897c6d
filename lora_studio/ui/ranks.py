"""What a run says of ranks: the validation loss at every rank of a nested adapter, and the ranks AdaLoRA left in each layer."""

from lora_studio.ui import theme

RANKS = """{{#if value.title}}<div class="ranks"><p class="cap"><b>{{value.title}}</b> <span>{{value.note}}</span></p>
<table><thead><tr><th>{{value.head}}</th><th class="n">{{value.number}}</th><th></th></tr></thead><tbody>
{{#each value.rows}}<tr><td class="name">{{name}}</td><td class="n">{{text}}</td><td class="bar"><i style="width:{{share}}%"></i></td></tr>{{/each}}</tbody></table></div>{{/if}}"""
RANKS_CSS = """
.ranks{color:var(--body-text-color);font-size:13.5px;max-height:340px;overflow-y:auto;padding:2px 4px}
.ranks .cap{margin:0 0 6px;display:flex;flex-wrap:wrap;gap:2px 10px}.ranks .cap span{color:var(--body-text-color-subdued)}
.ranks table{border-collapse:collapse;width:100%;margin:0!important}.ranks table,.ranks tr{border:none!important}.ranks tbody tr{border-top:1px solid var(--border-color-primary)!important}
.ranks th,.ranks td{padding:3px 9px 3px 0;border:none;text-align:left;font-weight:400;color:var(--body-text-color)}.ranks thead th{color:var(--body-text-color-subdued);font-size:12px}
.ranks .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.ranks .name{overflow-wrap:anywhere}
.ranks .bar{width:42%;padding-right:0}.ranks .bar i{display:block;height:9px;border-radius:5px;background:var(--color-accent);min-width:1px}
"""


def build(**options) -> theme.Shown:
    """The part of the page; empty where a run says nothing of ranks."""
    return theme.Shown({}, html_template=RANKS, css_template=RANKS_CSS, **options)


def shown(events: list[dict]) -> dict:
    """What it shows of a run's events."""
    told = next((event for event in reversed(events) if event["kind"] == "ranks"), None)
    if told is None:
        return {}
    if told.get("losses"):
        losses = {int(rank): loss for rank, loss in told["losses"].items()}
        worst, best = max(losses.values()), min(losses.values())
        rows = [{"name": rank, "text": f"{loss:.4f}", "share": round(100 * loss / worst) if worst > 0 else 0} for rank, loss in sorted(losses.items())]
        note = f"The best is {best:.4f}. Cut it to a rank with: resize ID --name NAME --rank RANK --slice"
        return {"title": "Validation loss at every rank", "note": note, "head": "rank", "number": "loss", "rows": rows}
    layers = told.get("layers") or {}
    most = max(layers.values(), default=0)
    rows = [{"name": name, "text": str(rank), "share": round(100 * rank / most) if most else 0} for name, rank in layers.items()]
    return {"title": "Ranks that are left", "note": f"{sum(layers.values())} directions in {len(layers)} layers.", "head": "layer", "number": "rank", "rows": rows}
