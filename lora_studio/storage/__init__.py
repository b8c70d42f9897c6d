"""What outlives the machine: closed files copied to a place that lasts, and brought back when the studio starts on a bare disk.

    objects/ab/abcd...   the bytes of a file, or of a part of one, under their sha256; never changed
    manifests/12.json    which items there are, written last; the two newest stay, each begins with its own hash

The place is a folder (folder.py) or a private repository on the Hub (repository.py). A file counts only once it was closed and a whole
manifest names it. An item is what is copied as it stood at one moment: an adapter, an album, a checkpoint, the rest of a run.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_studio import durable, runs
from lora_studio.errors import HostError, RunError
from lora_studio.storage import contents
from lora_studio.storage.folder import Folder

LOG_BYTES = 64 << 10
MOST_PARTS = 16
TURN_BYTES = 512 << 20
READERS = 16
# A checkpoint is younger than the events that led to it for as long as those are batched.
SETTLED_SECONDS = 2.0


class Changed(Exception):
    """A file changed while it was copied; the next turn tries again."""


class Withheld(Exception):
    """A place does not take a file; the sentence says which and why."""


class Storage:
    """A home and the place that keeps its files. One thread uses it; `restore` comes before the first `save`."""

    def __init__(self, home: Path, place):
        self.home, self.place = Path(home), Folder(place) if isinstance(place, str | Path) else place
        self.writer, self.began, self.number = secrets.token_hex(8), time.time(), 0
        self.items: dict[str, str] = {}  # of the newest manifest: the hash of each item's listing
        self.before: set[str] | None = None  # what the manifest before it needs; None until one was written
        self.carried: dict[str, str] = {}  # what another studio kept last, and this one never had
        self.seen: dict[str, tuple] = {}  # (stamps, hash of the listing) of each item that was copied
        self.listings: dict[str, dict] = {}
        self.there: set[str] = set()  # objects known to be whole
        self.known: dict[Path, tuple] = {}  # (stamp, parts) of each file that was copied
        self.withheld: dict[str, str] = {}  # why the place does not take an item
        self.left = 0
        try:
            self.place.open(self.home)
        except OSError as error:
            raise self.place.refusal(error) from None

    # ---- bringing back

    def restore(self, *, allow: Callable[[int], None] = lambda more: None) -> list[str]:
        """Bring back every file that is missing here; what is here stays as it is. What is damaged there is left out. Runs that were at work
        are ended with the truth. `allow` is told how many bytes it will be, and may raise. Returns sentences about what was done; none when
        there was nothing. Raises StudioError when it cannot be read: what did not come back must not be taken for removed."""
        try:
            return self._restore(allow)
        except OSError as error:
            raise self.place.refusal(error) from None

    def _restore(self, allow: Callable[[int], None]) -> list[str]:
        self.place.look()
        found = self.place.manifests()
        if not found:
            return []
        number, body = next(((number, body) for number in found if (body := self._read(number)) is not None), (0, None))
        if body is None:
            raise HostError(self.place.BROKEN, path=self.place.name)
        self.number, self.items = number, dict(body["items"])
        if durable.read_json(self.home / self.place.mark) == self._here():
            return []  # this disk is as it was, and what is missing here was removed
        fresh = [self.home / item for item in self.items if contents.is_run(item) and not (self.home / item / "spec.yaml").exists()]
        back, damaged = self._bring(allow)
        self._settle(fresh)
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not damaged:  # else the next start looks at every byte again
            durable.write_json(self.home / self.place.mark, self._here())
        said = [f"{back} files were brought back from {self.place.name}."] if back else []
        return said + [f"{name} is damaged in {self.place.name} and was left out." for name in damaged]

    def _bring(self, allow: Callable[[int], None]) -> tuple[int, list[str]]:
        """Bring back what is missing: how many files, and the names of what is damaged. All is written before anything gets its name."""
        wanted, damaged, made = [], [], []
        for item in self.items:
            listing, top = self._listing(item), self.home / item
            if listing is None:
                damaged.append(item)
                continue
            for folder in ["", *listing["folders"]] if listing["is_folder"] else []:
                made += self._folder(top / folder)
            # A published folder comes back whole or not at all.
            whole = item if durable.MARKER in listing["files"] and not (top / durable.MARKER).exists() else ""
            for name, parts in listing["files"].items():
                target = top / name if name else top
                if not target.exists():
                    made += self._folder(target.parent)
                    wanted.append((whole or f"{item}/{name}".rstrip("/"), parts, target))
        try:
            allow(sum(size for _, parts, _ in wanted for _, size in parts))
            staged = self._all_staged(wanted)
        except BaseException:  # the place cannot be read, or it is too much: nothing of it is left here
            for _, _, target in wanted:
                _temporary(target).unlink(missing_ok=True)
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # somebody works in it meanwhile
                    folder.rmdir()
            raise
        broken = {name for (name, _, _), place in zip(wanted, staged, strict=True) if place is None}
        os.sync()
        for (name, parts, target), place in zip(wanted, staged, strict=True):
            if name in broken or target.exists():  # what was made here meanwhile is newer
                (place or _temporary(target)).unlink(missing_ok=True)
                continue
            os.replace(place, target)
            if target.name != contents.LOG:
                self.known[target] = (contents.stamp(target), [tuple(part) for part in parts])
        os.sync()
        for name in broken:
            if (self.home / name).is_dir():
                durable.remove_folder(self.home / name)
        return sum(name not in broken for name, _, _ in wanted), [*damaged, *sorted(broken)]

    def _all_staged(self, wanted: list[tuple]) -> list[Path | None]:
        """What is wanted, beside where it will be."""
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(lambda one: self._staged(*one[1:]), wanted))

    def _folder(self, folder: Path) -> list[Path]:
        """Make a folder of the home, with those above it; which were made."""
        made = [one for one in (*reversed(folder.parents), folder) if one.is_relative_to(self.home) and not one.exists()]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return made

    def _staged(self, parts: list, target: Path) -> Path | None:
        """A file made of its parts, beside where it will be; None when one is damaged."""
        temporary = _temporary(target)
        with open(temporary, "wb") as file:
            is_whole = all(self._copy_out(sha, size, file) for sha, size in parts)
        if is_whole:
            return temporary
        temporary.unlink()
        return None

    def _copy_out(self, sha: str, size: int, file) -> bool:
        try:
            digest, count = hashlib.sha256(), 0
            for block in self.place.read(_checked(sha)):
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
            raise self.place.refusal(error) from None
        finally:
            self.there -= self.place.abandon()

    def _save(self, at_most: int | None, settled: float) -> bool:
        self.place.look()
        self._look_for_others()
        self.left, items, late, withheld = (1 << 62) if at_most is None else at_most, {}, set(), {}
        present = list(contents.all_in(self.home, others=self.place.others))
        for item, path in present:
            try:
                items[item] = self._item(item, path, settled)
            except (Changed, FileNotFoundError):
                late.add(contents.root(item))
                if item in self.items:
                    items[item] = self.items[item]
            except Withheld as reason:
                withheld[item] = str(reason)
                items |= {item: self.items[item]} if item in self.items else {}
        self.withheld = withheld
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
                self._events(file, old["files"].get(name, []), f"{item}/{name}")
                if name == contents.EVENTS
                else self._log(file, f"{item}/{name}")
                if name == contents.LOG
                else self._file(file, f"{item}/{name}".rstrip("/"))
            )
        if contents.steady(contents.stamps(item, path)) != contents.steady(before):
            raise Changed
        listing = {"is_folder": path.is_dir(), "folders": before["folders"], "files": files}
        data = json.dumps(listing, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        sha = self._keep(data, item)
        self.listings[sha], self.seen[item] = json.loads(data), (before, sha)
        return sha

    def _file(self, file: Path, name: str) -> list:
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
            self.left -= max(size, self.place.file_bytes)
            if not self.place.add(sha, file, name):
                raise Changed
            self.there.add(sha)
        if contents.stamp(file) != stamp:
            raise Changed
        self.known[file] = (stamp, [(sha, size)])
        return [(sha, size)]

    def _events(self, file: Path, old: list, name: str) -> list:
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
        return [*kept, (self._keep(rest, name), len(rest))] if rest or not kept else kept

    def _log(self, file: Path, name: str) -> list:
        with open(file, "rb") as source:
            source.seek(max(0, os.fstat(source.fileno()).st_size - LOG_BYTES))
            data = source.read(LOG_BYTES)
        return [(self._keep(data, name), len(data))]

    def _keep(self, data: bytes, name: str = "") -> str:
        """Copy bytes, unless they are there. Returns their hash."""
        sha = hashlib.sha256(data).hexdigest()
        if sha not in self.there:
            self.place.add(sha, data, name)
            self.there.add(sha)
        return sha

    # ---- manifests

    def _commit(self, items: dict[str, str]) -> None:
        """Write the next manifest, then let go of the one before the last and of what only that one needed."""
        needed, older = self._needs(items), self._needs(self.items)
        number, last = max([*self.place.manifests(), 0, self.number]) + 1, self.number
        body = json.dumps(
            {"number": number, "writer": self.writer, "began": self.began, "items": items}, sort_keys=True, ensure_ascii=False
        ).encode()
        # A studio that was cut off leaves objects that no manifest names; the first turn finds them.
        gone = (self.before if self.before is not None else self.place.objects() - self.there) - needed - older
        drop = [one for one in self.place.manifests() if one != last], gone
        self.place.commit(number, hashlib.sha256(body).hexdigest().encode() + b"\n" + body, needed, drop)
        self.number, self.items = number, items
        durable.write_json(self.home / self.place.mark, self._here())
        self.place.tidy(drop)
        self.there -= gone
        self.before = older
        self.listings = {sha: listing for sha, listing in self.listings.items() if sha in needed or sha in older}
        self.known = {path: found for path, found in self.known.items() if path.exists()}
        self.seen = {item: found for item, found in self.seen.items() if item in items}

    def _here(self) -> dict:
        return {
            "number": self.number,
            "place": self.place.name,
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
        numbers = self.place.manifests()
        if self.number and self.number not in numbers:
            # Another place is attached now: nothing of what was copied is known to be there.
            self.number, self.items, self.before = 0, {}, None
            for known in (self.there, self.known, self.seen, self.listings, self.carried):
                known.clear()
        for number in numbers[:2]:
            body = self._read(number) if number > self.number else None
            if body is None or body["writer"] == self.writer:
                continue
            if body["began"] > self.began:
                raise HostError(self.place.TAKEN, path=self.place.name)
            self.carried |= {item: sha for item, sha in body["items"].items() if item not in self.items}

    def _read(self, number: int) -> dict | None:
        """A manifest; None when it is not whole."""
        sha, _, body = (self.place.manifest(number) or b"").partition(b"\n")
        return json.loads(body) if hashlib.sha256(body).hexdigest().encode() == sha else None

    def size(self) -> tuple[int, int]:
        """How many files the newest manifest names, and their bytes."""
        found = [(self._listing(item) or {"files": {}})["files"].values() for item in self.items]
        return sum(len(files) for files in found), sum(size for files in found for parts in files for _, size in parts)

    # ---- listings

    def _listing(self, item: str, sha: str | None = None) -> dict | None:
        """What an item of a manifest holds: {is_folder, folders, files: {name: [(sha256, bytes), ...]}}; None when it is damaged or unknown."""
        sha = sha or self.items.get(item, "")
        if sha and sha not in self.listings:
            try:
                data = b"".join(self.place.read(_checked(sha)))
            except OSError:
                return None
            if hashlib.sha256(data).hexdigest() != sha or not contents.is_item(item):
                return None
            listing = json.loads(data)
            if not all(contents.is_inside(name) for name in (*listing["files"], *listing["folders"])):
                return None
            self.listings[sha] = listing
            self.there |= {sha} | {
                part for parts in listing["files"].values() for part, _ in parts
            }  # a whole manifest names only what was closed
        return self.listings.get(sha)


def _temporary(target: Path) -> Path:
    return target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{hashlib.sha256(target.name.encode()).hexdigest()[:24]}")


def _checked(sha: str) -> str:
    """A name of an object. Raises FileNotFoundError for what can be none."""
    if not re.fullmatch(r"[0-9a-f]{64}", sha):
        raise FileNotFoundError(sha)
    return sha


def _checkpoint(folder: Path) -> int:
    """The step of a run's newest whole checkpoint; 0 without one."""
    found = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    return next((int(path.name.removeprefix("step-")) for path in found if durable.damage(path) is None), 0)
