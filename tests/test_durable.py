"""Files that survive: whole or absent, and locks that end with their holder."""

import os
import subprocess
import sys

import pytest

from lora_studio import durable


def test_a_published_folder_is_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "thing"
    durable.publish_folder(target, {"a": b"1", "b": b"2"})
    durable.publish_folder(target, {"c": b"3"})
    assert durable.damage(target) is None
    assert sorted(path.name for path in target.iterdir()) == ["c", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize("fault", ["delete", "truncate", "zero", "flip"])
@pytest.mark.parametrize("name", ["a", "manifest.json"])
def test_damage_to_any_file_is_noticed(tmp_path, fault, name):
    target = tmp_path / "thing"
    durable.publish_folder(target, {"a": b"some content that is long enough"})
    file = target / name
    data = bytearray(file.read_bytes())
    if fault == "delete":
        file.unlink()
    elif fault == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif fault == "zero":
        file.write_bytes(bytes(len(data)))
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert durable.damage(target) is not None


def test_leftovers_of_a_crash_are_swept(tmp_path):
    (tmp_path / ".part-1-x").mkdir()
    (tmp_path / ".trash-1-y").mkdir()
    (tmp_path / ".part-2-z").write_bytes(b"")
    (tmp_path / "kept").write_bytes(b"")
    durable.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_lock_is_exclusive_and_inherited_by_children(tmp_path):
    path = tmp_path / "a.lock"
    lock = durable.Lock(path)
    assert lock.take() and not durable.Lock(path).take() and durable.is_locked(path)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[lock.handle])
    lock.release()
    assert durable.is_locked(path)
    child.stdin.close()
    child.wait(20)
    assert not durable.is_locked(path)


def test_a_written_file_is_synced_before_the_call_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    durable.write(tmp_path / "a", "x")
    assert synced[0].startswith(str(tmp_path / durable.TEMPORARY)) and synced[-1] == str(tmp_path)


def test_a_published_folder_has_folders_in_it_and_copies_what_is_given_as_a_place(tmp_path):
    given = tmp_path / "given.bin"
    given.write_bytes(bytes(range(256)) * 40_000)  # longer than a portion
    durable.publish_folder(tmp_path / "out", {"unet/weights.bin": given, "model_index.json": b"{}"})
    assert (tmp_path / "out" / "unet" / "weights.bin").read_bytes() == given.read_bytes() and durable.damage(tmp_path / "out") is None
    (tmp_path / "out" / "unet" / "weights.bin").write_bytes(b"other")
    assert "unet/weights.bin has 5 bytes" in durable.damage(tmp_path / "out")
