"""The door of a studio that others can reach: who asks, what of Gradio's routes is open to them, and whose session, file or event it is.

Everything here is decided before Gradio sees a request. What is another's answers as what is not there.
"""

import html
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, unquote

from lora_studio import fence, workspace
from lora_studio.errors import HostError, StudioError
from lora_studio.hosting import LOCAL_UPLOAD, Hosting
from lora_studio.jobs import tokens
from lora_studio.sentences import SENTENCES
from lora_studio.ui import sign_in
from lora_studio.ui.seat import PERSON, WORKSPACE
from lora_studio.ui.sign_in import COOKIE, Person, SignIn

API = "/gradio_api"
# What the pages need of Gradio; every other route of it is not there for people who come from outside.
OPEN = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?|/(assets|static|svelte)/[^?]*"
    r"|/gradio_api/(info|app_id|startup-events|theme\.css|heartbeat/\w+|queue/join|queue/data|run/predict|cancel|reset|upload|upload_progress|component_server|file=.+|custom_component/.+)/?"
    r"|/studio/(adapter|library|sample|picture|album|export)/.+"
)
# Seen by everybody: what a browser asks for by itself, what Gradio asks itself as it starts, and whether the server lives.
PUBLIC = re.compile(r"/favicon\.ico|/robots\.txt|/studio/health|/gradio_api/startup-events")
BODY, MOST_NAMES = 8_000_000, 200_000
NOT_FOUND = "There is nothing here under that name."


class _TooLarge(Exception):
    """More arrived than may; `most` is how much may."""

    def __init__(self, key: str, most: int):
        self.key, self.most = key, most


class Names:
    """Whose a session, an upload or an event is: the first who uses a name has it."""

    def __init__(self):
        self.owners: OrderedDict[str, str] = OrderedDict()

    def is_own(self, name: str, person: Person) -> bool:
        """Whether a name is this person's; a new one becomes theirs."""
        owner = self.owners.setdefault(name, person.subject)
        self.owners.move_to_end(name)
        while len(self.owners) > MOST_NAMES:
            self.owners.popitem(last=False)
        return owner == person.subject

    def knows(self, name: str, person: Person) -> bool:
        """Whether a name was given to this person."""
        return f"{person.subject} {name}" in self.owners

    def give(self, name: str, person: Person) -> None:
        """Note that something is this person's too: two may send the same file."""
        self.owners[f"{person.subject} {name}"] = person.subject


