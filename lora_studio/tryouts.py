"""The verb of trying a mix out before it is saved: the mix as it would be saved, beside its base or one of its parts, same prompt and seed."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_studio import baking, durable, families, library, shelf
from lora_studio.errors import BenchError, BlendError
from lora_studio.jobs import bench
from lora_studio.workspace import Workspace

MIX, BASE = "mix", "base"


@dataclass(frozen=True)
class Asked:
    """What is tried: a prompt, the parts of the mix, and the rank it is compressed to (None: exact). `against` is BASE, the id of an adapter,
    which answers alone with weight 1, or "" for nothing. `longest` is of words in tokens, `steps` of a picture."""

    prompt: str
    parts: shelf.Parts
    rank: int | None = None
    against: str = BASE
    seed: int = 0
    longest: int = 128
    steps: int = 20


def answer(workspace: Workspace, asked: Asked) -> Iterator[dict]:
    """The events of a try-out, as the bench's own: `piece` or `picture` of the sides MIX and the one it is held `against`, `done` last. A mix
    with a rank is compressed first by the very verb that saves it: `made` then tells its path, rank and loss. Raises StudioError."""
    if not asked.prompt.strip():
        raise BenchError("bench.nothing_asked")
    if not asked.parts:
        raise BlendError("tryout.empty")
    base, parts = baking.base_of(workspace, asked.parts), _paths(workspace, asked.parts)
    others = {asked.against: [] if asked.against == BASE else _paths(workspace, [(asked.against, 1.0)])} if asked.against else {}
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        if asked.rank is not None:
            target = Path(place) / "mix" / "adapter"
            for event in bench.stream("blend", parts=parts, rank=asked.rank, target=str(target)):
                if event["event"] != "result":
                    yield event
                    continue
                yield {"event": "made", "path": str(target), "rank": event["rank"], "loss": event["loss"]}
            parts = [[str(target), 1.0, f"the mix at rank {asked.rank}"]]
        yield from _events(workspace, base, asked, {MIX: parts, **others})


def _events(workspace: Workspace, base: str, asked: Asked, sides: dict[str, list]) -> Iterator[dict]:
    """The answers of sides given by paths; pictures at the size and with the guidance that the base's family is drawn with."""
    edge = shelf.picture_edge(base)
    if not edge:
        messages = [{"role": "user", "content": asked.prompt}]
        return bench.stream("answer", base=base, messages=messages, sides=sides, seed=asked.seed, longest=asked.longest)
    family = shelf.image_family(base)
    brush = {"seed": asked.seed, "steps": asked.steps, "width": edge, "height": edge, "guidance": families.guidance(base, family.pipeline if family else "")}
    return bench.stream("draw", base=base, prompt=asked.prompt, sides=sides, target=str(workspace.root / "pictures"), **brush)


def _paths(workspace: Workspace, parts: shelf.Parts) -> list[list]:
    return [[str(library.adapter_folder(workspace, id)), weight, library.card(workspace, id)["name"]] for id, weight in parts]
