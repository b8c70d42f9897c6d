"""The command line of comparing LoRA with LoRA+: a run's settings, what is tried, and a table of what was found."""

import click

from lora_studio import cli_sweep, comparisons
from lora_studio.cli_shelf import answer, refuse
from lora_studio.workspace import local

FLAGS = {"ratio", "rates", "plus_rates", "full", "full_rates", "seeds", "together"}
OPTIONS = [
    click.option("--ratio", type=float, default=None, metavar="X", help="LoRA+: B learns at this multiple of A's rate. The run's, else 16."),
    click.option("--rates", default=None, metavar="X,X", help="The rates that LoRA is tried at; five around the run's where none are given."),
    click.option("--plus-rates", "plus_rates", default=None, metavar="X,X", help="The rates of A that LoRA+ is tried at."),
    click.option("--full", is_flag=True, help="Full fine-tuning too, as the reference."),
    click.option("--full-rates", "full_rates", default=None, metavar="X,X", help="The rates that full fine-tuning is tried at."),
    click.option("--seeds", type=int, default=None, metavar="N", help="How often each is trained at its best rate; 3 where nothing is said."),
    click.option("--together", type=int, default=None, metavar="N", help="At most so many adapters at once: less memory, more time."),
]  # fmt: skip


def run(spec, say, *, as_json: bool, detach: bool, **asked) -> None:
    """Start a comparison and follow it to its end."""
    workspace = local()
    for name in ("rates", "plus_rates", "full_rates"):
        asked[name] = comparisons.rates_of(asked[name]) if asked[name] else None
    wanted = comparisons.compose(spec, **asked)
    report = comparisons.check(workspace, wanted, deep=True)
    refuse(report, say)
    id = comparisons.start(workspace, wanted)
    say.print(f"Run {id} compares LoRA and LoRA+ in {report.facts['parts']} parts, in {workspace.run_folder(id)}")
    if detach:
        answer(comparisons.result(workspace, id), as_json, id)
        return
    cli_sweep.follow_to_end(id, say, result="compare-result")
    show(id, as_json)


def show(id: str, as_json: bool) -> None:
    """What a comparison has found so far, as a table and in words."""
    told = comparisons.result(local(), id)
    answer(told, as_json, table(told))


def table(told: dict) -> str:
    """A line for each method, then the sentences."""
    lines = [
        f"{told['id']} is {told['state']}. {told['reason']}".rstrip(),
        f"{'':17} best rate  final loss  lowest   highest  other's loss at  seconds",
    ]
    for one in told["methods"].values():
        rate = f"{one['rate']:.2g}" if one["rate"] else "-"
        final, low, high = (f"{value:.4f}" if value is not None else "-" for value in (one["final"], *(one["spread"] or (None, None))))
        at = "" if "reach" not in one else "not reached" if one["reach"] is None else f"step {one['reach']:.0f}"
        seconds = f"{one['seconds']:.1f}" if one["seconds"] is not None else "-"
        lines.append(f"{one['name']:17} {rate:>9}  {final:>10}  {low:>7}  {high:>7}  {at:>15}  {seconds:>7}")
    for one in told["methods"].values():
        tried = ", ".join(f"{rate:.2g}: {f'{loss:.4f}' if loss is not None else 'broke off'}" for rate, loss in one["tried"])
        lines += [f"{one['name']} tried {tried}"] if tried else []
    return "\n".join([*lines, "", *told["words"], told["claim"], told["ours"]])
