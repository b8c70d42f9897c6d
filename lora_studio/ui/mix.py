"""The mix: which adapters are picked, and the weight of each, as one number or by block. A part of the Blend page and of the Playground."""

import math
import time

import gradio as gr

from lora_studio import library
from lora_studio.errors import AdapterError, BlendError
from lora_studio.ui import forms, theme
from lora_studio.ui.events import LIVE
from lora_studio.ui.seat import Seated
from lora_studio.weights import Weight as Weighed
from lora_studio.workspace import Workspace

POOL = 8
LEAST, MOST, STEP = -2.0, 2.0, 0.01
NEWEST = 300
BY_BLOCK = " · by block"  # of a slider whose adapter has further weights

Parts = list[list]


class Mix(Seated):
    """A picker of adapters and a fixed pool of weights, of which those in use are shown. Everything inside keeps the weights of what
    stays when the pick changes; `turn` changes whenever the pick, all weights or those by block were set, `sliders` tell of a single weight.
    `by` holds {id: {pattern: weight}} of those that have weights by block or pattern beside their slider's."""

    def __init__(self, workspace: Workspace, name: str = "mix"):
        self.workspace, self.name = workspace, name

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Column(elem_id=self.name):
            self.pick = gr.Dropdown(
                self.choices(), value=[], multiselect=True, allow_custom_value=True, label="Adapters", interactive=True,
                info="Pick some of the newest, or type a name or an id and press Enter.",
            )  # fmt: skip
            self.sliders = [
                forms.Slider(LEAST, MOST, value=1.0, step=STEP, label=f"Weight {number + 1}", visible=False, interactive=True, buttons=[], elem_id=f"{self.name}-weight-{number}")
                for number in range(POOL)
            ]
            self.told = theme.sentences(elem_id=f"{self.name}-told", visible=False)
        self.held, self.turn, self.by = gr.State([]), gr.State(0), gr.State({})
        # Its `change` and not its `input`: Gradio tells no `input` of a typed name.
        self.pick.change(self.choose, self.inputs, self.opened, **LIVE)

    @property
    def inputs(self) -> list:
        """What says which adapters are mixed, and how."""
        return [self.pick, self.held, *self.sliders, self.by]

    @property
    def opened(self) -> list:
        """What showing another mix fills."""
        return [self.pick, self.held, self.turn, *self.sliders, self.by, self.told]

    def parts(self, pick, held, *given) -> Parts:
        """The mix as [[id, weight], ...] from the values of `inputs`. Raises StudioError."""
        known = self.known(held, *given)
        found = list(dict.fromkeys(library.folder_of(self.workspace, text).name for text in pick or []))
        if len(found) > POOL:
            raise BlendError("mix.many", count=len(found), most=POOL)
        return [[id, self._weight(id, known.get(id, 1.0))] for id in found]

    def known(self, held, *given) -> dict:
        """The weight of each adapter that has a slider, as it was given: what was typed there, or {"": that, pattern: weight, ...}."""
        by = self.by_of(*given)
        return {id: {"": value, **by[id]} if by.get(id) else value for id, value in zip(held or [], given[:POOL])}

    @staticmethod
    def by_of(*given) -> dict[str, dict[str, float]]:
        """The weights by pattern among the values of `inputs` that come after those of `held`."""
        return (given[POOL] if len(given) > POOL else None) or {}

    def _weight(self, id: str, given) -> Weighed:
        if not isinstance(given, dict):
            return self.number(self.label(id), given)
        return {
            pattern: self.number(f"{self.label(id)} in {pattern}" if pattern else self.label(id), value) for pattern, value in given.items()
        }

    @staticmethod
    def number(name: str, given) -> float:
        """A single weight that a person gave. Raises BlendError that says whose."""
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or not LEAST <= given <= MOST:
            shown = "empty" if given is None else repr(given)[:40]
            raise BlendError("mix.weight", name=name, weight=shown, least=LEAST, most=MOST)
        return float(given)

    def open(self, parts: Parts) -> list:
        """Updates that show other parts. An adapter that is gone is named in a sentence."""
        weights = dict(parts)
        return self._updates(list(weights), None, weights)

    def choose(self, pick, held, *given) -> list:
        """Updates after the pick has changed: those that stay keep their weights, new ones get 1."""
        return self._updates(pick or [], dict(enumerate(held or [])), self.known(held, *given))

    def _updates(self, wanted: list[str], places: dict[int, str] | None, weights: dict) -> list:
        """`places` says which adapter each slider has now, so that it is left alone where that stays; None sets everything anew."""
        shown, told = [], []
        for text in dict.fromkeys(wanted):
            try:
                id = library.folder_of(self.workspace, text).name
                shown += [id] if id not in shown else []
            except AdapterError as error:
                told.append(theme.said("error", str(error)))
                shown.append(text)
        found = [id for id in shown if self._is_there(id)]
        if len(found) > POOL:
            told.append(theme.said("error", str(BlendError("mix.many", count=len(found), most=POOL))))
        held, by = found[:POOL], {}
        sliders = []
        for number in range(POOL):
            id = held[number] if number < len(held) else None
            weight, patterns = parted(weights.get(id, 1.0))
            by |= {id: patterns} if patterns else {}
            if id is None:
                sliders.append(gr.update(visible=False))
            elif places and places.get(number) == id:
                sliders.append(gr.skip())  # a weight that is being dragged is left alone
            else:
                sliders.append(gr.update(visible=True, label=self.heading(id, patterns), value=weight))
        # The value only where a typed name became an id: what the person picks meanwhile is not taken back.
        value = {"value": shown} if shown != wanted or places is None else {}
        return [gr.update(choices=self.choices(shown), **value), held, time.monotonic_ns(), *sliders, by, gr.update(value=told, visible=bool(told))]

    def _is_there(self, id: str) -> bool:
        try:
            return library.folder_of(self.workspace, id).name == id
        except AdapterError:
            return False

    def fresh(self, pick):
        """The picker with what has come into the library since."""
        return gr.update(choices=self.choices(pick or []))

    def choices(self, also=()) -> list[tuple[str, str]]:
        """The newest adapters as (label, id), and those of `also`."""
        found = {item.id: _described(item.name, item.base, item.rank, item.method) for item in library.find(self.workspace, limit=NEWEST)}
        for id in also:
            if id not in found and self._is_there(id):
                card = library.card(self.workspace, id)
                found[id] = _described(card["name"], card["base"], card["rank"], card["method"])
        return [(label, id) for id, label in found.items()]

    def label(self, id: str) -> str:
        """The name of an adapter."""
        return library.card(self.workspace, id)["name"]

    def heading(self, id: str, patterns: dict) -> str:
        """What stands over an adapter's slider."""
        return self.label(id) + (BY_BLOCK if patterns else "")


def parted(weight: Weighed) -> tuple[float, dict[str, float]]:
    """A weight as that of the layers that no pattern means, and those by pattern."""
    if not isinstance(weight, dict):
        return weight, {}
    return weight.get("", 1.0), {pattern: value for pattern, value in weight.items() if pattern}


def _described(name: str, base: str, rank: int | None, method: str) -> str:
    """An adapter in a list: a base that is a folder of this machine by the folder's name, and its rank, or the method that has none."""
    return f"{name} · {base.rstrip('/').rsplit('/', 1)[-1] if base.startswith(('/', '~')) else base} · {f'r{rank}' if rank else method}"


def tab_of(component) -> gr.Tab:
    """The tab that a component was laid out in."""
    while not isinstance(component, gr.Tab):
        component = component.parent
    return component


def whole(given):
    """A number without a fraction as a whole one; the bench judges the rest."""
    return int(given) if isinstance(given, float) and given.is_integer() else given
