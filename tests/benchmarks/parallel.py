"""Four 50-step runs on demo-text: one after another, each in a process of its own, against one sweep that trains all four side by side.

    python -m tests.benchmarks.parallel --rounds 3

Everything counts: starting Python, loading the libraries and the base, training, validation, checkpoints, the adapters. The measure is CPU
seconds of the processes (all threads); wall seconds are listed beside it. Memory is the highest that a run reports of itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.meter import ENVIRONMENT, ROOT, leave

OVER = ["optim.lr=3e-4,1e-3", "method.rank=8,16"]


def work(folder: Path) -> tuple[float, float]:
    """Do the job of a run folder in a process of its own. Returns its CPU seconds and wall seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lora_studio.worker", "--inside", str(folder)]
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log)
        _, code, used = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"{folder} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - started


def measure(steps: int) -> dict:
    """Both ways once. Returns their CPU seconds, wall seconds and peaks in MB."""
    from lora_studio import runs, studio, sweeps
    from lora_studio.spec import sweep
    from lora_studio.workspace import local

    run = studio.compose("demo/pirate", {"schedule": {"steps": steps}, "compute": {"device": "cpu"}, "output": {"sample_prompts": []}})
    asked = sweeps.compose(run, OVER, keep="all")
    asked = asked.model_copy(update={"together": sweeps.check(local(), asked).facts["at_once"]})  # as `sweeps.start` does
    singles = [runs.create(local(), one.spec) for one in sweep.variants(asked)]
    alone = [work(folder) for folder in singles]
    whole = runs.create(local(), asked)
    together = work(whole)

    def peak(folder: Path) -> float:
        return max(event["memory"] for event in runs.read_all(folder) if "memory" in event) / 1e6

    best = [min(event["loss"] for event in runs.read_all(folder) if event["kind"] == "eval") for folder in singles]
    same = [
        min(event["loss"] for event in runs.read_all(whole) if event["kind"] == "eval" and event["variant"] == number)
        for number in range(len(singles))
    ]
    return {
        "alone_cpu": round(sum(cpu for cpu, _ in alone), 2), "alone_wall": round(sum(wall for _, wall in alone), 2), "alone_peak_mb": round(max(map(peak, singles))),
        "sweep_cpu": round(together[0], 2), "sweep_wall": round(together[1], 2), "sweep_peak_mb": round(peak(whole)),
        "losses_differ_by": max(abs(one - other) / other for one, other in zip(same, best)),
    }  # fmt: skip


def table(found: list[dict], steps: int) -> str:
    """The figures as a markdown table: medians, and the ratios from least to most."""
    lines = [f"Four runs of {steps} steps, start-up and all.", "", "| | one after another | one sweep | ratio |", "|---|---|---|---|"]
    for what, name in (("CPU s", "cpu"), ("wall s", "wall"), ("peak MB of a process", "peak_mb")):
        pairs = [(row[f"alone_{name}"], row[f"sweep_{name}"]) for row in found]
        ratios = [one / other if name != "peak_mb" else other / one for one, other in pairs]
        middle = [statistics.median(side) for side in zip(*pairs)]
        lines.append(
            f"| {what} | {middle[0]:.1f} | {middle[1]:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join([*lines, "", f"Lowest validation losses differ by at most {max(row['losses_differ_by'] for row in found):.1e}."])


def main() -> None:
    """Measure, print, and leave the figures unless told not to."""
    parser = argparse.ArgumentParser(description="Four runs one after another against one sweep.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dry", action="store_true", help="Write no results.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["LORA_STUDIO_HOME"] = home
        found = []
        for number in range(options.rounds):
            found.append(measure(options.steps))
            print(f"round {number + 1}  {found[-1]}", flush=True)
    body = table(found, options.steps)
    print(body)
    if not options.dry:
        print(
            f"written to {leave('parallel', 'Parallel training', body, {'rounds': options.rounds, 'steps': options.steps, 'results': found}).relative_to(ROOT)}"
        )


if __name__ == "__main__":
    main()
