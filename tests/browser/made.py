"""Adapters made for the pages' tests: small random factors on the bundled base, on the shelf without any training."""

import contextlib
import os

from lora_studio import library
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.workspace import Workspace
from tests import tiny

BASE = "demo-text"


def adapter(home, name: str, *, seed: int, rank: int = 4, size: float = 0.08, base: str = BASE, ends=("q_proj", "v_proj", "up_proj")) -> str:
    """Put a random adapter on the shelf of a home. Returns its id."""
    files = tiny.adapter_files(demo_base(BASE), seed=seed, rank=rank, size=size, ends=ends, name=base)
    return library.add(Workspace(home), files, {"name": name, "base": base})


@contextlib.contextmanager
def at(home):
    """Within it, the bench that is asked is the one of that home."""
    before = os.environ.get("LORA_STUDIO_HOME")
    os.environ["LORA_STUDIO_HOME"] = str(home)
    try:
        yield bench
    finally:
        if before is None:
            del os.environ["LORA_STUDIO_HOME"]
        else:
            os.environ["LORA_STUDIO_HOME"] = before
