"""Processes on this machine: start a detached worker, ask it to stop, and make sure that it does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lora_studio import allotment, durable, runs
from lora_studio.home import PACKAGE
from lora_studio.jobs.tokens import SECRETS

GRACE_SECONDS = 20.0
_children: list[subprocess.Popen] = []


def spawn(folder: Path, *, device: str, locks: list[durable.Lock], token: str = "") -> int:
    """Start the worker of a run in a session of its own, holding `locks`. Returns its process id.

    Its output goes to a file, never to a pipe nobody reads. No token is in its environment or command line: a visitor's comes by its input.
    """
    handles = [lock.handle for lock in locks]
    environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if device.startswith("cuda"):
        visible = [item for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
        number = int(device.partition(":")[2] or 0)
        environment["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with open(folder / "log.txt", "ab", buffering=0) as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "lora_studio.worker", str(folder), *map(str, handles)],
            stdin=subprocess.PIPE if token else subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=handles,
            start_new_session=True,
            env=allotment.of_child(environment),
            cwd=folder,
        )
    hand_over(process, token)
    durable.write_json(folder / "process.json", {"pid": process.pid, "born": psutil.Process(process.pid).create_time()})
    _children.append(process)
    return process.pid


def hand_over(process: subprocess.Popen, token: str) -> None:
    """Give a process a token on its standard input, and close that."""
    if token:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(f"{token}\n".encode())


def reap() -> None:
    """Collect workers of this process that have ended, so that none stays a zombie."""
    _children[:] = [child for child in _children if child.poll() is None]


def processes(folder: Path) -> list[psutil.Process]:
    """The living processes of a run's session. A number that was given to someone else meanwhile is not taken for ours."""
    record = durable.read_json(folder / "process.json", {})
    if not record:
        return []
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == record["pid"] and process.create_time() >= record["born"] - 1:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


def end(folder: Path, *, patience: float = 3.0) -> None:
    """End every process of a run: ask by SIGTERM, then SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in processes(folder):
            try:
                process.send_signal(sign)
            except psutil.Error:
                continue
        until = time.monotonic() + patience
        while time.monotonic() < until:
            reap()
            if not processes(folder) and not runs.is_live(folder):
                return
            time.sleep(0.05)
