"""The command line: the same verbs as the pages. Flags are generated from the spec, so they cannot drift from it."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lora_studio import (
    __version__,
    cli_captions,
    cli_compare,
    cli_judge,
    cli_keep,
    cli_merge,
    cli_shelf,
    cli_space,
    cli_sweep,
    doctor,
    presets,
    settings,
    studio,
)
from lora_studio.cli_shelf import answer, refuse
from lora_studio.errors import RunError, SpecError, StudioError
from lora_studio.runs import Status
from lora_studio.workspace import local

app = typer.Typer(
    name="lora-studio", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train, blend and publish LoRA adapters. Every command takes --json.",
)  # fmt: skip
say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
AsJson = typer.Option(False, "--json", help="Answer as JSON on standard output.")


def main() -> None:
    """Run the command line. A StudioError is one sentence on standard error and exit code 1."""
    wants_json = "--json" in sys.argv
    try:
        command()(prog_name="lora-studio", standalone_mode=False)
    except StudioError as error:
        _fail(error, wants_json)
    except click.exceptions.Abort:
        say.print("Interrupted.")
        sys.exit(130)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        if wants_json:
            print(json.dumps({"error": error.format_message()}))
        say.print(error.format_message())
        sys.exit(error.exit_code)


def _fail(error: StudioError, wants_json: bool) -> None:
    if wants_json:
        problems = [asdict(problem) for problem in error.problems] if isinstance(error, SpecError) else []
        print(json.dumps({"error": str(error), "problems": problems}, ensure_ascii=False))
    say.print(str(error))
    sys.exit(1)


# ---- flags from the spec


def with_settings(function):
    """Give a command one flag for every setting of the spec; it receives them as `chosen: dict[path, text]`."""
    for leaf in reversed(settings.leaves()):
        if leaf.path == "data":
            help = "Rows to train on: a path or Hub id, or a source as YAML ({path: x, weight: 2}). May be repeated."
            option = click.option("--data", "data", multiple=True, metavar="SOURCE", help=help)
        else:
            name = leaf.path.replace(".", "__")
            option = click.option(f"--{leaf.path}", name, default=None, metavar=_metavar(leaf), help=leaf.help)
        function = option(function)
    return function


def _metavar(leaf: settings.Leaf) -> str:
    if leaf.default == "auto" and leaf.low is not None:
        return "|".join(word for item in get_args(leaf.type) if get_origin(item) is Literal for word in get_args(item)) + "|X"
    return "|".join(leaf.choices) if leaf.choices else {int: "N", float: "X", bool: "true|false", str: "TEXT"}.get(leaf.type, "LIST")


def tree_of_flags(flags: dict[str, Any]) -> dict:
    """The settings that flags give, as a tree. The kind of a group is set before its other settings."""
    given = {name.replace("__", "."): value for name, value in flags.items() if value not in (None, ())}
    tree: dict = {}
    for path in sorted(given, key=lambda path: not path.endswith(".kind")):
        if path == "data":
            tree["data"] = [_source(text) for text in given["data"]]
        else:
            leaf = next(leaf for leaf in settings.leaves() if leaf.path == path)
            value = given[path] if leaf.type is str and given[path] != "null" else settings.read_yaml(given[path], f"--{path}")
            tree = settings.set_path(tree, path, value)
    return tree


def _source(text: str) -> dict:
    value = settings.read_yaml(text, "--data") if text.lstrip().startswith("{") else {"path": text}
    return value if isinstance(value, dict) else {"path": text}


def spec_from(preset: str | None, file: Path | None, flags: dict, overrides: list[str]):
    """The spec that a preset, a file, flags and overrides give, each on top of the one before."""
    tree = settings.read_tree(file) if file else {}
    return studio.compose(preset, settings.overlay(tree, tree_of_flags(flags)), list(overrides))


def _settings_command(name: str, help: str):
    """Register `function(spec, **own flags)` as a command that takes a spec in every way a spec can be given."""

    def register(function):
        @click.pass_context
        def run(context, /, file, preset, overrides, **flags):
            own = {option: flags.pop(option) for option in list(flags) if option in OWN_FLAGS}
            spec = spec_from(preset, Path(file) if file else None, flags, overrides)
            return function(spec, preset=preset, **own)

        command = with_settings(run)
        command = click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Set anything by its path: --set method.rank=8. May be repeated.")(command)
        command = click.option("--preset", default=None, help="Start from a preset (see `presets`).")(command)
        for option in OWN_OPTIONS[name]:
            command = option(command)
        command = click.argument("file", required=False, metavar="[SPEC.yaml]")(command)
        EXTRA[name] = click.command(name, help=help)(command)
        return function

    return register


EXTRA: dict[str, click.Command] = {}
_json = click.option("--json", "as_json", is_flag=True, help="Answer as JSON on standard output.")
_detach = click.option("--detach", is_flag=True, help="Return at once; the run goes on by itself either way.")
_sparse = click.option("--show-spec", is_flag=True, help="Print the spec as YAML and stop.")
OWN_OPTIONS = {"train": [_json, _detach, _sparse], "preflight": [_json], "recommend": [_json], "sweep": [_json, _detach, *cli_sweep.OPTIONS], "compare": [_json, _detach, *cli_compare.OPTIONS]}
OWN_FLAGS = {"as_json", "detach", "show_spec", *cli_sweep.FLAGS, *cli_compare.FLAGS}


@_settings_command("train", "Train an adapter. The run is detached: Ctrl-C leaves it running.")
def train(spec, *, preset, as_json, detach, show_spec):
    if show_spec:
        answer(settings.to_tree(spec), as_json, settings.dumps(spec, sparse=True).rstrip())
        return
    workspace = local()
    report = studio.preflight(workspace, spec, deep=True)
    refuse(report, say)
    id = studio.start(workspace, spec)
    say.print(f"Run {id} is in {workspace.run_folder(id)}")
    if detach:
        answer(_status(studio.show(workspace, id)), as_json, id)
        return
    _follow_to_end(workspace, id, as_json)


@_settings_command("preflight", "Say what will happen and what stands in the way, without starting.")
def preflight(spec, *, preset, as_json):
    report = studio.preflight(local(), spec, deep=True)
    facts = "\n".join(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in report.facts.items())
    problems = "\n".join(f"{problem.level}: {problem.sentence}" for problem in report.problems)
    value = {"can_start": report.can_start, "facts": report.facts, "problems": [asdict(problem) for problem in report.problems]}
    answer(value, as_json, "\n".join(part for part in (facts, problems, "Ready to start." if report.can_start else "") if part))
    if not report.can_start:
        raise click.exceptions.Exit(1)


@_settings_command("recommend", "Say which settings suit a base, its rows and this machine, and why: recommend --base.id demo-text --data rows.jsonl")
def recommend(spec, *, preset, as_json):
    found = studio.recommend(local(), spec)
    command = studio.command(studio.with_values(spec, found.values))
    width = max(len(advice.path) for advice in found.advices)
    lines = [f"{advice.path:{width}}  {settings.inline(advice.value):12}  {advice.reason}" for advice in found.advices]
    answer({**asdict(found), "command": command}, as_json, "\n".join([*lines, *found.notes, "", command]))


@_settings_command("sweep", "Train variants of a run side by side over one base, and keep the best: sweep --preset demo/pirate --over optim.lr=1e-4,3e-4")
def sweep(spec, *, preset, **own):
    cli_sweep.run(spec, say, **own)


@app.command("sweep-result", help="What a sweep has found so far: each variant with its validation loss, the best first.")
def sweep_result(id: str, as_json: bool = AsJson):
    cli_sweep.show(id, as_json)


@_settings_command("compare", "Measure LoRA against LoRA+ on the same rows, each at its best rate, over several seeds: compare --preset demo/pirate --full")
def compare(spec, *, preset, **own):
    cli_compare.run(spec, say, **own)


@app.command("compare-result", help="What a comparison of LoRA and LoRA+ has found so far, in numbers and in words.")
def compare_result(id: str, as_json: bool = AsJson):
    cli_compare.show(id, as_json)


# ---- runs


def _follow_to_end(workspace, id: str, as_json: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn())
    try:
        with Progress(*columns, console=say, transient=not say.is_terminal, disable=not say.is_terminal) as bar:
            task = bar.add_task("starting", total=100)
            while True:
                studio.pump()
                status = studio.show(workspace, id)
                loss = f" loss {status.loss:.4f}" if status.loss is not None else ""
                bar.update(task, completed=status.step, total=status.steps or 100, description=status.state + loss)
                if not status.is_live and status.state != "queued":
                    break
                time.sleep(0.3)
    except KeyboardInterrupt:
        say.print(f"The run goes on. Follow it with: python -m lora_studio run {id} --follow; end it with: python -m lora_studio stop {id}")
        raise click.exceptions.Exit(130) from None
    _end(workspace, status, as_json)


def _end(workspace, status: Status, as_json: bool) -> None:
    """Say how a run ended. Raises RunError when it failed."""
    if status.state == "failed":
        raise RunError("run.failed", id=status.id, reason=status.reason)
    folder, model = (workspace.run_folder(status.id) / name for name in ("adapter", "model"))
    where = f" The adapter is in {folder}" if folder.is_dir() else f" The model is in {model}" if model.is_dir() else ""
    judged = f", validation loss {status.validation:.4f}" if status.validation is not None else ""
    text = f"{status.id} is {status.state} at step {status.step}{judged}.{where} {status.reason}".rstrip()
    made = {name: str(path) if path.is_dir() else None for name, path in (("adapter", folder), ("model", model))}
    answer({**_status(status), **made}, as_json, text)


def _status(status: Status) -> dict:
    return {key: value for key, value in asdict(status).items() if key != "step_event"}


@app.command("runs", help="List the runs, newest first.")
def list_runs(as_json: bool = AsJson):
    found = studio.list_runs(local())
    lines = [f"{run.id}  {run.state:9}  {run.step:>6}/{run.steps:<6} {_number(run.loss):>8}  {run.name}" for run in found]
    answer([_status(run) for run in found], as_json, "\n".join(lines) or "There are no runs yet. Start one: train --preset demo/pirate")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


@app.command("run", help="Show one run: its state, notes, sample answers and log.")
def show_run(id: str, follow: bool = typer.Option(False, help="Wait for its end."), as_json: bool = AsJson):
    workspace = local()
    if follow:
        return _follow_to_end(workspace, id, as_json)
    status = studio.show(workspace, id)
    events = studio.events(workspace, id)
    told = [event.get("text") or event.get("words") or event.get("reason") for event in events if event["kind"] in ("note", "resumed", "failed")]
    samples = [f"step {event['step']}: {event['prompt']} → {event['answer']}" for event in events if event["kind"] == "sample"]
    head = f"{status.name} ({status.id}) is {status.state}, step {status.step}/{status.steps}, loss {_number(status.loss)}"
    text = "\n".join([head, *filter(None, [status.reason]), *filter(None, told), *samples[-4:], "", studio.log(workspace, id, 2000).rstrip()])
    answer({**_status(status), "events": events}, as_json, text)


@app.command(help="Ask a run to stop: it saves a checkpoint and an adapter, unless --discard.")
def stop(id: str, discard: bool = typer.Option(False, help="Stop without saving anything new."), as_json: bool = AsJson):
    workspace = local()
    said = studio.stop(workspace, id, save=not discard)
    status = studio.wait_until_ended(workspace, id, seconds=60)
    answer({**_status(status), "said": said}, as_json, f"{status.id} is {status.state}. {status.reason}".rstrip())


@app.command(help="Ask a run for a checkpoint after the step it is at.")
def save(id: str, as_json: bool = AsJson):
    said = studio.save_now(local(), id)
    answer({"id": id, "said": said}, as_json, said)


@app.command(help="Ask a run for samples after the step it is at.")
def sample(id: str, as_json: bool = AsJson):
    said = studio.sample_now(local(), id)
    answer({"id": id, "said": said}, as_json, said)


@app.command(help="Go on with a run from its newest whole checkpoint.")
def resume(id: str, detach: bool = typer.Option(False, help="Return at once."), as_json: bool = AsJson):
    workspace = local()
    full = studio.resume(workspace, id)
    if detach:
        answer(_status(studio.show(workspace, full)), as_json, full)
    else:
        _follow_to_end(workspace, full, as_json)


# ---- the rest


@app.command("presets", help="List the presets.")
def list_presets(as_json: bool = AsJson):
    found = presets.available()
    value = [{"name": preset.name, "description": preset.description, "settings": preset.tree()} for preset in found]
    width = max((len(preset.name) for preset in found), default=0)
    answer(value, as_json, "\n".join(f"{preset.name:{width}}  {preset.description}" for preset in found))


@app.command(help="Every setting with its default and its help.")
def schema(as_json: bool = AsJson):
    from lora_studio.spec import TrainSpec

    lines = [f"{leaf.path} = {settings.inline(leaf.default)}\n    {leaf.help}" for leaf in settings.leaves()]
    answer(TrainSpec.model_json_schema(), as_json, "\n".join(lines))


@app.command("doctor", help="Name what does not fit on this machine, with the line that mends it.")
def run_doctor(as_json: bool = AsJson):
    findings = doctor.examine()
    value = [asdict(finding) for finding in findings]
    lines = [f"{finding.level:7} {finding.sentence}" + (f"\n        {finding.remedy}" if finding.remedy else "") for finding in findings]
    answer({"version": __version__, "findings": value}, as_json, "\n".join(lines))
    if any(finding.level == "error" for finding in findings):
        raise click.exceptions.Exit(1)


@app.command(help="Serve the studio in the browser.")
def serve(
    host: str = typer.Option("127.0.0.1", help="Address to listen on. Anything but loopback is for trusted networks only."),
    port: int = typer.Option(7860, help="Port to listen on."),
    as_json: bool = AsJson,
):
    from lora_studio import ui

    if as_json:
        print(json.dumps({"url": f"http://{host}:{port}"}), flush=True)
    ui.serve(host=host, port=port)


cli_shelf.register(app)
cli_merge.register(app)
cli_judge.register(app)
cli_captions.register(app)
cli_space.register(app)
cli_keep.register(app)


def command() -> click.Group:
    """The whole command line as a click group: typer's commands and those with the flags of every setting."""
    group = typer.main.get_command(app)
    for name, extra in EXTRA.items():
        group.add_command(extra, name)
    return group
