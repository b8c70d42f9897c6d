"""The door: who asks is known before anything answers, and another's session, file or event is not there."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lora_studio import hosting
from lora_studio.fence import Limits
from lora_studio.hosting import Hosting, OAuth
from lora_studio.ui import door, sign_in
from lora_studio.ui.door import Door
from lora_studio.ui.seat import WORKSPACE
from lora_studio.ui.sign_in import Memory, Person, SignIn
from tests.hosted.issuer import Issuer

UPLOADS = "/tmp/uploads-of-the-test"
TOKENS = {name: f"hf_{name * 6}" for name in ("ana", "ben")}


@pytest.fixture
def issuer():
    found = Issuer()
    for name, token in TOKENS.items():
        found.account(name, token=token)
    yield found
    found.close()


def served(kind: str, issuer=None, **options):
    """A client for a door with a small Gradio behind it, and its sign-in."""

    async def echo(request: Request):
        told = await request.json() if request.method == "POST" and "upload" not in request.url.path else {}
        if request.method == "POST" and "upload" in request.url.path:
            return JSONResponse([f"{UPLOADS}/{len(await request.body())}/rows.jsonl"])
        if request.url.path.endswith("/queue/join"):
            return JSONResponse({"event_id": f"event-of-{told['session_hash']}"})
        return JSONResponse({"root": Path(request.scope[WORKSPACE].root).name} if WORKSPACE in request.scope else {})

    oauth = OAuth(issuer.url, issuer.client, issuer.secret, "openid profile") if issuer else None
    how = Hosting(kind, oauth=oauth, hosts=(), **{"limits": Limits(upload=1000), **options})
    signs = SignIn(how)
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])], middleware=[Middleware(Door, hosting=how, signs=signs, uploads=UPLOADS, shared=list)])
    return TestClient(app, follow_redirects=False, raise_server_exceptions=True), signs


def signed_in(kind: str, issuer, *names: str, **options):
    """A client for each of several people who signed in at the provider."""
    first, signs = served(kind, issuer, **options)
    out = []
    for name in names:
        client = TestClient(first.app, follow_redirects=False)
        enter(client, name)
        out.append(client)
    return out, signs


def enter(client, name: str) -> None:
    """The whole way over the provider."""
    import urllib.request

    there = client.get("/login/huggingface")
    assert there.status_code == 303

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *given):
            return None

    try:
        urllib.request.build_opener(Stay).open(there.headers["location"] + f"&as={name}")
    except urllib.error.HTTPError as answer:
        back = answer.headers["Location"]
    done = client.get("/" + back.split("/", 3)[3])
    assert done.status_code == 303 and done.headers["location"] == "/"


@pytest.mark.parametrize("path", ["/config", "/gradio_api/queue/data?session_hash=x", "/studio/library/abc", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/nothing"])
@pytest.mark.parametrize("kind", ["local", "owner", "visitors"])
def test_nobody_gets_past_it_without_signing_in(kind, path, issuer):
    client, _ = served(kind, None if kind == "local" else issuer, password="long enough" if kind == "local" else "")
    assert client.get(path).status_code == 401
    page = client.get("/")
    assert page.status_code == 200 and "Sign in" in page.text and "gradio" not in page.text


def test_two_visitors_sign_in_and_have_workspaces_of_their_own(issuer, home):
    (ana, ben), signs = signed_in("visitors", issuer, "ana", "ben")
    roots = [client.get("/config").json()["root"] for client in (ana, ben)]
    assert len(set(roots)) == 2 and all((home / "users" / root / "runs").is_dir() for root in roots)
    assert {one.value.token for one in signs.sessions.kept.values()} == set(TOKENS.values())
    cookie = ana.cookies["studio"]
    assert "hf_" not in cookie and ana.get("/logout").status_code == 303
    ana.cookies["studio"] = cookie
    assert ana.get("/config").status_code == 401


def test_only_the_owner_enters_the_owners_studio(issuer, home):
    (ana, ben), _ = signed_in("owner", issuer, "ana", "ben", owners=("Ana",))
    assert ana.get("/config").json()["root"] == home.name
    assert ben.get("/config").status_code == 401 and "signed in as ben" in ben.get("/").text


def test_who_writes_for_the_organization_that_owns_it_enters(issuer, home):
    issuer.account("cyd", token="hf_cyd", orgs=[{"preferred_username": "team", "roleInOrg": "write"}])
    issuer.account("dot", token="hf_dot", orgs=[{"preferred_username": "team", "roleInOrg": "read"}])
    (cyd, dot), _ = signed_in("owner", issuer, "cyd", "dot", owners=("team",))
    assert cyd.get("/config").status_code == 200 and dot.get("/config").status_code == 401


def test_a_way_back_that_was_begun_elsewhere_is_refused(issuer):
    first, _ = served("visitors", issuer)
    other = TestClient(first.app, follow_redirects=False)
    first.get("/login/huggingface")
    for asked in ("code=x&state=y", "", "error=access_denied&state=z"):
        answer = other.get(f"/login/callback?{asked}")
        assert answer.status_code == 403 and "did not come through" in answer.text and "set-cookie" not in answer.headers


@pytest.mark.parametrize("route", ["/oauth/token", "/oauth/userinfo"])
def test_a_provider_that_fails_lets_nobody_in(issuer, route):
    client, signs = served("visitors", issuer)
    issuer.refuse.add(route)
    with pytest.raises(AssertionError):
        enter(client, "ana")
    assert not signs.sessions.kept


def test_a_password_opens_and_a_wrong_one_does_not(home):
    client, _ = served("local", password="long enough")
    assert client.post("/studio/sign-in", data={"password": "wrong"}).status_code == 403
    opened = client.post("/studio/sign-in", data={"password": "long enough"})
    assert opened.status_code == 303 and "HttpOnly" in opened.headers["set-cookie"] and "long" not in opened.headers["set-cookie"]
    assert client.get("/config").json()["root"] == home.name


def test_ten_wrong_passwords_a_minute_close_the_door_for_the_right_one_too(monkeypatch):
    client, signs = served("local", password="long enough")
    for _ in range(sign_in.TRIES):
        client.post("/studio/sign-in", data={"password": "wrong"})
    assert client.post("/studio/sign-in", data={"password": "long enough"}).status_code == 403
    signs.tries = [moment - sign_in.TRIES_SECONDS for moment in signs.tries]
    assert client.post("/studio/sign-in", data={"password": "long enough"}).status_code == 303


def test_routes_that_the_pages_do_not_need_are_not_there(issuer):
    (ana,), _ = signed_in("visitors", issuer, "ana")
    for path in (
        "/gradio_api/call/anything",
        "/gradio_api/run/anything",
        "/gradio_api/api/x",
        "/monitoring",
        "/gradio_api/vibe-edit",
        "/gradio_api/openapi.json",
        "/gradio_api/proxy=http://x",
        "/docs",
    ):
        assert ana.get(path).status_code == 404 and ana.post(path, json={}).status_code == 404


def test_a_session_is_the_first_ones_who_used_it(issuer):
    (ana, ben), _ = signed_in("visitors", issuer, "ana", "ben")
    assert ana.post("/gradio_api/queue/join", json={"session_hash": "s1", "data": []}).status_code == 200
    for ask in (
        lambda client: client.get("/gradio_api/queue/data?session_hash=s1"),
        lambda client: client.get("/gradio_api/heartbeat/s1"),
        lambda client: client.post("/gradio_api/queue/join", json={"session_hash": "s1", "data": []}),
        lambda client: client.post("/gradio_api/component_server", json={"session_hash": "s1", "data": []}),
        lambda client: client.post("/gradio_api/run/predict", json={"session_hash": "s1", "data": []}),
    ):
        assert ask(ben).status_code == 404 and ask(ana).status_code == 200


def test_an_event_is_cancelled_by_its_own_only(issuer):
    (ana, ben), _ = signed_in("visitors", issuer, "ana", "ben")
    ana.post("/gradio_api/queue/join", json={"session_hash": "s1", "data": []})
    asked = {"session_hash": "s2", "fn_index": 0, "event_id": "event-of-s1"}
    assert ben.post("/gradio_api/cancel", json=asked).status_code == 404
    assert ana.post("/gradio_api/cancel", json={**asked, "session_hash": "s1"}).status_code == 200


@pytest.mark.parametrize("shape", [lambda file: {"path": file}, lambda file: {"url": f"http://x/gradio_api/file={file}"}, lambda file: [[{"deep": {"path": file}}]], lambda file: f"/tmp/../{file}"])
def test_an_uploaded_file_is_its_senders_only(issuer, shape):
    (ana, ben), _ = signed_in("visitors", issuer, "ana", "ben")
    [file] = ana.post("/gradio_api/upload", content=b"x" * 7).json()
    assert ana.get(f"/gradio_api/file={file}").status_code == 200 and ben.get(f"/gradio_api/file={file}").status_code == 404
    ask = {"session_hash": "own", "data": [shape(file)]}
    assert ben.post("/gradio_api/queue/join", json=ask).status_code == 404
    assert ana.post("/gradio_api/queue/join", json={**ask, "session_hash": "hers"}).status_code == 200
    ben.post("/gradio_api/upload", content=b"y" * 7)  # the same file, and so the same name: now it is his too
    assert ben.post("/gradio_api/queue/join", json=ask).status_code == 200


def test_an_upload_is_counted_while_it_arrives(issuer):
    (ana,), _ = signed_in("visitors", issuer, "ana")
    arrived = []

    def parts():
        for _ in range(1000):
            arrived.append(1)
            yield b"z" * 100

    answer = ana.post("/gradio_api/upload", content=parts())
    assert answer.status_code == 413 and "not kept" in answer.json()["error"]
    assert ana.post("/gradio_api/upload", content=b"z" * 1000).status_code == 200


def test_a_large_request_is_not_read(issuer, monkeypatch):
    monkeypatch.setattr(door, "BODY", 1000)
    (ana,), _ = signed_in("visitors", issuer, "ana")
    answer = ana.post("/gradio_api/queue/join", json={"session_hash": "s", "data": ["x" * 2000]})
    assert answer.status_code == 413 and "not read" in answer.json()["error"]


@pytest.mark.parametrize("body", [b"{", b"\xff", b'["\\ud800"]', b'{"\xed\xa0\x80": 1}', b"[" * 100_000, b"--x\r\nContent-Disposition: form-data"])
def test_what_is_no_json_is_not_there(issuer, body):
    (ana,), _ = signed_in("visitors", issuer, "ana")
    assert ana.post("/gradio_api/component_server", content=body).status_code == 404


def test_a_session_ends_with_its_token(issuer):
    issuer.account("eve", token="hf_eve", seconds=1)
    (eve,), _ = signed_in("visitors", issuer, "eve")
    time.sleep(1.1)
    assert eve.get("/config").status_code == 401


def test_memory_forgets_the_oldest_and_what_is_over():
    memory = Memory(most=10)
    names = [memory.put(number, seconds=60 + number) for number in range(12)]
    assert len(memory.kept) <= 11 and memory.get(names[-1]) == 11 and memory.get(names[0]) is None
    assert memory.get(memory.put("x", seconds=-1)) is None and memory.get("") is None


def test_a_space_sends_people_back_to_its_own_address():
    found = hosting.of(
        {"SPACE_ID": "a/b", "SPACE_HOST": "a-b.hf.space,own.example", "SPACE_AUTHOR_NAME": "a", "OPENID_PROVIDER_URL": "https://h", "OAUTH_CLIENT_ID": "i", "OAUTH_CLIENT_SECRET": "s"}, host="0.0.0.0"
    )
    assert sign_in.back_address(found, "http", "10.0.0.1:7860") == "https://a-b.hf.space/login/callback"


def test_a_persons_token_is_in_nothing_that_is_printed():
    assert "hf_" not in repr(Person("1", "ana", token="hf_secret"))


def test_names_of_people_run_no_script_on_the_page():
    page = sign_in.page(
        Hosting("owner", owners=("<script>alert(1)</script>",), space='x"><script>'), stranger="<img onerror=x>", shared=[{"name": "<b>", "base": "<i>", "url": 'https://x/"><script>'}]
    )
    assert "<script" not in page and "<img" not in page and "<b>" not in page


def test_an_open_studio_only_counts():
    async def app(scope, receive, send):
        await PlainTextResponse("inside")(scope, receive, send)

    told = []

    async def send(message):
        told.append(message)

    scope = {"type": "http", "method": "GET", "path": "/anything", "headers": [], "query_string": b""}
    door = Door(app, Hosting(), SignIn(Hosting()), UPLOADS)
    with ThreadPoolExecutor(1) as thread:  # whoever drives a browser in this process has a loop in this thread already
        thread.submit(lambda: asyncio.run(door(scope, None, send))).result()
    assert told[0]["status"] == 200 and json.dumps(told[0]["status"])
