"""A place that lasts which is a folder, perhaps a bucket that somebody mounted: nothing is locked, renamed or appended to there."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_studio.errors import HostError

BLOCK = 4 << 20
MANIFEST = re.compile(r"(\d{1,12})\.json")


class Folder:
    """Objects and manifests as files. A place is any object with these methods; `name` is what people read of it, `mark` the file in the home
    that says which manifest it is as new as, `file_bytes` what opening and closing one file counts for, `others` whether the users' folders
    of the home are kept there too."""

    BROKEN, TAKEN, mark, file_bytes, others = "host.storage_broken", "host.storage_taken", "storage.json", 1 << 20, True

    def __init__(self, path: Path):
        self.path = Path(path).absolute()
        self.name = str(self.path)

    def refusal(self, error: OSError) -> HostError:
        """What a failure to read or write comes to."""
        return HostError("host.storage", path=self.path, reason=error.strerror or str(error))

    def open(self, home: Path) -> None:
        """Make it ready. Raises HostError and OSError."""
        if Path(os.path.realpath(self.path)).is_relative_to(os.path.realpath(home)):
            raise HostError("host.storage_inside", path=self.path, home=home)
        for name in ("objects", "manifests"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        self._put(b"LoRA Studio keeps its files here.\n", self.path / "manifests" / "about.txt")

    def look(self) -> None:
        """See what is there now; a folder is seen whenever it is asked."""

    # ---- reading

    def manifests(self) -> list[int]:
        """The numbers of the manifests, the newest first. Raises OSError."""
        found = (MANIFEST.fullmatch(path.name) for path in (self.path / "manifests").iterdir())
        return sorted((int(match.group(1)) for match in found if match), reverse=True)

    def manifest(self, number: int) -> bytes | None:
        """The bytes of a manifest, whole or not; None when it is not there."""
        try:
            return self._manifest(number).read_bytes()
        except OSError:
            return None

    def read(self, sha: str) -> Iterator[bytes]:
        """The bytes of an object as they are there, which may be others than they should be. Raises FileNotFoundError."""
        with open(self._object(sha), "rb") as source:
            while block := source.read(BLOCK):
                yield block

    def objects(self) -> set[str]:
        """The names of all objects."""
        return {path.name for path in (self.path / "objects").glob("??/*")}

    # ---- writing

    def add(self, sha: str, source: Path | bytes, name: str) -> bool:
        """Take an object in, from a file or as bytes; `name` is what it is in the home. Returns whether it arrived whole. Raises OSError."""
        target = self._object(sha)
        if isinstance(source, bytes):
            self._put(source, target)
            return True
        target.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        with open(source, "rb") as file, open(target, "wb") as copy:
            while block := file.read(BLOCK):
                digest.update(block)
                _write(copy, block)
            _close(copy)
        if digest.hexdigest() == sha:
            return True
        target.unlink()
        return False

    def commit(self, number: int, manifest: bytes, needed: set[str], drop: tuple[Iterable[int], Iterable[str]]) -> None:
        """Write a manifest, by which all that was added counts; `drop` are the manifests and objects that may go then."""
        self._put(manifest, self._manifest(number))

    def tidy(self, drop: tuple[Iterable[int], Iterable[str]]) -> None:
        """Let go of what nobody needs once the manifest is written."""
        for number in drop[0]:
            self._manifest(number).unlink(missing_ok=True)
        for sha in drop[1]:
            self._object(sha).unlink(missing_ok=True)

    def abandon(self) -> set[str]:
        """The objects that were added and do not count after all: here none, for each was written at once."""
        return set()

    def _manifest(self, number: int) -> Path:
        return self.path / "manifests" / f"{number}.json"

    def _object(self, sha: str) -> Path:
        return self.path / "objects" / sha[:2] / sha

    def _put(self, data: bytes, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        with open(target, "wb") as file:
            _write(file, data)
            _close(file)


def _write(file, block: bytes) -> None:
    file.write(block)


def _close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
