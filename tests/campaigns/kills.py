"""Kill a run at random instants, resume it, and compare the adapter with that of a run nobody disturbed.

    python -m tests.campaigns.kills --kills 50          the campaign: 50 kills of 60-step runs, each resumed to its end
    python -m tests.campaigns.kills --kills 50 --image  the same with an image model, crops, flips and caption dropout on
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path


def settings(base: Path, rows: Path, *, steps: int) -> dict:
    """A run with everything on that draws at random: dropout, accumulation, two sources, best checkpoint, samples."""
    from tests import tiny

    return tiny.tree(
        base,
        rows,
        data=[{"path": str(rows)}, {"path": str(rows), "weight": 0.5, "cap": 20}],
        method={"rank": 4, "alpha": 8, "dropout": 0.2},
        schedule={"steps": steps, "batch_size": 3, "accumulate": 2, "warmup": 3},
        validation={"size": 6, "every": 7},
        output={"checkpoint_every": 5, "sample_prompts": ["red fox?"], "sample_tokens": 4},
    )


def image_settings(base: Path, rows: Path, *, steps: int) -> dict:
    """An image run with everything on that draws at random: crops, flips, caption dropout, shuffled tags, noise, samples."""
    task = {"kind": "image", "resolution": 32, "bucket_step": 8, "crop": "random", "flip": True, "caption_dropout": 0.3, "shuffle_tags": True}
    return {
        "name": "tiny", "base": {"id": str(base)}, "data": [{"path": str(rows)}], "task": {**task, "sample_steps": 2, "noise_offset": 0.05},
        "method": {"rank": 2, "alpha": 4, "dropout": 0.2}, "schedule": {"steps": steps, "batch_size": 2, "accumulate": 2, "warmup": 3},
        "validation": {"size": 3, "every": 7}, "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "output": {"checkpoint_every": 5, "sample_prompts": ["a red circle"], "sample_every": 20},
    }  # fmt: skip


def finish(workspace, id: str, *, seconds: float = 120) -> str:
    """Wait for a run's end; the sha256 of its adapter."""
    from lora_studio import studio

    status = studio.wait_until_ended(workspace, id, seconds=seconds)
    assert status.state == "done", (status, studio.log(workspace, id))
    return hashlib.sha256((workspace.run_folder(id) / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def wait_for_start(folder: Path) -> None:
    """Return when the attempt that is under way says that it trains (imports and loading take most of a short run)."""
    from lora_studio import runs, studio

    while not runs.is_live(folder) and runs.ended(folder) is None:
        studio.pump()  # the run before may hold its device for another moment
        time.sleep(0.005)
    begun = sum(event["kind"] == "started" for event in runs.read_all(folder))
    while runs.is_live(folder) and sum(event["kind"] == "started" for event in runs.read(folder)[0]) == begun:
        time.sleep(0.005)


def kill(workspace, id: str, *, after: float, training: bool = True) -> int:
    """End every process of a run by SIGKILL so many seconds after its training began (or after now); the last step that
    was reported, or -1 when the run was over before."""
    from lora_studio import durable, runs
    from lora_studio.jobs import local

    folder = workspace.run_folder(id)
    if training:
        wait_for_start(folder)
    time.sleep(after)
    if not runs.is_live(folder):
        return -1
    try:
        os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGKILL)
    except ProcessLookupError:
        return -1
    until = time.monotonic() + 20
    # A dying process lets go of its lock a moment before it is gone from the table of processes.
    while (runs.is_live(folder) or local.processes(folder)) and time.monotonic() < until:
        local.reap()
        time.sleep(0.02)
    assert not local.processes(folder), "a process of the run outlived SIGKILL"
    return runs.status(folder).step


def history(workspace, id: str) -> list[tuple]:
    """What a run reported, without times: each step, validation and sample once, in order."""
    from lora_studio import studio

    names = ("step", "loss", "grad_norm", "lr_A", "lr_B", "best", "prompt", "answer")
    progress = (event for event in studio.events(workspace, id) if event["kind"] in ("step", "eval", "sample"))
    return [(event["kind"], *(event.get(name) for name in names)) for event in progress]


def trial(workspace, spec, draw: random.Random, *, longest: float) -> tuple[str, str, list[int]]:
    """Start a run, kill it one to three times (also while it resumes), let it end. A fifth of the kills hits the start-up.
    Returns (id, sha256, steps it was killed at)."""
    from lora_studio import studio

    id, at = studio.start(workspace, spec), []
    for _ in range(draw.choice((1, 2, 2, 3))):
        training = draw.random() < 0.8
        step = kill(workspace, id, after=draw.uniform(0.0, longest if training else 5.0), training=training)
        if step < 0 or studio.show(workspace, id).state == "done":
            break
        at.append(step)
        studio.resume(workspace, id)
    return id, finish(workspace, id), at


def main() -> int:
    """Run the campaign and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["LORA_STUDIO_HOME"] = str(Path(place) / "home")
        return campaign(Path(place), chosen)


def campaign(place: Path, chosen) -> int:
    """`chosen.kills` kills; 0 when every resumed run equals the undisturbed one."""
    from lora_studio import studio, workspace
    from lora_studio.spec import parse
    from tests import tiny, tiny_image

    if getattr(chosen, "image", False):
        tree = image_settings(tiny_image.write_pipeline(place / "base"), tiny_image.write_pictures(place / "pictures", size=(40, 32)), steps=chosen.steps)
    else:
        tree = settings(tiny.write_base(place / "base"), tiny.write_rows(place / "rows.jsonl", count=40), steps=chosen.steps)
    home, spec = workspace.local(), parse(tree)
    whole = studio.start(home, spec)
    wait_for_start(home.run_folder(whole))
    began = time.monotonic()
    expected, told = finish(home, whole), history(home, whole)
    longest = time.monotonic() - began
    draw, kills, wrong, steps = random.Random(chosen.seed), 0, 0, []
    while kills < chosen.kills:
        id, found, at = trial(home, spec, draw, longest=longest)
        bytes_, story = found == expected, history(home, id) == told
        kills, wrong, steps = kills + len(at), wrong + (not (bytes_ and story)), steps + at
        words = "same" if bytes_ and story else "OTHER BYTES" if not bytes_ else "OTHER HISTORY"
        print(f"{kills:3d} kills; killed at steps {at}; {words}", flush=True)
    print(f"{kills} kills at steps {sorted(steps)}: {wrong} runs differ in bytes (sha256 {expected[:16]}) or history")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