class Door:
    """ASGI middleware. With `hosting` open to nobody but this machine it only counts what arrives."""

    def __init__(self, app, hosting: Hosting, signs: SignIn, uploads: str, shared: Callable[[], list[dict]] = list):
        self.app, self.hosting, self.signs, self.uploads, self.shared = app, hosting, signs, uploads, shared
        self.names = Names()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008}) if not self.hosting.is_open else await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = []

        async def sending(message):
            begun.append(message["type"])
            await send(message)

        try:
            await self._serve(scope, receive, sending)
        except _TooLarge as error:
            if not begun:
                await _answer(send, 413, str(SENTENCES[error.key].format(most=f"{error.most / 1e6:g} MB")))
        except StudioError as error:
            if not begun:
                await _answer(send, 403, str(error))

    async def _serve(self, scope, receive, send):
        path = scope["path"]
        if self.hosting.is_open:
            most = LOCAL_UPLOAD if path.rstrip("/") == f"{API}/upload" else BODY * 8
            return await self.app(scope, _counted(receive, most), send)
        if PUBLIC.fullmatch(path):
            return await self.app(scope, receive, send)
        if path.startswith(("/login/", "/logout", "/studio/sign-in")):
            return await self._sign(path, scope, receive, send)
        person = self.signs.person(_cookie(scope, COOKIE))
        inside = person is not None and (self.hosting.kind == "visitors" or self.signs.owns(person))
        if not inside:
            return await self._outside(path, scope, send, person)
        if not OPEN.fullmatch(path):
            return await _answer(send, 404, NOT_FOUND)
        scope[PERSON], scope[WORKSPACE] = person, self._workspace(person)
        if self.hosting.kind == "visitors":
            tokens.lend(scope[WORKSPACE].root, person.token, until=person.until)
        await self._pass(path.rstrip("/") or "/", scope, receive, send)

    def _workspace(self, person: Person):
        if self.hosting.kind == "visitors":
            return workspace.of_visitor(person.subject, person.name, self.hosting.limits)
        return workspace.local()

    async def _outside(self, path: str, scope, send, person: Person | None):
        if path == "/" and scope["method"] in ("GET", "HEAD"):
            shared = self.shared() if self.hosting.kind == "owner" else []
            return await _page(send, sign_in.page(self.hosting, stranger=person.name if person else "", shared=shared))
        await _answer(send, 401, SENTENCES["host.sign_in"])

    # ---- signing in

    async def _sign(self, path: str, scope, receive, send):
        secure = self._is_secure(scope)
        try:
            if path == "/logout":
                person = self.signs.person(_cookie(scope, COOKIE))
                if person is not None and self.hosting.kind == "visitors":
                    tokens.take_back(self._workspace(person).root)
                self.signs.sign_out(_cookie(scope, COOKIE))
                return await _redirect(send, "/", _set_cookie(COOKIE, "", 0, secure))
            if path == "/studio/sign-in" and scope["method"] == "POST" and self.hosting.password:
                given = parse_qs((await _body(receive, 4096)).decode("utf-8", "replace")).get("password", [""])[0]
                return await _redirect(send, "/", _set_cookie(COOKIE, self.signs.by_password(given), sign_in.KEPT_SECONDS, secure))
            if path == "/login/huggingface" and self.hosting.oauth:
                back = sign_in.back_address(self.hosting, _scheme(scope), _header(scope, "host"))
                where, kept = await self.signs.address(back)
                return await _redirect(send, where, _set_cookie(f"{COOKIE}_way", kept, sign_in.STATE_SECONDS, secure))
            if path == "/login/callback" and self.hosting.oauth:
                asked = {name: values[0] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
                cookie = await self.signs.arrive(_cookie(scope, f"{COOKIE}_way"), asked)
                return await _redirect(send, "/", _set_cookie(COOKIE, cookie, sign_in.KEPT_SECONDS, secure), _set_cookie(f"{COOKIE}_way", "", 0, secure))
        except HostError as error:
            return await _page(send, sign_in.page(self.hosting, wrong=str(error)), status=403)
        await _answer(send, 404, NOT_FOUND)

    def _is_secure(self, scope) -> bool:
        host = _header(scope, "host").partition(":")[0]
        return _scheme(scope) == "https" or bool(self.hosting.space and host not in ("127.0.0.1", "localhost"))

    # ---- whose it is

    async def _pass(self, path: str, scope, receive, send):
        person = scope[PERSON]
        asked = {name: values[0] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        names = [f"session {asked[name]}" for name in ("session_hash",) if name in asked]
        names += [f"upload {asked['upload_id']}"] if "upload_id" in asked else []
        names += [f"session {path.rpartition('/')[2]}"] if path.startswith(f"{API}/heartbeat/") else []
        if path.startswith(f"{API}/file=") and not self.names.knows(path.partition("=")[2], person):
            return await _answer(send, 404, NOT_FOUND)
        if scope["method"] == "POST" and path == f"{API}/upload":
            return await self._upload(scope, receive, send, names)
        if scope["method"] not in ("GET", "HEAD"):
            body = await _body(receive, BODY)
            told = _parsed(body)
            if told is None or any(not self.names.knows(file, person) for file in _files(told, self.uploads)):
                return await _answer(send, 404, NOT_FOUND)
            if path in (f"{API}/cancel", f"{API}/reset") and not self.names.knows(f"event {told.get('event_id')}", person):
                return await _answer(send, 404, NOT_FOUND)
            names += [f"session {told['session_hash']}"] if isinstance(told, dict) and told.get("session_hash") else []
            receive = _replayed(body, receive)
            send = self._noting(send, person) if path == f"{API}/queue/join" else send
        if not all(self.names.is_own(name, person) for name in names):
            return await _answer(send, 404, NOT_FOUND)
        await self.app(scope, receive, send)

    async def _upload(self, scope, receive, send, names: list[str]):
        """Take files in, counted while they arrive, and note whose they are."""
        person, space = scope[PERSON], scope[WORKSPACE]
        if not all(self.names.is_own(name, person) for name in names):
            return await _answer(send, 404, NOT_FOUND)
        fence.refuse_bytes(space)
        most = space.limits.upload if space.limits else LOCAL_UPLOAD
        await self.app(scope, _counted(receive, most, "host.upload"), self._noting(send, person))

    def _noting(self, send, person: Person):
        """`send` that notes whose the files and the event are that an answer names."""
        parts = []

        async def sending(message):
            if message["type"] == "http.response.body":
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    told = _parsed(b"".join(parts))
                    for file in told if isinstance(told, list) else []:
                        self.names.give(str(file), person)
                    if isinstance(told, dict) and told.get("event_id"):
                        self.names.give(f"event {told['event_id']}", person)
            await send(message)

        return sending


# ---- requests and answers


def _header(scope, name: str) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.decode("latin-1").lower() == name), "")


def _scheme(scope) -> str:
    return _header(scope, "x-forwarded-proto").split(",")[0].strip() or scope.get("scheme", "http")


def _cookie(scope, name: str) -> str:
    try:
        found = SimpleCookie(_header(scope, "cookie")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _set_cookie(name: str, value: str, seconds: float, secure: bool) -> tuple[bytes, bytes]:
    """HttpOnly, so that no script sees it; on a Space, which others frame, also sent from within a frame of another site."""
    more = "; SameSite=None; Secure" if secure else "; SameSite=Lax"
    return b"set-cookie", f"{name}={value}; Path=/; HttpOnly; Max-Age={int(seconds)}{more}".encode()


def _parsed(body: bytes):
    """JSON of a body; an empty one is an empty object, and anything else None, half a character in a text too: no answer could repeat it."""
    try:
        told = json.loads(body) if body else {}
        json.dumps(told, ensure_ascii=False).encode()
        return told
    except (ValueError, RecursionError):
        return None


def _files(told, uploads: str):
    """Every place among the uploads that a text in it names, as a path or within an address."""
    waiting = [told]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str) and ("/" in one or "\\" in one):
            here = os.path.normpath(unquote(one))
            if uploads in here:
                yield here[here.index(uploads) :]


def _counted(receive, most: int, key: str = "host.request"):
    """`receive` that breaks off when more than `most` bytes arrived."""
    total = 0

    async def counting():
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise _TooLarge(key, most)
        return message

    return counting


async def _body(receive, most: int) -> bytes:
    parts, receive = [], _counted(receive, most)
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive):
    """`receive` that gives a body that was read already, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return waiting.pop() if waiting else await receive()

    return again


async def _answer(send, status: int, sentence: str) -> None:
    """One sentence, as Gradio's pages read errors."""
    body = json.dumps({"error": sentence, "detail": sentence}).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": body})


async def _page(send, text: str, status: int = 200) -> None:
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"cache-control", b"no-store"), (b"content-security-policy", POLICY)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


POLICY = b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"


async def _redirect(send, where: str, *cookies: tuple[bytes, bytes]) -> None:
    headers = [(b"location", where.encode("latin-1", "replace")), (b"cache-control", b"no-store"), *cookies]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": html.escape(where).encode()})
