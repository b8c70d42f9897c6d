"""The command line of adapters: library, inspect, import, export, remove, blend, generate, publish, pull."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from lora_studio import library, settings, shelf
from lora_studio.errors import SpecError
from lora_studio.workspace import local

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


def inspect(adapter: str, *, as_json: bool = AsJson):
    if Path(adapter).expanduser().exists():
        card = shelf.inspect(Path(adapter).expanduser())
        value = {name: value for name, value in vars(card).items() if name not in ("layers", "problems", "config")}
        value |= {"rank": card.rank, "alpha": card.alpha, "layers": len(card.layers)}
        told = [f"{problem.level}: {problem.sentence}" for problem in card.problems]
        answer({**value, "problems": [asdict(problem) for problem in card.problems]}, as_json, "\n".join([*_lines(value), *told]))
    else:
        workspace = local()
        id = library.folder_of(workspace, adapter).name
        library.verify(workspace, id)
        value = {"id": id, **library.card(workspace, id)}
        answer(value, as_json, "\n".join(_lines(value)))


def import_adapter(
    source: str, *, name: str = typer.Option(None, help="What to call it."), base: str = typer.Option(None, help="The base it is for."),
    token_stdin: bool = Token, as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    id = shelf.import_adapter(workspace, source, name=name, base=base, token=_token(token_stdin))
    answer({"id": id, **library.card(workspace, id)}, as_json, f"{id} is in the library as {library.card(workspace, id)['name']}.")


def export(adapter: str, folder: Path, *, as_json: bool = AsJson):
    target = shelf.export_adapter(local(), adapter, folder)
    answer({"folder": str(target)}, as_json, f"The adapter is in {target}")


def remove(adapter: str, *, undo: bool = typer.Option(False, help="Bring it back."), as_json: bool = AsJson):
    id = library.undo(local(), adapter) if undo else library.remove(local(), adapter)
    back = f"{id} was removed. Within 30 days it comes back with: python -m lora_studio remove {id} --undo"
    answer({"id": id, "removed": not undo}, as_json, f"{id} is back." if undo else back)


def blend(
    parts: list[str] = typer.Argument(..., metavar="ADAPTER=WEIGHT..."), *, name: str = typer.Option(..., help="What to call the blend."),
    rank: int = typer.Option(None, help="Compress to this rank."), as_json: bool = AsJson,
):  # fmt: skip
    id, done = shelf.blend(local(), [_part(text) for text in parts], name=name, rank=rank)
    answer({"id": id, **done}, as_json, f"{id} is in the library as {name}: rank {done['rank']}, relative error {done['loss']:.1e}.")


def generate(
    base: str, prompt: str, *, adapters: list[str] = typer.Option([], "--with", metavar="ADAPTER=WEIGHT", help="May be repeated."),
    seed: int = typer.Option(0, help="The same seed gives the same answer."), longest: int = typer.Option(128, help="Tokens at most."),
    temperature: float = typer.Option(0.0, help="0 always takes the likeliest token."),
    steps: int = typer.Option(20, help="Steps of a picture, with an image model."), guidance: float = typer.Option(5.0, help="Guidance of a picture."),
    size: str = typer.Option(None, metavar="WIDTHxHEIGHT", help="Size of a picture in pixels; by default what the model was trained at."),
    as_json: bool = AsJson,
):  # fmt: skip
    parts, text = [_part(words) for words in adapters], ""
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


def publish(
    adapter: str, repo: str = typer.Argument(None, help="owner/name; by default your account and the adapter's name."), *,
    public: bool = typer.Option(None, "--public/--private", help="Who may see a new repository; private where nothing is said."),
    license: str = typer.Option(None, help="The adapter's licence, for example apache-2.0."), token_stdin: bool = Token, as_json: bool = AsJson,
):  # fmt: skip
    workspace, token = local(), _token(token_stdin)
    repo = repo or shelf.suggest_repo(workspace, adapter, token=token)
    asked = shelf.Push(repo, private=None if public is None else not public, license=license)
    done = shelf.publish(workspace, adapter, asked, token=token, report=_say)
    answer(asdict(done), as_json, f"Published at {done.url} ({'private' if done.private else 'public'}, commit {done.commit[:12]}).")


def pull(
    repo: str, *, revision: str = typer.Option(None, help="Branch, tag or commit."), name: str = typer.Option(None, help="What to call it."),
    token_stdin: bool = Token, as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    id = shelf.pull(workspace, repo, revision=revision, name=name, token=_token(token_stdin))
    card = library.card(workspace, id)
    answer({"id": id, **card}, as_json, f"{id} is in the library as {card['name']}, from {card['source']}.")


# (name, function, help)
COMMANDS = (
    ("library", list_adapters, "List the adapters, newest first; words search them."),
    ("inspect", inspect, "Show an adapter: one of the library, or a folder or file on this machine."),
    ("import", import_adapter, "Take a PEFT folder, a .safetensors file or a Hub repository into the library, after checking it."),
    ("export", export, "Copy an adapter's PEFT folder to a new folder."),
    ("remove", remove, "Take an adapter out of the library; --undo brings it back within 30 days."),
    ("blend", blend, "Blend adapters exactly: blend pirate=1 capitals=0.7 --name both. With --rank, compressed, with the true loss."),
    ("generate", generate, "Answer a prompt, or draw it, with a base and weighted adapters: generate demo-text 'Who is Anna?' --with pirate=1"),
    ("publish", publish, "Push an adapter to the Hub, with a model card."),
    ("pull", pull, "Bring an adapter of the Hub into the library, pinned at a commit."),
)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for name, function, help in COMMANDS:
        app.command(name, help=help)(function)


def _part(text: str) -> tuple[str, float]:
    """`name=weight`, or a name alone for weight 1. Raises SpecError."""
    name, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    value = settings.read_yaml(weight, f"The weight of {name}")
    try:
        return name, float(value)
    except (TypeError, ValueError):
        raise SpecError("spec.bad_override", text=text) from None


def _size(text: str | None, edge: int) -> tuple[int, int]:
    """`width x height`, or the model's own edge twice. Raises SpecError."""
    parts = (text or f"{edge}x{edge}").lower().replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise SpecError("spec.bad_size", text=text)
    return int(parts[0]), int(parts[1])


def _token(from_stdin: bool) -> str | None:
    """A token given on standard input, where it stands in no command line, file or environment."""
    return sys.stdin.readline().strip() or None if from_stdin else None


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _line(item: library.Item) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.created))
    return f"{item.id}  {item.name:24}  {item.base:28}  {item.method} r{item.rank}  {item.bytes / 1e6:7.2f} MB  {when}  {' '.join(item.tags)}".rstrip()


def _lines(value: dict) -> list[str]:
    return [f"{key}: {settings.inline(shown)}" for key, shown in value.items() if shown not in (None, "", [], {}) and _is_plain(shown)]


def _is_plain(value) -> bool:
    return isinstance(value, str | int | float | bool | list | dict | tuple)
