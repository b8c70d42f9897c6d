"""The command line of albums: `captions list | make | add | set | replace | prefix | ... | undo | statistics`."""

from pathlib import Path

import typer

from lora_studio import albums, settings, studio
from lora_studio.cli_shelf import AsJson, answer
from lora_studio.errors import RunError
from lora_studio.workspace import local

Only = typer.Option([], "--only", metavar="PICTURE", help="Only this picture. May be repeated; without it, all of the album.")
Name = typer.Option("", help="What to call the album.")


def list_captions(album: str = typer.Argument(None, help="An album; without it, the albums are listed."), *, as_json: bool = AsJson):
    workspace = local()
    if album is None:
        found = {name: len(albums.view(workspace, name).captions) for name in albums.names(workspace)}
        lines = [f"{name}  {count:,} picture{'' if count == 1 else 's'}" for name, count in found.items()]
        answer([{"album": name, "pictures": count} for name, count in found.items()], as_json, "\n".join(lines) or "There is no album yet. Make one: captions make FILES")
    else:
        view = albums.view(workspace, album)
        value = {"album": view.name, "captions": view.captions, "undo": view.undo, "redo": view.redo}
        answer(value, as_json, "\n".join(f"{name}  {text}".rstrip() for name, text in view.captions.items()))


def make(sources: list[str] = typer.Argument(..., metavar="SOURCE...", help="Pictures, a .zip, or one folder, demo or Hub data set."), *, name: str = Name, as_json: bool = AsJson):
    workspace, files = local(), [Path(source).expanduser() for source in sources]
    if all(file.is_file() for file in files):
        album, found = albums.create(workspace, files, name=name)
    else:
        album, found = albums.copy(workspace, sources[0], name=name)
    _tell_in(workspace, album, found, as_json)


def add(album: str, files: list[Path], *, as_json: bool = AsJson):
    workspace = local()
    _tell_in(workspace, album, albums.add(workspace, album, [file.expanduser() for file in files]), as_json)


def _tell_in(workspace, album: str, found, as_json: bool) -> None:
    value = {"album": album, "taken": len(found.items), "refused": [{"name": name, "reason": reason} for name, reason in found.refused], "path": albums.source_of(workspace, album).path}
    answer(value, as_json, "\n".join([*found.sentences(), f"{len(found.items):,} pictures are in {album}: {value['path']}"]))


def set_one(album: str, picture: str, text: str, *, as_json: bool = AsJson):
    _told(album, albums.write(local(), album, {picture: text}), as_json)


def replace(
    album: str, find: str, text: str = typer.Argument("", metavar="[BY]", help="Without it, what was found is deleted."), *,
    ignore_case: bool = typer.Option(False, "--ignore-case", help="Find it in any case."), only: list[str] = Only, as_json: bool = AsJson,
):  # fmt: skip
    _edit(album, albums.Edit("replace", text, find, ignore_case), only, as_json)


def prefix(album: str, text: str, *, only: list[str] = Only, as_json: bool = AsJson):
    _edit(album, albums.Edit("prefix", text), only, as_json)


def suffix(album: str, text: str, *, only: list[str] = Only, as_json: bool = AsJson):
    _edit(album, albums.Edit("suffix", text), only, as_json)


def trigger(album: str, text: str, *, only: list[str] = Only, as_json: bool = AsJson):
    _edit(album, albums.Edit("trigger", text), only, as_json)


def add_tag(album: str, text: str, *, only: list[str] = Only, as_json: bool = AsJson):
    _edit(album, albums.Edit("add_tag", text), only, as_json)


def remove_tag(album: str, text: str, *, only: list[str] = Only, as_json: bool = AsJson):
    _edit(album, albums.Edit("remove_tag", text), only, as_json)


def remove(album: str, pictures: list[str], *, as_json: bool = AsJson):
    count = albums.remove(local(), album, pictures)
    answer({"album": album, "removed": count}, as_json, f"{count} pictures were taken out. They come back with: python -m lora_studio captions undo {album}")


def undo(album: str, *, as_json: bool = AsJson):
    words = albums.undo(local(), album)
    answer({"album": album, "undone": words}, as_json, f"Undone: {words}.")


def redo(album: str, *, as_json: bool = AsJson):
    words = albums.redo(local(), album)
    answer({"album": album, "done": words}, as_json, f"Done again: {words}.")


def write_by(
    album: str, model: str = typer.Argument(albums.CAPTIONERS[0], help="An image-to-text model: a Hub id or a folder."), *,
    every: bool = typer.Option(False, "--all", help="For every picture, not only for those without a caption."), only: list[str] = Only,
    prompt: str = typer.Option("", help="What the model is asked, or how its captions begin."), tokens: int = typer.Option(75, help="The longest caption in tokens."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1, mps."), detach: bool = typer.Option(False, "--detach", help="Return at once."), as_json: bool = AsJson,
):  # fmt: skip
    workspace = local()
    id = albums.write_captions(workspace, album, model=model, pictures=only or ("all" if every else "missing"), prompt=prompt, tokens=tokens, device=device)
    status = studio.show(workspace, id) if detach else studio.wait_until_ended(workspace, id, seconds=30 * 24 * 3600)
    if status.state == "failed":
        raise RunError("run.failed", id=id, reason=status.reason)
    answer({"run": id, "state": status.state, "reason": status.reason}, as_json, f"{id} is {status.state}. {status.reason}".rstrip())


def statistics(album: str, *, resolution: int = typer.Option(512, help="The resolution of training, for the buckets."), as_json: bool = AsJson):
    found = albums.measure(local(), album, resolution=resolution)
    lines = [f"{name}: {settings.inline(value)}" for name, value in found.items() if value not in (None, "", [], {})]
    answer(found, as_json, "\n".join(lines))


def _edit(album: str, change: albums.Edit, only: list[str], as_json: bool) -> None:
    _told(album, albums.edit(local(), album, change, only or None), as_json)


def _told(album: str, count: int, as_json: bool) -> None:
    answer({"album": album, "changed": count}, as_json, f"{count:,} caption{' was' if count == 1 else 's were'} changed in {album}.")


# (name, function, help)
COMMANDS = (
    ("list", list_captions, "List the albums, or the captions of one."),
    ("make", make, "Make an album of pictures, of a .zip, or as a copy of a folder, a demo or a Hub data set."),
    ("add", add, "Bring more pictures into an album."),
    ("set", set_one, "Write the caption of one picture."),
    ("replace", replace, "Replace words in captions: replace ALBUM cat dog"),
    ("prefix", prefix, "Put words before captions."),
    ("suffix", suffix, "Put words after captions."),
    ("trigger", trigger, "Put a trigger word first, where it is not there yet."),
    ("add-tag", add_tag, "Add a comma-divided part, where it is not there yet."),
    ("remove-tag", remove_tag, "Remove a comma-divided part."),
    ("remove", remove, "Take pictures out of an album."),
    ("write", write_by, "Let an image-to-text model write captions, as a run; one step that can be undone."),
    ("undo", undo, "Take the newest change of an album back."),
    ("redo", redo, "Do the change again that was undone last."),
    ("statistics", statistics, "Sizes, buckets, captions, and what is there twice."),
)


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Albums of pictures: their captions, edited one by one or all at once, with undo.")
    for name, function, help in COMMANDS:
        group.command(name, help=help)(function)
    app.add_typer(group, name="captions")
