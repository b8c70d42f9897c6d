"""What the small Hub knows beside files: tags, pull requests, gating and collections."""

import json
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.rules import Collection, Refusal, Repo, Request

ID = r"(?P<id>[\w.-]+/[\w.-]+)"
SLUG = r"(?P<slug>[\w.-]+/[\w.-]+)"
# (route, server, method, path)
ROUTES = [
    ("refs", "hub", "GET", rf"/api/models/{ID}/refs"),
    ("tag", "hub", "POST", rf"/api/models/{ID}/tag/(?P<revision>[^/]+)"),
    ("discussions", "hub", "GET", rf"/api/models/{ID}/discussions"),
    ("settings", "hub", "PUT", rf"/api/models/{ID}/settings"),
    ("collections", "hub", "GET", r"/api/collections"),
    ("make_collection", "hub", "POST", r"/api/collections"),
    ("collection", "hub", "GET", rf"/api/collections/{SLUG}"),
    ("collect", "hub", "POST", rf"/api/collections/{SLUG}/items"),
]
NOW = "2026-01-01T00:00:00.000Z"


class Extras:
    """Handlers of these routes, for the server's Handler."""

    def asked(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def opens(self) -> bool:
        return self.asked().get("create_pr") == "1"

    def writable(self, id: str, revision: str | None) -> tuple[Repo, Request | None]:
        """The repository for somebody who may commit to a revision: to a pull request its author, and a new one may be opened by all who read."""
        number = unquote(revision or "").removeprefix("refs/pr/")
        repo = self.find(id, write=not (self.opens() or number.isdigit()))
        if self.opens():
            self.who(needed=True)
            return repo, None
        if not number.isdigit():
            return repo, None
        request = repo.requests.get(int(number))
        if request is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        if request.author != self.who(needed=True).name:
            raise Refusal(403, "Forbidden: it is not your pull request")
        return repo, request

    def committed(self, id: str, title: str, files: dict[str, bytes], request: Request | None):
        repo = self.hub.repos[id]
        if self.opens():
            number = len(repo.requests) + 1
            request = repo.requests[number] = Request(self.who(needed=True).name, title)
        oid = repo.commit(title, files, request)
        more = {"pullRequestUrl": f"{self.hub.url}/{id}/discussions/{len(repo.requests)}"} if self.opens() else {}
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}", "hookOutput": "", **more}

    def on_refs(self, body, id):
        repo = self.find(id)
        row = lambda kind, name, oid: {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}  # noqa: E731
        return told(
            {
                "branches": [row("heads", "main", repo.commits[-1][0])],
                "converts": [],
                "tags": [row("tags", *one) for one in repo.tags.items()],
            }
        )

    def on_tag(self, body, id, revision):
        repo, tag = self.find(id, write=True), json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Tag {tag} already exists")
        repo.tags[tag] = repo.at(revision)[0]
        return told({})

    def on_discussions(self, body, id):
        repo, author = self.find(id), self.asked().get("author")
        rows = [
            {"title": one.title, "num": number, "author": {"name": one.author}, "createdAt": NOW, "status": one.status, "isPullRequest": True, "repo": {"name": id, "type": "model"}}
            for number, one in repo.requests.items()
            if author in (None, one.author)
        ]  # fmt: skip
        return told({"discussions": rows, "count": len(rows), "start": 0})

    def on_settings(self, body, id):
        repo = self.find(id, write=True)
        repo.gated = json.loads(body).get("gated", repo.gated)
        return told({})

    def on_collections(self, body):
        owner = self.asked().get("owner")
        rows = [self.shown(slug) for slug in self.hub.collections if slug.split("/")[0] == owner]
        return told([{name: value for name, value in row.items() if name != "position"} for row in rows])

    def on_make_collection(self, body):
        wish = json.loads(body)
        self.owned(wish["namespace"])
        slug = f"{wish['namespace']}/{wish['title'].lower().replace(' ', '-')}-{len(self.hub.collections):024x}"
        self.hub.collections[slug] = Collection(wish["title"], wish["private"])
        return told(self.shown(slug))

    def on_collection(self, body, slug):
        if slug not in self.hub.collections:
            raise Refusal(404, "Collection not found")
        return told(self.shown(slug))

    def on_collect(self, body, slug):
        self.owned(slug.split("/")[0])
        item = json.loads(body)["item"]
        if item["id"] in self.hub.collections[slug].items:
            raise Refusal(409, "Item already in collection")
        self.hub.collections[slug].items.append(item["id"])
        return told(self.shown(slug))

    def owned(self, namespace: str) -> None:
        account = self.who(needed=True)
        if account.role == "read" or namespace not in (account.name, *account.organizations):
            raise Refusal(403, "Forbidden: you need the scope write-collections")

    def shown(self, slug: str) -> dict:
        one = self.hub.collections[slug]
        items = [{"_id": str(place), "id": id, "type": "model", "position": place} for place, id in enumerate(one.items)]
        more = {"lastUpdated": NOW, "position": 0, "theme": "blue", "upvotes": 0}
        return {"slug": slug, "title": one.title, "owner": {"name": slug.split("/")[0]}, "items": items, "private": one.private, **more}


def told(value):
    return 200, json.dumps(value).encode(), {}
