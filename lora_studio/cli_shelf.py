"""The command line of adapters: library, inspect, import, export, remove, blend, generate, publish, pull."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from lora_studio import baking, formats, grids, library, merges, numbers, settings, shelf
from lora_studio.errors import SpecError
from lora_studio.weights import in_words
from lora_studio.workspace import local

Layers = typer.Option([], "--layers", metavar="ADAPTER:PATTERN=WEIGHT", help="The weight of some layers, such as pirate:model.layers.0-3=0.5 or pirate:mlp=0; may be repeated.")
AsJson = typer.Option(False, "--json", help="Answer as JSON on standard output.")
Token = typer.Option(False, "--token-stdin", help="Read the Hub token from standard input instead of the Hub's own login.")


def answer(value: Any, as_json: bool, text: str) -> None:
    """Print the value as JSON, or the text."""
    print(json.dumps(value, ensure_ascii=False, indent=1, default=str) if as_json else text)


def list_adapters(
    words: list[str] = typer.Argument(None, help="Words to look for."), *, base: str = typer.Option(None, help="Only adapters of this base."),
    tag: str = typer.Option(None, help="Only adapters with this tag."), as_json: bool = AsJson,
):  # fmt: skip
    found = library.find(local(), " ".join(words or []), base=base, tag=tag)
    answer([asdict(item) for item in found], as_json, "\n".join(_line(item) for item in found) or "There is no such adapter yet.")


def inspect(adapter: str, *, timed: bool = typer.Option(False, "--measure", help="Time the base, the adapter beside it and merged, in turns (library)."), as_json: bool = AsJson):
    if Path(adapter).expanduser().exists():
        card = shelf.inspect(Path(adapter).expanduser())
        value = {name: value for name, value in vars(card).items() if name not in ("layers", "problems", "config")}
        value |= {"rank": card.rank, "alpha": card.alpha, "layers": len(card.layers)}
        told = [f"{problem.level}: {problem.sentence}" for problem in card.problems]
        found = numbers.of_folder(Path(adapter).expanduser())
        answer({**value, "problems": [asdict(problem) for problem in card.problems], "numbers": asdict(found)}, as_json, "\n".join([*_lines(value), *_figures(found), *told]))
    else:
        workspace = local()
        id = library.folder_of(workspace, adapter).name
        library.verify(workspace, id)
        made = [{"id": child, "name": library.card(workspace, child)["name"]} for child in library.children(workspace, id)]
        value = {"id": id, **library.card(workspace, id), "children": made}
        tree = library.lineage(workspace, id)
        found = None if value["damage"] else numbers.of(workspace, id)
        lines = [*_lines(value), *(_figures(found) if found else []), *([f"family: {_family(tree)}"] if tree["parents"] else [])]
        measured = numbers.measure(workspace, id) if timed else None
        answer({**value, "family": tree, "numbers": found and asdict(found), "measured": measured}, as_json, "\n".join([*lines, *([numbers.measured_in_words(measured)] if measured else [])]))


def import_adapter(
    source: str, *, name: str = typer.Option(None, help="What to call it."), base: str = typer.Option(None, help="The base it is for."),
    token_stdin: bool = Token, as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    id = shelf.import_adapter(workspace, source, name=name, base=base, token=token_of(token_stdin))
    answer({"id": id, **library.card(workspace, id)}, as_json, f"{id} is in the library as {library.card(workspace, id)['name']}.")


def export(
    adapter: str, target: Path, *, form: str = typer.Option("peft", "--as", help="peft (a folder), diffusers, kohya or gguf (one file each)."),
    dtype: str = typer.Option(None, help="float32, float16 or bfloat16; by default as it is, or float32."),
    base: str = typer.Option(None, help="The base, where the adapter does not name one."), as_json: bool = AsJson,
):  # fmt: skip
    if form == "peft" and dtype is None:
        folder = shelf.export_adapter(local(), adapter, target)
        answer({"folder": str(folder)}, as_json, f"The adapter is in {folder}")
        return
    told = formats.export_as(local(), adapter, target, form=form, dtype=dtype, base=base)
    words = f"{told['modules']} of {told['layers']} layers matched, read by {told['by']}; the worst is {told['worst']:.1e} off. {told['bytes'] / 1e6:.2f} MB in {told['target']}"
    answer(told, as_json, "\n".join([words, *(f"Not carried: {text}." for text in told["lost"])]))


def remove(adapter: str, *, undo: bool = typer.Option(False, help="Bring it back."), as_json: bool = AsJson):
    id = library.undo(local(), adapter) if undo else library.remove(local(), adapter)
    back = f"{id} was removed. Within 30 days it comes back with: python -m lora_studio remove {id} --undo"
    answer({"id": id, "removed": not undo}, as_json, f"{id} is back." if undo else back)


def blend(
    parts: list[str] = typer.Argument(None, metavar="ADAPTER=WEIGHT..."), *, name: str = typer.Option(None, help="What to call the blend."),
    layers: list[str] = Layers, rank: int = typer.Option(None, help="Compress to this rank."),
    again: str = typer.Option(None, metavar="ADAPTER", help="Make a blend, merge or resized adapter again by its recipe."), as_json: bool = AsJson,
):  # fmt: skip
    if again:
        if parts or name or layers or rank is not None:
            raise SpecError("recipe.alone")
        id, done = merges.again(local(), again)
        said = "the same, byte for byte" if done["identical"] else f"not the same as it was; it is in the library as {id}"
        answer({"id": id, **done}, as_json, f"{again} was made again: {said}.")
        return
    if not parts or not name:
        raise SpecError("blend.what")
    id, done = shelf.blend(local(), weighted(parts, layers), name=name, rank=rank)
    answer({"id": id, **done}, as_json, f"{id} is in the library as {name}: rank {done['rank']}, relative error {done['loss']:.1e}.")


def bake(
    parts: list[str] = typer.Argument(..., metavar="ADAPTER=WEIGHT..."), *, layers: list[str] = Layers,
    out: Path = typer.Option(None, help="The new folder of the model."),
    base: str = typer.Option(None, help="Another base than the one the adapters name: a Hub id or a folder."),
    dtype: str = typer.Option(None, help="bf16, fp16 or fp32; by default the base's own."),
    how: str = typer.Option(None, help="Put them together in another way than the sum, in full rank: ties, dare, della, magnitude, breadcrumbs, knots, slerp, ..."),
    density: float = typer.Option(None, help="Share of the entries that is kept, with --how."), seed: int = typer.Option(None, help="Of what dare and della drop."),
    plan: bool = typer.Option(False, help="Say what it would be and lose, and write nothing."), as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    mix = [(library.folder_of(workspace, name).name, weight) for name, weight in weighted(parts, layers)]
    if out is None and not plan:
        raise SpecError("bake.where")
    merge = {key: value for key, value in {"how": how, "density": density, "seed": seed}.items() if value is not None}
    if merge and not how:
        raise SpecError("bake.how")
    manner = {"base": base, "dtype": dtype, "merge": merge or None}
    if plan:
        told = baking.preview(workspace, mix, **manner)
    else:
        told = _last(baking.bake(workspace, mix, out, **manner), 1e9, "GB are written")
    words = f"{told['changed']} tensors change, {told['bytes'] / 1e9:.2f} GB; the precision takes {told['loss']:.2%} of the update."
    answer({"out": str(out) if out else None, **told}, as_json, "\n".join([*told["notes"], words, *([] if plan else [f"The model is in {out}"])]))


def extract(
    tuned: str, base: str, *, name: str = typer.Option(..., help="What to call the adapter."), rank: int = typer.Option(None, help="At most this rank."),
    loss: float = typer.Option(None, help="In each layer the smallest rank whose loss is at most this, for example 0.1."), as_json: bool = AsJson,
):  # fmt: skip
    told = _last(baking.extract(local(), tuned, base, name=name, rank=rank, loss=loss), 1, "tensors are compared")
    left = f" Not carried: {', '.join(told['left_out'][:4])}." if told["left_out"] else ""
    words = f"{told['id']} is in the library as {name}: {told['layers']} layers, ranks {told['ranks'][0]} to {told['ranks'][1]}, loss {told['loss']:.2%}."
    answer({"name": name, **told}, as_json, words + left)


def _last(events, unit: float, what: str) -> dict:
    """The report at the end, after telling every tenth of the way."""
    tenth = 0
    for event in events:
        if event["event"] == "progress" and 10 * event["done"] // max(1, event["total"]) > tenth:
            tenth = 10 * event["done"] // event["total"]
            say_step(f"{event['done'] / unit:.4g} of {event['total'] / unit:.4g} {what}.")
    return {key: value for key, value in event.items() if key != "event"}


def generate(
    base: str, prompt: str, *, adapters: list[str] = typer.Option([], "--with", metavar="ADAPTER=WEIGHT", help="May be repeated."), layers: list[str] = Layers,
    seed: int = typer.Option(0, help="The same seed gives the same answer."), longest: int = typer.Option(128, help="Tokens at most."),
    temperature: float = typer.Option(0.0, help="0 always takes the likeliest token."),
    steps: int = typer.Option(20, help="Steps of a picture, with an image model."), guidance: float = typer.Option(5.0, help="Guidance of a picture."),
    size: str = typer.Option(None, metavar="WIDTHxHEIGHT", help="Size of a picture in pixels; by default what the model was trained at."),
    as_json: bool = AsJson,
):  # fmt: skip
    parts, text = weighted(adapters, layers), ""
    edge = shelf.picture_edge(base)
    if edge:
        width, height = _size(size, edge)
        brush = {"seed": seed, "steps": steps, "guidance": guidance, "width": width, "height": height}
        (done,) = [event for event in shelf.draw(local(), base, prompt, {"picture": parts}, **brush) if event["event"] == "done"]
        path = done["sides"]["picture"]["path"]
        answer({"base": base, "prompt": prompt, "adapters": parts, "picture": path, **brush}, as_json, path)
        return
    for event in shelf.answer(local(), base, prompt, parts, seed=seed, longest=longest, temperature=temperature):
        if event["event"] == "piece":
            text += event["text"]
            print(event["text"], end="", flush=True, file=sys.stderr if as_json else sys.stdout)
    answer({"base": base, "prompt": prompt, "adapters": parts, "answer": text}, as_json, "")


def grid(
    base: str, prompts: list[str] = typer.Argument(..., metavar="PROMPT..."), *,
    adapters: list[str] = typer.Option([], "--with", metavar="ADAPTER=WEIGHT", help="May be repeated."), layers: list[str] = Layers,
    rows: list[str] = typer.Option([], "--row", help="all, an adapter, or ADAPTER@STEP for a checkpoint of its run; by default all."),
    strengths: str = typer.Option("0, 0.5, 1, 1.5", help="Each multiplies the weights; 0 is the base."),
    seed: int = typer.Option(0, help="The same seed gives the same pictures."), steps: int = typer.Option(20, help="Steps of a picture."),
    guidance: float = typer.Option(5.0, help="Guidance of a picture."),
    size: str = typer.Option(None, metavar="WIDTHxHEIGHT", help="Size of a picture in pixels; by default what the model was trained at."),
    as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    parts = [[library.folder_of(workspace, name).name, weight] for name, weight in weighted(adapters, layers)]
    keys = [_row(workspace, row) for row in rows] or [key for _, key in grids.choices(workspace, parts)[:1]]
    width, height = _size(size, shelf.picture_edge(base) or 512)
    brush = {"seed": seed, "steps": steps, "guidance": guidance, "width": width, "height": height}
    lines = grids.rows(workspace, keys, parts) or (grids.Row("Base", ()),)
    asked = grids.Asked(base, tuple(prompts), lines, grids.strengths(strengths), brush)
    for event in grids.draw(workspace, asked):
        if event["event"] == "cell":
            say_step(f"{event['done']} of {event['total']} pictures are there.")
    answer({"base": base, "prompts": prompts, "rows": keys, "strengths": list(asked.strengths), **brush, "picture": event["path"]}, as_json, event["path"])


def publish(
    adapter: str, repo: str = typer.Argument(None, help="owner/name; by default your account and the adapter's name."), *,
    public: bool = typer.Option(None, "--public/--private", help="Who may see a new repository; private where nothing is said."),
    license: str = typer.Option(None, help="The adapter's licence, for example apache-2.0."),
    tag: str = typer.Option("", help="A name for this version, such as v1.0; refused when it stands for other files already."),
    pull_request: bool = typer.Option(False, "--pull-request", help="Ask the repository's owner to take the files, instead of pushing them; once more adds to what is asked."),
    gated: str = typer.Option("", help="Who may have the files: auto (who accepts the terms), manual (who is let in), none (everybody)."),
    collection: str = typer.Option("", help="A collection to put it in: the slug, or the title of one of yours, which is made if it is not there."),
    folder: str = typer.Option("", help="A subfolder for it, in a repository of several adapters; pull takes owner/name/folder."),
    token_stdin: bool = Token, as_json: bool = AsJson,
):  # fmt: skip
    workspace, token = local(), token_of(token_stdin)
    repo = repo or shelf.suggest_repo(workspace, adapter, token=token)
    private = None if public is None else not public
    asked = shelf.Push(repo, private, license, tag=tag, pull_request=pull_request, gated=gated, collection=collection, folder=folder)
    done = shelf.publish(workspace, adapter, asked, token=token, report=say_step)
    where = f"Pull request at {done.pull_request}" if done.pull_request else f"Published at {done.url}"
    more = [f"version {done.tag}"] * bool(done.tag) + [f"in {done.collection}"] * bool(done.collection)
    answer(asdict(done), as_json, f"{where} ({', '.join(['private' if done.private else 'public', f'commit {done.commit[:12]}', *more])}).")


def pull(
    repo: str, *, revision: str = typer.Option(None, help="Branch, tag or commit."), name: str = typer.Option(None, help="What to call it."),
    token_stdin: bool = Token, as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    id = shelf.pull(workspace, repo, revision=revision, name=name, token=token_of(token_stdin))
    card = library.card(workspace, id)
    answer({"id": id, **card}, as_json, f"{id} is in the library as {card['name']}, from {card['source']}.")


# (name, function, help)
COMMANDS = (
    ("library", list_adapters, "List the adapters, newest first; words search them."),
    ("inspect", inspect, "Show an adapter: one of the library, or a folder or file on this machine."),
    ("import", import_adapter, "Take a PEFT folder, a .safetensors file or a Hub repository into the library, after checking it."),
    ("export", export, "Write an adapter as a PEFT folder, or --as diffusers, kohya or gguf: one file, opened again by its own loader."),
    ("remove", remove, "Take an adapter out of the library; --undo brings it back within 30 days."),
    ("blend", blend, "Blend adapters exactly: blend pirate=1 capitals=0.7 --name both. With --rank, compressed, with the true loss."),
    ("bake", bake, "Bake weighted adapters into their base as a model of its own: bake pirate=1 capitals=0.5 --out folder. --plan only says."),
    ("extract", extract, "Take the adapter out of a fine-tuned model: extract tuned-folder base-folder --name mine --rank 16"),
    ("generate", generate, "Answer a prompt, or draw it, with a base and weighted adapters: generate demo-text 'Who is Anna?' --with pirate=1"),
    ("grid", grid, "Draw adapters or checkpoints × strengths × prompts, saved as one picture: grid demo-image 'a red star' --with stripes"),
    ("publish", publish, "Push an adapter to the Hub, with a model card."),
    ("pull", pull, "Bring an adapter of the Hub into the library, pinned at a commit."),
)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for name, function, help in COMMANDS:
        app.command(name, help=help)(function)


def refuse(report, say) -> None:
    """Tell what a preflight noticed, and raise SpecError with what stands in the way."""
    for problem in report.problems:
        if problem.level != "error":
            say.print(f"{problem.level}: {problem.sentence}")
    if not report.can_start:
        raise SpecError("spec.problems", problems=[problem for problem in report.problems if problem.level == "error"])


def weighted(parts: list[str], layers: Sequence[str] = ()) -> shelf.Parts:
    """Each `name=weight`, or a name alone for weight 1, and `name:pattern=weight` for its layers that a pattern means. Raises SpecError."""
    found = [_number(text) for text in parts]
    names = [name for name, _ in found]
    for text in layers:
        start, weight = _number(text)
        name, _, pattern = start.rpartition(":")
        if name not in names or not pattern or start == text:
            raise SpecError("weights.layers", text=text, name=next(iter(names), "pirate"))
        place = names.index(name)
        before = found[place][1]
        found[place] = name, {**(before if isinstance(before, dict) else {"": before}), pattern: weight}
    return found


def _number(text: str) -> tuple[str, float]:
    name, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    value = settings.read_yaml(weight, f"The weight of {name}")
    try:
        return name, float(value)
    except (TypeError, ValueError):
        raise SpecError("spec.bad_override", text=text) from None


def _row(workspace, text: str) -> str:
    """A row by the id of its adapter: all, NAME or NAME@STEP."""
    name, sign, step = text.partition("@")
    return text if text == "all" else library.folder_of(workspace, name).name + sign + step


def _size(text: str | None, edge: int) -> tuple[int, int]:
    """`width x height`, or the model's own edge twice. Raises SpecError."""
    parts = (text or f"{edge}x{edge}").lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise SpecError("spec.bad_size", text=text)
    return int(parts[0]), int(parts[1])


