"""The bench: the one resident process that reads adapters, previews and saves blends, and answers. `python -m lora_studio.bench`.

It is started and asked by `jobs.bench`, over a unix socket that only its owner can open. A connection carries one request, a line of
JSON {verb, ...}, and then events, a line each, up to `result`, `done` or `error`; closing it cancels. Work is done by the main thread,
one request after another, so torch has one thread of ours; each connection has a thread that listens, says every second that work is
going on, and answers by itself what must not wait (ping, status, stop, the wish for room).

While a model is loaded the bench holds its device's lock like any worker, on the CPU too: one law for all devices, and a run gets the
memory and the cores it was promised. A run that starts asks for room; the answer being spoken ends with a sentence, the model is
unloaded, and the next answer after the run loads it again.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from pathlib import Path

from lora_studio import durable
from lora_studio.errors import BenchError, StudioError
from lora_studio.home import PACKAGE, home

IDLE_SECONDS = 600.0
BEAT_SECONDS = 1.0
SEND_SECONDS = 10.0
STOP_SECONDS = 2.0
LONGEST_PATH = 100  # of the 108 bytes a unix socket's address may have
LONGEST_REQUEST = 16 << 20
TEMPORARY = "lora-bench-"


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """One request and who waits for it."""

    def __init__(self, request: dict, peer: socket.socket):
        self.request, self.peer = request, peer
        self.cancelled, self.guard, self.doing = False, threading.Lock(), "waiting for its turn"
        self.is_over = False

    def send(self, event: str, **fields) -> None:
        """Send one event. Raises Cancelled when nobody takes it."""
        line = json.dumps({"event": event, **fields}, ensure_ascii=False).encode() + b"\n"
        try:
            with self.guard:
                self.peer.sendall(line)
        except OSError:
            self.cancelled = True
            raise Cancelled from None

    def check(self) -> None:
        """Raise Cancelled when nobody waits any more."""
        if self.cancelled:
            raise Cancelled

    def end(self, event: str, **fields) -> None:
        """Send the last event and let go of the connection. It is over before the last event is out: who got it may ask what is being done."""
        self.is_over = True
        with contextlib.suppress(Cancelled):
            self.send(event, **fields)
        with contextlib.suppress(OSError):
            self.peer.shutdown(socket.SHUT_RDWR)


class Server:
    """The socket, its connections and the line of jobs."""

    def __init__(self, folder: Path, desk, *, idle: float = IDLE_SECONDS):
        self.folder, self.desk, self.idle = folder, desk, idle
        self.line: deque[Job] = deque()
        self.news = threading.Condition()
        self.current: Job | None = None
        self.peers, self.closed, self.last = 0, False, time.monotonic()
        self.address, self.listener = _listen(folder)

    def run(self) -> None:
        """Serve until stopped, or idle for long."""
        durable.write_json(self.folder / "socket.json", {"socket": str(self.address)})
        threading.Thread(target=self._accept, daemon=True).start()
        print(f"listening (process {os.getpid()})", flush=True)
        while not self._is_over():
            job = self._next()
            if job is not None:
                self._do(job)
                with self.news:
                    self.current, self.last = None, time.monotonic()

    def close(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            self.listener.close()
        _sweep(self.address)
        (self.folder / "socket.json").unlink(missing_ok=True)

    def _next(self) -> Job | None:
        with self.news:
            self.news.wait_for(lambda: self.line or self.closed, timeout=min(1.0, self.idle / 4))
            self.current = self.line.popleft() if self.line else None
            return self.current

    def _is_over(self) -> bool:
        """Whether to end: asked to, idle, or the home is gone. Afterwards nobody is taken in."""
        with self.news:
            is_idle = not self.line and not self.peers and time.monotonic() - self.last > self.idle
            if is_idle and not self.closed:
                print(f"ended after {self.idle:g} seconds without a request", flush=True)
            self.closed = self.closed or is_idle or not self.folder.is_dir()
            return self.closed

    def _do(self, job: Job) -> None:
        """One job, to its last event. What goes wrong is a sentence; a bug also leaves its traceback in the log."""
        verb = str(job.request.get("verb"))[:40]
        try:
            if verb != "unload":  # room is made even for one who stopped waiting
                job.check()
            if verb != "preview":  # one for every move of a slider
                print(f"{time.strftime('%H:%M:%S')} {verb}", flush=True)
            last, fields = self.desk.do(job)
            job.end(last, **fields)
        except Cancelled:
            told = BenchError("bench.cancelled")
            job.end("error", error=told.key, kind="BenchError", sentence=str(told))
        except StudioError as error:
            print(f"{verb} was refused: {error.key}", flush=True)
            job.end("error", error=error.key, kind=type(error).__name__, sentence=str(error))
        except Exception as error:  # noqa: BLE001 (the process lives on, the person is told)
            traceback.print_exc()
            sys.stderr.flush()
            told = BenchError("bench.bug", verb=verb, reason=_in_words(error), log=self.folder / "log.txt")
            job.end("error", error=told.key, kind="BenchError", sentence=str(told))

    # ---- connections

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with self.news:
                if self.closed:
                    peer.close()
                    continue
                self.peers += 1
            threading.Thread(target=self._attend, args=(peer,), daemon=True).start()

    def _attend(self, peer: socket.socket) -> None:
        """One connection, from its greeting to its end."""
        try:
            with peer:
                peer.settimeout(SEND_SECONDS)
                peer.sendall(b'{"event": "hello"}\n')
                request = _request(peer)
                if request is not None:
                    self._take(Job(request, peer))
        except OSError:
            pass  # the client is gone, and nobody is left to be told
        finally:
            with self.news:
                self.peers -= 1

    def _take(self, job: Job) -> None:
        verb = job.request.get("verb")
        if verb == "ping":
            job.end("result", pid=os.getpid())
        elif verb == "status":
            current = self.current
            doing = current.doing if current and not current.is_over else ""
            job.end("result", pid=os.getpid(), waiting=len(self.line), doing=doing, **self.desk.status())
        elif verb == "stop":
            self._stop(job)
        elif verb == "unload" and not self.desk.make_room(job.request):
            job.end("result", unloaded=False)
        else:
            with self.news:
                # Whoever needs the device goes before those who wait for answers.
                self.line.appendleft(job) if verb == "unload" else self.line.append(job)
                self.news.notify_all()
            self._watch(job)

    def _watch(self, job: Job) -> None:
        """Listen while the job is worked on: a closed connection cancels it, and each beat says that it is not forgotten."""
        while True:
            if select.select([job.peer], [], [], BEAT_SECONDS)[0]:
                job.cancelled = job.cancelled or not _peek(job.peer)
                return
            try:
                job.send("waiting", doing=job.doing)
            except Cancelled:
                return

    def _stop(self, job: Job) -> None:
        print("ended because it was asked to", flush=True)
        with self.news:
            self.closed = True
            for other in [*self.line, *filter(None, [self.current])]:
                other.cancelled = True
            self.news.notify_all()
        job.end("result", stopped=True)
        # What is written is written whole or not at all, so work that does not look up is simply left.
        timer = threading.Timer(STOP_SECONDS, self._leave)
        timer.daemon = True
        timer.start()

    def _leave(self) -> None:
        self.close()
        os._exit(0)


def _request(peer: socket.socket) -> dict | None:
    """The request of a connection; None when it sent none, or none that is one."""
    block = b""
    while b"\n" not in block:
        more = peer.recv(1 << 16)
        if not more or len(block) > LONGEST_REQUEST:
            return None
        block += more
    try:
        request = json.loads(block.partition(b"\n")[0])
    except ValueError:
        return None
    return request if isinstance(request, dict) else None


def _peek(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


def _listen(folder: Path) -> tuple[Path, socket.socket]:
    """A socket only its owner can open: in `folder`, or in a private temporary one where that path is too long for a socket."""
    record = durable.read_json(folder / "socket.json", {})
    if isinstance(record, dict) and record.get("socket"):
        _sweep(Path(record["socket"]))
    address = folder / "socket"
    if len(os.fsencode(address)) > LONGEST_PATH:
        address = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir="/tmp" if os.path.isdir("/tmp") else None)) / "socket"
    address.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(address))
    finally:
        os.umask(before)
    listener.listen(64)
    return address, listener


def _sweep(address: Path) -> None:
    """Delete a socket, and the temporary folder that was made for it."""
    with contextlib.suppress(OSError):
        address.unlink(missing_ok=True)
    if address.parent.name.startswith(TEMPORARY) and not address.parent.is_symlink():
        shutil.rmtree(address.parent, ignore_errors=True)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['(no words)'])[0][:200]}".rstrip(".")


def main() -> None:
    """Serve until the end of the process. The lock was taken by whoever started it and is held while the process lives."""
    folder = home() / "bench"
    idle = float(os.environ.get("LORA_STUDIO_BENCH_IDLE") or IDLE_SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from lora_studio.inference.desk import Desk

    server = Server(folder, Desk(), idle=idle)
    try:
        server.run()
    finally:
        server.close()
    # Nothing is left to put in order, and torch would take seconds over it.
    os._exit(0)


if __name__ == "__main__":
    # Imported as itself, so that its classes are the ones others see.
    sys.path.insert(0, str(PACKAGE.parent))
    main()
