"""The Blend page: weights on the left, what they make of the adapters on the right, live; and the blend saved as an adapter."""

import json
import math

import gradio as gr

from lora_studio import library, shelf
from lora_studio.errors import AdapterError, BlendError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.bake import Bake
from lora_studio.ui.merge import Merge
from lora_studio.ui.mix import LIVE, QUIET, Mix, tab_of
from lora_studio.workspace import Workspace

FIGURES = """<div class="figures" aria-live="off">{{#if value.hint}}<p class="hint">{{value.hint}}</p>{{/if}}{{#if value.parts}}
<div><table class="parts"><caption>How much each one changes (size after its weight)</caption><thead><tr><th></th><th>adapter</th><th class="n">weight</th><th class="n">size</th><th></th></tr></thead><tbody>
{{#each value.parts}}<tr><td class="n">{{number}}</td><td class="name">{{name}}</td><td class="n">{{weight}}</td><td class="n size">{{size}}</td><td class="bar"><i style="width:{{share}}%"></i></td></tr>{{/each}}
<tr class="sum"><td></td><td>the blend</td><td></td><td class="n size">{{value.norm}}</td><td class="bar"><i style="width:{{value.share}}%"></i></td></tr></tbody></table></div>
{{#if value.rows}}<div><table class="matrix"><caption>How alike they are (cosine)</caption><thead><tr><th></th>{{#each value.parts}}<th class="n">{{number}}</th>{{/each}}</tr></thead><tbody>
{{#each value.rows}}<tr><th class="name">{{number}} {{name}}</th>{{#each cells}}<td class="n {{level}}">{{text}}</td>{{/each}}</tr>{{/each}}</tbody></table></div>{{/if}}
{{#if value.pair}}<p class="pair">{{value.pair}}</p>{{/if}}<p class="rank">{{value.rank}}</p>{{/if}}</div>"""
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
CURVE = """<p class="cap"><b>Error when compressed to a rank</b> <output aria-live="off"></output></p>
<canvas role="img" aria-label="error at every rank"></canvas>"""
CURVE_CSS = """
.cap{margin:0 0 4px;font-size:13.5px;color:var(--body-text-color);display:flex;flex-wrap:wrap;gap:2px 10px;justify-content:space-between}
.cap output{color:var(--body-text-color-subdued)}
canvas{width:100%;height:220px;display:block;cursor:crosshair}
"""
CURVE_SCRIPT = r"""
const canvas = element.querySelector('canvas'), output = element.querySelector('output'), pen = canvas.getContext('2d');
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
function take(){ found = props.value ? JSON.parse(props.value) : null; over = null; element.style.display = found ? '' : 'none'; draw(); }
function under(event){ if(!found) return null; const box = canvas.getBoundingClientRect(), share = (event.clientX - box.left - L) / (box.width - L - R);
  return Math.max(1, Math.min(found.exact, Math.round(share * found.exact))); }
canvas.addEventListener('pointermove', event => { over = under(event); draw(); });
canvas.addEventListener('pointerleave', () => { over = null; draw(); });
canvas.addEventListener('click', event => { const rank = under(event); if(rank) trigger('pick', {rank: rank === found.exact ? 0 : rank}); });
watch('value', take); new ResizeObserver(draw).observe(canvas); take();
"""
SUGGESTED, ROUNDING = (0.05, 0.01), 1e-5
HINT = "Pick adapters on the left. Their sizes, how alike they are, and the error of every rank appear here."


class ErrorCurve(gr.HTML):
    """The error of every rank, the chosen one marked. Value: {losses, exact, chosen} as JSON, or ""; a click picks a rank."""

    def __init__(self, value="", **options):
        super().__init__(value, html_template=CURVE, css_template=CURVE_CSS, js_on_load=CURVE_SCRIPT, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}


