"""A workspace: one user's folder. Every verb takes one, and an id resolves only inside it."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lora_studio.errors import MachineError, RunError
from lora_studio.fence import Limits
from lora_studio.home import home

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True)
class Workspace:
    """The folder of one owner, and the right to use it. `limits` are a visitor's; None for who owns the studio."""

    root: Path
    owner: str = "local"
    limits: Limits | None = None

    @property
    def runs(self) -> Path:
        """The folder of run folders."""
        return self.root / "runs"

    @property
    def data(self) -> Path:
        """The folder of uploaded data."""
        return self.root / "data"

    def run_folder(self, id: str) -> Path:
        """The folder of a run, by its id or an unambiguous beginning of it. Raises RunError."""
        text = str(id)
        if RUN_ID.fullmatch(text) and (self.runs / text / "spec.yaml").is_file():
            return self.runs / text
        if re.fullmatch(r"[0-9a-f-]{4,20}", text):
            fits = sorted(path for path in self.run_folders() if path.name.startswith(text) or path.name.endswith(text))
            if len(fits) == 1:
                return fits[0]
            if fits:
                raise RunError("run.ambiguous", id=text, known=", ".join(path.name for path in fits[:5]))
        raise RunError("run.unknown", id=text[:80])

    def run_folders(self) -> list[Path]:
        """The folders of all runs, newest first."""
        if not self.runs.is_dir():
            return []
        found = (path for path in self.runs.iterdir() if RUN_ID.fullmatch(path.name) and (path / "spec.yaml").is_file())
        return sorted(found, key=lambda path: path.name, reverse=True)


def local() -> Workspace:
    """The workspace of the person at this machine, made if it is not there. Raises MachineError."""
    return _made(Workspace(home()))


def of_visitor(subject: str, name: str, limits: Limits) -> Workspace:
    """The workspace of a visitor, made if it is not there. `subject` is what the sign-in calls them for ever, `name` what they are called
    now; the folder's name is made of the first alone. Raises MachineError."""
    folder = home() / "users" / hashlib.sha256(subject.encode()).hexdigest()[:24]
    return _made(Workspace(folder, name, limits))


def _made(workspace: Workspace) -> Workspace:
    try:
        for folder in (workspace.root, workspace.runs, workspace.data):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise MachineError("machine.write", path=workspace.root, reason=error.strerror or str(error)) from None
    return workspace
