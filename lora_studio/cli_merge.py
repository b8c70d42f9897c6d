"""The command line of resizing and merging adapters."""

import re

import typer

from lora_studio import library, merges
from lora_studio.cli_shelf import AsJson, Layers, answer, weighted
from lora_studio.errors import BlendError
from lora_studio.workspace import local

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def resize(
    adapter: str, *, name: str = typer.Option(..., help="What to call the new adapter."), rank: int = typer.Option(None, help="At most this rank in every layer."),
    loss: float = typer.Option(None, help="At most this relative loss of the whole, for example 0.05, with few parameters."),
    per_layer: bool = typer.Option(False, "--per-layer", help="Of each layer the smallest rank within --loss."),
    size: str = typer.Option(None, help="At most this size of the file, for example 5MB."),
    slice: bool = typer.Option(False, "--slice", help="With --rank: cut the first rows and columns out, of an adapter trained by dylora."), as_json: bool = AsJson,
):  # fmt: skip
    id, done = merges.resize(local(), adapter, name=name, rank=rank, loss=loss, per_layer=per_layer, size=_bytes(size) if size else None, slice=slice)
    low, high = done["ranks"]
    words = f"{id} is in the library as {name}: rank {low if low == high else f'{low} to {high}'}, relative error {done['loss']:.2e}, {done['bytes'] / 1e6:.2f} MB."
    more = []
    if done["clamped"]:
        more.append(f"{done['clamped']} layers have a lower rank than {rank}, because they had no more.")
    if done["left_out"]:
        more.append(f"Left out, because they bring too little: {', '.join(done['left_out'][:4])}{' and others' if len(done['left_out']) > 4 else ''}.")
    answer({"id": id, "name": name, **done}, as_json, "\n".join([words, *more]))


def merge(
    parts: list[str] = typer.Argument(..., metavar="ADAPTER=WEIGHT..."), *, name: str = typer.Option(..., help="What to call the merge."),
    how: str = typer.Option(..., help="slerp, subtract, orthogonal, knots; or ties, dare, della, magnitude, breadcrumbs, which need --rank."),
    rank: int = typer.Option(None, help="Approximate or compress to this rank."), density: float = typer.Option(None, help="Share of the entries that is kept; 0.5 where nothing is said."),
    seed: int = typer.Option(None, help="Of what dare and della drop; 0 where nothing is said."), gamma: float = typer.Option(None, help="Share of the largest entries that breadcrumbs drops."),
    epsilon: float = typer.Option(None, help="How far the chances of della spread."), space: str = typer.Option(None, help="What orthogonal takes out: direction or subspace."),
    layers: list[str] = Layers, as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    mix = [(library.folder_of(workspace, text).name, weight) for text, weight in weighted(parts, layers)]
    id, done = merges.merge(workspace, mix, how, name=name, rank=rank, density=density, seed=seed, gamma=gamma, epsilon=epsilon, space=space)
    words = f"{id} is in the library as {name}: rank {done['rank']}, relative error {done['loss']:.2e} against the merge itself."
    answer({"id": id, "name": name, **done}, as_json, words)


def _bytes(text: str) -> int:
    """A size such as 5MB in bytes. Raises BlendError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B|)\s*", text, re.I)
    if not match:
        raise BlendError("resize.size", size=text)
    return int(float(match[1]) * UNITS[match[2].upper()])


# (name, function, help)
COMMANDS = (
    ("resize", resize, "Cut an adapter down: resize pirate --name small --rank 8, or --loss 0.05, or --size 5MB. The true loss is told."),
    ("merge", merge, "Put adapters together in another way than the sum: merge A=1 B=0.7 --how ties --rank 16 --name both"),
)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for name, function, help in COMMANDS:
        app.command(name, help=help)(function)
