"""Pictures of a Hub data set, written into the cache as files with their captions, and read from there like any folder."""

import hashlib
import json
from pathlib import Path

from lora_studio import data
from lora_studio.errors import DataError, MachineError
from lora_studio.pictures import staging
from lora_studio.pictures.labels import CAPTIONS, MASKS, METADATA, SOURCES
from lora_studio.spec import Source

KINDS = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))


def fetch(source: Source, cache: Path, *, limit: int | None = None) -> Path:
    """The folder with the pictures of a Hub data set (the first `limit` of them), made if it is not there.

    The metadata file in it has the columns' own names, so that source.columns holds there too. Raises DataError, MachineError.
    """
    import datasets

    found = data.load_hub(source)
    columns = _columns(found, source)
    rows = min(number for number in (limit, source.cap, len(found)) if number is not None)
    if rows == 0:
        raise DataError("data.empty", path=source.path)
    known = [source.path, source.subset, source.split, source.revision, found._fingerprint, columns, rows]
    for role in ("picture", "mask", "source"):
        if role in columns:
            # As they are stored: their bytes are checked like those of any other file before PIL decodes them.
            found = found.cast_column(columns[role], datasets.Image(decode=False))
    target = cache / hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    try:
        return staging.publish(target, lambda folder: _write(found.select(range(rows)), columns, folder, source))
    except OSError as error:
        raise MachineError("machine.write", path=cache, reason=error.strerror or str(error)) from None


def _columns(found, source: Source) -> dict[str, str]:
    """The column of each role. Raises DataError."""
    import datasets

    listed = ", ".join(found.column_names)
    for role, column in source.columns.items():
        if column not in found.column_names:
            raise DataError("data.no_column", path=source.path, column=column, columns=listed, role=role)
    pictures = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
    columns = dict(source.columns)
    if "picture" not in columns and pictures:
        columns["picture"] = next((name for name in pictures if name not in (*MASKS, *SOURCES)), pictures[0])
    if any(columns.get(role) not in pictures for role in ("picture", *(role for role in ("mask", "source") if role in columns))):
        raise DataError("picture.hub_column", id=source.path, columns=listed)
    for role, usual in (("caption", CAPTIONS), ("mask", MASKS), ("source", SOURCES)):
        column = next((name for name in usual if name in (found.column_names if role == "caption" else pictures)), None)
        if role not in columns and column is not None and column != columns["picture"]:
            columns[role] = column
    return columns


def _write(found, columns: dict[str, str], folder: Path, source: Source) -> dict[str, int]:
    """Write the rows as picture files and one metadata file; the size of each. Raises DataError, MachineError."""
    sizes, rows, total = {}, [], 0
    # Under the names that source.columns gives, or else the usual ones.
    named = {"picture": "file_name", "caption": CAPTIONS[0], "mask": MASKS[0], "source": SOURCES[0]} | source.columns
    for index, row in enumerate(found):
        said = {named["caption"]: _caption(row[columns["caption"]])} if "caption" in columns else {}
        for role in ("picture", "mask", "source"):
            content = _bytes_of(row[columns[role]]) if role in columns else None
            if content is None and role != "picture":
                continue
            content = content or b""  # a row without its picture is counted like an empty file
            total += len(content)
            if total > staging.MOST_BYTES:
                raise DataError(
                    "data.hub", path=source.path, reason=f"its pictures take more than {staging.MOST_BYTES / 1e9:.1f} GB. Set cap"
                )
            staging.make_sure_it_fits(len(content), folder)
            said[named[role]] = name = f"{role}s/{index:06}{_suffix(content)}"
            sizes[name] = staging.write(folder / name, content)
        rows.append(said)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return sizes | {METADATA[0]: staging.write(folder / METADATA[0], lines.encode())}


def _caption(value):
    """A caption as JSON can hold it; what is no text stays recognisable as that."""
    if value is None or isinstance(value, str):
        return value
    return [] if isinstance(value, list | dict) else str(value)


def _bytes_of(value: dict | None) -> bytes | None:
    """A stored picture's bytes. A path is followed only into the Hub's caches: a data set could name any file of this machine."""
    import datasets
    import huggingface_hub.constants as hub

    if not value or value.get("bytes") is not None:
        return value["bytes"] if value else None
    caches = [
        Path(place).resolve() for place in (hub.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    ]
    path = Path(value.get("path") or "").resolve()
    return path.read_bytes() if path.is_file() and any(path.is_relative_to(cache) for cache in caches) else None


def _suffix(content: bytes) -> str:
    if content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in KINDS if content.startswith(start)), ".avif" if content[4:12] == b"ftypavif" else ".png")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
