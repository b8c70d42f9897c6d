"""What outlives the machine: closed files copied to a folder that lasts, and brought back when the studio starts on a bare disk.

    objects/ab/abcd...   the bytes of a file, or of a part of one, under their sha256; never changed
    manifests/12.json    which items there are, written last; the two newest stay, each begins with its own hash

The folder may be a bucket that somebody mounted: nothing is locked, renamed or appended to there, and a file counts only once it was closed
and a whole manifest names it. An item is what is copied as it stood at one moment: an adapter, an album, a checkpoint, the rest of a run.
"""

import hashlib
import json
import os
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_studio import durable, runs
from lora_studio.errors import HostError, RunError
from lora_studio.storage import contents

HERE = "storage.json"  # in the home: which manifest it is as new as
LOG_BYTES = 64 << 10
MOST_PARTS = 16
TURN_BYTES, FILE_BYTES = 512 << 20, 1 << 20  # of a turn, and what opening and closing one file counts for
READERS = 16
BLOCK = 4 << 20
# A checkpoint is younger than the events that led to it for as long as those are batched.
SETTLED_SECONDS = 2.0
MANIFEST = re.compile(r"(\d{1,12})\.json")


class Changed(Exception):
    """A file changed while it was copied; the next turn tries again."""


class Storage:
    """A home and the folder that keeps its files. One thread uses it; `restore` comes before the first `save`."""

    def __init__(self, home: Path, place: Path):
        self.home, self.place = Path(home), Path(place).absolute()
        self.writer, self.began, self.number = secrets.token_hex(8), time.time(), 0
        self.items: dict[str, str] = {}  # of the newest manifest: the hash of each item's listing
        self.before: set[str] | None = None  # what the manifest before it needs; None until one was written
        self.carried: dict[str, str] = {}  # what another studio kept last, and this one never had
        self.seen: dict[str, tuple] = {}  # (stamps, hash of the listing) of each item that was copied
        self.listings: dict[str, dict] = {}
        self.there: set[str] = set()  # objects known to be whole
        self.known: dict[Path, tuple] = {}  # (stamp, parts) of each file that was copied
        self.left = 0
        if Path(os.path.realpath(self.place)).is_relative_to(os.path.realpath(self.home)):
            raise HostError("host.storage_inside", path=self.place, home=self.home)
        try:
            for name in ("objects", "manifests"):
                (self.place / name).mkdir(parents=True, exist_ok=True)
            self._put(b"LoRA Studio keeps its files here.\n", self.place / "manifests" / "about.txt")
        except OSError as error:
            raise HostError("host.storage", path=self.place, reason=error.strerror or str(error)) from None

    # ---- bringing back

    def restore(self) -> list[str]:
        """Bring back every file that is missing here; what is here stays as it is. What is damaged there is left out. Runs that were at work
        are ended with the truth. Returns sentences about what was done; none when there was nothing. Raises HostError when it cannot be read:
        what did not come back must not be taken for removed."""
        try:
            return self._restore()
        except OSError as error:
            raise HostError("host.storage", path=self.place, reason=error.strerror or str(error)) from None

    def _restore(self) -> list[str]:
        found = self._manifests()
        if not found:
            return []
        path, body = next(((path, body) for path in found if (body := _read(path)) is not None), (None, None))
        if body is None:
            raise HostError("host.storage_broken", path=self.place)
        self.number, self.items = int(path.stem), dict(body["items"])
        if durable.read_json(self.home / HERE) == self._here():
            return []  # this disk is as it was, and what is missing here was removed
        fresh = [self.home / item for item in self.items if contents.is_run(item) and not (self.home / item / "spec.yaml").exists()]
        back, damaged = self._bring()
        self._settle(fresh)
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not damaged:  # else the next start looks at every byte again
            durable.write_json(self.home / HERE, self._here())
        said = [f"{back} files were brought back from {self.place}."] if back else []
        return said + [f"{name} is damaged in {self.place} and was left out." for name in damaged]

    def _bring(self) -> tuple[int, list[str]]:
        """Bring back what is missing: how many files, and the names of what is damaged. All is written before anything gets its name."""
        wanted, damaged = [], []
        for item in self.items:
            listing, top = self._listing(item), self.home / item
            if listing is None:
                damaged.append(item)
                continue
            for folder in ["", *listing["folders"]] if listing["is_folder"] else []:
                (top / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
            # A published folder comes back whole or not at all.
            whole = item if durable.MARKER in listing["files"] and not (top / durable.MARKER).exists() else ""
            for name, parts in listing["files"].items():
                target = top / name if name else top
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    wanted.append((whole or f"{item}/{name}".rstrip("/"), parts, target))
        with ThreadPoolExecutor(READERS) as readers:
            staged = list(readers.map(lambda one: self._staged(*one[1:]), wanted))
        broken = {name for (name, _, _), place in zip(wanted, staged, strict=True) if place is None}
        os.sync()
        for (name, parts, target), place in zip(wanted, staged, strict=True):
            if name in broken:
                (place or target).unlink(missing_ok=True)
                continue
            os.replace(place, target)
            if target.name != contents.LOG:
                self.known[target] = (contents.stamp(target), [tuple(part) for part in parts])
        os.sync()
        for name in broken:
            if (self.home / name).is_dir():
                durable.remove_folder(self.home / name)
        return sum(name not in broken for name, _, _ in wanted), [*damaged, *sorted(broken)]

    def _staged(self, parts: list, target: Path) -> Path | None:
        """A file made of its parts, beside where it will be; None when one is damaged."""
        temporary = target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{hashlib.sha256(target.name.encode()).hexdigest()[:24]}")
        with open(temporary, "wb") as file:
            is_whole = all(self._copy_out(sha, size, file) for sha, size in parts)
        if is_whole:
            return temporary
        temporary.unlink()
        return None

    def _copy_out(self, sha: str, size: int, file) -> bool:
        try:
            digest, count = hashlib.sha256(), 0
            with open(self._object(sha), "rb") as source:
                while block := source.read(BLOCK):
                    digest.update(block)
                    count += len(block)
                    file.write(block)
        except FileNotFoundError:
            count, digest = -1, hashlib.sha256()
        if count == size and digest.hexdigest() == sha:
            return True
        self.there.discard(sha)
        return False

    def _settle(self, fresh: list[Path]) -> None:
        """Say of every run that came back how it stands: what was at work ended with the machine, what waited waits on."""
        waits = [entry for entry in durable.read_json(self.home / contents.QUEUE, []) if runs.is_waiting(self.home / entry)]
        if (self.home / contents.QUEUE).exists():
            durable.write_json(self.home / contents.QUEUE, waits)
        for folder in fresh:
            if not (folder / "spec.yaml").is_file() or str(folder.relative_to(self.home)) in waits:
                continue
            if runs.ended(folder) is None or runs.is_waiting(folder):
                step = _checkpoint(folder)
                runs.note(folder, "failed", reason=str(RunError("run.machine_went" if step else "run.machine_went_early", step=step)))

    # ---- copying out

    def save(self, *, at_most: int | None = TURN_BYTES, settled: float = SETTLED_SECONDS) -> bool:
        """Copy what is new, at most so many bytes and a file, and write a manifest if anything differs. Returns whether everything that is
        closed is there now. Raises HostError where the folder cannot be written or another studio has taken it over."""
        try:
            return self._save(at_most, settled)
        except OSError as error:
            raise HostError("host.storage", path=self.place, reason=error.strerror or str(error)) from None

    def _save(self, at_most: int | None, settled: float) -> bool:
        self._look_for_others()
        self.left, items, late = (1 << 62) if at_most is None else at_most, {}, set()
        present = list(contents.all_in(self.home))
        for item, path in present:
            try:
                items[item] = self._item(item, path, settled)
            except (Changed, FileNotFoundError):
                late.add(contents.root(item))
                if item in self.items:
                    items[item] = self.items[item]
        # What is gone here stays there until all else of the same thing is copied: a newer checkpoint comes before the older goes.
        items |= {item: sha for item, sha in self.items.items() if item not in items and contents.root(item) in late}
        items = {**self.carried, **items}
        if items != self.items or not self.number or self.before is None:
            self._commit(items)
        return not late

    def _item(self, item: str, path: Path, settled: float) -> str:
        """Copy the files of an item. Returns the hash of its listing. Raises Changed when it did not hold still or the turn is over."""
        before = contents.stamps(item, path)
        if (seen := self.seen.get(item)) and seen[0] == before and seen[1] in self.there:
            return seen[1]
        if durable.MARKER in before["files"] and time.time() - (path / durable.MARKER).stat().st_mtime < settled:
            raise Changed
        old = self._listing(item) or {"files": {}}
        files = {}
        for name in before["files"]:
            file = path / name if name else path
            files[name] = (
                self._events(file, old["files"].get(name, []))
                if name == contents.EVENTS
                else self._log(file)
                if name == contents.LOG
                else self._file(file)
            )
        if contents.steady(contents.stamps(item, path)) != contents.steady(before):
            raise Changed
        listing = {"is_folder": path.is_dir(), "folders": before["folders"], "files": files}
        data = json.dumps(listing, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        sha = self._keep(data)
        self.listings[sha], self.seen[item] = json.loads(data), (before, sha)
        return sha

    def _file(self, file: Path) -> list:
        """The parts of a closed file, which is copied if it is new."""
        stamp, known = contents.stamp(file), self.known.get(file)
        if known and known[0] == stamp and all(sha in self.there for sha, _ in known[1]):
            return known[1]
        with open(file, "rb") as source:
            sha = hashlib.file_digest(source, "sha256").hexdigest()
        size = stamp[0]
        if sha not in self.there:
            if self.left <= 0:
                raise Changed
            self.left -= max(size, FILE_BYTES)
            self._copy_in(file, sha, size)
        if contents.stamp(file) != stamp:
            raise Changed
        self.known[file] = (stamp, [(sha, size)])
        return [(sha, size)]

    def _copy_in(self, file: Path, sha: str, size: int) -> None:
        digest, target = hashlib.sha256(), self._object(sha)
        target.parent.mkdir(exist_ok=True)
        with open(file, "rb") as source, open(target, "wb") as copy:
            while block := source.read(BLOCK):
                digest.update(block)
                _write(copy, block)
            _close(copy)
        if digest.hexdigest() != sha or target.stat().st_size != size:
            target.unlink()
            raise Changed
        self.there.add(sha)

    def _events(self, file: Path, old: list) -> list:
        """The parts of a run's events: what was added since is one more, and many become one."""
        with open(file, "rb") as source:
            data = source.read()
        data = data[: data.rfind(b"\n") + 1]
        kept, offset = [], 0
        for sha, size in old if len(old) < MOST_PARTS else []:
            if hashlib.sha256(data[offset : offset + size]).hexdigest() != sha or sha not in self.there:
                break
            kept, offset = [*kept, (sha, size)], offset + size
        rest = data[offset:]
        return [*kept, (self._keep(rest), len(rest))] if rest or not kept else kept

    def _log(self, file: Path) -> list:
        with open(file, "rb") as source:
            source.seek(max(0, os.fstat(source.fileno()).st_size - LOG_BYTES))
            data = source.read(LOG_BYTES)
        return [(self._keep(data), len(data))]

    def _keep(self, data: bytes) -> str:
        """Copy bytes, unless they are there. Returns their hash."""
        sha = hashlib.sha256(data).hexdigest()
        if sha not in self.there:
            self._put(data, self._object(sha))
            self.there.add(sha)
        return sha

    def _put(self, data: bytes, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        with open(target, "wb") as file:
            _write(file, data)
            _close(file)

    # ---- manifests

    def _commit(self, items: dict[str, str]) -> None:
        """Write the next manifest, then let go of the one before the last and of what only that one needed."""
        needed, older = self._needs(items), self._needs(self.items)
        number, last = max(self._newest(), self.number) + 1, self.number
        body = json.dumps(
            {"number": number, "writer": self.writer, "began": self.began, "items": items}, sort_keys=True, ensure_ascii=False
        ).encode()
        self._put(hashlib.sha256(body).hexdigest().encode() + b"\n" + body, self.place / "manifests" / f"{number}.json")
        self.number, self.items = number, items
        durable.write_json(self.home / HERE, self._here())
        for path in self._manifests():
            if int(path.stem) not in (number, last):
                path.unlink(missing_ok=True)
        # A studio that was cut off leaves objects that no manifest names; the first turn finds them.
        gone = self.before if self.before is not None else {path.name for path in (self.place / "objects").glob("??/*")} - self.there
        for sha in gone - needed - older:
            self._object(sha).unlink(missing_ok=True)
            self.there.discard(sha)
        self.before = older
        self.listings = {sha: listing for sha, listing in self.listings.items() if sha in needed or sha in older}
        self.known = {path: found for path, found in self.known.items() if path.exists()}
        self.seen = {item: found for item, found in self.seen.items() if item in items}

    def _here(self) -> dict:
        return {
            "number": self.number,
            "place": str(self.place),
            "items": hashlib.sha256(json.dumps(self.items, sort_keys=True).encode()).hexdigest(),
        }

    def _needs(self, items: dict[str, str]) -> set[str]:
        """The objects that a manifest with these items names."""
        found = set(items.values())
        for item, sha in items.items():
            listing = self._listing(item, sha) or {"files": {}}
            found |= {part for parts in listing["files"].values() for part, _ in parts}
        return found

    def _look_for_others(self) -> None:
        """During a restart two studios are alive for a while. Raises HostError when one that started later writes here; what one that started
        earlier kept since is carried along until the next start brings it back."""
        if self.number and not (self.place / "manifests" / f"{self.number}.json").is_file():
            # Another folder is attached now: nothing of what was copied is known to be there.
            self.number, self.items, self.before = 0, {}, None
            for known in (self.there, self.known, self.seen, self.listings, self.carried):
                known.clear()
        for path in self._manifests()[:2]:
            body = _read(path) if int(path.stem) > self.number else None
            if body is None or body["writer"] == self.writer:
                continue
            if body["began"] > self.began:
                raise HostError("host.storage_taken", path=self.place)
            self.carried |= {item: sha for item, sha in body["items"].items() if item not in self.items}

    def _manifests(self) -> list[Path]:
        """The files of manifests, the newest first. Raises OSError."""
        found = [path for path in (self.place / "manifests").iterdir() if MANIFEST.fullmatch(path.name)]
        return sorted(found, key=lambda path: -int(path.stem))

    def _newest(self) -> int:
        return max((int(path.stem) for path in self._manifests()), default=0)

    # ---- objects

    def _object(self, sha: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha):
            raise HostError("host.storage_broken", path=self.place)
        return self.place / "objects" / sha[:2] / sha

    def _listing(self, item: str, sha: str | None = None) -> dict | None:
        """What an item of a manifest holds: {is_folder, folders, files: {name: [(sha256, bytes), ...]}}; None when it is damaged or unknown."""
        sha = sha or self.items.get(item, "")
        if sha and sha not in self.listings:
            try:
                data = self._object(sha).read_bytes()
            except OSError:
                return None
            if hashlib.sha256(data).hexdigest() != sha or not contents.is_inside(item):
                return None
            listing = json.loads(data)
            if not all(contents.is_inside(name) for name in (*listing["files"], *listing["folders"])):
                return None
            self.listings[sha] = listing
            self.there |= {sha} | {
                part for parts in listing["files"].values() for part, _ in parts
            }  # a whole manifest names only what was closed
        return self.listings.get(sha)


def _write(file, block: bytes) -> None:
    file.write(block)


def _close(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path) -> dict | None:
    """The manifest in a file; None when it is not whole."""
    try:
        sha, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return json.loads(body) if hashlib.sha256(body).hexdigest().encode() == sha else None


def _checkpoint(folder: Path) -> int:
    """The step of a run's newest whole checkpoint; 0 without one."""
    found = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    return next((int(path.name.removeprefix("step-")) for path in found if durable.damage(path) is None), 0)
