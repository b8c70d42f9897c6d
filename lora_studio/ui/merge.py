"""The part of the Blend page that merges the mix in another way than the exact sum."""

import gradio as gr

from lora_studio import merges
from lora_studio.errors import AdapterError, BlendError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import busy
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

WAYS = [
    ("ties: the larger sign wins, needs a rank", "ties"), ("dare: drop at random, needs a rank", "dare"), ("della: drop small ones more often, needs a rank", "della"),
    ("magnitude: the largest entries, needs a rank", "magnitude"), ("breadcrumbs: neither largest nor smallest, needs a rank", "breadcrumbs"),
    ("knots: ties in a common basis", "knots"), ("slerp: along the arc between two", "slerp"), ("subtract: the first less the others", "subtract"),
    ("orthogonal: the first without what it shares with the second", "orthogonal"),
]  # fmt: skip

FULL = ("ties", "dare", "della", "magnitude", "breadcrumbs")  # their result has full rank


class Merge(Seated):
    """A part of the Blend page; the mix is the page's own."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Merge in another way than the sum", open=False, elem_id="merge-box"):
            with gr.Row():
                self.name = gr.Textbox("", label="Name of the merge", max_lines=1, max_length=80, interactive=True, elem_id="merge-name", min_width=150)
                self.how = gr.Dropdown(WAYS, value="ties", label="Way", interactive=True, elem_id="merge-how", min_width=150)
            with gr.Row():
                self.rank = gr.Textbox("", label="Rank", placeholder="as it is", max_lines=1, interactive=True, elem_id="merge-rank", min_width=80)
                self.density = gr.Textbox("", label="Density", placeholder="0.5", info="Share of entries kept.", max_lines=1, interactive=True, elem_id="merge-density", min_width=80)
                self.seed = gr.Textbox("", label="Seed", placeholder="0", max_lines=1, interactive=True, elem_id="merge-seed", min_width=80)
            self.start = gr.Button("Merge", size="md", elem_id="merge-start")
            self.told = theme.sentences(elem_id="merge-sentences")

    def connect(self, mix) -> None:
        """Let the button act on the mix of the page."""

        def begin(name, how, rank, density, seed, *given):
            return self.merge(mix, name, how, {"rank": (rank, int), **typed(density, seed)}, *given)

        self.start.click(begin, [self.name, self.how, self.rank, self.density, self.seed, *mix.inputs], self.told, concurrency_limit=None, **busy(self.told))

    def merge(self, mix, name: str, how: str, typed: dict, *given) -> list[dict]:
        """Merge, and say what came of it. Nothing is lost when it cannot be."""
        try:
            if not (name or "").strip():
                raise AdapterError("library.name", name="of the merge is empty and")
            id, done = merges.merge(self.workspace, mix.parts(*given), how, name=name.strip(), **{key: _number(key, *value) for key, value in typed.items()})
        except StudioError as error:
            return [theme.said("error", str(error))]
        words = f"{mix.label(id)} is in the library: rank {done['rank']}, {100 * done['loss']:.2g} % off the merge itself."
        return [theme.said("ok", words)]

    @property
    def asked(self) -> list:
        """What says the way; their values go to `way`."""
        return [self.how, self.density, self.seed]


def typed(density: str, seed: str) -> dict:
    """The settings that were typed, with their kinds."""
    return {"density": (density, float), "seed": (seed, int)}


def way(how: str, density: str, seed: str) -> dict:
    """The way and its settings, as baking takes them. Raises BlendError."""
    numbers = {key: _number(key, *value) for key, value in typed(density, seed).items()}
    return {"how": how, **{key: value for key, value in numbers.items() if value is not None}}


def in_full(how: str) -> str:
    """How baking a merge differs from saving it as an adapter, in a sentence."""
    if how in FULL:
        return f"Put together by {how} in full rank, with nothing cut. Saved as an adapter the same merge is cut to a rank, and loses what Merge tells."
    return f"Put together by {how}. Saved as an adapter without a rank it is the same, because {how} keeps to the adapters' own directions."


def _number(name: str, text: str, kind: type):
    """What was typed as a number; nothing is None. Raises BlendError."""
    text = (text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        raise BlendError("merge.number", name=name, text=text[:40]) from None
