"""A small Hub on loopback for the real huggingface_hub client: accounts, rights, LFS, commits, card check, and faults on demand.

    hub = Hub()                                     # serves at once; hub.url is for HF_ENDPOINT (with HF_HUB_DISABLE_XET=1)
    hub.account("me", token="hf_me", role="write", organizations=["team"])
    hub.fault("commit", "lost")                     # the next commit takes effect, its answer does not arrive
    hub.fault("put", 503, times=6)                  # route and kind; kinds: a status, cut, half, lost, short,
                                                    # silent, html, html502, flip
    hub.seen                                        # every request: method, path, route, authorized, bytes

Storage (LFS objects) is a second server on another port, as on the Hub, so that a token sent there is seen.
"""

import base64
import contextlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import extras
from tests.hub.rules import LFS, Account, Collection, Refusal, Repo, Seen, blob, card_errors, entry, sha256

PAGE = b"<html><body>Please sign in to the guest network</body></html>"
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
# (route, server, method, path)
ROUTES = [
    ("whoami", "hub", "GET", r"/api/whoami-v2"),
    ("validate", "hub", "POST", r"/api/validate-yaml"),
    ("create", "hub", "POST", r"/api/repos/create"),
    ("delete", "hub", "DELETE", r"/api/repos/delete"),
    ("auth", "hub", "GET", rf"/api/models/{ID}/auth-check(?P<write>/write)?"),
    ("tree", "hub", "GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?"),
    ("paths", "hub", "POST", rf"/api/models/{ID}/paths-info/(?P<revision>[^/]+)"),
    ("preupload", "hub", "POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)"),
    ("commit", "hub", "POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)"),
    ("info", "hub", "GET", rf"/api/models/{ID}(?:/revision/(?P<revision>[^/]+))?"),
    ("batch", "hub", "POST", rf"/{ID}\.git/info/lfs/objects/batch"),
    ("verify", "hub", "POST", rf"/{ID}\.git/info/lfs/objects/verify"),
    ("head", "hub", "HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("get", "hub", "GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("large", "hub", "GET", rf"/api/models/{ID}/lfs-files"),
    ("free", "hub", "POST", rf"/api/models/{ID}/lfs-files/batch"),
    ("put", "storage", "PUT", r"/objects/(?P<oid>[0-9a-f]{64})"),
    ("cdn", "storage", "GET", r"/objects/(?P<oid>[0-9a-f]{64})"),
    *extras.ROUTES,
]


class Hub:
    """The Hub and its storage; `close()` ends both."""

    def __init__(self):
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, Collection] = {}
        self.bytes_left: int | None = None  # so many more bytes of files come in, then the connection breaks, and stays broken
        self.faults: list[list] = []
        self.seen: list[Seen] = []
        self.texts: list[str] = []  # answers carry this one, as a Hub that repeats what it was sent
        self.lock, self.closing = threading.RLock(), threading.Event()
        self.servers = {
            name: ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self, "name": name}))
            for name in ("hub", "storage")
        }
        for server in self.servers.values():
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url, self.storage = (f"http://127.0.0.1:{self.servers[name].server_port}" for name in ("hub", "storage"))

    def close(self) -> None:
        self.closing.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def account(self, name: str, *, token: str, role: str = "write", organizations=(), expired: bool = False) -> None:
        self.accounts[token] = Account(name, role, tuple(organizations), expired)

    def repo(self, id: str, files: dict[str, bytes] | None = None, *, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[id] = Repo(private, gated)
        repo.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        if files:
            for path, data in files.items():
                if path.endswith(LFS):
                    self.objects[sha256(data)] = data
            repo.commit("Upload", {**repo.commits[-1][2], **files})
        return repo

    def fault(self, route: str, kind, *, times: int = 1, nth: int = 1, wait: int | None = None) -> None:
        """Let the nth request of a route (and the next, `times` in all) fail."""
        self.faults.append([route, kind, nth, times, wait])

    def pick(self, route: str):
        with self.lock:
            for fault in self.faults:
                if fault[0] == route:
                    if fault[2] > 1:
                        fault[2] -= 1
                    elif fault[3] > 0:
                        fault[3] -= 1
                        return fault[1], fault[4]
        return None, None

    def calm(self) -> None:
        """No faults from here on, and nothing seen yet."""
        with self.lock:
            self.faults.clear()
            self.seen.clear()
            self.bytes_left = None

    def files(self, id: str) -> dict[str, bytes]:
        return {path: data for path, data in self.repos[id].commits[-1][2].items() if path != ".gitattributes"}

    def received(self, *routes: str) -> int:
        return sum(request.received for request in self.seen if request.route in routes)


class Handler(extras.Extras, BaseHTTPRequestHandler):
    """One connection to the Hub or to its storage."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub
    name: str

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()

    def answer(self):
        # A Space or a data set is a repository like a model's, under addresses of its own.
        path = re.sub(r"^/(api/)?(?:spaces|datasets)/", lambda found: "/api/models/" if found[1] else "/", urlsplit(self.path).path)
        found = ((route, match) for route, server, method, pattern in ROUTES
                 if server == self.name and method == self.command and (match := re.fullmatch(pattern, path)))  # fmt: skip
        route, match = next(found, ("unknown", None))
        kind, wait = self.hub.pick(route)
        size = int(self.headers.get("content-length") or 0)
        half = size // 2 if kind == "half" else None
        if route == "put" and self.hub.bytes_left is not None:
            with self.hub.lock:
                half, kind = (self.hub.bytes_left, "half") if size > self.hub.bytes_left else (None, kind)
                self.hub.bytes_left -= min(size, self.hub.bytes_left)
        body = self.body(half)
        note = Seen(self.name, self.command, self.path, route, "authorization" in self.headers, len(body))
        with self.hub.lock:
            self.hub.seen.append(note)
        note.status = kind or 0
        if kind == "silent":
            self.hub.closing.wait(30)
            return self.cut()
        if kind in ("cut", "half"):
            return self.cut()
        if kind == "html":
            return self.send(200, PAGE, {"Content-Type": "text/html"})
        if kind == "html502":
            return self.send(502, PAGE, {"Content-Type": "text/html"})
        if isinstance(kind, int):
            headers = {"Retry-After": str(wait)} if wait else {}
            return self.send(kind, json.dumps({"error": f"fault {kind} {' '.join(self.hub.texts)}"}).encode(), headers)
        try:
            with self.hub.lock:
                status, out, headers = getattr(self, f"on_{route}")(body, **match.groupdict()) if match else (404, b"{}", {})
        except Refusal as refusal:
            status, out, headers = refusal.status, json.dumps(refusal.body).encode(), {"X-Error-Code": refusal.code} if refusal.code else {}
        note.status = kind or status
        if kind == "lost":
            return self.cut()
        if kind == "short":
            return self.send(status, out, headers, cut=len(out) // 2)
        if kind == "flip" and out:
            out = bytes([out[0] ^ 1]) + out[1:]
        self.send(status, out, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def body(self, limit: int | None = None) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0) if limit is None else limit)

    def cut(self):
        """Break the connection with a reset, as a network does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.close()

    def send(self, status: int, body: bytes, headers: dict | None = None, *, cut: int | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    # who may do what

    def who(self, needed: bool = False) -> Account | None:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        account = self.hub.accounts.get(token)
        if token and (account is None or account.expired):
            raise Refusal(401, " ".join(["Invalid credentials in Authorization header", *self.hub.texts]))
        if needed and account is None:
            raise Refusal(401, "Invalid username or password.")
        return account

    def find(self, id: str, *, write: bool = False, files: bool = False) -> Repo:
        account, repo = self.who(), self.hub.repos.get(id)
        owns = account is not None and id.split("/")[0] in (account.name, *account.organizations)
        if repo is None or (repo.private and not owns):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if repo.gated and files and not owns:
            raise Refusal(403, f"Access to model {id} is restricted", "GatedRepo")
        if write and not (owns and account.role in ("write", "fineGrained")):
            raise Refusal(403, "Forbidden: you don't have the rights to write here")
        return repo

    def tree(self, id: str, revision: str | None, *, files: bool = False) -> tuple[str, dict[str, bytes]]:
        found = self.find(id, files=files).at(revision)
        if found is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return found

    # one method for each route: (status, body, headers)

    def on_whoami(self, body):
        account = self.who(needed=True)
        access = {"displayName": "test", "role": account.role}
        return ok(
            {
                "type": "user",
                "name": account.name,
                "orgs": [{"name": name} for name in account.organizations],
                "auth": {"accessToken": access},
            }
        )

    def on_validate(self, body):
        self.who()
        errors = card_errors(json.loads(body)["content"])
        return ok({"errors": errors, "warnings": []}, 400 if errors else 200)

    def on_create(self, body):
        account, wish = self.who(needed=True), json.loads(body)
        id = f"{wish['organization'] or account.name}/{wish['name']}"
        if account.role == "read" or id.split("/")[0] not in (account.name, *account.organizations):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{id.split("/")[0]}"')
        if id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{id}")
        self.hub.repo(id, private=wish.get("visibility") == "private").made = wish
        return ok({"url": f"{self.hub.url}/{id}", "name": id, "id": "1"})

    def on_delete(self, body):
        wish = json.loads(body)
        id = f"{wish['organization']}/{wish['name']}"
        self.find(id, write=True)
        del self.hub.repos[id]
        return ok({})

    def on_auth(self, body, id, write):
        self.find(id, write=bool(write), files=True)
        return ok({})

    def on_info(self, body, id, revision):
        oid, files = self.tree(id, revision)
        repo = self.hub.repos[id]
        return ok({"_id": "1", "id": id, "modelId": id, "author": id.split("/")[0], "sha": oid, "private": repo.private, "gated": "auto" if repo.gated is True else repo.gated,
                   "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in files]})  # fmt: skip

    def on_tree(self, body, id, revision, folder=None):
        _, files = self.tree(id, revision)
        if folder:
            files = {path: data for path, data in files.items() if path.startswith(f"{unquote(folder)}/")}
            if not files:
                raise Refusal(404, "Entry not found", "EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        rows = [entry(path, data) for path, data in files.items() if recursive or "/" not in path]
        folders = {path.split("/")[0] for path in files if "/" in path}
        return ok(rows + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)])

    def on_paths(self, body, id, revision):
        _, files = self.tree(id, revision)
        wanted = parse_qs(body.decode()).get("paths", []) or json.loads(body or b"{}").get("paths", [])
        return ok([entry(path, files[path]) for path in wanted if path in files])

    def on_preupload(self, body, id, revision):
        repo, _ = self.writable(id, revision)
        _, files = repo.at(revision)
        known = {path: sha256(data) if path.endswith(LFS) else blob(data) for path, data in files.items()}
        return ok({"files": [{"path": row["path"], "uploadMode": "lfs" if row["path"].endswith(LFS) else "regular",
                              "shouldIgnore": row["path"] in repo.ignored, "oid": known.get(row["path"])} for row in json.loads(body)["files"]]})  # fmt: skip

    def on_batch(self, body, id):
        asked = json.loads(body)
        self.writable(id, asked["ref"]["name"]) if "ref" in asked else self.find(id)
        rows = []
        for wish in asked["objects"]:
            row = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.hub.objects:
                put = {"href": f"{self.hub.storage}/objects/{wish['oid']}?signature=x", "header": {}}
                row["actions"] = {"upload": put, "verify": {"href": f"{self.hub.url}/{id}.git/info/lfs/objects/verify", "header": {}}}
            rows.append(row)
        return ok({"transfer": "basic", "objects": rows})

    def on_put(self, body, oid):
        if sha256(body) != oid:
            raise Refusal(400, "The bytes do not have the hash that was announced")
        self.hub.objects[oid] = body
        return 200, b"", {"ETag": f'"{oid[:32]}"'}

    def on_verify(self, body, id):
        self.find(id)
        wish = json.loads(body)
        if len(self.hub.objects.get(wish["oid"], b"")) != wish["size"]:
            raise Refusal(404, "The object is not in the storage")
        return ok({})

    def on_commit(self, body, id, revision):
        repo, request = self.writable(id, revision)
        head, files = repo.at(revision)
        files, title = dict(files), ""
        for line in body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif row["key"] == "deletedFile":
                files.pop(value["path"])
        errors = card_errors(files["README.md"].decode()) if "README.md" in files else []
        if errors:
            raise Refusal(400, errors[0]["message"])
        return ok(self.committed(id, title, files, request))

    def on_large(self, body, id):
        self.find(id, write=True)
        named = {sha256(data): (path, data) for _, _, files in self.hub.repos[id].commits for path, data in files.items() if path.endswith(LFS)}
        return ok([{"fileOid": oid, "filename": path, "oid": oid, "pushedAt": extras.NOW, "size": len(data)} for oid, (path, data) in named.items()])

    def on_free(self, body, id):
        repo, gone = self.find(id, write=True), json.loads(body)["deletions"]
        for oid in gone["sha"]:
            self.hub.objects.pop(oid, None)
        if gone["rewriteHistory"]:
            commits, repo.commits = repo.commits, []
            for _, title, files in commits:
                repo.commit(title, {path: data for path, data in files.items() if not (path.endswith(LFS) and sha256(data) in gone["sha"])})
        return ok({})

    def on_get(self, body, id, revision, path):
        oid, files = self.tree(id, revision, files=True)
        path = unquote(path)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = files[path]
        if path.endswith(LFS):
            location = {"Location": f"{self.hub.storage}/objects/{sha256(data)}?signature=x"}
            return 302, b"", {"X-Repo-Commit": oid, "X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data)), **location}
        return self.ranged(data, {"X-Repo-Commit": oid, "ETag": f'"{blob(data)}"'})

    on_head = on_get

    def on_cdn(self, body, oid):
        return self.ranged(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def ranged(self, data: bytes, headers: dict):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        if not start:
            return 200, data, headers
        begin = int(start.group(1))
        return 206, data[begin:], {**headers, "Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}


def ok(value, status: int = 200):
    return status, json.dumps(value).encode(), {}
