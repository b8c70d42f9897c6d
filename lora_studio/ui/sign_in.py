"""Signing in: who somebody is, by OAuth or by the studio's password. Sessions and tokens are kept in memory only; a cookie holds a random name."""

import hmac
import html
import secrets
import time
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

from lora_studio.errors import HostError
from lora_studio.hosting import LOOPBACK, Hosting

COOKIE, KEPT_SECONDS, MOST = "studio", 8 * 3600.0, 10_000
STATE_SECONDS = 600.0
TRIES, TRIES_SECONDS = 10, 60.0


@dataclass
class Person:
    """Somebody who signed in: what the provider calls them for ever, their name, their organizations in which they may write, the token for
    the Hub, what it may be used for, and until when it holds."""

    subject: str
    name: str
    organizations: tuple[str, ...] = ()
    token: str = field(default="", repr=False)
    scopes: tuple[str, ...] = ()
    until: float = 0.0


@dataclass
class _Kept:
    until: float
    value: object


class Memory:
    """Values by random names for a while, at most so many; nothing of it is written anywhere."""

    def __init__(self, most: int = MOST):
        self.most, self.kept = most, {}

    def put(self, value, *, seconds: float) -> str:
        name = secrets.token_urlsafe(32)
        now = time.time()
        if len(self.kept) >= self.most:
            self.kept = dict(sorted(((key, one) for key, one in self.kept.items() if one.until > now), key=lambda item: item[1].until)[self.most // 10 :])
        self.kept[name] = _Kept(now + seconds, value)
        return name

    def get(self, name: str):
        """The value, or None when it is unknown or over."""
        found = self.kept.get(name or "")
        if found is None or found.until < time.time():
            self.kept.pop(name or "", None)
            return None
        return found.value

    def forget(self, name: str) -> None:
        self.kept.pop(name or "", None)


class SignIn:
    """How people sign in to a studio, and who they are afterwards."""

    def __init__(self, hosting: Hosting):
        self.hosting, self.sessions, self.begun, self.tries = hosting, Memory(), Memory(1000), []
        self._provider: dict = {}

    def person(self, cookie: str) -> Person | None:
        """Who has this cookie."""
        found = self.sessions.get(cookie)
        return found if found is not None and found.until > time.time() else None

    def sign_out(self, cookie: str) -> None:
        self.sessions.forget(cookie)

    def by_password(self, given: str) -> str:
        """The cookie of the owner. Raises HostError for another password, and for more than ten tries a minute."""
        now = time.monotonic()
        self.tries = [moment for moment in self.tries if now - moment < TRIES_SECONDS]
        right = bool(self.hosting.password) and hmac.compare_digest(given.encode(), self.hosting.password.encode())
        if len(self.tries) >= TRIES or not right:
            self.tries.append(now)
            raise HostError("host.password")
        return self._begin(Person("owner", self.hosting.owners[0] if self.hosting.owners else "owner", until=time.time() + KEPT_SECONDS))

    def _begin(self, person: Person) -> str:
        return self.sessions.put(person, seconds=max(0.0, person.until - time.time()))

    # ---- OAuth: authorization code with PKCE (RFC 6749, RFC 7636), the client being authlib's

    async def _client(self, **options):
        from authlib.integrations.httpx_client import AsyncOAuth2Client

        own = self.hosting.oauth
        client = AsyncOAuth2Client(own.id, own.secret, scope=own.scopes, code_challenge_method="S256", timeout=15.0, leeway=0, **options)
        if not self._provider:
            answer = await client.request("GET", f"{own.provider}/.well-known/openid-configuration", withhold_token=True)
            answer.raise_for_status()
            self._provider = answer.json()
        return client

    async def address(self, back: str) -> tuple[str, str]:
        """Where to send somebody who wants to sign in, and the cookie that ties the way back to their browser. `back` is the address the
        provider sends them to. Raises HostError when the provider does not answer."""
        try:
            client = await self._client(redirect_uri=back)
            verifier = secrets.token_urlsafe(48)
            where, state = client.create_authorization_url(self._provider["authorization_endpoint"], code_verifier=verifier)
        except _failures() as error:
            raise HostError("host.refused", reason=_reason(error)) from None
        return where, self.begun.put((state, verifier, back), seconds=STATE_SECONDS)

    async def arrive(self, cookie: str, asked: dict[str, str]) -> str:
        """The cookie of somebody who came back from the provider. Raises HostError when it is not what was begun in this browser."""
        begun = self.begun.get(cookie)
        self.begun.forget(cookie)
        if begun is None or not hmac.compare_digest(begun[0], asked.get("state", "")):
            raise HostError("host.refused", reason="it was not begun in this browser, or too long ago")
        if "code" not in asked:
            raise HostError("host.refused", reason=asked.get("error_description") or asked.get("error") or "the provider gave no code")
        try:
            client = await self._client(redirect_uri=begun[2])
            got = await client.fetch_token(self._provider["token_endpoint"], code=asked["code"], code_verifier=begun[1])
            answer = await client.get(self._provider["userinfo_endpoint"])
            answer.raise_for_status()
            told = answer.json()
            person = Person(
                str(told["sub"]), str(told.get("preferred_username") or told.get("name") or told["sub"]), _organizations(told), str(got["access_token"]),
                tuple(str(got.get("scope") or self.hosting.oauth.scopes).split()), float(got.get("expires_at") or time.time() + KEPT_SECONDS),
            )  # fmt: skip
        except _failures() as error:
            raise HostError("host.refused", reason=_reason(error)) from None
        return self._begin(person)

    def owns(self, person: Person) -> bool:
        """Whether somebody is the owner of this studio, or writes for the organization that is."""
        names = {name.lower() for name in self.hosting.owners}
        return (not self.hosting.oauth) or person.name.lower() in names or any(name.lower() in names for name in person.organizations)


def _organizations(told: dict) -> tuple[str, ...]:
    return tuple(str(one.get("preferred_username") or one.get("name")) for one in told.get("orgs") or () if one.get("roleInOrg") in ("admin", "write"))


def _failures() -> tuple[type[Exception], ...]:
    """What a provider, or the way to it, can make of a sign-in."""
    import httpx2
    from authlib.common.errors import AuthlibBaseError

    return AuthlibBaseError, httpx2.HTTPError, httpx2.InvalidURL, KeyError, ValueError, TypeError


def _reason(error: Exception) -> str:
    """What went wrong, without anything that was sent: only its kind, and what an OAuth provider names as the error."""
    return str(getattr(error, "error", "") or type(error).__name__)[:80]


def back_address(hosting: Hosting, scheme: str, host: str) -> str:
    """Where the provider sends people back to: a Space's own address, else the one they came by."""
    place = next((name for name in hosting.public if hosting.space), host)
    plain = (urlsplit(f"//{place}").hostname or "") in LOOPBACK
    return f"{scheme if not hosting.space else 'http' if plain else 'https'}://{place}/login/callback"


def page(hosting: Hosting, *, wrong: str = "", stranger: str = "", shared: list[dict] = ()) -> str:
    """The page of who is not in: how to sign in, what the owner shares, and how to have a studio of one's own."""
    what = {"owner": "This studio belongs to " + (", ".join(hosting.owners) or "its owner") + ".", "visitors": "Sign in, and a workspace of your own is ready."}
    out = [f"<p>{html.escape(what.get(hosting.kind, 'This studio asks for its password.'))}</p>"]
    if stranger:
        out.append(f"<p>You are signed in as {html.escape(stranger)}, who does not own it. <a href='/logout'>Sign out</a></p>")
    elif hosting.oauth:
        out.append("<p><a class='button' href='/login/huggingface' target='_top'>Sign in with Hugging Face</a></p>")
    else:
        out.append(
            "<form method='post' action='/studio/sign-in'><label for='password'>Password</label>"
            "<input id='password' name='password' type='password' autocomplete='current-password' autofocus required><button class='button'>Sign in</button></form>"
        )
    if wrong:
        out.append(f"<p class='wrong' role='alert'>{html.escape(wrong)}</p>")
    if shared:
        items = "".join(f"<li><a href='{html.escape(one['url'], quote=True)}' rel='noreferrer noopener' target='_blank'>{html.escape(one['name'])}</a> <small>{html.escape(one['base'])}</small></li>" for one in shared)
        out.append(f"<h2>What was published from here</h2><ul>{items}</ul>")
    if hosting.space:
        query = urlencode({"duplicate": "true"})
        out.append(f"<p><a href='https://huggingface.co/spaces/{html.escape(hosting.space, quote=True)}?{query}' target='_blank' rel='noreferrer noopener'>Duplicate this Space</a> to have a studio of your own.</p>")
    return PAGE.replace("<!-- -->", "".join(out))


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>LoRA Studio</title>
<style>
:root{color-scheme:light dark;--ink:#1e293b;--soft:#64748b;--paper:#f8fafc;--card:#fff;--line:#e2e8f0;--accent:#c2410c}
@media (prefers-color-scheme:dark){:root{--ink:#e2e8f0;--soft:#94a3b8;--paper:#0b0f19;--card:#131a2a;--line:#334155;--accent:#ea580c}}
body{margin:0;min-height:100vh;display:grid;place-items:center;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{width:min(400px,calc(100vw - 32px));box-sizing:border-box;padding:28px;background:var(--card);border:1px solid var(--line);border-radius:12px}
h1{margin:0 0 12px;font-size:22px}h2{font-size:16px;margin:20px 0 4px}p{margin:0 0 12px;overflow-wrap:anywhere}ul{padding-left:18px;margin:0 0 12px}small{color:var(--soft)}
label{display:block;font-size:14px}input{width:100%;box-sizing:border-box;margin:4px 0 12px;padding:9px 10px;font:inherit;color:inherit;background:var(--paper);border:1px solid var(--line);border-radius:8px}
.button{display:inline-block;padding:9px 16px;border:0;border-radius:8px;background:#c2410c;color:#fff;font:inherit;font-weight:600;text-decoration:none;cursor:pointer}
a{color:var(--accent)}a.button{color:#fff}.wrong{margin:12px 0 0;color:var(--accent)}
</style></head><body><main><h1>LoRA Studio</h1><!-- --></main></body></html>"""