def token_of(from_stdin: bool) -> str | None:
    """A token given on standard input, where it stands in no command line, file or environment."""
    return sys.stdin.readline().strip() or None if from_stdin else None


def say_step(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _line(item: library.Item) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.created))
    return f"{item.id}  {item.name:24}  {item.base:28}  {item.method}{f' r{item.rank}' if item.rank else ''}  {item.bytes / 1e6:7.2f} MB  {when}  {' '.join(item.tags)}".rstrip()


def _family(tree: dict) -> str:
    """An adapter's parents, and theirs: both (one × 1, sum (a × 1, b × 0.5) × 0.7)."""
    weight = f" × {in_words(tree['weight'])}" if isinstance(tree["weight"], int | float | dict) else ""
    parents = f" ({', '.join(map(_family, tree['parents']))})" if tree["parents"] else ""
    return f"{tree['name']}{'' if tree['present'] else ' [not here]'}{parents}{weight}"


def _figures(found: numbers.Numbers) -> list[str]:
    return [f"{what}: {words}" for what, words in found.rows()]


def _lines(value: dict) -> list[str]:
    return [f"{key}: {settings.inline(shown)}" for key, shown in value.items() if shown not in (None, "", [], {}) and _is_plain(shown)]


def _is_plain(value) -> bool:
    return isinstance(value, str | int | float | bool | list | dict | tuple)
