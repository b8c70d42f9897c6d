"""The command line of sweeps: a run's settings, those that vary, and a table of what came of each variant."""

import time

import click

from lora_studio import runs, settings, studio, sweeps
from lora_studio.cli_shelf import answer, refuse
from lora_studio.errors import RunError
from lora_studio.workspace import Workspace, local

FLAGS = {"over", "variants", "folds", "together", "keep"}
OPTIONS = [
    click.option("--over", "over", multiple=True, metavar="PATH=VALUE,VALUE", help="A setting and its values: --over method.rank=4,8. May be repeated: every combination is trained."),
    click.option("--variant", "variants", multiple=True, metavar="SETTINGS", help="One variant as YAML: {optim.lr: 1e-4, method.rank: 4}. May be repeated."),
    click.option("--folds", type=int, default=None, metavar="N", help="Cross-validation in so many parts, for few rows."),
    click.option("--together", type=int, default=None, metavar="N", help="At most so many adapters at once: less memory, more time."),
    click.option("--keep", type=click.Choice(["best", "all"]), default=None, help="Which adapters enter the library."),
]  # fmt: skip


def run(spec, say, *, as_json: bool, detach: bool, over=(), variants=(), folds=None, together=None, keep=None) -> None:
    """Start a sweep and follow it to its end."""
    workspace = local()
    listed = [settings.read_yaml(text, "--variant") for text in variants] or None
    wanted = sweeps.compose(spec, list(over), variants=listed, folds=folds, together=together, keep=keep)
    report = sweeps.check(workspace, wanted, deep=True)
    refuse(report, say)
    id = sweeps.start(workspace, wanted)
    say.print(f"Run {id} trains {report.facts['adapters']} adapters in {workspace.run_folder(id)}")
    if detach:
        answer(sweeps.result(workspace, id), as_json, id)
        return
    follow_to_end(id, say, result="sweep-result")
    show(id, as_json)


def follow_to_end(id: str, say, *, result: str) -> None:
    """Say the step now and then until the run ends; `result` is the command that shows what it finds. Ctrl-C ends the following, not the
    run. Raises RunError when it failed."""
    try:
        status = _follow(local(), id, say)
    except KeyboardInterrupt:
        say.print(f"It goes on. See what it finds: python -m lora_studio {result} {id}; end it with: python -m lora_studio stop {id}")
        raise click.exceptions.Exit(130) from None
    if status.state == "failed":
        raise RunError("run.failed", id=id, reason=status.reason)


def _follow(workspace: Workspace, id: str, say) -> runs.Status:
    told = -1
    while True:
        studio.pump()
        status = studio.show(workspace, id)
        if not status.is_live and status.state != "queued":
            return status
        if status.steps and status.step * 10 // status.steps > told:
            told = status.step * 10 // status.steps
            say.print(f"step {status.step}/{status.steps}")
        time.sleep(0.3)


def show(id: str, as_json: bool) -> None:
    """What a sweep has found so far, as a table with the best first."""
    told = sweeps.result(local(), id)
    answer(told, as_json, table(told))


def table(told: dict) -> str:
    """A line for each variant: what differs, its validation loss, how it ended."""
    rows = sorted(told["variants"], key=lambda one: (one["validation"] is None, one["validation"] or 0.0, one["number"]))
    width = max(len(one["words"]) for one in rows)
    lines = [f"{told['id']} is {told['state']}. {told['reason']}".rstrip(), f"{'':{width}}  validation  training  step"]
    for one in rows:
        judged, loss = (f"{value:.4f}" if value is not None else "-" for value in (one["validation"], one["loss"]))
        mark = f"  {one['library']}" if one["library"] else ""
        lines.append(f"{one['words']:{width}}  {judged:>10}  {loss:>8}  {one['step']:>4}  {one['state']}{mark}")
        if one["state"] == "failed":
            lines.append(f"{'':{width}}  {one['reason']}")
    return "\n".join(lines)
