"""The bench's client: ask the one resident process that reads adapters, blends and answers; started on first use, never waited for in
vain. `ask` gives a result, `stream` the events of an answer. Loads no torch."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from lora_studio import allotment, durable, errors, fence, runs
from lora_studio.errors import BenchError, StudioError
from lora_studio.home import PACKAGE, home
from lora_studio.jobs import devices
from lora_studio.jobs.tokens import SECRETS

START_SECONDS = 60.0
SILENT_SECONDS = 60.0
GREETING_SECONDS = 10.0
ROOM_SECONDS = 10.0
LOG_BYTES = 1 << 20
LAST = {"result", "done", "error"}
_children: list[subprocess.Popen] = []


def ask(verb: str, *, seconds: float = 600.0, **arguments) -> dict:
    """One request and its result; the process is started if need be. Raises StudioError, among them BenchError when the bench dies, is
    silent for a minute, or is not done within `seconds`."""
    return _result(_asked(verb, arguments, seconds))


def stream(verb: str, *, seconds: float = 3600.0, **arguments) -> Iterator[dict]:
    """The events of a request as they come: `waiting` each second with what is being done, `note`, `piece`, and `done` last.
    Closing the iterator cancels the request. Raises like `ask`."""
    return _asked(verb, arguments, seconds)


def _asked(verb: str, arguments: dict, seconds: float) -> Iterator[dict]:
    # The bench serves everybody: what a visitor names is looked at here, what their files name by the bench, which is told who asks.
    for name in ("base", "tuned"):
        if arguments.get(name):
            fence.refuse_base(str(arguments[name]))
    asker = fence.asker()
    if asker is not None:
        arguments = {**arguments, "asker": asker}
    if verb in _carried:
        return _told(_carried[verb](verb, arguments))
    return _exchange(_connect(), verb, arguments, seconds)


_carried: dict[str, Callable[[str, dict], Iterator[dict]]] = {}


def carry(verbs: tuple[str, ...], serve: Callable[[str, dict], Iterator[dict]]) -> None:
    """From now on `serve(verb, arguments)` does these verbs in place of the bench's process (where a GPU is lent to calls only)."""
    _carried.update(dict.fromkeys(verbs, serve))


def _told(events: Iterator[dict]) -> Iterator[dict]:
    for event in events:
        if event["event"] == "error":
            raise _error(event)
        yield event


def status() -> dict:
    """What the bench does; {state: "off"} when it is not running. Starts nothing."""
    _reap()
    connection = _greeted()
    if connection is None:
        return {"state": "starting" if is_running() else "off", "note": "", "doing": "", "waiting": 0}
    try:
        return _result(_exchange(connection, "status", {}, GREETING_SECONDS))
    except BenchError as error:
        return {"state": "off", "note": str(error), "doing": "", "waiting": 0}


def is_running() -> bool:
    """Whether a bench lives."""
    return durable.is_locked(_folder() / "bench.lock")


def make_room(run: Path | str, *, device: str, seconds: float = ROOM_SECONDS) -> bool:
    """Have the bench unload its model from a device for a run (its folder, or its id) that is about to start there. Starts nothing.
    Returns whether the bench does not hold the device (any more); False when it could not let go within `seconds`."""
    folder = run if isinstance(run, Path) else home() / "runs" / run
    connection = _greeted() if is_running() else None
    if connection is None:
        return not is_running()
    try:
        _result(_exchange(connection, "unload", {"run": str(folder), "device": device}, seconds))
    except BenchError:
        return not is_running()
    return True


def stop(*, patience: float = 5.0) -> bool:
    """End the bench: ask it, then SIGKILL. Returns whether there was one."""
    if not is_running():
        return False
    connection = _greeted()
    if connection is not None:
        with contextlib.suppress(BenchError):
            _result(_exchange(connection, "stop", {}, patience))
    if not _ends_within(patience):
        _kill()
    return True


def _kill() -> None:
    """End a bench that does not hear. A number that was given to someone else meanwhile is not taken for it."""
    record = durable.read_json(_folder() / "process.json", {})
    with contextlib.suppress(psutil.Error, KeyError, TypeError):
        process = psutil.Process(record["pid"])
        if abs(process.create_time() - record["born"]) < 1:
            process.send_signal(signal.SIGKILL)
    _ends_within(3.0)