class Blend:
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.mix = workspace, Mix(workspace, "mix-blend")
        self.merge, self.bake = Merge(workspace), Bake(workspace)

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Blend adapters\nA blend is the sum of what its adapters change, each times its weight. A weight of 0 leaves one out, a negative one takes it away.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.mix.build()
                self._save_box()
                self.merge.build()
                self.bake.build()
            with gr.Column(scale=3, min_width=300, elem_id="blend-preview"):
                self.figures = theme.Shown({"hint": HINT}, html_template=FIGURES, css_template=FIGURES_CSS, container=True, padding=True, elem_id="blend-figures")
                self.curve = ErrorCurve("", container=True, padding=True, visible=False, elem_id="blend-curve")
        self.saved, self.suggested = gr.State(None), gr.State([])
        self._wire()

    def _save_box(self) -> None:
        with gr.Row():
            self.name = gr.Textbox("", label="Name of the blend", info="As it stands in the library.", max_lines=1, max_length=80, interactive=True, elem_id="blend-name", min_width=150)
            self.rank = gr.Textbox("", label="Rank", placeholder="exact", max_lines=1, info="Empty: exact (ranks add).", interactive=True, elem_id="blend-rank", min_width=110)
        with gr.Row():
            self.exact = gr.Button("Exact", size="sm", min_width=80)
            self.ranks = [gr.Button("", size="sm", visible=False, min_width=110, elem_id=f"blend-rank-{number}") for number in range(len(SUGGESTED))]
        self.save = gr.Button("Save blend", variant="primary", size="lg", elem_id="blend-save")
        # Two, so that a preview that was under way does not take away what came of saving.
        with gr.Column(elem_id="blend-sentences"):
            self.kept, self.told = theme.sentences(), theme.sentences()
        with gr.Row():
            self.talk = gr.Button("Talk to it", size="md", min_width=90, elem_id="blend-talk")
            self.to_library = gr.Button("Show in library", size="md", interactive=False, min_width=90, elem_id="blend-to-library")
            self.to_publish = gr.Button("Publish", size="md", interactive=False, min_width=90, elem_id="blend-to-publish")

    # ---- wiring

    @property
    def opened(self) -> list:
        """What showing other parts fills; the preview follows by itself."""
        return self.mix.opened

    @property
    def seen(self) -> list:
        """What the preview fills."""
        return [self.figures, self.curve, self.exact, *self.ranks, self.suggested, self.told]

    def _wire(self) -> None:
        changes = [slider.input for slider in self.mix.sliders]
        gr.on([*changes, self.mix.turn.change, self.rank.change], self.look, [self.rank, *self.mix.inputs], self.seen, **LIVE)
        # Its `change` and not its `input`: Gradio tells no `input` of pasted text, and the buttons set it too.
        self.exact.click(lambda: "", None, self.rank, **QUIET)
        for number, button in enumerate(self.ranks):
            button.click(self._suggestion(number), self.suggested, self.rank, **QUIET)
        self.curve.pick(self.point, None, self.rank, **QUIET)
        self.merge.connect(self.mix)
        self.bake.connect(self.mix)
        self.save.click(
            self.keep, [self.name, self.rank, *self.mix.inputs], [self.kept, self.saved, self.to_library, self.to_publish, self.mix.pick],
            show_progress="minimal", show_progress_on=self.kept, api_visibility="private", concurrency_limit=None,
        )  # fmt: skip

    def connect(self, tabs, playground, library_page, publish) -> None:
        """Let the buttons lead to the other pages."""
        tab_of(self.mix.pick).select(self.mix.fresh, self.mix.pick, self.mix.pick, **QUIET)
        self.talk.click(lambda *given: self.jump(playground, *given), [self.saved, self.rank, *self.mix.inputs], [tabs, *playground.opened], **QUIET)
        self.to_library.click(lambda saved: [gr.Tabs(selected="library"), *library_page.open(saved["id"])], self.saved, [tabs, *library_page.opened], **QUIET)
        show = {"fn": lambda saved, owner: [gr.Tabs(selected="publish"), *publish.open(saved["id"], owner)], "inputs": [self.saved, publish.owner]}
        self.to_publish.click(**show, outputs=[tabs, *publish.opened], **QUIET)

    @staticmethod
    def _suggestion(number: int):
        return lambda suggested: str(suggested[number]) if number < len(suggested) and suggested[number] else ""

    def point(self, event: gr.EventData):
        """The rank that was clicked in the curve; 0 stands for the exact one."""
        return str(int(event.rank) or "")

    # ---- what is shown

    def open(self, parts) -> list:
        """Updates for `opened` that show other parts."""
        return self.mix.open(parts)

    def add(self, id: str, *given) -> list:
        """Updates for `opened` that add an adapter, with weight 1, to the parts there are (the values of `mix.inputs`)."""
        pick, held, *weights = given
        known = dict(zip(held or [], weights))
        parts = [[text, known.get(text, 1.0)] for text in pick or []]
        return self.open(parts if id in known else [*parts, [id, 1.0]])

    def look(self, rank, *given):
        """The preview of what the sliders say; a sentence first where it has to be waited for."""
        try:
            parts, chosen = self.mix.parts(*given), rank_of(rank)
            if not parts:
                yield [{"hint": HINT}, _curve(None), *self._buttons([], None), []]
                return
            waiting = _waiting(shelf.bench_status())
            if waiting:
                yield [*[gr.skip()] * (len(self.seen) - 1), [theme.said("note", waiting)]]
            found = shelf.preview(self.workspace, parts)
        except StudioError as error:
            hint = {"hint": "There is no preview of this mix: see the sentence marked ✗."}
            yield [hint, _curve(None), *self._buttons([], None), [theme.said("error", str(error))]]
            return
        cards = [library.card(self.workspace, id) for id, _ in parts]
        exact = exact_rank(found, [(card["rank"], weight) for card, (_, weight) in zip(cards, parts)])
        suggested = suggestions(found["losses"], exact)
        told = [theme.said("warning", "Every weight is 0, so the blend would change nothing. Move a slider.")] if not exact else []
        if chosen and exact and chosen >= exact:
            told.append(theme.said("note", f"The exact blend has rank {exact}, so rank {chosen} loses nothing and saves the exact one."))
        curve = {"losses": found["losses"], "exact": exact, "chosen": min(chosen or exact, exact)} if exact else None
        figures = figures_of(found, [card["name"] for card in cards], [weight for _, weight in parts], exact)
        yield [figures, _curve(curve), *self._buttons(suggested, exact), told]

    def _buttons(self, suggested: list, exact: int | None) -> list:
        """The buttons that set a rank, and the ranks they set."""
        shown = [gr.update(value=f"Exact (rank {exact})" if exact else "Exact")]
        for number, limit in enumerate(SUGGESTED):
            rank = suggested[number] if number < len(suggested) else None
            shown.append(gr.update(value=f"Rank {rank}: error below {limit:.0%}" if rank else "", visible=rank is not None))
        return [*shown, suggested]

    # ---- what the buttons do

    def keep(self, name: str, rank, *given) -> list:
        """Save the blend and say what came of it. Nothing is lost when it cannot be."""
        try:
            parts, chosen = self.mix.parts(*given), rank_of(rank)
            if not parts:
                return self._refused("There is nothing to save yet. Pick at least one adapter.")
            if not (name or "").strip():
                raise AdapterError("library.name", name="of the blend is empty and")
            id, done = shelf.blend(self.workspace, parts, name=name.strip(), rank=chosen)
        except StudioError as error:
            return self._refused(str(error))
        called, kind = self.mix.label(id), "exact" if chosen is None or done["loss"] < ROUNDING else f"compressed to rank {chosen}"
        told = [theme.said("ok", f"{called} is in the library: rank {done['rank']}, {kind}, true error {percent(done['loss'])}.")]
        if called != name.strip():
            told.append(theme.said("note", f"The very same blend was there already, and keeps its name {called}. Rename it in the library."))
        saved = {"id": id, "parts": parts, "rank": chosen}
        return [told, saved, gr.update(interactive=True), gr.update(interactive=True), self.mix.fresh(given[0])]

    @staticmethod
    def _refused(sentence: str) -> list:
        return [[theme.said("error", sentence)], *[gr.skip()] * 4]

    def jump(self, playground, saved, rank, *given) -> list:
        """Updates that lead to the Playground: with the blend that was saved, or with the parts as they are now."""
        try:
            parts = self.mix.parts(*given)
            is_saved = saved is not None and saved["parts"] == parts and saved["rank"] == rank_of(rank)
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * (1 + len(playground.opened))
        return [gr.Tabs(selected="playground"), *playground.open([[saved["id"], 1.0]] if is_saved else parts)]


