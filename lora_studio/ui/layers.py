"""The part of the Blend page that weighs an adapter by block and by layer pattern, beside the one weight of its slider."""

import json
import time
from functools import lru_cache

import gradio as gr

from lora_studio import library, shelf, weights
from lora_studio.errors import BlendError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import LIVE, QUIET, when
from lora_studio.ui.mix import LEAST, MOST, Mix
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

GRID = """<p class="none" hidden>Pick adapters first. Their blocks appear here.</p><div class="blocks" role="group"></div>"""
GRID_CSS = """
.none{margin:2px 0;color:var(--body-text-color-subdued);font-size:13.5px}
.blocks{display:grid;grid-template-columns:repeat(auto-fill,minmax(92px,1fr));gap:8px;max-height:340px;overflow-y:auto;padding:2px}
.blocks label{display:flex;flex-direction:column;gap:2px;min-width:0;font-size:12px;color:var(--body-text-color-subdued)}
.blocks span{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;direction:rtl;text-align:left}
.blocks input{width:100%;min-width:0;font:inherit;font-size:13.5px;padding:4px 7px;border-radius:7px;border:1px solid var(--border-color-primary);background:var(--input-background-fill);color:var(--body-text-color);font-variant-numeric:tabular-nums}
.blocks input::placeholder{color:var(--body-text-color-subdued);opacity:.75}
.blocks input:focus-visible{outline:2px solid var(--color-accent);outline-offset:0}.blocks .own input{border-color:var(--color-accent);font-weight:700}
.blocks i{position:relative;height:4px;border-radius:2px;background:var(--border-color-primary);overflow:hidden}
.blocks i::after{content:"";position:absolute;top:0;bottom:0;left:var(--from,50%);width:var(--share,0%);background:var(--color-accent)}
"""
GRID_SCRIPT = r"""
const box = element.querySelector('.blocks'), none = element.querySelector('.none'); let found = null, key = '', focused = null;
const typed = input => input.validity.badInput ? 'what stands there' : input.value;
function show(input){
  const block = found.blocks[input.dataset.at], weight = Number(input.value === '' ? block.rest : input.value), share = Math.min(50, Math.abs(weight) / found.most * 50);
  const bar = input.nextSibling; bar.style.setProperty('--share', share + '%'); bar.style.setProperty('--from', (weight < 0 ? 50 - share : 50) + '%');
  input.parentNode.classList.toggle('own', input.value !== '');
}
let later = 0;
function tell(){ clearTimeout(later); later = 0; const weights = {}; for(const input of box.querySelectorAll('input')) if(typed(input) !== '') weights[found.blocks[input.dataset.at].name] = typed(input);
  trigger('weigh', {id: found.id, weights}); }
function cell(block, at){
  const label = document.createElement('label'), name = document.createElement('span'), input = document.createElement('input');
  name.textContent = '\u200e' + block.name; label.title = block.name; Object.assign(input, {type: 'number', step: '0.05', min: found.least, max: found.most}); input.dataset.at = at;
  input.setAttribute('aria-label', `weight of ${block.name}`); label.append(name, input, document.createElement('i'));
  input.addEventListener('input', () => { show(input); clearTimeout(later); if(!input.validity.badInput) later = setTimeout(tell, 60); });
  input.addEventListener('blur', () => { if(later || input.validity.badInput) tell(); });
  // The first step up or down from an empty box begins at the weight it has now, not at 0.
  input.addEventListener('keydown', event => { if(input.value === '' && !input.validity.badInput && ['ArrowUp', 'ArrowDown'].includes(event.key)) input.value = input.placeholder; });
  return label;
}
function take(){
  found = props.value ? JSON.parse(props.value) : null; none.hidden = !!found; box.hidden = !found;
  const now = found ? found.id + ' ' + found.blocks.map(block => block.name).join(' ') : '';
  if(now !== key){ key = now; box.replaceChildren(...(found ? found.blocks.map(cell) : [])); if(found) box.setAttribute('aria-label', `Weights of ${found.name} by block`); }
  if(!found) return;
  for(const input of box.querySelectorAll('input')){ const block = found.blocks[input.dataset.at]; input.placeholder = block.rest;
    if(input !== document.activeElement) input.value = block.weight; show(input); }
  if(found.focus && found.asked !== focused){ focused = found.asked; const wanted = [...box.querySelectorAll('input')].find(input => found.blocks[input.dataset.at].name === found.focus);
    setTimeout(() => { wanted?.focus(); wanted?.scrollIntoView({block: 'center'}); }, 60); }
}
watch('value', take); take();
"""