def _ends_within(seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_running():
        _reap()
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    _reap()
    return True


# ---- one request


def _exchange(connection: socket.socket, verb: str, arguments: dict, seconds: float) -> Iterator[dict]:
    """Send a request, then give its events up to the last. Raises the error it ends with."""
    if verb in ("load", "answer", "draw", "measure"):
        device = devices.resolve(arguments.get("device") or "auto")
        arguments = {**arguments, "device": device, "lock": str(devices.device_lock(device))}
    with connection:
        try:
            connection.sendall(json.dumps({"verb": verb, **arguments}, ensure_ascii=False).encode() + b"\n")
            for event in _events(connection, seconds):
                if event["event"] == "error":
                    raise _error(event)
                yield event
                if event["event"] in LAST:
                    return
        except (ConnectionError, BrokenPipeError):
            pass  # told below: the connection ended before its last event did
    raise _died()


def _events(connection: socket.socket, seconds: float) -> Iterator[dict]:
    """The lines of a connection as they come, up to its end. Raises BenchError when they do not come in time."""
    until, block, doing = time.monotonic() + seconds, b"", "starting"
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise BenchError("bench.slow", seconds=seconds, doing=doing)
        connection.settimeout(min(SILENT_SECONDS, left))
        try:
            more = connection.recv(1 << 16)
        except TimeoutError:
            if left > SILENT_SECONDS:
                _kill()  # its beat comes from a thread of its own, so it hangs
                raise BenchError("bench.silent", seconds=SILENT_SECONDS, doing=doing) from None
            continue
        if not more:
            return
        *lines, block = (block + more).split(b"\n")
        for event in (json.loads(line) for line in lines if line):
            doing = event.get("doing", doing)
            yield event


def _result(events: Iterator[dict]) -> dict:
    last = {}
    for event in events:
        last = event
    return {name: value for name, value in last.items() if name != "event"}


def _error(event: dict) -> StudioError:
    """The error that was raised over there, with its class, key and sentence."""
    kind = getattr(errors, str(event.get("kind")), BenchError)
    error = kind.__new__(kind)
    Exception.__init__(error, event["sentence"])
    error.key, error.values, error.problems = event["error"], {}, (errors.Problem("", event["sentence"]),)
    return error


def _died() -> BenchError:
    _ends_within(3.0)
    return BenchError("bench.died", line=runs.last_line(_folder()).rstrip("."))


# ---- the process


def _folder() -> Path:
    return home() / "bench"


def _connect() -> socket.socket:
    """A greeted connection; starts the process if there is none. Raises BenchError."""
    until, started = time.monotonic() + START_SECONDS, 0
    while True:
        connection = _greeted()
        if connection is not None:
            return connection
        if not is_running():
            # Once more if it ended just then, idle or killed; a process that cannot live is not started over and over.
            if started == 2:
                raise BenchError("bench.not_started", line=runs.last_line(_folder()).rstrip("."))
            started += _spawn()
        elif time.monotonic() > until:
            _kill()
            raise BenchError("bench.silent", seconds=START_SECONDS, doing="starting")
        time.sleep(0.05)


def _greeted() -> socket.socket | None:
    """A connection on which the bench has said hello, so that it takes the request; None when it does not listen."""
    record = durable.read_json(_folder() / "socket.json")
    if not isinstance(record, dict) or not is_running():
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(GREETING_SECONDS)
    try:
        connection.connect(record["socket"])
        hello = b""
        while not hello.endswith(b"\n"):
            more = connection.recv(64)
            if not more:
                break
            hello += more
        if hello.endswith(b"\n"):
            return connection
    except (OSError, KeyError):
        pass  # not there (any more); the lock tells whether it lives
    connection.close()
    return None


def _spawn() -> int:
    """Start the bench in a session of its own, holding its lock, unless somebody else just did. Returns how many were started."""
    folder = _folder()
    _reap()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise errors.MachineError("machine.write", path=folder, reason=error.strerror or str(error)) from None
    lock = durable.Lock(folder / "bench.lock")
    if not lock.take():
        return 0
    try:
        environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        environment |= {"LORA_STUDIO_HOME": str(home()), "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        log = folder / "log.txt"
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.unlink()
        with open(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0) as output:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "lora_studio.bench"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.handle],
                start_new_session=True, env=allotment.of_child(environment), cwd=folder,
            )  # fmt: skip
        _children.append(process)
        durable.write_json(folder / "process.json", {"pid": process.pid, "born": psutil.Process(process.pid).create_time()})
        return 1
    finally:
        lock.release()


def _reap() -> None:
    """Collect benches of this process that have ended, so that none stays a zombie."""
    _children[:] = [child for child in _children if child.poll() is None]
