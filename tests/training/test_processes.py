"""Several processes: the loop under `accelerate launch` makes the same steps as alone."""

import os
import subprocess
import sys

import pytest

from lora_studio import runs
from lora_studio.spec import parse
from tests import tiny

METHODS = {
    **{init: {"method": {"rank": 4, "alpha": 8, "init": init}, "optim": {"lr": 2e-3, "lora_plus_ratio": 16}} for init in ("kaiming", "lora_ga")},
    **{kind: {"method": {"kind": kind, "tokens": 5}} for kind in ("prompt", "prefix")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_steps_of_one(workspace, base, chat_rows, free_port, name):
    found = []
    for count in (1, 2):
        folder = runs.create(workspace, parse({**tiny.tree(base, chat_rows), "output": {}, "optim": {"lr": 2e-3}, **METHODS[name]}))
        words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(count), "--num_machines", "1",
                 "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port),
                 "-m", "lora_studio.worker", "--inside", str(folder)]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        events = runs.read_all(folder)
        assert events[-1]["kind"] == "done", done.stdout + done.stderr
        found.append([event["loss"] for event in events if event["kind"] in ("step", "eval")])
    assert len(found[0]) == 16 and found[0] == pytest.approx(found[1], rel=1e-5)
