"""Who may speak to the server: its own pages. Hosts are checked against DNS rebinding, origins against other sites' posts."""

from urllib.parse import urlsplit

from lora_studio.hosting import LOOPBACK

SAFE = ("GET", "HEAD", "OPTIONS")
REFUSAL = "This request did not come from the studio's own page, so it was refused."


class SameOrigin:
    """ASGI middleware. `hosts` are the names under which the server may be addressed; empty accepts any name. `public` are names that its
    own pages come from where something stands before it that calls it by another."""

    def __init__(self, app, hosts: tuple[str, ...] = LOOPBACK, public: tuple[str, ...] = ()):
        self.app, self.hosts, self.public = app, {host if host in LOOPBACK else _name(host) for host in hosts}, {host.lower() for host in public}

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and not self._may(scope):
            return await _refuse(send)
        if scope["type"] == "websocket" and not self._may({**scope, "method": "POST"}):
            return await send({"type": "websocket.close", "code": 1008})
        return await self.app(scope, receive, send)

    def _may(self, scope) -> bool:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts and _name(host) not in self.hosts:
            return False
        if scope["method"] in SAFE:
            return True
        origin = headers.get("origin")
        if origin is not None:
            return urlsplit(origin).netloc.lower() in {host.lower(), *self.public}
        # A browser that sends no Origin still says where the request comes from; programs send neither.
        return headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def _name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


async def _refuse(send) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSAL.encode()})