class BlockGrid(gr.HTML):
    """A box of numbers for every block of an adapter; an empty one takes the adapter's slider. Value: {id, name, least, most, blocks} as
    JSON, or ""; `weigh` tells what stands in all boxes, so that no change is lost between two answers."""

    def __init__(self, value="", **options):
        super().__init__(value, html_template=GRID, css_template=GRID_CSS, js_on_load=GRID_SCRIPT, **options)

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "string"}


class Layers(Seated):
    """A part of the Blend page; the mix is the page's own. The lines of patterns are the truth, the boxes show what they say of blocks."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Weights by block and layer", open=False, elem_id="layers-box") as self.box:
            self.which = gr.Dropdown(
                [],
                value=None,
                label="Adapter",
                info="An empty box takes the weight of its slider.",
                interactive=True,
                elem_id="layers-which",
            )
            self.grid = BlockGrid("", elem_classes="flush", elem_id="layers-grid")
            self.lines = gr.Textbox(
                "", label="By pattern", lines=2, max_lines=8, interactive=True, elem_id="layers-lines", placeholder="model.layers.0-3 = 0.2\nmlp = 0",
                info="One a line. A smaller part wins: mlp over model.layers.3.",
            )  # fmt: skip
            self.told = theme.sentences(elem_id="layers-sentences")
            self.reset = gr.Button("One weight for all layers", size="md", elem_id="layers-reset")
        self.shown = gr.State(None)

    def connect(self, mix: Mix) -> None:
        """Let the parts act on the mix of the page."""
        self.mix = mix
        given, own = [self.which, *mix.inputs], [self.which, self.grid, self.lines, self.told, self.shown]
        changed = [mix.by, mix.turn, *mix.sliders, self.grid, self.lines, self.told, self.shown]
        when(
            [mix.turn.change, self.which.input, *(slider.input for slider in mix.sliders)], self.follow, [self.shown, *given], own, **LIVE
        )
        # One after another and none left out: with `always_last` Gradio would ask again with the data of the first.
        self.grid.weigh(self.weigh, given, changed, trigger_mode="multiple", concurrency_limit=1, **QUIET)
        # Its `change` and not its `input`: Gradio tells no `input` of pasted text.
        self.lines.change(self.write, [self.lines, self.shown, *given], changed, **LIVE)
        self.reset.click(self.clear, given, changed, **QUIET)

    # ---- what is shown

    def follow(self, shown, which, *given) -> list:
        """The adapter, its boxes and its lines after the mix has changed; what is being typed is left alone."""
        held, known = given[1] or [], self.mix.known(given[1], *given[2:])
        which = which if which in held else next(iter(held), None)
        pick = gr.update(choices=[(self.mix.label(id), id) for id in held], value=which)
        if which is None:
            return [pick, "", "", [], None]
        patterns = _patterns(known[which])
        if shown == [which, patterns]:
            return [pick, self._grid(which, known[which]), gr.skip(), gr.skip(), gr.skip()]
        return [pick, self._grid(which, known[which]), _written(patterns), [], [which, patterns]]

    def open(self, block: str, which, *given) -> list:
        """Updates for the box, the adapter and the grid that lead to a block."""
        held, known = given[1] or [], self.mix.known(given[1], *given[2:])
        if which not in held:
            return [gr.skip()] * 3
        return [gr.update(open=True), which, self._grid(which, known[which], focus=block)]

    def _grid(self, id: str, weight, focus: str = "") -> str:
        patterns = _patterns(weight)
        whole = {"": weight.get("", 1.0) if isinstance(weight, dict) else weight, **patterns}
        blocks = []
        for block in weights.blocks(self._names(id)):
            rest = weights.of({pattern: one for pattern, one in whole.items() if pattern != block}, block)
            blocks.append({"name": block, "weight": _short(patterns[block]) if block in patterns else "", "rest": _short(rest)})
        asked = {"focus": focus, "asked": time.monotonic_ns()} if focus else {}
        return json.dumps({"id": id, "name": self.mix.label(id), "least": LEAST, "most": MOST, "blocks": blocks, **asked})

    def _names(self, id: str) -> tuple[str, ...]:
        return _layers_of(str(library.adapter_folder(self.workspace, id)))

    # ---- what is changed

    def weigh(self, event: gr.EventData, _, *given) -> list:
        """What stands in the boxes now, as weights of blocks."""
        return self.set_blocks(event.id, event.weights, *given)

    def set_blocks(self, id: str, typed: dict, *given) -> list:
        """The weights of an adapter's blocks are these, the others stay. One that is none is a sentence, and nothing changes."""
        try:
            held, known = given[1] or [], self.mix.known(given[1], *given[2:])
            if id not in held:
                return self._same([])
            blocks = weights.blocks(self._names(id))
            kept = {pattern: one for pattern, one in _patterns(known[id]).items() if pattern not in blocks or pattern in typed}
            return self._set(
                id,
                {
                    **kept,
                    **{
                        block: self.mix.number(f"{self.mix.label(id)} in {block}", _number(typed[block]))
                        for block in blocks
                        if block in typed
                    },
                },
                given,
            )
        except StudioError as error:
            return self._same([theme.said("error", str(error))])

    def write(self, text: str, shown, which, *given) -> list:
        """The lines that were typed, as weights by pattern. One that is none is a sentence, and nothing changes."""
        if which not in (given[1] or []) or not shown or shown[0] != which:  # else they are still another adapter's
            return self._same([])
        try:
            patterns, waiting = self.read(text or "", self.mix.label(which))
            weights.by_layer({"": 1.0, **patterns}, self._names(which), self.mix.label(which))
        except StudioError as error:
            return self._same([theme.said("error", str(error))])
        if waiting:
            return self._same([theme.said("note", str(BlendError("mix.line", line=waiting)))])
        return self._set(which, patterns, given, text=text)

    def read(self, text: str, name: str) -> tuple[dict[str, float], str]:
        """Lines as weights by pattern, and the first line that says none yet. Raises BlendError."""
        found, waiting = {}, ""
        for line in filter(None, map(str.strip, text.splitlines())):
            pattern, _, number = map(str.strip, line.rpartition("="))
            if not pattern or number in ("", "-"):
                waiting = waiting or line[:60]
                continue
            if pattern in found:
                raise BlendError("mix.twice", pattern=pattern[:60])
            found[pattern] = self.mix.number(f"{name} in {pattern[:60]}", _number(number))
        return found, waiting

    def clear(self, which, *given) -> list:
        """One weight for all layers of the adapter."""
        return self._set(which, {}, given) if which in (given[1] or []) else self._same([])

    def _set(self, id: str, patterns: dict, given, *, text: str | None = None) -> list:
        """Updates that give an adapter these weights by pattern; `text` are the lines that stand there already."""
        held, by = given[1], self.mix.by_of(*given[2:])
        known = self.mix.known(held, *given[2:])
        raw = known[id].get("", 1.0) if isinstance(known[id], dict) else known[id]
        lines = gr.skip() if text is not None else _written(patterns)
        if patterns == by.get(id, {}):
            return [gr.skip()] * (2 + len(self.mix.sliders)) + [self._grid(id, {"": raw, **patterns}), lines, [], [id, patterns]]
        by = {other: one for other, one in by.items() if other != id} | ({id: patterns} if patterns else {})
        place = held.index(id)
        sliders = [
            gr.update(label=self.mix.heading(id, patterns)) if number == place else gr.skip() for number in range(len(self.mix.sliders))
        ]
        return [by, time.monotonic_ns(), *sliders, self._grid(id, {"": raw, **patterns}), lines, [], [id, patterns]]

    def _same(self, told: list) -> list:
        """Updates that change nothing but what is said."""
        return [gr.skip()] * (4 + len(self.mix.sliders)) + [told, gr.skip()]


def _patterns(weight) -> dict[str, float]:
    return {pattern: one for pattern, one in weight.items() if pattern} if isinstance(weight, dict) else {}


def _number(text):
    """A number that was typed; what is none as it came, to be refused by name."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return str(text)


def _short(number) -> str:
    """A number as it was typed, so that it is read back as the same one."""
    return repr(float(number)).removesuffix(".0") if weights.is_number(number) else ""


def _written(patterns: dict[str, float]) -> str:
    return "\n".join(f"{pattern} = {_short(one)}" for pattern, one in patterns.items())


@lru_cache(maxsize=64)
def _layers_of(folder: str) -> tuple[str, ...]:
    """The layers that an adapter of the library changes; what lies under an id never changes."""
    return tuple(shelf.inspect(folder).layers)
