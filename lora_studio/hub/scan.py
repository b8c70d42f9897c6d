"""Which files would be published, and what in them must not be: secrets, the token in use, local paths, pickles."""

import hashlib
import html
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_studio import durable
from lora_studio.errors import HubError
from lora_studio.home import home

TEXT = {".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".svg"}
BINARY = {".safetensors", ".model", ".png", ".jpg", ".jpeg", ".webp"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
VOCABULARY = {"tokenizer.json", "vocab.json", "merges.txt"}  # any string may be a token of these, so only our own paths count
LARGEST_TEXT = 64 << 20
HEADER_LIMIT = 100 << 20
CHUNK = 1 << 20

SECRETS = tuple(
    (what, re.compile(pattern))
    for what, pattern in (
        ("a Hugging Face token", r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}"),
        ("a key of OpenAI or Anthropic", r"(?<![A-Za-z0-9])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{24,}"),
        ("a GitHub token", r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{30,})"),
        ("a key of AWS", r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
        ("a key of Google", r"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}"),
        ("a Slack token", r"(?<![A-Za-z0-9])xox[abeprs]-[0-9A-Za-z-]{10,}"),
        ("a private key", r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
        ("an address with a password", r"[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@"),
    )
)
ANYONES_PATH = re.compile(
    r"(?<![\w.])/(?:home|Users|root|tmp|var/tmp|var/folders)/[^/\s\"'\\]+"
    r"|(?<![A-Za-z])[A-Za-z]:\\{1,2}Users\\{1,2}[^\\\"\s]+"
    r"|file://"
)
MARKDOWN_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
PATH_KEY = re.compile(r"(?:path|dir|folder|file)s?$", re.IGNORECASE)
PATH_VALUE = re.compile(r"^(?:/[\w.]|~|\.{1,2}[/\\]|[A-Za-z]:[\\/]|file:)")


@dataclass(frozen=True)
class Item:
    """One file to publish: its name in the repository, where its bytes are, and what the Hub will know it by."""

    path: str
    source: Path | bytes = field(repr=False)
    size: int
    sha256: str
    blob: str
    leaks: bool = field(default=False, repr=False)
    stamp: tuple[int, int] = field(default=(0, 0), repr=False)

    def read(self, limit: int | None = None) -> bytes:
        """The first bytes of the file (all without a limit)."""
        if isinstance(self.source, bytes):
            return self.source[:limit]
        with open(self.source, "rb") as file:
            return file.read() if limit is None else file.read(limit)


def plan(folder: Path, files: Mapping[str, bytes | str] | None = None, *, token: str | None = None) -> list[Item]:
    """Every file that would be published: those of `folder` (without hidden ones and the studio's own manifest), with
    `files` (name to content) laid over them. Raises HubError for what is never published."""
    laid = {name: content.encode() if isinstance(content, str) else bytes(content) for name, content in (files or {}).items()}
    found: dict[str, Path | bytes] = {**_walk(Path(folder)), **laid}
    for name in found:
        if Path(name).suffix.lower() not in TEXT | BINARY:
            reason = "it may be a pickle, and pickles run code" if Path(name).suffix.lower() in PICKLES else "it is no part of an adapter"
            raise HubError("hub.unwanted", path=name, reason=reason)
    if not any(name.endswith(".safetensors") for name in found):
        raise HubError("hub.empty", path=folder)
    try:
        return [item_of(name, source, token) for name, source in sorted(found.items())]
    except OSError as error:
        raise _unreadable(error, folder) from None


def _walk(folder: Path) -> dict[str, Path]:
    try:
        found, waiting = {}, [folder]
        while waiting:
            for path in sorted(waiting.pop().iterdir()):
                name = path.relative_to(folder).as_posix()
                if path.name.startswith(".") or name == durable.MARKER:
                    continue
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise HubError("hub.unwanted", path=name, reason="it is a link or a device, which may lead anywhere")
                if path.is_dir():
                    waiting.append(path)
                else:
                    found[name] = path
        return found
    except OSError as error:
        raise _unreadable(error, folder) from None


def _unreadable(error: OSError, folder: Path) -> HubError:
    return HubError("hub.file", path=error.filename or folder, reason=error.strerror or type(error).__name__, outcome="Nothing was sent.")


def stamp(path: Path) -> tuple[int, int]:
    """What tells that a file was written to: its size and the time of the last write."""
    try:
        known = path.stat()
    except OSError:
        return -1, -1
    return known.st_size, known.st_mtime_ns


def item_of(name: str, source: Path | bytes, token: str | None) -> Item:
    """One file with its hashes, and whether the token in use is in it. Raises OSError."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    before = stamp(source) if isinstance(source, Path) else (0, 0)
    sha256, blob, leaks, tail, read = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size), False, b"", 0
    secret = (token or "").encode()
    for chunk in _chunks(source):
        sha256.update(chunk)
        if size <= LARGEST_TEXT:  # larger ones the Hub keeps in its storage, by sha256
            blob.update(chunk)
        read += len(chunk)
        leaks = leaks or bool(secret and secret in tail + chunk)
        tail = chunk[-len(secret) :] if secret else b""
    if read != size:
        raise OSError(None, "it changed while it was read", name)
    item = Item(name, source, size, sha256.hexdigest(), blob.hexdigest(), leaks, before)
    return replace(item, leaks=True) if token and not leaks and token in _text(item) else item


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def scan(items: Iterable[Item]) -> list[str]:
    """What must not be published, each with its file and without quoting a secret. An empty list is what is wanted."""
    found: dict[str, None] = {}
    own = _own_paths()
    for item in items:
        if item.leaks:
            found[f"{item.path} holds the token you are signed in with"] = None
        text = _text(item)
        for what, pattern in SECRETS:
            if not item.leaks and (hit := pattern.search(text)):
                found[f"{item.path} holds {what} (line {text.count(chr(10), 0, hit.start()) + 1})"] = None
        for path in _paths(item, text, own):
            found[f"{item.path} holds the local path {path[:100]}"] = None
    return list(found)


def secret_in(item: Item) -> str:
    """What secret a file of any kind holds: the token in use, or what looks like a key or a password. Empty when none was found."""
    if item.leaks:
        return "the token you are signed in with"
    suffix = Path(item.path).suffix.lower()
    if suffix in TEXT | {".safetensors"}:
        text = _text(item)
    else:
        text = "" if b"\0" in item.read(8192) else item.read(LARGEST_TEXT).decode("utf-8", "replace")
    hit = next(((what, found) for what, pattern in SECRETS if (found := pattern.search(text))), None)
    return f"{hit[0]} (line {text.count(chr(10), 0, hit[1].start()) + 1})" if hit else ""


def _text(item: Item) -> str:
    """What can be read in a file: the text itself (that of Markdown as it is shown), or the free text in the header of a safetensors file."""
    suffix = Path(item.path).suffix.lower()
    if suffix in TEXT:
        text = item.read(LARGEST_TEXT).decode("utf-8", "replace")
        # A token in a paragraph is written hf\_..., and read as hf_...
        return html.unescape(MARKDOWN_ESCAPE.sub(r"\1", text)) if suffix == ".md" else text
    if suffix != ".safetensors" or item.size < 8:
        return ""
    (length,) = struct.unpack("<Q", item.read(8))
    header = item.read(8 + min(length, HEADER_LIMIT))[8:].decode("utf-8", "replace")
    try:
        return json.dumps(json.loads(header).get("__metadata__", {}), ensure_ascii=False)
    except (ValueError, AttributeError):
        return header


def _paths(item: Item, text: str, own: re.Pattern) -> Iterator[str]:
    yield from (hit.group() for hit in own.finditer(text))
    suffix, name = Path(item.path).suffix.lower(), Path(item.path).name
    # In a README a path may be part of an answer about paths; in settings it is never meant for others.
    if name in VOCABULARY or suffix not in (".json", ".yaml", ".yml", ".safetensors"):
        return
    yield from (hit.group() for hit in ANYONES_PATH.finditer(text))
    try:
        yield from _path_values(json.loads(text))
    except ValueError:
        return


def _path_values(value, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _path_values(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _path_values(inner, key)
    elif isinstance(value, str) and PATH_KEY.search(key) and PATH_VALUE.match(value):
        yield value


def _own_paths() -> re.Pattern:
    """This machine's own folders, wherever they are written; those that every machine has give nothing away."""
    folders = {str(home()), str(Path.home()), tempfile.gettempdir(), os.getcwd()} - {"/", "", "/tmp", "/var/tmp", "/root"}
    ends = "|".join(re.escape(folder.rstrip("/")) for folder in sorted(folders, key=len, reverse=True))
    return re.compile(rf"(?<![\w.])(?:{ends})(?=/)[^\s\"'<>)]*")
