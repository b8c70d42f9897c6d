"""Hostile names: sixty and more through every text field, server function and file name of the running studio, while an audit hook in each
of its processes watches what is opened, made, started, fetched and imported.
"""

import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests import tiny
from tests.hosted import hostile
from tests.hosted.test_served import Told, config, home, listen, served, shaped  # noqa: F401

TEXTS = ("textbox", "dropdown", "radio", "file", "uploadbutton", "image", "html", "code")
FIELDS = ("id", "adapter", "block", "weights", "name", "album", "picture", "value", "chosen", "turn", "before", "after", "run", "at")
WATCHED = Path(__file__).parent / "watched"
SYSTEM = ["/usr", "/lib", "/lib64", "/proc", "/sys", "/dev/null", "/dev/shm", "/dev/urandom", "/etc/localtime", "/etc/mime.types", "/etc/ssl", "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"]


@pytest.fixture(scope="module", autouse=True)
def watch(tmp_path_factory):
    """The hook, in this process and in all that it starts; what it wrote down is read at the end."""
    place, before = tmp_path_factory.mktemp("watched"), dict(os.environ)
    outside = hostile.outside(place)
    inside = sorted(path.name for path in outside.rglob("*") if path.is_file())
    packages = {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parent.parent.parent)}
    temporary = os.path.realpath(tmp_path_factory.getbasetemp())
    rules = {
        "log": str(place / "log.jsonl"), "read": [temporary, os.path.realpath("/tmp"), *SYSTEM, *packages], "write": [temporary, os.path.realpath("/tmp"), "/dev/null", "/dev/shm"],
        "never": [str(outside), "/etc/passwd", "/proc/self/environ", "/dev/zero", os.path.expanduser("~root/.ssh"), os.path.expanduser("~root/.profile")], "marks": [hostile.MARK], "modules": ["antigravity", "this"],
        "programs": [os.path.basename(sys.executable), os.path.basename(os.path.realpath(sys.executable)), "nvidia-smi", "ldconfig"],
    }  # fmt: skip
    (place / "rules.json").write_text(json.dumps(rules))
    os.environ |= {"LORA_STUDIO_WATCH": str(place / "rules.json"), "PYTHONPATH": os.pathsep.join([str(WATCHED), os.environ.get("PYTHONPATH", "")]), "HOME": str(outside), "LORA_STUDIO_STEPS": "1"}
    sys.path.insert(0, str(WATCHED))
    sys.modules.pop("sitecustomize", None)
    import sitecustomize

    found = sitecustomize.watch
    found.outside, found.path, found.before = outside, place / "log.jsonl", inside
    yield found
    found.is_on = False
    sys.path.remove(str(WATCHED))
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ |= before


class Talk(Told):
    """A visitor's conversation with the running studio: calls wait at most forty at a time, and every answer is kept."""

    def __init__(self, studio, config: dict, session: str, seconds: float):  # noqa: F811
        super().__init__(config)
        self.served, self.session, self.until = studio, session, time.monotonic() + seconds
        self.asked, self.answers, self.refused, self.stop, self.thread = {}, {}, 0, threading.Event(), None

    def texts(self, event: dict) -> list[int]:
        """Which parts of what an event is told hold a text or name a file."""
        return [number for number in self.parts(event) if self.components[number]["type"] in TEXTS]

    def call(self, event: dict, given: dict[int, object], name: str) -> None:
        """Join the queue with an event: what the page would send, but for the values `given` by component."""
        data = self.data(event, lambda number: given.get(number, self.components[number]["props"].get("value")))
        told = {"fn_index": event["id"], "data": data, "session_hash": self.session, "trigger_id": None, "event_data": dict.fromkeys(FIELDS, name)}
        status, text = self.served.ask("ben", "POST", "/gradio_api/queue/join", json.dumps(told).encode())
        if status != 200:
            self.refused += 1
            return
        self.asked[json.loads(text)["event_id"]] = (event["api_name"], name[:60])
        if self.thread is None:
            self.thread = threading.Thread(target=listen, args=(self.served, "ben", self.session, self.answers, self.stop), daemon=True)
            self.thread.start()
        self.wait(40)

    def wait(self, most: int = 0) -> None:
        """Until at most so many calls are not answered."""
        while sum(f"done {id}" not in self.answers for id in self.asked) > most and time.monotonic() < self.until:
            time.sleep(0.02)

    def end(self) -> None:
        self.wait()
        self.stop.set()
        assert not [self.asked[id] for id in self.asked if f"done {id}" not in self.answers]
        assert not [text for text in self.answers.values() if hostile.SECRET in text]


