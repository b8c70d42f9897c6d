"""A small OAuth provider on loopback: authorization code with PKCE, a client with a secret, and people who choose who they are.

issuer = Issuer(client="app", secret="s3cret")
issuer.account("alice", token="hf_...", scopes="openid profile contribute-repos")
issuer.environment("127.0.0.1:7999")            # what a Space would find in its environment
"""

import base64
import hashlib
import html
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

SCOPES = "openid profile contribute-repos gated-repos"


class Issuer:
    """The provider; `close()` ends it. `seen` are the paths it was asked for."""

    def __init__(self, *, client: str = "app", secret: str = "a-client-secret"):
        self.client, self.secret = client, secret
        self.people: dict[str, dict] = {}
        self.codes: dict[str, dict] = {}
        self.seen: list[str] = []
        self.refuse: set[str] = set()  # routes that answer 500
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"issuer": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def account(self, name: str, *, token: str, scopes: str = SCOPES, orgs: list[dict] = (), seconds: int = 28800) -> None:
        """Somebody who may sign in."""
        self.people[name] = {"token": token, "scopes": scopes, "orgs": list(orgs), "seconds": seconds}

    def environment(self, host: str, *, space: str = "owner/lora-studio") -> dict[str, str]:
        """A Space's variables, for a studio that is reached as `host`."""
        return {
            "SPACE_ID": space, "SPACE_HOST": host, "SPACE_AUTHOR_NAME": space.partition("/")[0], "OPENID_PROVIDER_URL": self.url,
            "OAUTH_CLIENT_ID": self.client, "OAUTH_CLIENT_SECRET": self.secret, "OAUTH_SCOPES": SCOPES,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    issuer: Issuer

    def log_message(self, *args):
        pass

    def do_GET(self):
        address = urlsplit(self.path)
        self.issuer.seen.append(address.path)
        asked = dict(parse_qsl(address.query))
        if address.path in self.issuer.refuse:
            return self.answer(500, {"error": "server_error"})
        if address.path == "/.well-known/openid-configuration":
            ends = {name: f"{self.issuer.url}/oauth/{end}" for name, end in (("authorization_endpoint", "authorize"), ("token_endpoint", "token"), ("userinfo_endpoint", "userinfo"))}
            return self.answer(200, {"issuer": self.issuer.url, **ends})
        if address.path == "/oauth/authorize":
            return self.authorize(asked)
        if address.path == "/oauth/userinfo":
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            name = next((name for name, one in self.issuer.people.items() if one["token"] == token), None)
            if name is None:
                return self.answer(401, {"error": "invalid_token"})
            told = {"sub": f"id-of-{name}", "name": name.title(), "preferred_username": name, "profile": "", "picture": "", "orgs": self.issuer.people[name]["orgs"]}
            return self.answer(200, told)
        self.answer(404, {"error": "not_found"})

    def authorize(self, asked: dict):
        assert asked["client_id"] == self.issuer.client and asked["response_type"] == "code" and asked["code_challenge_method"] == "S256", asked
        if "as" not in asked:
            links = "".join(f'<p><a href="/oauth/authorize?{html.escape(urlencode({**asked, "as": name}))}">{html.escape(name)}</a></p>' for name in self.issuer.people)
            return self.answer(200, f"<h1>Who are you?</h1>{links}", "text/html")
        code = secrets.token_hex(8)
        self.issuer.codes[code] = asked
        query = urlencode({"code": code, "state": asked["state"]})
        self.send_response(302)
        self.send_header("Location", f"{asked['redirect_uri']}?{query}")
        self.end_headers()

    def do_POST(self):
        address = urlsplit(self.path)
        self.issuer.seen.append(address.path)
        given = {name: values[0] for name, values in parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).items()}
        basic = self.headers.get("Authorization", "").removeprefix("Basic ")
        own = base64.b64encode(f"{self.issuer.client}:{self.issuer.secret}".encode()).decode()
        begun = self.issuer.codes.pop(given.get("code", ""), None)
        if address.path in self.issuer.refuse:
            return self.answer(500, {"error": "server_error"})
        if address.path != "/oauth/token" or basic != own:
            return self.answer(401, {"error": "invalid_client"})
        challenge = base64.urlsafe_b64encode(hashlib.sha256(given.get("code_verifier", "").encode()).digest()).rstrip(b"=").decode()
        if begun is None or begun["redirect_uri"] != given.get("redirect_uri") or begun["code_challenge"] != challenge:
            return self.answer(400, {"error": "invalid_grant"})
        person = self.issuer.people[begun["as"]]
        self.answer(200, {"access_token": person["token"], "token_type": "bearer", "expires_in": person["seconds"], "scope": person["scopes"]})

    def answer(self, status: int, told, kind: str = "application/json"):
        body = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
