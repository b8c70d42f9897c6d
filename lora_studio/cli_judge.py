"""The command line of what comes before merging: judging adapters, and searching their weights."""

import typer

from lora_studio import judging, library, search, studio
from lora_studio.cli_shelf import AsJson, Layers, answer, weighted
from lora_studio.errors import RunError, SpecError
from lora_studio.workspace import local

SHOWN = 12


def judge(
    parts: list[str] = typer.Argument(..., metavar="ADAPTER[=WEIGHT]..."), *, layers: list[str] = Layers,
    each_layer: bool = typer.Option(False, "--each-layer", help="Show every layer, not only blocks."), as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    mix = [(library.folder_of(workspace, name).name, weight) for name, weight in weighted(parts, layers)]
    told = judging.judge(workspace, mix)
    answer(told, as_json, "\n".join([*_adapters(told), *_pairs(told), *_map(told, each_layer), "", *told["advice"]]))


def _adapters(told: dict) -> list[str]:
    width = max(len(one["name"]) for one in told["adapters"])
    rows = [
        f"{one['name']:{width}}  {one['norm']:9.4g}  {one['stable_rank']:11.1f}  {one['effective_rank']:14.1f}  {one['layers']:6}"
        for one in told["adapters"]
    ]
    return [f"{'':{width}}  {'norm':>9}  {'stable rank':>11}  {'effective rank':>14}  layers", *rows, ""]


def _pairs(told: dict) -> list[str]:
    found = []
    for pair in told["pairs"]:
        names = " and ".join(told["adapters"][pair[side]]["name"] for side in ("left", "right"))
        if not pair["shared"]:
            found.append(f"{names}: they meet in no layer.")
            continue
        found.append(
            f"{names}: cosine {pair['cosine']:+.3f}; common directions {pair['overlap_out']:.0%} of what is written, {pair['overlap_in']:.0%} of what is read; "
            f"signs disagree in {pair['conflict']:.0%} by weight"
        )
    if told["pairs"] and told["sampled"]["layers"]:
        found.append(f"(Signs of {told['sampled']['layers']} large layers are from a sample of their rows.)")
    return found


def _map(told: dict, layers: bool) -> list[str]:
    """The cosine and the sign conflict of each pair, block by block or layer by layer."""
    if not told["pairs"]:
        return []
    names, table = (told["layers"], told["by_layer"]) if layers else (told["blocks"], told["by_block"])
    width = max(map(len, names))
    heads = [f"{pair['left'] + 1}×{pair['right'] + 1}" for pair in told["pairs"]]
    rows = [f"{'':{width}}  " + "  ".join(f"{head + ' cosine':>{SHOWN}}  {head + ' signs':>{SHOWN}}" for head in heads)]
    for name, cosines, conflicts in zip(names, table["cosine"], table["conflict"]):
        cells = [
            f"{'-' if cosine is None else f'{cosine:+.3f}':>{SHOWN}}  {'-' if conflict is None else f'{conflict:.0%}':>{SHOWN}}"
            for cosine, conflict in zip(cosines, conflicts)
        ]
        rows.append(f"{name:{width}}  " + "  ".join(cells))
    return ["", *rows]


def search_weights(
    adapters: list[str] = typer.Argument(None, metavar="ADAPTER..."), *,
    rows: list[str] = typer.Option([], "--rows", metavar="SOURCE", help="Rows no adapter was trained on, prompts with answers, or pictures with captions. May be repeated."),
    budget: int = typer.Option(40, help="How many weights are tried at most."), low: float = typer.Option(0.0, help="The lowest weight."),
    high: float = typer.Option(1.5, help="The highest weight."), seed: int = typer.Option(0, help="What is tried comes from this number."),
    cap: int = typer.Option(search.ROWS, help="At most this many rows of each source."), batch_size: int = typer.Option(8, help="Rows that go through the model at once."),
    base: str = typer.Option(None, help="Another base than the adapters' own."), task: str = typer.Option(None, help="chat, prompt_completion, text or image; by default chat, or image."),
    resolution: int = typer.Option(None, help="The edge of pictures in pixels."), device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, mps."),
    detach: bool = typer.Option(False, "--detach", help="Return at once."), shown: str = typer.Option(None, "--result", metavar="RUN", help="Show what a search has found so far."),
    as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    if shown:
        told = search.result(workspace, shown)
        answer(told, as_json, _found(told))
        return
    if not adapters or not rows:
        raise SpecError("search.what")
    kind = {"kind": task} if task else {"kind": "image"} if resolution else {}
    settings = {**kind, **({"resolution": resolution} if resolution else {})} or None
    id = search.start(
        workspace,
        adapters,
        rows,
        base=base,
        cap=cap,
        task=settings,
        evaluations=budget,
        low=low,
        high=high,
        seed=seed,
        batch_size=batch_size,
        device=device,
    )
    status = studio.show(workspace, id) if detach else studio.wait_until_ended(workspace, id, seconds=30 * 24 * 3600)
    if status.state == "failed":
        raise RunError("run.failed", id=id, reason=status.reason)
    told = search.result(workspace, id)
    answer(
        told, as_json, f"{id} is {status.state}. See what it finds: python -m lora_studio search --result {id}" if detach else _found(told)
    )


def _found(told: dict) -> str:
    """The losses of the simple weights and of the best, how it came there, and the command that blends them."""
    names = [one["name"] for one in told["adapters"]]

    def line(what: str, one: dict) -> str:
        loss = "no number" if one["loss"] is None else f"{one['loss']:.4f}"
        return f"{what:14}  {loss:>9}  " + ", ".join(f"{name} {weight:g}" for name, weight in zip(names, one["weights"]))

    rows = [line(one["what"], one) for one in told["marks"]]
    if not told["parts"]:
        return "\n".join([f"{told['id']} is {told['state']} and has tried nothing yet."])
    best = {"weights": [weight for _, weight in told["parts"]], "loss": told["loss"]}
    steps = [(number, loss) for (number, loss), (_, before) in zip(told["curve"], [(0, None), *told["curve"]]) if loss != before]
    curve = "lowest loss by try: " + ", ".join(f"{number}: {loss:.4f}" for number, loss in steps[-8:])
    mix = " ".join(f"{id}={weight:g}" for id, weight in told["parts"] if weight)
    command = f"python -m lora_studio blend {mix} --name NAME" if mix else "The base alone is best on these rows."
    return "\n".join(
        [
            f"{told['id']} is {told['state']}: {len(told['tries'])} of {told['evaluations']} tries on {told['rows']} rows.",
            *rows,
            line("best", best),
            curve,
            command,
        ]
    )


# (name, function, help)
COMMANDS = (
    ("judge", judge, "Say how adapters stand to each other before they are merged: judge pirate capitals=0.7"),
    ("search", search_weights, "Search the weights that suit your own rows best: search pirate capitals --rows held-out.jsonl --budget 40"),
)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for name, function, help in COMMANDS:
        app.command(name, help=help)(function)