def refuse(watch, root: Path, capfd) -> None:
    """Fail on anything that was done because of a name, and on a name that came to a traceback of ours in place of a sentence."""
    watch.is_on = False
    err = capfd.readouterr().err
    broken = [
        one
        for one in err.split("Traceback (most recent call last):")[1:]
        if re.search(r"^([\w.]+\.)?(OSError|RuntimeError|RecursionError|Unicode\w+|ValueError|\w+DecodeError|KeyError|NameError|SyntaxError)\b", one, re.M) and "/lora_studio/" in one
    ]
    told = [json.loads(line) for line in watch.path.read_text().splitlines()]
    assert not told, f"{len(told)}: {told[:5]}"
    assert not broken, broken[0][-3000:]
    assert sorted(path.name for path in watch.outside.rglob("*") if path.is_file()) == watch.before
    assert all(hostile.SECRET.encode() not in path.read_bytes() for path in root.rglob("*") if path.is_file())
    watch.is_on = True


@pytest.mark.parametrize("act", ["open({place!r}).read()", "import os; os.mkdir({place!r} + 'x')", "import antigravity", "import socket; socket.create_connection(('203.0.113.9', 9), 0.01)", "exec('zq9x = 1')"])
def test_the_hook_sees_what_it_should_in_every_process(watch, act):
    """Otherwise the tests below would pass over anything."""
    code = act.format(place=str(watch.outside / "config.json"))
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env={**os.environ, "BROWSER": "true"})
    told = watch.path.read_text()
    watch.path.write_text("")
    assert told, code
    watch.is_on = False
    (watch.outside / "config.jsonx").rmdir() if "mkdir" in act else None
    watch.is_on = True


