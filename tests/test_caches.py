"""The caches are bounded by size and age; what is unused longest goes first, and never what a run, the bench or a download needs."""

import fcntl
import os
import time

import pytest

from lora_studio import caches, durable, runs
from lora_studio.caches import Bounds
from lora_studio.errors import HostError
from lora_studio.jobs import queue
from lora_studio.spec import parse

NOW = 2_000_000_000.0
DAY = 86400.0


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache of its own."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def fetched(hub, id: str, *, days: float, size: int = 1000):
    """A repository in the cache as the client leaves it, last used so many days ago."""
    folder = hub / f"models--{id.replace('/', '--')}"
    for part in ("blobs", "snapshots/abc", "refs"):
        (folder / part).mkdir(parents=True)
    (folder / "blobs" / "x").write_bytes(b"w" * size)
    (folder / "refs" / "main").write_bytes(b"")
    (folder / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/x")
    used(folder, days)
    return folder


def used(folder, days: float) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (NOW - days * DAY,) * 2, follow_symlinks=False)


def names(gone) -> list[str]:
    return [entry.name for entry in gone]


def test_what_is_unused_longest_goes_until_the_rest_fits(home, hub):
    for id, days in (("a/old", 9), ("b/older", 12), ("c/new", 1)):
        fetched(hub, id, days=days)
    one = caches.entries()[0].bytes
    assert caches.size() == 3 * one and one >= 1000
    assert names(caches.trim(Bounds(2 * one + 10), now=NOW)) == ["b/older"]
    assert caches.trim(Bounds(2 * one), now=NOW) == []
    assert names(caches.trim(Bounds(1), now=NOW)) == ["a/old", "c/new"]
    assert caches.size() == 0 and not list(hub.glob("models--*"))


def test_what_is_too_old_goes_though_there_is_room(home, hub):
    fetched(hub, "a/old", days=15)
    kept = fetched(hub, "b/new", days=13)
    assert names(caches.trim(Bounds(None, 14 * DAY), now=NOW)) == ["a/old"] and kept.is_dir()
    assert caches.trim(Bounds(), now=NOW + 900 * DAY) == []


def test_what_the_studio_made_itself_is_bounded_too(home, hub):
    for kind, name, days in (("latents", "one", 20), ("archives", "two", 3)):
        (home / "cache" / kind / name).mkdir(parents=True)
        (home / "cache" / kind / name / "x").write_bytes(b"x" * 500)
        used(home / "cache", days) if days == 20 else used(home / "cache" / kind / name, days)
    assert names(caches.trim(Bounds(None, 14 * DAY), now=NOW)) == [str(home / "cache" / "latents" / "one")]
    assert (home / "cache" / "archives" / "two" / "x").is_file()


def test_what_a_run_needs_stays(workspace, home, hub):
    """Waiting or at work, under whatever setting it is named; once it has ended it may go."""
    base, other = fetched(hub, "a/base", days=30), fetched(hub, "b/other", days=30)
    run = runs.create(workspace, parse({"name": "x", "base": {"id": "a/base"}, "data": [{"path": "demo/pirate"}]}))
    queue.add(workspace, run, device="cpu")
    assert names(caches.trim(Bounds(0, DAY), now=NOW)) == ["b/other"] and base.is_dir() and not other.is_dir()
    queue.remove(run)
    runs.note(run, "launched", device="cpu")
    with durable.Lock(run / "run.lock"):
        assert caches.trim(Bounds(0, DAY), now=NOW) == []
    runs.note(run, "done", step=1)
    assert names(caches.trim(Bounds(0, DAY), now=NOW)) == ["a/base"]


def test_what_the_bench_holds_is_fetched_or_is_new_stays(home, hub):
    fetched(hub, "a/held", days=30)
    fetched(hub, "b/fetched", days=30)
    fetched(hub, "c/new", days=0.01)
    lock = hub / ".locks" / "models--b--fetched" / "x.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert caches.trim(Bounds(0, DAY), kept=["a/held"], now=NOW) == []
    assert names(caches.trim(Bounds(0, DAY), kept=["a/held"], now=NOW)) == ["b/fetched"]


def test_a_folder_that_is_read_while_it_goes_is_read_to_its_end(home, hub):
    folder = fetched(hub, "a/mapped", days=30, size=5000)
    with open(folder / "snapshots" / "abc" / "model.safetensors", "rb") as file:
        used(folder, 30)
        assert caches.trim(Bounds(0), now=NOW)
        assert len(file.read()) == 5000


def test_the_bounds_are_read_from_the_environment():
    assert caches.bounds({}, is_hosted=False) == Bounds(None, None)
    assert caches.bounds({}, is_hosted=True) == Bounds(30 * 10**9, 14 * DAY)
    assert caches.bounds({"LORA_STUDIO_CACHE_GB": "2.5", "LORA_STUDIO_CACHE_DAYS": "3"}, is_hosted=False) == Bounds(2_500_000_000, 3 * DAY)
    for text in ("none", "0", "-1", "nan"):
        with pytest.raises(HostError, match="LORA_STUDIO_CACHE_GB"):
            caches.bounds({"LORA_STUDIO_CACHE_GB": text}, is_hosted=True)


def test_now_is_the_time_of_the_machine(home, hub):
    folder = fetched(hub, "a/new", days=0)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - 2 * DAY,) * 2, follow_symlinks=False)
    assert caches.trim(Bounds(None, 3 * DAY)) == [] and names(caches.trim(Bounds(None, DAY))) == ["a/new"]
