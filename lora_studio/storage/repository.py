"""A place that lasts which is a private repository on the Hub: what was added counts with the one commit that writes the manifest."""

import contextlib
import hashlib
import hmac
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_studio.errors import HostError, HubError
from lora_studio.hub import own
from lora_studio.hub.pull import fetch
from lora_studio.hub.scan import item_of, secret_in
from lora_studio.storage import Withheld
from lora_studio.storage.folder import BLOCK

MANIFEST = re.compile(r"manifests/(\d{1,12})\.json")
# Files of that name are kept by the Hub as large ones, by their sha256: what it has is not sent again, and none swells the history.
OBJECT = re.compile(r"objects/../([0-9a-f]{64})\.bin")
FREE_BYTES = 1 << 30
ABOUT = """# A LoRA Studio workspace

LoRA Studio keeps runs, adapters, albums and rows here, by the hash of their bytes, and brings them back when the disk it works on was lost.
Nothing in it is meant to be edited. Keep it private. When you no longer want it, delete the repository: the studio does not make it again by itself.
"""


class Repository:
    """A place (see folder.py). `token` may be set anew before every turn. With a `seal` manifests are signed with it, and one that was signed
    otherwise is not read: whoever owns the repository could have written anything there, and a visitor's workspace is trusted by the studio."""

    BROKEN, TAKEN, mark, file_bytes, others = "keep.broken", "keep.taken", "repository.json", 1 << 16, False

    def __init__(self, name: str, token: str, *, staging: Path, seal: bytes = b"", make: bool = False):
        self.name, self.token, self.seal, self.make = name, token, seal, make
        self.staging = staging
        self.staged: dict[str, Path | bytes] = {}
        self.dropped: set[str] = set()  # objects that are needed no more, and may still take room there
        self.unneeded = 0  # their bytes

    def refusal(self, error: OSError) -> HostError:
        """What a failure to read or write a file here comes to."""
        return HostError("keep.file", path=error.filename or self.staging, reason=error.strerror or type(error).__name__)

    def open(self, home: Path) -> None:
        """Find or make the repository. Raises HubError, HostError, OSError."""
        self.talk, self.remote = own.open_own(self.name, self.token, make=self.make)
        self.name = self.talk.id
        self.staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = Path(tempfile.mkdtemp(dir=self.staging))

    def close(self) -> None:
        """Let go of what is between here and there."""
        self.staged.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self) -> None:
        """Forget the token; a new one is set before the next turn."""
        self.token = self.talk.token = ""

    def look(self) -> None:
        """See what is there now. Raises HubError and HostError."""
        self.talk.token = self.token
        self.remote = own.seen(self.talk)

    # ---- reading

    def manifests(self) -> list[int]:
        return sorted((int(match.group(1)) for path in self.remote.files if (match := MANIFEST.fullmatch(path))), reverse=True)

    def manifest(self, number: int) -> bytes | None:
        """The bytes of a manifest. Raises HostError when it is not sealed as it should be."""
        try:
            data = b"".join(self._fetched(f"manifests/{number}.json"))
        except FileNotFoundError:
            return None
        sha, _, rest = data.partition(b"\n")
        body, _, seal = rest.partition(b"\n")
        if self.seal and not hmac.compare_digest(seal.strip(), self._sealed(body)):
            raise HostError("keep.strange", id=self.name)
        return sha + b"\n" + body

    def _sealed(self, body: bytes) -> bytes:
        return hmac.new(self.seal, body, hashlib.sha256).hexdigest().encode()

    def read(self, sha: str) -> Iterator[bytes]:
        """The bytes of an object, as the Hub lists them. Raises FileNotFoundError for one that is not there or is another's, HubError when
        it does not arrive as it is listed."""
        entry = self.remote.files.get(path := _object(sha))
        if entry is None or (entry.lfs and entry.lfs.sha256 != sha):
            raise FileNotFoundError(path)
        yield from self._fetched(path)

    def _fetched(self, path: str) -> Iterator[bytes]:
        entry = self.remote.files.get(path)
        if entry is None:
            raise FileNotFoundError(path)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            fetch(self.talk, entry, self.remote.commit, Path(place))
            with open(Path(place) / Path(path).name, "rb") as source:
                while block := source.read(BLOCK):
                    yield block

    def objects(self) -> set[str]:
        return {match.group(1) for path in self.remote.files if (match := OBJECT.fullmatch(path))}

    # ---- writing

    def add(self, sha: str, source: Path | bytes, name: str) -> bool:
        """Lay an object ready for the commit. Raises Withheld when a secret is in it."""
        if sha in self.staged:
            return True
        if isinstance(source, Path):
            source = self._held(source, sha)
        item = item_of(name, source, self.token)
        if item.sha256 != sha:
            return False
        if found := secret_in(item):
            raise Withheld(f"{name} holds {found}, so it is not kept.")
        there = self.remote.files.get(_object(sha))
        # What is there whole is not sent again, though perhaps no manifest names it.
        if there is None or there.size != item.size or (there.lfs and there.lfs.sha256 != sha):
            self.staged[sha] = source
        return True

    def _held(self, file: Path, sha: str) -> Path:
        """The file under a second name, by which it is still there when the studio lets go of it before it was sent."""
        held = self.folder / sha
        with contextlib.suppress(FileExistsError):
            try:
                os.link(file, held)
            except PermissionError:
                shutil.copyfile(file, held)
        return held

    def commit(self, number: int, manifest: bytes, needed: set[str], drop: tuple[Iterable[int], Iterable[str]]) -> None:
        """Send what is laid ready and needed, with the manifest and without what is to go, in one commit. Raises HubError and HostError."""
        seal = b"\n" + self._sealed(manifest.partition(b"\n")[2]) if self.seal else b""
        path = f"manifests/{number}.json"
        files = {_object(sha): source for sha, source in self.staged.items() if sha in needed} | {path: manifest + seal}
        if "README.md" not in self.remote.files:
            files["README.md"] = ABOUT.encode()
        gone = [*(f"manifests/{one}.json" for one in drop[0]), *(_object(sha) for sha in drop[1])]
        self.unneeded += sum(entry.size for name in set(gone) if (entry := self.remote.files.get(name)))
        self.dropped = (self.dropped | set(drop[1])) - needed
        self.remote = own.commit(self.talk, self.remote, files, gone, proof=path)
        for sha in needed & self.staged.keys():
            del self.staged[sha]

    def tidy(self, drop: tuple[Iterable[int], Iterable[str]]) -> None:
        """What nobody needs went with the commit, but the Hub keeps it with the history: once it is much it is deleted there too."""
        if self.unneeded < FREE_BYTES:
            return
        try:
            own.free(self.talk, self.dropped)
            self.dropped = set()
        except HubError as error:
            print(f"Room in {self.name} was not freed: {error}", flush=True)
        self.unneeded = 0

    def abandon(self) -> set[str]:
        """Forget what was laid ready and not sent; its names."""
        found = set(self.staged)
        self.staged.clear()
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        return found


def _object(sha: str) -> str:
    return f"objects/{sha[:2]}/{sha}.bin"