def test_every_name_in_every_event_one_field_at_a_time(watch, served, config, capfd):  # noqa: F811
    """Each text field of each kind of event once, the names going round; a long form's fields share its turn."""
    names, turn, seen = hostile.names(watch.outside), 0, set()
    talk = Talk(served, config, "hostile1", seconds=300)
    for event in talk.events:
        kind = re.sub(r"_\d+$", "", event["api_name"] or ""), len(talk.parts(event))
        fields = [] if kind in seen else talk.texts(event)
        seen.add(kind)
        for number in fields if len(fields) < 20 else fields[:: len(fields) // 8]:
            name, turn = names[turn % len(names)], turn + 1
            talk.call(event, {number: shaped(talk.components[number], name)}, name)
    talk.end()
    with capfd.disabled():
        print(f"{len(names)} names, {len(seen)} kinds of events, {len(talk.asked)} calls, {talk.refused} refused at the door; watched: {dict(watch.counts)}")
    assert len(names) >= 60 and len(talk.asked) > 100 and watch.counts["open"] > 1000
    refuse(watch, served.ben.root, capfd)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LORA_STUDIO_CAMPAIGN") != "1", reason="a campaign of some 12,000 calls: LORA_STUDIO_CAMPAIGN=1 runs it")
def test_every_name_in_every_field_of_every_event(watch, served, config, capfd):  # noqa: F811
    talk, names = Talk(served, config, "hostile2", seconds=3000), hostile.names(watch.outside)
    for event in talk.events:
        fields = talk.texts(event)
        for name in names if fields else names[:1]:
            talk.call(event, {number: shaped(talk.components[number], name) for number in fields}, name)
    talk.end()
    with capfd.disabled():
        print(f"{len(names)} names, {len(talk.events)} events, {len(talk.asked)} calls, {talk.refused} refused at the door; watched: {dict(watch.counts)}")
    refuse(watch, served.ben.root, capfd)


def test_every_name_in_every_server_function(watch, served, config, capfd):  # noqa: F811
    names, tried = hostile.names(watch.outside), 0
    functions = {(component["id"], name) for component in config["components"] for name in component["props"].get("server_fns") or []}
    by_name = {name: id for id, name in functions}
    for function, id in by_name.items():
        for name in names:
            for data in (name, [name] * 4, {"id": name, "name": name}):
                body = {"session_hash": "hostile3", "component_id": id, "fn_name": function, "data": data}
                status, text = served.ask("ben", "POST", "/gradio_api/component_server", json.dumps(body).encode())
                assert hostile.SECRET not in text and (status != 200 or "error" in text or text in ("null", "{}", "[]") or len(text) < 3000), (function, name[:40], text[:200])
                tried += 1
    assert tried > 180
    refuse(watch, served.ben.root, capfd)


def upload(studio, name: str, content: bytes) -> list[str]:
    """Send a file under a name, as a browser would not; the places that were told, none when it was refused."""
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode("utf-8", "surrogatepass") + b'"\r\nContent-Type: application/octet-stream\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b", "Cookie": f"studio={studio.cookies['ben']}"}
    request = urllib.request.Request(f"{studio.url}/gradio_api/upload", data=head + content + b"\r\n--b--\r\n", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        assert error.code < 500 or name in UNSENDABLE or len(name) > 200, (name[:60], error.code)
        return []


UNSENDABLE = ("rows\0.jsonl", "\0", "\ud800")  # names that no file system, or no answer, could hold


def archive(names: list[str], content: bytes) -> bytes:
    """A .zip whose members have these names."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def test_every_name_as_the_name_of_an_upload_and_of_a_member_of_an_archive(watch, served, config, capfd):  # noqa: F811
    """Rows, pictures and adapters come under hostile names, and in archives with hostile members; each goes to every event that takes files."""
    talk, names = Talk(served, config, "hostile4", seconds=240), hostile.names(watch.outside)
    takers = [event for event in talk.events if any(talk.components[number]["type"] in ("file", "uploadbutton") for number in event["inputs"])]
    rows, tensors = (b'{"prompt": "a", "completion": "b"}\n', tiny.adapter_files(tiny_base(), seed=5, rank=2, size=0.05, ends=("q_proj",), name="demo-text"))
    sent = 0
    for turn, name in enumerate(names):
        event = takers[turn % len(takers)]
        suffix, content = ((".jsonl", rows), (".png", b"\x89PNG\r\n\x1a\n" + rows), (".safetensors", tensors["adapter_model.safetensors"]))[turn % 3]
        found = upload(served, f"{name}{suffix}", content)
        sent += len(found)
        for path in found:
            assert Path(path).resolve().is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()), (name, path)
            give(talk, event, path, name)
    sendable = [name for name in names if "\ud800" not in name and len(name) < 60_000]
    for suffix, content in ((".jsonl", rows), (".png", rows), (".safetensors", tensors["adapter_model.safetensors"])):
        whole = archive([f"{name}{suffix}" for name in dict.fromkeys(sendable)], content)
        for path in upload(served, "members.zip", whole):
            for event in takers:
                give(talk, event, path, "members.zip")
    talk.end()
    with capfd.disabled():
        print(f"{len(names)} names, {sent} files taken in, {len(talk.asked)} calls")
    assert sent > 40 and len(talk.asked) > 40
    refuse(watch, served.ben.root, capfd)


def tiny_base() -> Path:
    from lora_studio.home import demo_base

    return demo_base("demo-text")


def give(talk: Talk, event: dict, path: str, name: str) -> None:
    """Call an event with an uploaded file."""
    given = {}
    for number in event["inputs"]:
        if talk.components[number]["type"] in ("file", "uploadbutton"):
            given[number] = [{"path": path, "orig_name": name[:5000], "meta": {"_type": "gradio.FileData"}}]
    talk.call(event, given, name)
