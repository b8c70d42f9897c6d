"""An audit hook for every Python process whose PYTHONPATH leads here: what goes beyond the rules is written down.

The rules are the JSON file $LORA_STUDIO_WATCH: `log` (where it is written down), `read` and `write` (folders in which that is
right), `never` (places that nobody may touch), `marks` (texts that may stand in no command, module or code) and `programs`.
"""

import json
import os
import sys
from collections import Counter

READS = {"os.listdir": 1, "os.scandir": 1, "os.chdir": 1}
WRITES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1, "os.utime": 1, "os.chown": 1, "sqlite3.connect": 1}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEVER = {"os.system", "os.exec", "os.startfile", "pty.spawn", "webbrowser.open", "pickle.find_class", "telnetlib.Telnet.open", "ftplib.connect", "smtplib.connect"}
LOOPBACK = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "", None}


class Watch:
    """The hook, its rules, and how often each kind of event was seen."""

    def __init__(self, rules: dict):
        self.rules, self.counts, self.is_on = rules, Counter(), True
        self.log = os.open(rules["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        sys.addaudithook(self)

    def __call__(self, event: str, given: tuple) -> None:
        if not self.is_on:
            return
        told = self.judge(event, given)
        if told:
            line = {"event": event, "told": told[:300], "process": " ".join(sys.argv)[:200]}
            os.write(self.log, (json.dumps(line) + "\n").encode())

    def judge(self, event: str, given: tuple) -> str:
        """What is wrong with an event; empty when nothing is."""
        if event == "open":
            self.counts[event] += 1
            flags = given[2] if isinstance(given[2], int) else 0
            return self.place(given[0], "write" if flags & WRITING else "read")
        if event in READS or event in WRITES:
            self.counts[event] += 1
            count = READS.get(event) or WRITES[event]
            if any(isinstance(handle, int) and handle >= 0 for handle in given[-count:]) and not any("/" in os.fsdecode(name) for name in given[:count] if not isinstance(name, int)):
                return ""  # a plain name within a folder that was opened, and judged, before
            return next((told for place in given[:count] if (told := self.place(place, "read" if event in READS else "write"))), "")
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            self.counts[event] += 1
            address = given[1] if event in ("socket.connect", "socket.sendto") else given[0]
            host = address[0] if isinstance(address, tuple) else None
            host = address if event in ("socket.getaddrinfo", "socket.gethostbyname") else host
            host = host.decode("utf-8", "replace") if isinstance(host, bytes) else host
            return "" if host in LOOPBACK else f"a connection to {host}"
        if event in ("subprocess.Popen", "os.posix_spawn"):
            self.counts[event] += 1
            command = [os.fsdecode(part) for part in given[1]] if not isinstance(given[1], (str, bytes)) else [os.fsdecode(given[1])]
            is_known = os.path.basename(os.fsdecode(given[0] or command[0])) in self.rules["programs"]
            return "" if is_known and not self.marked(" ".join(command)) else f"a process: {command}"
        if event == "import":
            return f"the module {given[0]}" if self.marked(str(given[0])) or given[0] in self.rules["modules"] else ""
        if event == "compile":
            source = given[0].decode("utf-8", "replace") if isinstance(given[0], bytes) else given[0]
            return f"code: {source}" if isinstance(source, str) and self.marked(source) else ""
        return f"{event} {given!r}" if event in NEVER else ""

    def marked(self, text: str) -> bool:
        return any(mark in text for mark in self.rules["marks"])

    def place(self, place, how: str) -> str:
        """What is wrong with touching a place; empty when nothing is. Numbers are handles of what was opened before."""
        if not isinstance(place, (str, bytes, os.PathLike)):
            return ""
        text = os.fsdecode(place)
        if text == ":memory:" or "\0" in text:
            return ""
        asked = os.path.abspath(text)
        real = os.path.realpath(asked)
        for found in {asked, real}:
            if any(_inside(found, top) for top in self.rules["never"]):
                return f"{how} {text}"
        return "" if any(_inside(real, top) for top in self.rules[how]) else f"{how} {text}"


def _inside(place: str, top: str) -> bool:
    return place == top or place.startswith(top.rstrip("/") + "/")


if os.environ.get("LORA_STUDIO_WATCH"):
    with open(os.environ["LORA_STUDIO_WATCH"], encoding="utf-8") as file:
        watch = Watch(json.load(file))
