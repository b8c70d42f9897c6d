"""One thing of every kind that a person of the studio may own, under names that are found again wherever they leak to."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_studio import albums, durable, library, runs, studio
from lora_studio.home import demo_base
from lora_studio.spec import parse
from lora_studio.workspace import Workspace
from tests import tiny


@dataclass(frozen=True)
class Belongings:
    """What somebody owns: the canary that stands in every name and text, and the ids others may try."""

    canary: str
    run: str
    adapter: str
    removed: str
    album: str
    discarded: str
    data: str
    sample: str
    picture: str
    export: str
    export_name: str
    model: str

    @property
    def ids(self) -> list[str]:
        """Every name by which something of it might be asked for."""
        return [self.run, self.run[-4:], self.adapter, self.adapter[:6], f"{self.canary} adapter", self.removed, self.album, self.discarded, self.data, self.model]


def make(workspace: Workspace, canary: str, *, scratch: Path, seed: int = 1) -> Belongings:
    """Put one of everything into a workspace."""
    files = {number: tiny.adapter_files(demo_base("demo-text"), seed=seed * 10 + number, rank=2, size=0.05, ends=("q_proj",), name="demo-text") for number in (1, 2)}
    adapter = library.add(workspace, files[1], {"name": f"{canary} adapter", "base": "demo-text", "notes": f"{canary} notes", "tags": [f"{canary}-tag"]})
    gone = library.add(workspace, files[2], {"name": f"{canary} removed", "base": "demo-text"})
    library.remove(workspace, gone)
    run = runs.create(workspace, parse({"name": f"{canary} run", "data": [{"path": "demo/pirate"}], "schedule": {"steps": 3}, "output": {"sample_prompts": [f"{canary} prompt"]}}))
    sample = "0123456789abcdef.png"
    for kind, fields in (
        ("queued", {}), ("launched", {"device": "cpu"}), ("started", {"steps": 3}), ("step", {"step": 1, "steps": 3, "loss": 1.0}),
        ("sample", {"step": 1, "prompt": f"{canary} prompt", "answer": f"{canary} answer"}), ("done", {"step": 3, "steps": 3}),
    ):  # fmt: skip
        runs.note(run, kind, **fields)
    (run / "log.txt").write_text(f"{canary} log\n")
    durable.publish_folder(run / "adapter", {**files[1]})
    picture(run / "samples" / sample)
    picture(workspace.root / "pictures" / "fedcba9876543210.png")
    picture(scratch / f"{canary}.png")
    name, _ = albums.create(workspace, [scratch / f"{canary}.png"], name=f"{canary}-album")
    other, _ = albums.create(workspace, [scratch / f"{canary}.png"], name=f"{canary}-discarded")
    albums.discard(workspace, other)
    (scratch / f"{canary}.jsonl").write_text(f'{{"prompt": "{canary} question", "completion": "{canary} reply"}}\n' * 4)
    data = studio.upload(workspace, scratch / f"{canary}.jsonl", f"{canary}.jsonl")
    for path, text in ((f"exports/{'ab' * 8}/{canary}.gguf", f"{canary} export"), (f"models/{canary}-model/config.json", f'{{"note": "{canary}"}}')):
        (workspace.root / path).parent.mkdir(parents=True)
        durable.write(workspace.root / path, text)
    entry = albums.discarded(workspace)[0][0]
    return Belongings(canary, run.name, adapter, gone, name, entry, data, sample, "fedcba9876543210.png", "ab" * 8, f"{canary}.gguf", str(workspace.root / "models" / f"{canary}-model"))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (200, 30, 60)).save(path)


def state(workspace: Workspace) -> dict[str, tuple[int, bytes]]:
    """Every file of a workspace with its size and content, but the search index, which is made anew at will."""
    found = (path for path in sorted(workspace.root.rglob("*")) if path.is_file() and "index" not in path.name and path.suffix != ".lock")
    return {str(path.relative_to(workspace.root)): (path.stat().st_size, path.read_bytes()) for path in found}
