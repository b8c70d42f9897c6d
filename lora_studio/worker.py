"""One job in one process: `python -m lora_studio.worker RUN`.

The process that is started is a keeper: it holds the run's locks, starts the process that works, and outlives it, so that
even a worker killed for memory leaves a sentence behind and the queue moves on. `--inside RUN` is the one that works,
`--check` reads a spec from its input and says what its rows look like as tokens.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lora_studio import durable, fence, runs, settings
from lora_studio.errors import StudioError
from lora_studio.home import PACKAGE
from lora_studio.workspace import Workspace

LOOK_SECONDS = 0.25
GRACE_SECONDS = 20.0
REFUSED = 75  # the exit code of a worker whose token was refused (EX_TEMPFAIL)
SIGNALS = {
    signal.SIGKILL: "was killed (signal 9, SIGKILL); the system does that when memory runs out",
    signal.SIGTERM: "was asked to end (signal 15, SIGTERM)",
    signal.SIGINT: "was interrupted (signal 2, SIGINT)",
    signal.SIGSEGV: "crashed (signal 11, SIGSEGV)",
    signal.SIGABRT: "aborted (signal 6, SIGABRT)",
    signal.SIGBUS: "crashed (signal 7, SIGBUS); a full disk or a file that shrank can do that",
}


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    if arguments[:1] == ["--check"]:
        return check(sys.stdin.read())
    if arguments[:1] == ["--inside"]:
        fence.lend(_handed())
        return work(Path(arguments[1]))
    return keep(Path(arguments[0]), [int(handle) for handle in arguments[1:]])


def _handed() -> str:
    """The token that was handed over on the standard input; empty where there is none."""
    return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.readline().strip()


# ---- the keeper


def keep(folder: Path, handles: list[int]) -> int:
    """Run the job of `folder` in a child, see to it that a request to stop is obeyed, and say how it ended."""
    from lora_studio.jobs import local

    for handle in handles:
        os.set_inheritable(handle, True)
    token = _handed()
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "lora_studio.worker", "--inside", str(folder)],
        stdin=subprocess.PIPE if token else subprocess.DEVNULL,
        pass_fds=handles,
    )
    local.hand_over(child, token)
    while child.poll() is None:
        time.sleep(LOOK_SECONDS)
        request = runs.asked(folder, "stop")
        if request and time.time() - request["time"] > request.get("grace", GRACE_SECONDS):
            child.kill()
    words, waits = in_words(child.returncode), child.returncode == REFUSED
    if waits:
        runs.set_card(folder, needs_token=True, refused=time.time())
    elif runs.ended(folder) is None:
        reason = str(StudioError("run.ended", words=words, line=runs.last_line(folder)))
        if runs.asked(folder, "stop"):
            runs.note(folder, "stopped", saved=False, reason=f"It did not react to the request to stop and was ended. {reason}")
        else:
            runs.note(folder, "failed", reason=reason)
    runs.answered(folder, "stop")
    _pump_next(handles, folder if waits else None)
    return 0 if child.returncode == 0 else 1


def _pump_next(handles: list[int], again: Path | None) -> None:
    """Let go of the locks and start what waits, a run among it whose token was refused. The next worker gets a session of its own."""
    from lora_studio.jobs import queue

    for handle in handles:
        os.close(handle)
    if again is not None:
        queue.add(Workspace(again.parent.parent), again, device=durable.read_json(again / "card.json", {}).get("device", "cpu"))
    queue.pump()


def in_words(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return SIGNALS.get(-code, f"was ended by signal {-code}")
    return "ended without saying why" if code == 0 else f"ended with code {code}"


# ---- the worker


class RunDesk:
    """Where the loop reports: the events and control files of a run folder."""

    def __init__(self, folder: Path, events: runs.Events):
        self.folder, self.events = folder, events

    def emit(self, kind: str, **fields) -> None:
        self.events.emit(kind, **fields)
        if kind in ("eval", "saved", "note"):
            told = (f"{name}={value:.4f}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items())
            print(" ".join([kind, *told]), flush=True)
        elif kind == "step" and "loss" in fields and (fields["step"] % 10 == 0 or fields["step"] == fields["steps"]):
            print(f"step {fields['step']}/{fields['steps']} loss {fields['loss']:.4f}", flush=True)

    def flush(self) -> None:
        self.events.flush()

    def asked(self, request: str) -> dict | None:
        path = self.folder / "control" / f"{request}.json"
        return durable.read_json(path) if os.path.exists(path) else None

    def answered(self, request: str) -> None:
        runs.answered(self.folder, request)


def work(folder: Path) -> int:
    """Train the run of `folder`; its events say how it went. Returns 0 when it ended as it should."""
    with runs.Events(folder) as events:
        desk = RunDesk(folder, events)
        durable.sweep(folder / "checkpoints")
        durable.sweep(folder)
        try:
            _train(folder, desk)
            return 0
        except StudioError as error:
            print(f"error: {error}", flush=True)
            if error.key in ("base.bad_token", "data.bad_token") and fence.lent():
                return REFUSED  # the keeper puts the run back into the queue, until its owner has signed in again
            events.emit("failed", reason=str(error), key=error.key)
            return 1
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = f"The disk is full: {error.filename or folder} could not be written. Free some space, then resume; the last whole checkpoint is kept."
            print(f"error: {reason}", flush=True)
            events.emit("failed", reason=reason, key="disk full")
            return 1
        # Anything else is a bug: its traceback goes to the log, and the keeper reports the last line.


def _train(folder: Path, desk: RunDesk) -> None:
    _quieten()
    if runs.writes_captions(folder):
        from lora_studio.inference import captioning

        return captioning.run(folder, desk)
    if runs.kind_of(folder) == "sweep":
        from lora_studio.training import many

        return many.run(folder, desk)
    if runs.kind_of(folder) == "compare":
        from lora_studio.training import comparing

        return comparing.run(folder, desk)
    if not runs.trains(folder):
        from lora_studio.inference import searching

        return searching.run(folder, desk)
    from lora_studio.training import job

    job.train(folder, desk)


def _quieten() -> None:
    """Keep out of the log what tells its reader nothing: progress bars of loading, notes about optional packages."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def check(text: str) -> int:
    """Encode every row of the spec in `text`; print {facts, problems} as one line of JSON."""
    from lora_studio.training import check as rows_check

    print(json.dumps(rows_check.check(settings.load_text(text))), flush=True)
    return 0


if __name__ == "__main__":
    # Imported here and not above, so that a test can import this module under another name.
    sys.path.insert(0, str(PACKAGE.parent))
    sys.exit(main(sys.argv[1:]))
