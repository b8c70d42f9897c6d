"""What the small Hub of the tests keeps and demands: accounts, repositories, hashes, and the check of a model card."""

import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

import yaml

LICENSES = {"apache-2.0", "mit", "other", "llama3.2", "gemma", "cc-by-4.0", "openrail", "gpl-3.0", "unknown"}
LFS = (".safetensors", ".bin", ".png", ".pt")


@dataclass
class Account:
    """Who a token belongs to, and what it may do."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()
    expired: bool = False


@dataclass
class Repo:
    """A model repository: its commits, oldest first, each the full tree {path: bytes}."""

    private: bool = False
    gated: bool | str = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    tags: dict[str, str] = field(default_factory=dict)
    requests: dict[int, "Request"] = field(default_factory=dict)
    made: dict = field(default_factory=dict)  # what whoever made it asked for

    def commit(self, title: str, files: dict[str, bytes], request: "Request | None" = None) -> str:
        """A commit on main, or on a pull request."""
        branch = self.commits if request is None else request.commits
        oid = hashlib.sha1(f"{id(branch)}{len(branch)}{title}{sorted(files)}".encode()).hexdigest()
        branch.append((oid, title, files))
        return oid

    def at(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        revision = unquote(revision or "main")
        if revision in ("main", "HEAD"):
            return self.commits[-1][0], self.commits[-1][2]
        number = revision.removeprefix("refs/pr/")
        if number.isdigit() and int(number) in self.requests:
            return self.requests[int(number)].commits[-1][::2]
        revision = self.tags.get(revision, revision)
        everywhere = [*self.commits, *(one for request in self.requests.values() for one in request.commits)]
        return next(((oid, files) for oid, _, files in everywhere if oid.startswith(revision) and len(revision) > 6), None)


@dataclass
class Request:
    """A pull request: who opened it, its commits, oldest first, each the full tree."""

    author: str
    title: str
    status: str = "open"
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)


@dataclass
class Collection:
    """A collection of models, by their ids."""

    title: str
    private: bool = False
    items: list[str] = field(default_factory=list)


class Refusal(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, code: str | None = None, **more):
        self.status, self.body, self.code = status, {"error": message, **more}, code


@dataclass
class Seen:
    """One request: what came in and whether it carried a token."""

    server: str
    method: str
    path: str
    route: str
    authorized: bool
    received: int
    status: int | str = 0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    row = {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
    return {**row, "lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if path.endswith(LFS) else row


def card_errors(text: str) -> list[dict]:
    """What the Hub is known to refuse in the front matter of a card."""
    if not text.startswith("---\n"):
        return []
    try:
        data = yaml.safe_load(text[4:].split("\n---", 1)[0]) or {}
    except yaml.YAMLError as error:
        return [{"message": f"Invalid YAML: {error.__class__.__name__}"}]
    wrong = []
    listed = lambda name: data[name] if isinstance(data[name], list) else [data[name]]  # noqa: E731
    if "base_model" in data and not all(isinstance(id, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]*\w", id) for id in listed("base_model")):
        wrong.append('"base_model" with value "' + str(data["base_model"]) + '" is not valid. Use a model id from https://hf.co/models.')
    if "license" in data and data["license"] not in LICENSES:
        wrong.append('"license" must be one of the known licenses')
    if "language" in data and not all(isinstance(code, str) and re.fullmatch(r"[a-z]{2,3}", code) for code in listed("language")):
        wrong.append('"language" must only contain ISO 639-1, 639-2/3 codes')
    if "datasets" in data and not all(isinstance(id, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", id) for id in listed("datasets")):
        wrong.append('"datasets" with a value that is not valid. Use a dataset id from https://hf.co/datasets.')
    if "tags" in data and not (isinstance(data["tags"], list) and all(isinstance(tag, str) for tag in data["tags"])):
        wrong.append('"tags" must be an array of strings')
    if "base_model_relation" in data and data["base_model_relation"] not in ("adapter", "finetune", "merge", "quantized"):
        wrong.append('"base_model_relation" is not valid')
    return [{"message": message} for message in wrong]
