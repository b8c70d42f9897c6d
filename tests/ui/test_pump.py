"""What the server does by itself: it keeps what must outlive the machine, says trouble once, and bounds the caches."""

import os
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

from lora_studio.errors import MachineError
from lora_studio.fence import Limits
from lora_studio.hosting import Hosting
from lora_studio.ui import pump as pumping
from lora_studio.ui.account import Account
from lora_studio.ui.pump import Pump


def test_trouble_with_the_storage_is_said_once_and_gets_over(workspace, tmp_path, capsys):
    place = tmp_path / "bucket"
    pump = Pump(Hosting(storage=str(place)))
    (workspace.data / "a.jsonl").write_text("a")
    assert pump.keep(everything=True) and pump.trouble == ""
    shutil.rmtree(place)
    place.write_text("in the way")
    (workspace.data / "b.jsonl").write_text("b")
    assert not pump.keep() and not pump.keep()
    line = Account(workspace, Hosting(storage=str(place), space="me/studio"), pump)._line
    me, visitor = SimpleNamespace(name="me"), replace(workspace, limits=Limits())
    assert line(me, workspace)["lasts"] == pump.trouble and str(place) in pump.trouble
    assert "not being kept" in line(me, visitor)["lasts"] and str(place) not in line(me, visitor)["lasts"]
    assert capsys.readouterr().out.count("LORA_STUDIO_STORAGE") == 1
    place.unlink()
    for name in ("objects", "manifests"):
        (place / name).mkdir(parents=True)
    assert pump.keep(everything=True) and pump.trouble == "" and line(me, workspace)["lasts"] == ""
    shutil.rmtree(workspace.root)
    Pump(Hosting(storage=str(place)))
    assert (workspace.data / "a.jsonl").read_text() == "a" and (workspace.data / "b.jsonl").read_text() == "b"


def test_without_storage_nothing_is_kept_and_nothing_fails(workspace):
    pump = Pump(Hosting())
    assert pump.storage is None and not pump.keep(everything=True)


def test_caches_are_trimmed_where_people_sign_in_and_left_alone_on_a_machine_of_ones_own(workspace, home, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    old = home / "cache" / "latents" / "old"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 20 * 86400,) * 2)
    Pump(Hosting()).trim()
    assert old.is_file()
    Pump(Hosting(kind="owner")).trim()
    assert not old.exists()


def test_trouble_in_a_turn_is_said_once_and_ends_nothing_and_stopped_it_takes_no_further_turn(workspace, monkeypatch, capsys):
    seen = []

    def pump():
        seen.append(len(seen))
        if len(seen) in (2, 3):
            raise MachineError("machine.write", path="queue.json", reason="no space left on device")
        if len(seen) == 4:
            raise OSError(28, "no space left on device")

    monkeypatch.setattr(pumping.studio, "pump", pump)
    monkeypatch.setattr(pumping, "SECONDS", 0.01)
    made = Pump(Hosting())
    made.start()
    until = time.monotonic() + 30
    while len(seen) < 6:
        assert time.monotonic() < until
        time.sleep(0.01)
    made.stop()
    taken = len(seen)
    assert not any(worker.thread.is_alive() for worker in made.workers)
    time.sleep(0.1)
    assert len(seen) == taken
    told = capsys.readouterr().out
    assert told.count("Starting what waits: ") == 2 and told.count("queue.json") == 1
