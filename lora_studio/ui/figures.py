"""The figures of the Blend page: how much each adapter changes, how alike they are, and what the ranks would lose, in numbers and words."""

from lora_studio.errors import BlendError
from lora_studio.weights import Weight, acts

FIGURES = """<div class="figures" aria-live="off">{{#if value.hint}}<p class="hint">{{value.hint}}</p>{{/if}}{{#if value.parts}}
<div><table class="parts"><caption>How much each one changes (size after its weight)</caption><thead><tr><th></th><th>adapter</th><th class="n">weight</th><th class="n">size</th><th></th></tr></thead><tbody>
{{#each value.parts}}<tr><td class="n">{{number}}</td><td class="name">{{name}}</td><td class="n">{{weight}}</td><td class="n size">{{size}}</td><td class="bar"><i style="width:{{share}}%"></i></td></tr>{{/each}}
<tr class="sum"><td></td><td>the blend</td><td></td><td class="n size">{{value.norm}}</td><td class="bar"><i style="width:{{value.share}}%"></i></td></tr></tbody></table></div>
{{#if value.rows}}<div><table class="matrix"><caption>How alike they are (cosine)</caption><thead><tr><th></th>{{#each value.parts}}<th class="n">{{number}}</th>{{/each}}</tr></thead><tbody>
{{#each value.rows}}<tr><th class="name">{{number}} {{name}}</th>{{#each cells}}<td class="n {{level}}">{{text}}</td>{{/each}}</tr>{{/each}}</tbody></table></div>{{/if}}
{{#if value.pair}}<p class="pair">{{value.pair}}</p>{{/if}}<p class="rank">{{value.rank}}</p>{{#if value.saved}}<p class="saved">{{value.saved}}</p>{{/if}}{{/if}}</div>"""
FIGURES_CSS = """
.figures{color:var(--body-text-color);font-size:13.5px;line-height:1.45}
.figures .hint{color:var(--body-text-color-subdued);margin:4px 0}
.figures table{border-collapse:collapse;width:100%;margin:0!important}.figures div{margin:0 0 14px;overflow-x:auto}
.figures table,.figures tr{border:none!important}.figures tbody tr{border-top:1px solid var(--border-color-primary)!important}
.figures .matrix{width:auto}
.figures caption{text-align:left;font-weight:700;padding:0 0 4px}
.figures th,.figures td{padding:4px 9px 4px 0;border:none;text-align:left;font-weight:400;color:var(--body-text-color)}
.figures thead th{color:var(--body-text-color-subdued);font-size:12px}
.figures .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.figures .name{overflow-wrap:anywhere;min-width:76px;max-width:220px}
.figures .bar{width:34%;padding-right:0}.figures .bar i{display:block;height:9px;border-radius:5px;background:var(--color-accent);min-width:1px}
.figures .sum td{font-weight:700}.figures .sum .bar i{background:var(--body-text-color-subdued)}
.figures .matrix td{min-width:52px}.figures .high{font-weight:700;color:var(--color-accent)}.figures .self{color:var(--body-text-color-subdued)}
.figures p{margin:0 0 8px}
@media (max-width:640px){.figures .matrix td{min-width:0}.figures .matrix th,.figures .matrix td{padding-right:6px}}
"""
SUGGESTED, ROUNDING = (0.05, 0.01), 1e-5


