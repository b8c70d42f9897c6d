"""Users are kept apart, as served: every route, event and server function of the running studio is tried by another visitor and by nobody,
with the ids of somebody else's things. What is tried is read from the running application, so a new event is tried too.
"""

import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from lora_studio import fence, hosting, keeping, ui, workspace
from tests.hosted import belongings
from tests.hosted.issuer import Issuer
from tests.hosted.test_door import enter

CANARY = "canaryana"
PUBLIC = {"/studio/health", "/robots.txt", "/favicon.ico", "/gradio_api/startup-events"}


@dataclass
class Served:
    """A running studio for visitors: its application, address, and what one of them owns."""

    app: object
    url: str
    ana: workspace.Workspace
    ben: workspace.Workspace
    owned: belongings.Belongings
    cookies: dict[str, str] = field(default_factory=dict)

    def ask(self, who: str | None, method: str, path: str, body: bytes | None = None, seconds: float = 60.0) -> tuple[int, str]:
        """The status and text of an answer."""
        headers = {"Content-Type": "application/json", **({"Cookie": f"studio={self.cookies[who]}"} if who else {})}
        request = urllib.request.Request(self.url + quote(path, safe="/=%?&"), data=body, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("served"), dict(os.environ)
    issuer = Issuer()
    for name in ("ana", "ben"):
        issuer.account(name, token=f"hf_{name * 8}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= issuer.environment(f"127.0.0.1:{port}") | {"LORA_STUDIO_OPEN": "visitors", "LORA_STUDIO_HOME": str(place / "home"), "GRADIO_TEMP_DIR": str(place / "gradio"), "LORA_STUDIO_RUNS": "1"}
    # A Space's id makes Gradio itself look for things on the Hub; the rest of its environment is what is tried here.
    os.environ.pop("SPACE_ID")
    limits = hosting.of(os.environ, host="127.0.0.1").limits
    ana, ben = (workspace.of_visitor(f"id-of-{name}", name, limits) for name in ("ana", "ben"))
    (place / "scratch").mkdir()
    owned = belongings.make(ana, CANARY, scratch=place / "scratch")
    pages = ui.serve(port=port, block=False)
    found = Served(pages.app, f"http://127.0.0.1:{port}", ana, ben, owned)
    for name in ("ana", "ben"):
        client = TestClient(pages.app, base_url=found.url, follow_redirects=False)
        enter(client, name)
        found.cookies[name] = client.cookies["studio"]
    yield found
    pages.close()
    pages.pump.stop()
    keeping.rest()
    issuer.close()
    fence.watch(lambda: None)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ |= before
    from tests.browser import made

    with made.at(place / "home") as bench:
        bench.stop()


@pytest.fixture(autouse=True)
def home(served, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(served.ana.root.parent.parent))
    return served.ana.root.parent.parent


def all_routes(app):
    """The routes of an application and of the routers it includes."""
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        yield from all_routes(inner) if inner is not None else [route]


def routes(served) -> list[tuple[str, str]]:
    """(method, path) of every route, with something of another's in the place of each parameter."""
    owned, out = served.owned, []
    own = {
        "/studio/adapter/{id}": [owned.run], "/studio/library/{id}": owned.ids, "/studio/sample/{id}/{name}": [f"{owned.run}/{owned.sample}"], "/studio/picture/{name}": [owned.picture],
        "/studio/album/{album}/{name:path}": [f"{owned.album}/{CANARY}.png", f"{owned.discarded}/{CANARY}.png"], "/studio/export/{token}/{name}": [f"{owned.export}/{owned.export_name}"],
    }  # fmt: skip
    for route in all_routes(served.app):
        path, methods = getattr(route, "path", ""), sorted(getattr(route, "methods", None) or ["GET"])
        if path in own:
            paths = [path[: path.index("{")] + found.replace("/home", "%2Fhome") for found in own[path]]
        elif "file=" in path or path.endswith("/file/{path:path}"):
            paths = [path[: path.index("{")] + place for place in (owned.data, str(served.ana.root / "runs"), "/etc/passwd", f"{served.ana.root}/library/{owned.adapter}/card.json")]
        else:
            paths = [re.sub(r"\{[^}]*\}", owned.run, path)]
        out += [(method, found) for method in methods if method in ("GET", "POST", "HEAD", "PUT", "DELETE") for found in paths]
    return out


def test_every_route_is_closed_to_nobody_and_shows_nothing_of_another(served):
    tried, before = 0, belongings.state(served.ana)
    for method, path in routes(served):
        if "queue/data" in path or "heartbeat" in path:  # streams; tried below
            continue
        body = b"{}" if method in ("POST", "PUT") else None
        status, text = served.ask(None, method, path, body)
        allowed = path in PUBLIC or path in ("", "/") or path.startswith(("/login/", "/logout"))
        assert allowed or status in (401, 404), (method, path, status)
        assert CANARY not in text
        status, text = served.ask("ben", method, path, body)
        shown = text
        for asked in (path, *sorted(path.split("/"), key=len, reverse=True)):  # a sentence may repeat what was asked for
            shown = shown.replace(asked, "") if asked else shown
        assert CANARY not in shown, (method, path)
        if (path.startswith("/studio/") and path != "/studio/health") or "file" in path:
            assert status in (404, 405), (method, path, status)
        if path == "/logout":
            served.cookies["ben"] = again(served, "ben")
        tried += 2
    assert tried > 150 and belongings.state(served.ana) == before


def again(served, name: str) -> str:
    client = TestClient(served.app, base_url=served.url, follow_redirects=False)
    enter(client, name)
    return client.cookies["studio"]


def test_owners_get_what_is_theirs_by_the_same_routes(served):
    owned = served.owned
    for path in (
        f"adapter/{owned.run}",
        f"library/{owned.adapter}",
        f"sample/{owned.run}/{owned.sample}",
        f"picture/{owned.picture}",
        f"album/{owned.album}/{CANARY}.png",
        f"export/{owned.export}/{owned.export_name}",
    ):
        assert served.ask("ana", "GET", f"/studio/{path}")[0] == 200, path


def listen(served, who: str, session: str, answers: dict[str, str], stop: threading.Event) -> None:
    """Read the streams of a session until told to stop; each ends when nothing is left to do."""
    request = urllib.request.Request(f"{served.url}/gradio_api/queue/data?session_hash={session}", headers={"Cookie": f"studio={served.cookies[who]}"})
    while not stop.is_set():
        with urllib.request.urlopen(request, timeout=120) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    told = json.loads(line[5:])
                    key = told.get("event_id") or ""
                    answers[key] = answers.get(key, "") + line.decode()
                    if told.get("msg") == "process_completed":
                        answers[f"done {key}"] = "yes"


def send(served, who: str, session: str, number: int, data: list) -> str | None:
    """Join the queue with an event; its id, or None when it is refused there."""
    status, text = served.ask(who, "POST", "/gradio_api/queue/join", json.dumps({"fn_index": number, "data": data, "session_hash": session, "trigger_id": None, "event_data": None}).encode())
    return json.loads(text)["event_id"] if status == 200 else None


class Told:
    """What a page knows of the studio: its components by number, its events, and which boxes stand for the parts of a whole form."""

    def __init__(self, config: dict):
        self.components = {component["id"]: component for component in config["components"]}
        self.events = [one for one in config["dependencies"] if one["backend_fn"]]
        gathers = [one for one in config["dependencies"] if not one["backend_fn"] and "JSON.stringify" in str(one["js"])]
        self.forms = {one["outputs"][0]: one["inputs"] for one in gathers}

    def parts(self, event: dict) -> list[int]:
        """The components whose values an event is told, with those inside of a form."""
        return [part for number in event["inputs"] for part in self.forms.get(number, [number])]

    def data(self, event: dict, value) -> list:
        """What the page sends with an event when each component has `value(its number)`."""
        return [json.dumps([value(part) for part in self.forms[number]]) if number in self.forms else value(number) for number in event["inputs"]]

    def variants(self, event: dict, owned) -> list[list]:
        """What an event is given: in each part an id of another's, in the shape its component takes."""
        ids = (owned.run, owned.adapter, owned.album, owned.data, owned.picture, owned.discarded, owned.model)
        return [self.data(event, lambda number, id=id: shaped(self.components[number], id)) for id in ids]


def shaped(component: dict, id: str):
    kind, props = component["type"], component["props"]
    if kind == "dropdown":
        return [id] if props.get("multiselect") else id
    if kind in ("file", "uploadbutton", "image"):
        found = {"path": id if id.startswith("/") else f"/tmp/{id}", "meta": {"_type": "gradio.FileData"}}
        return [found] if props.get("file_count") == "multiple" else found
    if kind in ("checkbox",):
        return True
    if kind in ("number", "slider"):
        return 1
    return None if kind == "state" else id


@pytest.fixture(scope="module")
def config(served):
    return json.loads(served.ask("ben", "GET", "/config")[1])


def test_every_event_finds_nothing_of_another(served, config):
    """Each event is given every kind of id; its own conversation with its owner would be full of the canary."""
    told = Told(config)
    before, session, answers, stop = belongings.state(served.ana), "bensession1", {}, threading.Event()
    asked: dict[str, tuple[int, int]] = {}
    until, events = time.monotonic() + 240, told.events
    first = send(served, "ben", session, events[0]["id"], told.variants(events[0], served.owned)[0])
    thread = threading.Thread(target=listen, args=(served, "ben", session, answers, stop), daemon=True)
    thread.start()
    asked[first] = (events[0]["id"], 0)
    for event in events:
        for number, data in enumerate(told.variants(event, served.owned)):
            if not event["inputs"] and number:
                break
            id = send(served, "ben", session, event["id"], data)
            if id is not None:
                asked[id] = (event["id"], number)
            while sum(f"done {id}" not in answers for id in asked) > 40 and time.monotonic() < until:
                time.sleep(0.02)
    while any(f"done {id}" not in answers for id in asked) and time.monotonic() < until:
        time.sleep(0.05)
    stop.set()
    assert not [asked[id] for id in asked if f"done {id}" not in answers]
    # A sentence may repeat the id that was asked for, and nothing more.
    words = sorted({served.owned.album, served.owned.discarded, served.owned.data, served.owned.model, f"{CANARY}-model", f"{CANARY}.jsonl"}, key=len, reverse=True)
    leaks = {}
    for id, text in answers.items():
        for word in words:
            text = text.replace(word, "")
        if CANARY in text:
            leaks[asked.get(id)] = text[max(0, text.index(CANARY) - 200) : text.index(CANARY) + 80]
    assert not leaks
    assert len(events) > 100 and len(asked) > 300 and len(told.forms) >= 4 and belongings.state(served.ana) == before
    print(f"{len(events)} events, {len(asked)} calls, {len(leaks)} leaks")


def test_every_server_function_finds_nothing_of_another(served, config):
    owned, tried, before = served.owned, 0, belongings.state(served.ana)
    for component in config["components"]:
        for name in component["props"].get("server_fns") or []:
            for data in ([owned.run, 0, 0, 0], [owned.run, 0, 0, 0, 0], [owned.album, f"{CANARY}.png", "stolen", ""], [owned.adapter], owned.run, {"id": owned.run}, None):
                body = {"session_hash": "bensession2", "component_id": component["id"], "fn_name": name, "data": data}
                status, text = served.ask("ben", "POST", "/gradio_api/component_server", json.dumps(body).encode())
                assert CANARY not in text.replace(owned.album, "") and served.ask(None, "POST", "/gradio_api/component_server", json.dumps(body).encode())[0] == 401
                tried += 1
    assert tried >= 14 and belongings.state(served.ana) == before


def test_another_session_is_not_there(served, config):
    event = next(one for one in config["dependencies"] if one["backend_fn"] and not one["inputs"])
    assert send(served, "ana", "anasession", event["id"], [])
    for who, status in (("ben", 404), (None, 401)):
        for method, path, body in (
            ("GET", "/gradio_api/queue/data?session_hash=anasession", None),
            ("GET", "/gradio_api/heartbeat/anasession", None),
            ("POST", "/gradio_api/queue/join", {"session_hash": "anasession", "fn_index": event["id"], "data": []}),
            ("POST", "/gradio_api/run/predict", {"session_hash": "anasession", "fn_index": event["id"], "data": []}),
            ("POST", "/gradio_api/cancel", {"session_hash": "anasession", "fn_index": event["id"], "event_id": "x"}),
            ("POST", "/gradio_api/component_server", {"session_hash": "anasession", "component_id": 1, "fn_name": "x", "data": None}),
        ):
            assert served.ask(who, method, path, json.dumps(body).encode() if body else None)[0] == status, path


def test_the_page_that_everybody_is_sent_holds_nothing_of_anybody(served, config):
    assert CANARY not in json.dumps(config) and str(served.ana.root.parent.parent) not in json.dumps(config)


def test_no_token_is_in_a_file_of_the_studio(served):
    home = served.ana.root.parent.parent
    for path in home.parent.rglob("*"):
        if path.is_file():
            assert b"hf_ana" not in path.read_bytes(), path