# ---- words and numbers


def _curve(found: dict | None):
    """The error of every rank as its component takes it; none is not shown."""
    return gr.update(value=json.dumps(found) if found else "", visible=found is not None)


def rank_of(given) -> int | None:
    """The rank that was typed; nothing is None, the exact one. Raises BlendError."""
    text = str(given if given is not None else "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) < 10**8:
        raise BlendError("blend.rank", rank=repr(text[:40]))
    return int(text)


def exact_rank(found: dict, parts: list[tuple[int, float]]) -> int:
    """The rank of the exact blend: ranks add, and what has weight 0 takes no room."""
    return min(found["rank"], sum(rank for rank, weight in parts if weight)) if found["norm"] else 0


def suggestions(losses: list[float], exact: int) -> list[int | None]:
    """The smallest rank below each of the suggested errors; None where that is the exact one."""
    found = [next((rank for rank, loss in enumerate(losses[:exact]) if rank and loss <= limit), None) for limit in SUGGESTED]
    return [rank if rank not in found[:number] else None for number, rank in enumerate(found)]


def percent(loss: float) -> str:
    """An error in words: a share of the blend's size."""
    return f"{loss:.1e} (rounding only)" if loss < ROUNDING else f"{100 * loss:.2g} %"


def figures_of(found: dict, names: list[str], weights: list[float], exact: int) -> dict:
    """The numbers of a preview as the page shows them."""
    sizes = [abs(weight) * norm for weight, norm in zip(weights, found["norms"])]
    most = max([*sizes, found["norm"]]) or 1.0
    numbers = range(len(names))
    parts = [
        {"number": number + 1, "name": names[number], "weight": f"{weights[number]:.2f}", "size": f"{sizes[number]:.3g}", "share": f"{100 * sizes[number] / most:.1f}"}
        for number in numbers
    ]
    rows = [
        {"number": row + 1, "name": names[row], "cells": [_cell(found["cosines"][row][column], row == column) for column in numbers]} for row in numbers
    ]
    rank = f"Exact rank: {exact}. Layers changed: {found['layers']}." if exact else "The blend changes nothing."
    shown = {"hint": "", "parts": parts, "rows": rows if len(rows) > 1 else [], "norm": f"{found['norm']:.3g}", "share": f"{100 * found['norm'] / most:.1f}"}
    return {**shown, "pair": pair_in_words(found["cosines"], names, weights), "rank": rank}


def _cell(cosine: float, is_self: bool) -> dict:
    return {"text": "1" if is_self else _two(cosine), "level": "self" if is_self else "high" if abs(cosine) >= 0.3 else "low"}


def _two(number: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(number, 2) + 0.0:.2f}"


def pair_in_words(cosines: list[list[float]], names: list[str], weights: list[float]) -> str:
    """One sentence about the two that are most alike, or most opposed."""
    pairs = [(abs(cosines[row][column]), row, column) for row in range(len(names)) for column in range(row + 1, len(names))]
    if not pairs:
        return ""
    _, left, right = max(pairs)
    cosine, a, b = cosines[left][right], names[left], names[right]
    acting = cosine * math.copysign(1, weights[left] * weights[right])
    told = f"(cosine {_two(cosine)})"
    if abs(cosine) < 0.1:
        who, told = (f"{a} and {b}", told) if len(pairs) == 1 else ("All of them", f"(largest cosine {_two(cosine)})")
        return f"{who} point in nearly unrelated directions {told}: they should not disturb each other."
    if acting > 0:
        how = "nearly the same way" if acting >= 0.8 else "partly the same way"
        return f"{a} and {b} act {how} {told}: they strengthen each other, so lower weights may do."
    how = "nearly cancel each other" if acting <= -0.8 else "work partly against each other"
    return f"With these weights {a} and {b} {how} {told}: change the sign of one if that is not meant."


def _waiting(status: dict) -> str:
    """What has to be waited for before a preview; "" when nothing."""
    if status["state"] in ("off", "starting"):
        return "Starting the bench…"
    return f"The bench is busy ({status['doing']}); the preview comes after that." if status.get("doing") else ""