def rank_of(given) -> int | None:
    """The rank that was typed; nothing is None, the exact one. Raises BlendError."""
    text = str(given if given is not None else "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) < 10**8:
        raise BlendError("blend.rank", rank=repr(text[:40]))
    return int(text)


def exact_rank(found: dict, parts: list[tuple[int, Weight]]) -> int:
    """The rank of the exact blend: ranks add, and what has weight 0 takes no room."""
    return min(found["rank"], sum(rank for rank, weight in parts if acts(weight))) if found["norm"] else 0


def suggestions(losses: list[float], exact: int) -> list[int | None]:
    """The smallest rank below each of the suggested errors; None where that is the exact one."""
    found = [next((rank for rank, loss in enumerate(losses[:exact]) if rank and loss <= limit), None) for limit in SUGGESTED]
    return [rank if rank not in found[:number] else None for number, rank in enumerate(found)]


def percent(loss: float) -> str:
    """An error in words: a share of the blend's size."""
    return f"{loss:.1e} (rounding only)" if loss < ROUNDING else f"{100 * loss:.2g} %"


def figures_of(found: dict, names: list[str], weights: list[Weight], exact: int) -> dict:
    """The numbers of a preview as the page shows them."""
    sizes = found["sizes"]
    most = max([*sizes, found["norm"]]) or 1.0
    numbers = range(len(names))
    parts = [
        {"number": number + 1, "name": names[number], "weight": _weight(weights[number]), "size": f"{sizes[number]:.3g}", "share": f"{100 * sizes[number] / most:.1f}"}
        for number in numbers
    ]
    rows = [
        {"number": row + 1, "name": names[row], "cells": [_cell(found["cosines"][row][column], row == column) for column in numbers]} for row in numbers
    ]
    rank = f"Exact rank: {exact}. Layers changed: {found['layers']}." if exact else "The blend changes nothing."
    shown = {"hint": "", "parts": parts, "rows": rows if len(rows) > 1 else [], "norm": f"{found['norm']:.3g}", "share": f"{100 * found['norm'] / most:.1f}"}
    return {**shown, "pair": pair_in_words(found["cosines"], found["acting"], names), "rank": rank}


def _weight(weight: Weight) -> str:
    return f"{weight.get('', 1.0):.2f} by block" if isinstance(weight, dict) else f"{weight:.2f}"


def _cell(cosine: float, is_self: bool) -> dict:
    return {"text": "1" if is_self else _two(cosine), "level": "self" if is_self else "high" if abs(cosine) >= 0.3 else "low"}


def _two(number: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(number, 2) + 0.0:.2f}"


def saved_in_words(chosen: int | None, exact: int, losses: list[float], width: int) -> str:
    """The numbers the blend will have when it is saved; `width` is how many numbers each of its ranks has."""
    rank = min(chosen or exact, exact)
    kind = "exact" if rank == exact else f"true error {percent(losses[rank])}"
    return f"Saved like this it has rank {rank}, {kind}, and about {4 * rank * width / 1e6:.2f} MB." if exact else ""


def pair_in_words(cosines: list[list[float]], weighed: list[list[float]], names: list[str]) -> str:
    """One sentence about the two that are most alike, or most opposed, as they are weighed. Where nothing of two acts on the same layers
    there is nothing to say of them."""
    pairs = [
        (row, column)
        for row in range(len(names))
        for column in range(row + 1, len(names))
        if weighed[row][column] or not cosines[row][column]
    ]
    if not pairs:
        return ""
    left, right = max(pairs, key=lambda pair: abs(weighed[pair[0]][pair[1]]))
    acting, a, b = weighed[left][right], names[left], names[right]
    by_layer = abs(abs(acting) - abs(cosines[left][right])) > 1e-6
    cosine, told = (acting, "cosine as weighted") if by_layer else (cosines[left][right], "cosine")
    told = f"({told} {_two(cosine)})"
    if abs(acting) < 0.1:
        who, told = (f"{a} and {b}", told) if len(pairs) == 1 else ("All of them", f"(largest {told[1:]}")
        return f"{who} point in nearly unrelated directions {told}: they should not disturb each other."
    if acting > 0:
        how = "nearly the same way" if acting >= 0.8 else "partly the same way"
        return f"{a} and {b} act {how} {told}: they strengthen each other, so lower weights may do."
    how = "nearly cancel each other" if acting <= -0.8 else "work partly against each other"
    return f"With these weights {a} and {b} {how} {told}: change the sign of one if that is not meant."
