"""A grid of pictures: adapters or checkpoints × strengths × prompts, drawn on the bench and saved as one picture with its settings inside."""

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lora_studio import library, pictures
from lora_studio.adapters import steps
from lora_studio.errors import BenchError
from lora_studio.jobs import bench
from lora_studio.pictures.samples import save_sample
from lora_studio.weights import Weight, acts, times
from lora_studio.workspace import Workspace

MOST = 400
STEP = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class Row:
    """One row of a grid: what it is called, and its adapters as [folder, weight, name]."""

    label: str
    parts: tuple[tuple[str, Weight, str], ...]


@dataclass(frozen=True)
class Asked:
    """What a grid is made of. A strength multiplies every weight of a row; 0 is the bare base. `brush` may hold seed, steps, guidance,
    width, height."""

    base: str
    prompts: tuple[str, ...]
    rows: tuple[Row, ...]
    strengths: tuple[float, ...]
    brush: dict

    def __post_init__(self):
        if not self.prompts or not self.strengths or not self.rows:
            raise BenchError("grid.empty", what="prompt" if not self.prompts else "strength" if not self.strengths else "row")
        count = len(self.prompts) * len(self.rows) * len(self.strengths)
        if count > MOST:
            raise BenchError("grid.large", count=count, most=MOST)


def choices(workspace: Workspace, parts: list[list]) -> list[tuple[str, str]]:
    """The rows that a mix can have, as (label, key): all its adapters together, each alone, and the checkpoints of their runs."""
    names = {id: library.card(workspace, id)["name"] for id, _ in parts}
    alone = [(name, id) for id, name in names.items()]
    mixed = [("All together", "all")] if len(parts) > 1 else []
    return [*mixed, *alone, *((f"{name}, step {step}", f"{id}@{step}") for id, name in names.items() for step in _steps(workspace, id))]


def _steps(workspace: Workspace, id: str) -> list[int]:
    folder = _run(workspace, id)
    return steps.steps(folder) if folder else []


def _run(workspace: Workspace, id: str) -> Path | None:
    """The folder of the run that an adapter came from, if it is still there and has an adapter."""
    run = library.card(workspace, id).get("run")
    folder = workspace.root / "runs" / run if run else None
    return folder if folder and (folder / "adapter").is_dir() else None


def rows(workspace: Workspace, keys: list[str], parts: list[list]) -> tuple[Row, ...]:
    """The rows of those keys for a mix. A checkpoint has the weight of its adapter. Raises StudioError."""
    labels, weights = {key: label for label, key in choices(workspace, parts)}, dict(map(tuple, parts))
    found = []
    for key in keys:
        if key not in labels:
            raise BenchError("grid.row", name=key[:60])
        at = STEP.fullmatch(key)
        if key == "all":
            there = [(str(library.adapter_folder(workspace, id)), weight, library.card(workspace, id)["name"]) for id, weight in parts]
        elif at:
            there = [(str(steps.adapter_of(_run(workspace, at[1]), int(at[2]))), weights[at[1]], labels[key])]
        else:
            there = [(str(library.adapter_folder(workspace, key)), weights[key], labels[key])]
        found.append(Row(labels[key], tuple(there)))
    return tuple(found)


def draw(workspace: Workspace, asked: Asked) -> Iterator[dict]:
    """The events of a grid: `step` with what is done of all pictures, `cell` as each picture is there, `grid` with the one file at the
    end, in the workspace's pictures/. A cell that equals another (strength 0 in every row) is drawn once."""
    target, columns = workspace.root / "pictures", [f"x {strength:g}" if strength else "base" for strength in asked.strengths]
    cells = {(row, column): _scaled(asked.rows[row].parts, strength) for row in range(len(asked.rows)) for column, strength in enumerate(asked.strengths)}
    sides = {f"side {number}": parts for number, parts in enumerate({repr(parts): parts for parts in cells.values()}.values())}
    side_of = {repr(parts): side for side, parts in sides.items()}
    blocks, total, active = [], len(sides) * len(asked.prompts), {}
    for number, prompt in enumerate(asked.prompts):
        files: dict[str, Path] = {}
        request = {side: [list(part) for part in parts] for side, parts in sides.items()}
        with closing(bench.stream("draw", base=asked.base, prompt=prompt, sides=request, target=str(target), **asked.brush)) as events:
            for event in events:
                done = number * len(sides) + len(files)
                if event["event"] == "picture":
                    files[event["side"]] = Path(event["path"])
                    places = [place for place, parts in cells.items() if side_of[repr(parts)] == event["side"]]
                    yield {"event": "cell", "prompt": number, "places": places, "path": event["path"], "done": done + 1, "total": total}
                elif event["event"] == "done":
                    active |= {side: told["active"] for side, told in event["sides"].items()}
                else:
                    yield {**event, "done": done, "total": total}
        lines = [(row.label, [files[side_of[repr(cells[place, column])]] for column in range(len(columns))]) for place, row in enumerate(asked.rows)]
        blocks.append(pictures.Block(prompt, lines))
    told = [{"label": row.label, "adapters": [{"name": name, "weight": weight} for _, weight, name in row.parts]} for row in asked.rows]
    facts = {"base": asked.base, "prompts": list(asked.prompts), "rows": told, "strengths": list(asked.strengths), **asked.brush}
    name = save_sample(target, pictures.compose(blocks, columns), facts)
    bare = [side for side, parts in sides.items() if not parts]
    yield {"event": "grid", "path": str(target / name), "pictures": total, "base_is_bare": all(not active[side] for side in bare)}


def _scaled(parts: tuple[tuple[str, Weight, str], ...], strength: float) -> tuple[tuple[str, Weight, str], ...]:
    return tuple((path, times(weight, strength), name) for path, weight, name in parts if acts(times(weight, strength)))


def strengths(text: str) -> tuple[float, ...]:
    """Numbers that commas or blanks divide. Raises BenchError."""
    try:
        return tuple(dict.fromkeys(float(word) for word in text.replace(",", " ").split()))
    except ValueError:
        raise BenchError("grid.strengths", text=text[:60]) from None
