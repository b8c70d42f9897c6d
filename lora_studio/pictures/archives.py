"""A .zip of pictures, unpacked once into the cache: checked before anything is written, whole or not there at all."""

import errno
import hashlib
import os
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from stat import S_IFDIR, S_IFMT, S_IFREG

from lora_studio.errors import DataError, MachineError
from lora_studio.pictures import staging
from lora_studio.pictures.picture import shown

MOST_BYTES_OF_ONE = 1 << 30
MOST_FILES = 200_000


def unpack(archive: Path, cache: Path, *, suffixes: tuple[str, ...]) -> Path:
    """The folder with an archive's files of these suffixes, made if it is not there. Raises DataError, MachineError.

    It is named by the archive's hash. Nothing is written before every name and size in the archive was found harmless.
    """
    try:
        with open(archive, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("picture.closed", path=archive, reason=(error.strerror or str(error)).lower()) from None
    try:
        return staging.publish(cache / digest, lambda folder: _unpack(archive, folder, suffixes))
    except OSError as error:
        raise MachineError("machine.write", path=cache, reason=error.strerror or str(error)) from None


def _unpack(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> dict[str, int]:
    try:
        with _opened(archive) as packed:
            members = _checked(archive, packed, suffixes)
            size = sum(member.file_size for member in members)
            if size > staging.MOST_BYTES:
                raise ValueError(f"it would unpack to {size / 1e9:.1f} GB, and {staging.MOST_BYTES / 1e9:.1f} GB is the most")
            staging.make_sure_it_fits(size, folder)
            return {_inner(member): _write(packed, member, folder / _inner(member)) for member in members}
    except UnicodeDecodeError:
        raise DataError("picture.archive", name=shown(archive.name), reason="its list of names is damaged") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error, struct.error) as error:
        reason = str(error).rstrip(".")[:200] or "it is cut off"
        reason = "it is not a .zip, or cut off" if "not a zip file" in reason else reason[0].lower() + reason[1:]
        raise DataError("picture.archive", name=shown(archive.name), reason=reason) from None


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except OSError as error:  # it was readable a moment ago: the archive points to places that it has not
        raise ValueError(f"its list of files is damaged ({error.strerror or error})") from None


def _checked(archive: Path, packed: zipfile.ZipFile, suffixes: tuple[str, ...]) -> list[zipfile.ZipInfo]:
    """The members worth unpacking, once every name in the archive is harmless. Raises DataError."""
    wanted, seen = [], set()
    for member in packed.infolist():
        reason = _harm(member)
        name = _inner(member)
        if reason is None and name in seen and not member.is_dir():
            reason = f"it holds {shown(name)} twice"
        if reason:
            raise DataError("picture.archive", name=shown(archive.name), reason=reason)
        seen.add(name)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
        if not member.is_dir() and not hidden and Path(name).suffix.lower() in suffixes:
            wanted.append(member)
    if len(wanted) > MOST_FILES:
        raise DataError("picture.archive", name=shown(archive.name), reason=f"it holds {len(wanted)} files, and {MOST_FILES} is the most")
    return wanted


def _inner(member: zipfile.ZipInfo) -> str:
    """A member's name inside the folder; some Windows programs write it with backslashes."""
    return posixpath.normpath(member.filename.replace("\\", "/"))


def _harm(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked, in words."""
    name, kind = member.filename, S_IFMT(member.external_attr >> 16)
    parts = re.split(r"[/\\]", name)
    if not name or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in parts:
        return f"it holds the name {shown(name)}, which leads out of the folder"
    if any(letter < " " or letter == "\x7f" or "\ud800" <= letter <= "\udfff" for letter in name):
        return f"it holds the name {shown(name)}, which is no name for a file"
    if kind not in (0, S_IFREG, S_IFDIR):
        return f"it holds {shown(name)}, which is a link or a device"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"it holds {shown(name)}, which is packed by an unusual method"
    if member.flag_bits & 0x1:
        return "it is encrypted"
    if member.file_size > MOST_BYTES_OF_ONE:
        return f"{shown(name)} would unpack to {member.file_size / 1e9:.1f} GB, and {MOST_BYTES_OF_ONE / 1e9:.1f} GB is the most"
    return None


def _write(packed: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> int:
    """Unpack one member; its real size, which is never more than the declared one. Raises ValueError and OSError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target, "xb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"{shown(member.filename)} is both a file and a folder in it") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"the name {shown(member.filename)} is too long") from None
        raise
    written = 0
    with file:
        for piece in _pieces(packed, member):
            written += len(piece)
            if written > member.file_size:
                raise ValueError(f"{shown(member.filename)} is larger than the archive says")
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return written


def _pieces(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The unpacked bytes of a member. Raises ValueError when the archive cannot be read where it says that it is."""
    try:
        with packed.open(member) as source:
            while piece := source.read(1 << 20):
                yield piece
    except OSError as error:
        raise ValueError(f"{shown(member.filename)} cannot be read: {error.strerror or error}") from None
