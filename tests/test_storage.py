"""What outlives the machine: cut at any instant the storage is as before or as after, and a run that died with its disk goes on to the same bytes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lora_studio import durable, fence, runs, storage, studio
from lora_studio.errors import HostError
from lora_studio.spec import parse
from lora_studio.storage import Storage, folder
from lora_studio.workspace import Workspace, local, of_visitor
from tests import tiny
from tests.campaigns import kills
from tests.hosted import belongings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path):
    return tmp_path / "bucket"


def state(home: Path) -> dict[str, bytes]:
    """Every file that should outlive the machine."""
    left = (".lock", "process.json", "storage.json")
    found = (
        path
        for path in sorted(home.rglob("*"))
        if path.is_file() and not path.name.endswith(left) and not {"control", ".index", "locks", "exports"} & set(path.parts)
    )
    return {path.relative_to(home).as_posix(): path.read_bytes() for path in found}


def after_a_loss(place: Path, home: Path) -> tuple[dict[str, bytes], list[str]]:
    """What a studio on a bare disk has after its start, and what it said."""
    shutil.rmtree(home, ignore_errors=True)
    said = Storage(home, place).restore()
    return state(home), said


def test_everything_of_everybody_comes_back(home, place, tmp_path):
    for name in ("ana", "ben"):
        (tmp_path / name).mkdir()
        belongings.make(of_visitor(name, name, fence.Limits()), f"canary{name}", scratch=tmp_path / name, seed=len(name) + ord(name[0]))
    expected = state(home)
    assert Storage(home, place).save(settled=0.0) and len(expected) > 30
    found, said = after_a_loss(place, tmp_path / "bare")
    assert found == expected
    assert said == [f"{len(found)} files were brought back from {place}."]
    assert list((tmp_path / "bare").glob("users/*/data/*/.album")), "an empty folder has a meaning too"
    assert Storage(tmp_path / "bare", place).restore() == []


def test_an_unchanged_file_is_not_copied_again_and_a_removed_one_is_let_go(home, place, workspace):
    (workspace.data / "a.jsonl").write_bytes(b"a" * 5000)
    (workspace.data / "b.jsonl").write_bytes(b"b" * 5000)
    kept = Storage(home, place)
    kept.save(settled=0.0)
    seen = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert kept.save(settled=0.0)
    again = Storage(home, place)
    again.restore()
    again.save(settled=0.0)
    copied = {path for path in (place / "objects").rglob("*") if path.is_file()}
    assert {path: path.stat().st_mtime_ns for path in copied}.items() <= seen.items()
    (workspace.data / "a.jsonl").unlink()
    for text in ("c", "d", "e"):
        (workspace.data / "b.jsonl").write_text(text)
        again.save(settled=0.0)
    contents = [path.read_bytes() for path in (place / "objects").rglob("*") if path.is_file()]
    assert b"e" in contents and b"a" * 5000 not in contents and b"c" not in contents
    assert len(list((place / "manifests").glob("*.json"))) == 2


def test_events_are_immutable_segments_of_what_was_added(home, place, workspace, base, chat_rows):
    folder, kept = runs.create(workspace, parse(tiny.tree(base, chat_rows))), Storage(home, place)
    for number in range(40):
        runs.note(folder, "step", step=number, steps=40, loss=1.0)
        kept.save(settled=0.0)
        parts = kept._listing(f"runs/{folder.name}")["files"]["events.jsonl"]
        assert 1 <= len(parts) <= storage.MOST_PARTS
        data = b"".join((place / "objects" / sha[:2] / sha).read_bytes() for sha, _ in parts)
        assert data == (folder / "events.jsonl").read_bytes()
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b'{"seq": 40, "half')
    kept.save(settled=0.0)
    shutil.rmtree(home)
    Storage(home, place).restore()
    assert [event["step"] for event in runs.read_all(folder) if event["kind"] == "step"] == list(range(40))


class Cut(BaseException):
    """The machine goes."""


def cut_at(monkeypatch, number: int) -> list[int]:
    """Let the writing and deleting in storages stop at the so-manyeth operation, half of it done. Returns the count so far."""
    done, write, close, unlink = [0], folder._write, folder._close, Path.unlink

    def counted() -> bool:
        done[0] += 1
        return done[0] == number

    def torn(file, block):
        if counted():
            write(file, block[: len(block) // 2])
            file.flush()
            raise Cut
        write(file, block)

    def closed(file):
        if counted():
            raise Cut
        close(file)

    def unlinked(path, missing_ok=False):
        if "bucket" in path.parts and counted():
            raise Cut
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(folder, "_write", torn)
    monkeypatch.setattr(folder, "_close", closed)
    monkeypatch.setattr(Path, "unlink", unlinked)
    return done


def test_cut_at_any_write_the_storage_is_as_before_or_as_after(home, place, workspace, tmp_path, monkeypatch):
    """The bucket has no rename: a file may be half there under its own name."""
    (workspace.data / "rows.jsonl").write_text("one")
    durable.publish_folder(workspace.runs / "adapter", {"x": b"old weights"})
    for text in ("zero", "one"):
        (workspace.data / "more.jsonl").write_text(text)
        kept = Storage(home, place)
        kept.restore()
        kept.save(settled=0.0)
    before = state(home)
    (workspace.data / "rows.jsonl").write_text("two")
    (workspace.data / "more.jsonl").unlink()
    durable.publish_folder(workspace.runs / "adapter", {"x": b"new weights", "y": b"more"})
    after, seen = state(home), set()
    untouched = tmp_path / "untouched"
    shutil.copytree(place, untouched)
    mark = (home / "storage.json").read_bytes()
    for number in range(1, 200):
        shutil.rmtree(place)
        shutil.copytree(untouched, place)
        (home / "storage.json").write_bytes(mark)
        kept = Storage(home, place)
        kept.restore()
        with monkeypatch.context() as patch:
            done = cut_at(patch, number)
            with contextlib.suppress(Cut):
                kept.save(settled=0.0)
        found, said = after_a_loss(place, tmp_path / "bare")
        assert found in (before, after) and not [line for line in said if "damaged" in line], number
        seen.add("after" if found == after else "before")
        again = Storage(home, place)
        again.restore()
        assert again.save(settled=0.0) and state(home) == after
        assert after_a_loss(place, tmp_path / "bare")[0] == after
        again.save(settled=0.0)
        if done[0] < number:
            break
    assert seen == {"before", "after"} and number > 15


@pytest.mark.parametrize("way", ["cut", "emptied", "gone", "flipped"])
def test_what_is_damaged_is_left_out_and_said(home, place, workspace, tmp_path, way):
    (workspace.data / "rows.jsonl").write_bytes(b"r" * 3000)
    (workspace.data / "fine.jsonl").write_bytes(b"f" * 3000)
    durable.publish_folder(workspace.root / "library" / "one", {"weights": b"w" * 3000, "card": b"c"})
    Storage(home, place).save(settled=0.0)
    for path in (place / "objects").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if data[:3] in (b"rrr", b"www"):
            path.unlink()
            if way != "gone":
                path.write_bytes({"cut": data[:1500], "emptied": b"", "flipped": b"x" + data[1:]}[way])
    found, said = after_a_loss(place, tmp_path / "bare")
    assert sorted(found) == ["data/fine.jsonl"]
    assert [line.split(" is ")[0] for line in said[1:]] == ["data/rows.jsonl", "library/one"]
    # Made again here, it is copied again: what is known to be broken there does not count as there.
    again = Storage(tmp_path / "bare", place)
    again.restore()
    (tmp_path / "bare" / "data" / "rows.jsonl").write_bytes(b"r" * 3000)
    again.save(settled=0.0)
    assert after_a_loss(place, tmp_path / "bare2")[0]["data/rows.jsonl"] == b"r" * 3000


def test_a_manifest_that_is_not_whole_is_not_read(home, place, workspace, tmp_path):
    kept = Storage(home, place)
    for text in ("one", "two"):
        (workspace.data / "rows.jsonl").write_text(text)
        kept.save(settled=0.0)
    newest, older = sorted((place / "manifests").glob("*.json"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-20])
    assert after_a_loss(place, tmp_path / "bare")[0]["data/rows.jsonl"] == b"one"
    older.write_bytes(b"")
    with pytest.raises(HostError, match="No manifest"):
        Storage(tmp_path / "bare2", place).restore()


def test_names_that_lead_out_of_the_home_are_not_followed(home, place, workspace, tmp_path):
    (workspace.data / "rows.jsonl").write_text("one")
    kept = Storage(home, place)
    kept.save(settled=0.0)
    listing = {"is_folder": True, "folders": ["../../out"], "files": {"../../evil": kept._listing("data/rows.jsonl")["files"][""]}}
    kept._commit({**kept.items, "data/x": kept._keep(json.dumps(listing).encode()), "../evil2": kept.items["data/rows.jsonl"]})
    found, said = after_a_loss(place, tmp_path / "in" / "bare")
    assert sorted(found) == ["data/rows.jsonl"] and len(said) == 3
    assert not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("out"))


def test_a_turn_is_bounded_and_what_is_older_stays_until_the_newer_is_there(home, place, workspace, tmp_path):
    kept = Storage(home, place)
    run = workspace.runs / "20260101-000000-abcd" / "checkpoints"
    run.mkdir(parents=True)
    durable.publish_folder(run / "step-000001", {"a": b"1" * 1000, "b": b"2" * 1000})
    assert kept.save(settled=0.0)
    durable.publish_folder(run / "step-000002", {"a": b"3" * 1000, "b": b"4" * 1000})
    durable.remove_folder(run / "step-000001")
    assert not kept.save(at_most=500, settled=0.0)
    assert {path.split("/")[3] for path in after_a_loss(place, tmp_path / "bare")[0]} == {"step-000001"}
    turns = 1
    while not kept.save(at_most=500, settled=0.0):
        turns += 1
    assert turns == 2
    assert {path.split("/")[3] for path in after_a_loss(place, tmp_path / "bare")[0]} == {"step-000002"}


def test_a_studio_that_started_later_takes_the_storage_over(home, place, workspace, tmp_path):
    old = Storage(home, place)
    (workspace.data / "rows.jsonl").write_text("one")
    old.save(settled=0.0)
    new = Storage(tmp_path / "bare", place)
    new.restore()
    new.save(settled=0.0)
    (workspace.data / "rows.jsonl").write_text("two")
    with pytest.raises(HostError, match="started later"):
        old.save(settled=0.0)
    assert new.save(settled=0.0) and after_a_loss(place, tmp_path / "third")[0]["data/rows.jsonl"] == b"one"


def test_what_the_studio_before_kept_last_is_not_lost(home, place, workspace, tmp_path):
    """The old machine ends after the new one has started; or the bucket was attached late, and this studio began with an empty one."""
    old = Storage(home, place)
    (workspace.data / "rows.jsonl").write_text("one")
    (workspace.data / "gone.jsonl").write_text("here")
    old.save(settled=0.0)
    new = Storage(tmp_path / "bare", place)
    new.restore()
    (workspace.data / "last.jsonl").write_text("last")
    old.save(settled=0.0)
    (tmp_path / "bare" / "data" / "gone.jsonl").unlink()
    for number in range(4):
        (tmp_path / "bare" / "data" / "mine.jsonl").write_text(str(number))
        assert new.save(settled=0.0)
    found = after_a_loss(place, tmp_path / "third")[0]
    assert found == {"data/rows.jsonl": b"one", "data/last.jsonl": b"last", "data/mine.jsonl": b"3"}


def test_a_storage_that_cannot_be_one_is_refused(home, tmp_path):
    home.mkdir()
    with pytest.raises(HostError, match="inside"):
        Storage(home, home / "kept")
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot be used"):
        Storage(home, tmp_path / "file")


def serve(home: Path, place: Path, port: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "LORA_STUDIO_HOME": str(home),
        "LORA_STUDIO_STORAGE": str(place),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(home.parent / "gradio"),
    }
    with open(home.parent / "server.log", "ab") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environment, stdout=log, stderr=log, cwd=home.parent)
    until = time.monotonic() + 90
    while time.monotonic() < until:
        assert process.poll() is None, (home.parent / "server.log").read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/studio/health", timeout=1)
            return process
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not answer within 90 s")


def test_a_run_whose_machine_went_with_its_disk_goes_on_to_the_identical_adapter(home, place, workspace, base, chat_rows, free_port):
    """kill -9 of the server and of the run at work, the disk gone, the same storage: what was kept is there, and the run ends on the same bytes."""
    spec = parse(kills.settings(base, chat_rows, steps=300))
    whole = studio.start(workspace, spec)
    expected, told = kills.finish(workspace, whole), kills.history(workspace, whole)
    spec = parse({**kills.settings(base, chat_rows, steps=300), "name": "cut"})
    process = serve(home, place, free_port)
    try:
        id = studio.start(workspace, spec)
        folder = workspace.run_folder(id)
        while not [event for event in runs.read(folder)[0] if event["kind"] == "saved"]:
            time.sleep(0.005)
        os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGSTOP)  # in the middle, until it was kept
        assert runs.ended(folder) is None, "the run was over before it could be stopped"
        until = time.monotonic() + 60
        while not (kept := [item for item in newest(place) if item.startswith(f"runs/{id}/checkpoints/")]) and time.monotonic() < until:
            time.sleep(0.2)
        assert kept
    finally:
        process.kill()
        process.wait(20)
    os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGKILL)
    while runs.is_live(folder):
        time.sleep(0.02)
    shutil.rmtree(home)
    process = serve(home, place, free_port)
    try:
        served = Workspace(home)
        status = studio.show(served, id)
        assert status.state == "failed" and "Resume goes on from step" in status.reason, status
        assert studio.show(served, whole).state == "done" and kills.history(served, whole) == told
        assert studio.resume(served, id) == id
        assert kills.finish(served, id) == expected and kills.history(served, id) == told
    finally:
        process.terminate()
        process.wait(40)
    assert "All files are kept." in (home.parent / "server.log").read_text()
    shutil.rmtree(home)
    Storage(home, place).restore()
    assert studio.show(local(), id).state == "done" and not durable.damage(folder / "adapter")


def newest(place: Path) -> dict[str, str]:
    """The items of the newest manifest."""
    found, kept = folder.Folder(place), Storage(place.parent / "nothing", place)
    return next((body["items"] for number in found.manifests() if (body := kept._read(number))), {})
