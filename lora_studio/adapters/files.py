"""Adapter files from the outside: which file is meant, what it really is, and a strict reading of a safetensors header.

The header rules are those of the format, without the latitude that its usual parser leaves: no duplicate names, no holes or overlaps,
no empty tensors, nothing after the end; and limits, so that a hostile header costs nothing.
"""

import io
import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_studio.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BESIDE = ("chat_template.jinja", "README.md")  # what else may lie beside an adapter's weights; anything more in a folder stays behind
NESTED = "nested_ranks"  # of the header's metadata: its first rows and columns are an adapter of every lower rank
LINEAGE = "lora_studio"  # of the header's metadata: what the adapter was made of, as JSON
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
HEADER_LIMIT, TENSOR_LIMIT, METADATA_LIMIT, CONFIG_LIMIT = 8 << 20, 50_000, 1 << 20, 1 << 20
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    size: int


@dataclass(frozen=True)
class Source:
    """An adapter somewhere: its weights (a file, or its bytes) and its configuration, if there is one."""

    label: str
    weights: Path | bytes
    config: bytes | None

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, int]]:
        """The weights as an open file, and their size. Raises AdapterError."""
        try:
            with io.BytesIO(self.weights) if isinstance(self.weights, bytes) else open(self.weights, "rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                yield file, size
        except OSError as error:
            raise AdapterError("adapter.unreadable", path=self.label, reason=error.strerror or str(error)) from None


def shown(text: object, limit: int = 120) -> str:
    """A name from a file, fit to be shown: control characters escaped, long ones shortened."""
    plain = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text)[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def locate(source: Path | str | dict[str, bytes]) -> Source:
    """The weights and configuration of a PEFT folder, of one file, or of files in memory. Nothing pickled is opened. Raises AdapterError."""
    if isinstance(source, dict):
        if WEIGHTS not in source:
            raise AdapterError("adapter.no_weights", path="The adapter", wanted=WEIGHTS)
        return Source("The adapter", source[WEIGHTS], source.get(CONFIG))
    path = Path(source)
    if path.is_dir():
        weights = _weights_in(path)
    elif path.is_file():
        weights = path
    else:
        raise AdapterError("adapter.missing", path=shown(path, 300))
    if weights.suffix.lower() in PICKLED:
        raise AdapterError("adapter.pickle", path=weights.name)
    return Source(shown(path.name or path), weights, _read_config(weights.with_name(CONFIG)))


def _weights_in(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise AdapterError("adapter.many_files", path=folder.name, known=", ".join(shown(file.name) for file in others[:6]))
    pickled = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLED)
    if pickled:
        raise AdapterError("adapter.pickle", path=pickled[0].name)
    raise AdapterError("adapter.no_weights", path=folder.name, wanted=WEIGHTS)


def _read_config(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(CONFIG_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AdapterError("adapter.unreadable", path=CONFIG, reason=error.strerror or str(error)) from None


# ---- what a file really is

LOOKS = [
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
]


def refuse_strangers(label: str, head: bytes, size: int) -> None:
    """Raise AdapterError when the first bytes of a file are not those of safetensors: pickles, web pages, pointers, archives."""
    if size == 0:
        raise AdapterError("adapter.empty_file", path=label)
    pickle = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{"
    if pickle or head[257:262] == b"ustar" or (head[:4] == b"PK\x03\x04" and (b"data.pkl" in head or b".pkl" in head)):
        raise AdapterError("adapter.pickle", path=label)
    if head[:4] == b"PK\x03\x04":
        raise AdapterError("adapter.stranger", path=label, what="a zip archive")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise AdapterError("adapter.stranger", path=label, what="a web page (perhaps the Hub's sign-in page)")
    for start, what in LOOKS:
        if head.startswith(start):
            raise AdapterError("adapter.stranger", path=label, what=what)
    if head[8:9] != b"{" and text.startswith((b"{", b"[")):
        raise AdapterError("adapter.stranger", path=label, what="a JSON text")


# ---- the header


def reheaded(weights: bytes, new: Callable[[str], str] = str, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file with other names and more metadata in its header, in a fixed order (the library's own order of metadata is random)."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    entries = {new(name): entry for name, entry in header.items() if name != "__metadata__"}
    told = {**header.get("__metadata__", {}), "format": "pt", **(metadata or {})}
    text = json.dumps({"__metadata__": dict(sorted(told.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + weights[8 + length :]


def read_metadata(weights: bytes) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]).get("__metadata__", {})


def are_same_tensors(left: bytes, right: bytes) -> bool:
    """Whether two safetensors files hold the same tensors, byte for byte, whatever else their headers say."""
    found = []
    for weights in (left, right):
        (length,) = struct.unpack("<Q", weights[:8])
        header = json.loads(weights[8 : 8 + length])
        found.append(({name: entry for name, entry in header.items() if name != "__metadata__"}, memoryview(weights)[8 + length :]))
    return found[0] == found[1]


def read_header(label: str, file: BinaryIO, size: int) -> Header:
    """The header of a safetensors file, checked against every rule of the format. Raises AdapterError."""
    head = file.read(4096)
    refuse_strangers(label, head, size)
    if size < 8:
        raise AdapterError("adapter.cut", path=label, there=size, promised="at least 8")
    (length,) = struct.unpack("<Q", head[:8])
    if length > HEADER_LIMIT:
        # A length nobody writes is no header at all; one within the file is merely too large.
        if length > size - 8:
            raise AdapterError("adapter.not_safetensors", path=label, reason="its first bytes are not those of such a file")
        raise AdapterError("adapter.header_limit", path=label, what="a larger header", limit=f"{HEADER_LIMIT:,}")
    if length > size - 8:
        raise AdapterError("adapter.cut", path=label, there=size, promised=f"more than {length + 8:,}")
    file.seek(8)
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise AdapterError("adapter.not_safetensors", path=label, reason="its header does not begin with {")
    if raw.count(b'"data_offsets"') > TENSOR_LIMIT:
        raise AdapterError("adapter.header_limit", path=label, what="more tensors", limit=f"{TENSOR_LIMIT:,}")
    tree = parse_json(label, raw)
    metadata = tree.pop("__metadata__", {})
    if len(tree) > TENSOR_LIMIT:  # names can be written so that the count above misses them
        raise AdapterError("adapter.header_limit", path=label, what="more tensors", limit=f"{TENSOR_LIMIT:,}")
    tensors = {name: _entry(label, name, entry, 8 + length) for name, entry in tree.items()}
    if not tensors:
        raise AdapterError("adapter.no_tensors", path=label)
    _check_ranges(label, tensors, 8 + length, size)
    return Header(tensors, _metadata(label, metadata), size)


def parse_json(label: str, raw: bytes) -> dict:
    """The object in a JSON text, strictly: UTF-8, no key twice, no NaN. Raises AdapterError."""

    def pairs(items):
        found = dict(items)
        if len(found) != len(items):
            seen = set()
            twice = next(name for name, _ in items if name in seen or seen.add(name))
            raise AdapterError("adapter.duplicate", path=label, name=shown(twice))
        return found

    def refuse(word):
        raise ValueError(f"it holds {word}")

    try:
        tree = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refuse)
    except UnicodeDecodeError:
        raise AdapterError("adapter.not_json", path=label, reason="it is not UTF-8 text") from None
    except RecursionError:
        raise AdapterError("adapter.not_json", path=label, reason="it is nested too deeply") from None
    except ValueError as error:
        raise AdapterError("adapter.not_json", path=label, reason=shown(error)) from None
    if not isinstance(tree, dict):
        raise AdapterError("adapter.not_json", path=label, reason="it is not an object")
    return tree


def _entry(label: str, name: str, entry, start: int) -> Entry:
    def whole(value, length=None):
        return isinstance(value, list) and length in (None, len(value)) and all(type(item) is int and item >= 0 for item in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError("adapter.entry", path=label, name=shown(name), reason="it lacks a dtype, a shape or its offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise AdapterError("adapter.entry", path=label, name=shown(name), reason=f"the type {shown(dtype, 40)} is not known")
    if not whole(shape) or len(shape) > 8 or not whole(offsets, 2):
        raise AdapterError("adapter.entry", path=label, name=shown(name), reason="its shape or its offsets are not whole numbers")
    if 0 in shape:
        raise AdapterError("adapter.empty_tensor", path=label, name=shown(name), shape=shape)
    if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise AdapterError("adapter.entry", path=label, name=shown(name), reason="its shape and its offsets disagree")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_ranges(label: str, tensors: dict[str, Entry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at = start
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != at:
            what = "overlaps another tensor" if entry.start < at else "leaves a hole before it"
            raise AdapterError("adapter.entry", path=label, name=shown(name), reason=f"its range of bytes {what}")
        at = entry.end
    if at > size:
        raise AdapterError("adapter.cut", path=label, there=f"{size:,}", promised=f"{at:,}")
    if at < size:
        raise AdapterError("adapter.junk", path=label, extra=f"{size - at:,}")


def _metadata(label: str, metadata) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("adapter.not_safetensors", path=label, reason="its metadata is not a table of texts")
    if sum(len(key) + len(value) for key, value in metadata.items()) > METADATA_LIMIT:
        raise AdapterError("adapter.header_limit", path=label, what="more metadata", limit=f"{METADATA_LIMIT:,}")
    return metadata
