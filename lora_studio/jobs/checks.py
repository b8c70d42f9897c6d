"""Questions that need torch, asked of a short-lived process: what do all rows look like once they are tokens?"""

import json
import os
import subprocess
import sys

from lora_studio import allotment, settings
from lora_studio.home import PACKAGE
from lora_studio.jobs.tokens import STUDIO
from lora_studio.spec import TrainSpec

SECONDS = 300


def encode_all(spec: TrainSpec) -> dict:
    """Encode every row of a spec as its run would. Returns {facts, problems}; a crash of the process is a problem too."""
    environment = {**{key: value for key, value in os.environ.items() if key not in STUDIO}, "OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "lora_studio.worker", "--check"],
            input=settings.dumps(spec),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=allotment.of_child(environment),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _failed(f"The rows could not be checked within {SECONDS} seconds. The run itself may still work.", "warning")
    for line in reversed(answer.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    last = (answer.stderr.strip().splitlines() or ["(nothing was printed)"])[-1]
    return _failed(f"The check of the rows ended with code {answer.returncode}: {last[:300]}", "error")


def _failed(sentence: str, level: str) -> dict:
    return {"facts": {}, "problems": [{"path": "data", "sentence": sentence, "level": level}]}


def free_memory(device: str) -> int | None:
    """Bytes free on a device; None where that cannot be asked without loading torch."""
    if device == "cpu":
        return allotment.free_memory()
    if not device.startswith("cuda"):
        return None
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--id={device.partition(':')[2] or 0}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
