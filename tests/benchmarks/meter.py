"""What the benchmarks share: the meter of a process, the reports of a loop to it, and variants measured in turns.

Each variant runs in a fresh process, rounds are interleaved, and the measure is CPU seconds of the process (all threads), which a busy
neighbour disturbs least. Memory is the peak since training began minus what was resident then.
"""

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
WARM_UP = 1
# Waiting threads would spin and count as work; the rest keeps the trainers quiet and at home.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip


class Meter:
    """CPU and wall seconds per step, and the working set in MB."""

    def __init__(self):
        self.marks, self.losses, self.loss, self.resident = [], [], None, 0.0

    def begin(self) -> None:
        """Training starts here: forget the peak so far."""
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            print("the peak could not be reset; memory is not comparable", file=sys.stderr)
        self.resident = status("VmRSS")
        self.mark()

    def mark(self, loss: float | None = None) -> None:
        """One step is done."""
        self.marks.append((time.perf_counter(), time.process_time()))
        if loss is not None:
            self.losses.append(loss)

    def result(self, units: int, unit: str = "tokens") -> dict:
        """What was measured after the warm-up; `units` are the real tokens or pictures of those steps."""
        (wall, cpu), (wall_end, cpu_end) = self.marks[WARM_UP], self.marks[-1]
        loss = self.loss if self.loss is not None else statistics.mean(self.losses)
        return {
            "cpu_seconds": round(cpu_end - cpu, 3), "wall_seconds": round(wall_end - wall, 3), unit: units,
            "working_set_mb": round(status("VmHWM") - self.resident, 1), "peak_mb": round(status("VmHWM"), 1), "loss": round(loss, 4),
        }  # fmt: skip


def status(key: str) -> float:
    """A figure of this process in MB, by its name in /proc/self/status."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1e3


class Marks:
    """Where the loop reports: a mark of the meter at every step."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def emit(self, kind: str, **fields) -> None:
        if kind == "step":
            self.meter.mark(fields["loss"])

    def flush(self) -> None:
        """Nothing is kept here."""

    def asked(self, request: str) -> None:
        """Nobody asks."""

    def answered(self, request: str) -> None:
        """Nobody asked."""


def measure(file: str, rounds: int, steps: int, variants: list[str], *more: str) -> dict[str, list[dict]]:
    """Every variant of a benchmark's file once per round, each in a fresh process."""
    found: dict[str, list[dict]] = {variant: [] for variant in variants}
    environment = {**os.environ, **ENVIRONMENT}
    for number in range(rounds):
        for variant in variants:
            command = [sys.executable, file, "--work", variant, "--steps", str(steps), *more]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
            found[variant].append(json.loads(lines[0][7:]))
            print(f"round {number + 1}  {variant:8s} {found[variant][-1]}", flush=True)
    return found


def median(rows: list[dict], key: str) -> float:
    """The middle of one figure over the rounds."""
    return statistics.median(row[key] for row in rows)


def machine() -> str:
    """The processor's name, fit for a file name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return re.sub(r"[^a-z0-9]+", "-", (found.group(1) if found else platform.processor() or "cpu").lower()).strip("-")


def leave(benchmark: str, title: str, body: str, record: dict) -> Path:
    """Leave the figures under results/, named by machine and date: a table to read, and everything as JSON."""
    date = time.strftime("%Y-%m-%d")
    place = RESULTS / f"{benchmark}-{machine()}-{date}.json"
    RESULTS.mkdir(exist_ok=True)
    place.write_text(json.dumps({"benchmark": benchmark, "machine": machine(), "cores": os.cpu_count(), "date": date, **record}, indent=1) + "\n")
    place.with_suffix(".md").write_text(f"# {title}, {machine()}, {date}\n\n{body}\n")
    return place
