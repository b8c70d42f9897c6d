"""The library: whole or absent, found by what is known, undone, verified; the folders are the truth and the index is not."""

import errno
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import torch

from lora_studio import adapters, library
from lora_studio.errors import SENTENCES, AdapterError, MachineError
from lora_studio.lowrank import LowRank


def files_of(seed: int = 0, *, rank: int = 2, base: str = "demo-text") -> dict[str, bytes]:
    """A small adapter in memory."""
    draw = torch.Generator().manual_seed(seed)  # of its own: several threads call this at once
    modules = {
        f"model.layers.{layer}.self_attn.q_proj": LowRank(torch.randn(rank, 8, generator=draw), torch.randn(6, rank, generator=draw))
        for layer in range(2)
    }
    return adapters.write(adapters.with_modules(adapters.Card("peft", base=base, task_type="CAUSAL_LM"), modules))


def folder_with(path, files: dict[str, bytes]):
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def snapshot(folder) -> dict[str, bytes]:
    """Every file under a folder but the index and the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".index" not in path.parts and path.name != ".lock"
    }


def test_an_adapter_comes_back_as_it_was_put_in(workspace, tmp_path):
    source = folder_with(tmp_path / "pirate", {**files_of(), "chat_template.jinja": b"x", "training_args.bin": b"pickle", "junk.txt": b""})
    id = library.add(workspace, source, {"name": "Pirate", "trigger": "arr", "tags": ["style", "Style", "fun"], "run": "20260101-000000-abcd", "metrics": {"loss": 1.5}})
    folder = library.adapter_folder(workspace, id)
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "manifest.json"}
    assert (folder / "adapter_model.safetensors").read_bytes() == (source / "adapter_model.safetensors").read_bytes()
    card = library.card(workspace, id)
    assert card["rank"] == 2 and card["alpha"] == 2 and card["base"] == "demo-text" and card["layers"] == 2 and card["targets"] == ["q_proj"]
    assert card["tags"] == ["style", "fun"] and card["metrics"] == {"loss": 1.5} and card["bytes"] == (source / "adapter_model.safetensors").stat().st_size
    assert adapters.read(folder).modules.keys() == adapters.read(source).modules.keys()
    assert library.CARD.keys() <= card.keys() and library.verify(workspace) == {id: None}


def test_the_same_content_is_already_there(workspace, tmp_path):
    first = library.add(workspace, files_of(), {"name": "one"})
    library.note(workspace, first, "kept")
    again = library.add(workspace, folder_with(tmp_path / "same", files_of()), {"name": "another name"})
    assert again == first and library.count(workspace) == 1
    assert library.card(workspace, first)["name"] == "one" and library.card(workspace, first)["notes"] == "kept"
    assert library.add(workspace, files_of(1), {"name": "one"}) != first and library.count(workspace) == 2


def test_a_missing_alpha_that_was_given_is_written_down(workspace, tmp_path):
    files = files_of()
    config = json.loads(files[adapters.CONFIG])
    del config["lora_alpha"]
    source = folder_with(tmp_path / "x", {**files, adapters.CONFIG: json.dumps(config).encode()})
    with pytest.raises(AdapterError, match="no lora_alpha"):
        library.add(workspace, source, {})
    assert library.count(workspace) == 0
    id = library.add(workspace, source, {}, config={"lora_alpha": 6})
    assert adapters.inspect(library.adapter_folder(workspace, id)).alpha == 6


def test_what_is_broken_does_not_enter(workspace, tmp_path):
    library.add(workspace, files_of(), {"name": "there"})
    before = snapshot(workspace.root / "library")
    for data in (files_of(1)[adapters.WEIGHTS][:-3], b"\x80\x04pickle", b""):
        with pytest.raises(AdapterError):
            library.add(workspace, folder_with(tmp_path / str(len(data)), {**files_of(1), adapters.WEIGHTS: data}), {})
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(AdapterError, match="is a pickle"):
        library.add(workspace, tmp_path / "pickled", {})
    assert snapshot(workspace.root / "library") == before


@pytest.mark.parametrize("call", range(6))
def test_a_disk_that_fills_up_at_any_point_leaves_the_library_as_it_was(workspace, monkeypatch, call):
    library.add(workspace, files_of(), {"name": "there"})
    before, real, calls = snapshot(workspace.root / "library"), os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(MachineError, match="No space left"):
        library.add(workspace, files_of(1), {"name": "new"})
    monkeypatch.undo()
    assert snapshot(workspace.root / "library") == before and library.count(workspace) == 1


def test_a_disk_too_small_is_refused_before_anything_is_written(workspace, monkeypatch):
    library.add(workspace, files_of(), {"name": "there"})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(MachineError, match="free, and this needs"):
        library.add(workspace, files_of(1), {})
    assert library.count(workspace) == 1


# ---- finding


def test_items_are_found_by_words_and_filters(workspace):
    rows = [("Pirate talk", "demo-text", ["style"], "arr"), ("Capitals", "demo-text", ["Style", "shout"], ""), ("Grüße 100%", "other/base", [], "_x_")]
    ids = {name: library.add(workspace, files_of(seed, base=base), {"name": name, "tags": tags, "trigger": trigger, "created": 1000.0 + seed}) for seed, (name, base, tags, trigger) in enumerate(rows)}

    def names(text="", **filters):
        return [item.name for item in library.find(workspace, text, **filters)]

    assert names() == ["Grüße 100%", "Capitals", "Pirate talk"] and names(order="oldest") == names()[::-1]
    assert names(order="name") == ["Capitals", "Grüße 100%", "Pirate talk"]
    assert names("PIRATE") == names("talk pirate") == names("arr") == ["Pirate talk"] and names("pirate capitals") == []
    assert names("grüsse") == ["Grüße 100%"] and names("100%") == ["Grüße 100%"] and names("%") == ["Grüße 100%"] and names("_x_") == ["Grüße 100%"]
    assert names("'; DROP TABLE items; --") == []
    assert names(base="demo-text", order="name") == ["Capitals", "Pirate talk"] == names(tag="STYLE", order="name")
    assert names(tag="sty") == [] and names(method="lora", limit=1, offset=1) == ["Capitals"] and names(method="dora") == []
    library.favourite(workspace, ids["Capitals"])
    assert names(favourite=True) == ["Capitals"] and names(favourite=False, order="name") == ["Grüße 100%", "Pirate talk"]
    assert library.count(workspace, "demo") == 2


def test_an_id_resolves_only_inside_the_library(workspace, tmp_path):
    id = library.add(workspace, files_of(), {"name": "one"})
    assert library.folder_of(workspace, id) == library.folder_of(workspace, id[:6]) == library.folder_of(workspace, "one")
    library.add(workspace, files_of(1), {"name": "twin"})
    library.add(workspace, files_of(2), {"name": "twin"})
    for wrong in ("../library", "..", "/etc", "", ".removed", ".index", id + "/adapter", "nobody", "ffffffffffffffff", "\x00", "\ud800", 3):
        with pytest.raises(AdapterError, match="There is no adapter"):
            library.folder_of(workspace, wrong)
    with pytest.raises(AdapterError, match="fits several"):
        library.folder_of(workspace, "twin")


def test_cards_change_and_nothing_else_does(workspace):
    id = library.add(workspace, files_of(), {"name": "one", "tags": ["a"]})
    library.rename(workspace, id, "  two ")
    library.note(workspace, id, "line 1\nline 2")
    library.tag(workspace, id, add=("b", "B", "c"), remove=("A",))
    library.update(workspace, id, publications=[{"repo": "me/x"}])
    card = library.card(workspace, id)
    assert (card["name"], card["notes"], card["tags"], card["publications"]) == ("two", "line 1\nline 2", ["b", "c"], [{"repo": "me/x"}])
    assert library.find(workspace, "line")[0].name == "two" and library.find(workspace, "one") == [] and library.verify(workspace) == {id: None}
    for wrong in ("", "   ", "x" * 81, "a\nb", "\x1b[31m"):
        with pytest.raises(AdapterError, match="cannot be used"):
            library.rename(workspace, id, wrong)
        with pytest.raises(AdapterError, match="cannot be used"):
            library.tag(workspace, id, add=(wrong,))
    with pytest.raises(ValueError):
        library.update(workspace, id, sha256="0")
    assert library.card(workspace, id) == card


def test_changes_from_many_sides_at_once_are_all_kept(workspace):
    id = library.add(workspace, files_of(), {"name": "one"})
    failed = []

    def work(number):
        try:
            for step in range(5):
                library.tag(workspace, id, add=(f"t{number}-{step}",))
                library.find(workspace, "one")
                library.add(workspace, files_of(100 + step), {"name": f"new {step}"})
        except BaseException as error:  # noqa: BLE001  reported below
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(library.card(workspace, id)["tags"]) == {f"t{number}-{step}" for number in range(4) for step in range(5)}
    assert library.count(workspace) == 6 and not list((workspace.root / "library").glob(".part-*"))


# ---- removing


def test_removing_can_be_undone_for_30_days(workspace):
    id = library.add(workspace, files_of(), {"name": "one", "tags": ["kept"]})
    before = snapshot(workspace.root / "library")
    assert library.remove(workspace, "one") == id
    assert library.find(workspace) == [] and [row[:2] for row in library.removed(workspace)] == [(id, "one")]
    with pytest.raises(AdapterError, match="There is no adapter"):
        library.card(workspace, id)
    assert library.sweep(workspace, now=time.time() + 29 * 86400) == 0
    library.undo(workspace, id)
    assert snapshot(workspace.root / "library") == before and library.find(workspace)[0].tags == ("kept",)
    library.remove(workspace, id)
    library.add(workspace, files_of(), {"name": "imported again"})
    with pytest.raises(AdapterError, match="is in the library again"):
        library.undo(workspace, id)
    library.remove(workspace, id)
    assert library.sweep(workspace, now=time.time() + 31 * 86400) == 2 and library.removed(workspace) == []
    with pytest.raises(AdapterError, match="not among the removed"):
        library.undo(workspace, id)


def test_sweeping_takes_old_leftovers_and_spares_an_import_under_way(workspace):
    library.add(workspace, files_of(), {"name": "one"})
    left = workspace.root / "library" / ".part-abcd-0123456789abcdef"
    (left / "adapter").mkdir(parents=True)
    library.sweep(workspace)
    assert left.exists()
    library.sweep(workspace, now=time.time() + 7200)
    assert not left.exists() and library.count(workspace) == 1


# ---- the folders are the truth


def index_file(workspace):
    return workspace.root / "library" / ".index" / "library.sqlite"


@pytest.mark.parametrize("fault", ["deleted", "garbage", "emptied", "other schema", "rows changed"])
def test_the_index_is_rebuilt_from_the_folders(workspace, fault):
    ids = {library.add(workspace, files_of(seed), {"name": f"n{seed}", "notes": "apple" if seed else "pear"}) for seed in range(3)}
    before, file = library.find(workspace, order="name"), index_file(workspace)
    if fault == "deleted":
        shutil.rmtree(file.parent)
    elif fault == "garbage":
        file.write_bytes(random.Random(0).randbytes(50_000))
    elif fault == "emptied":
        file.write_bytes(b"")
    else:
        with sqlite3.connect(file) as connection:
            connection.executescript("DROP TABLE items; CREATE TABLE items (x)" if fault == "other schema" else "DELETE FROM items WHERE name = 'n1'")
        connection.close()
    assert library.find(workspace, order="name") == before and {item.id for item in before} == ids
    assert len(library.find(workspace, "apple")) == 2


def test_what_is_done_to_the_folders_by_hand_is_seen(workspace):
    ids = [library.add(workspace, files_of(seed), {"name": f"n{seed}"}) for seed in range(3)]
    top = workspace.root / "library"
    shutil.rmtree(top / ids[0])
    card = json.loads((top / ids[1] / "card.json").read_text())
    (top / ids[1] / "card.json").write_text(json.dumps({**card, "name": "by hand", "rank": 1e400, "tags": "no list", "alpha": "x", "trigger": "\ud800"}))
    (top / ids[2] / "card.json").write_text("{ broken")
    found = {item.id: item for item in library.find(workspace)}
    assert found.keys() == set(ids[1:])
    assert found[ids[1]].name == "by hand" and found[ids[1]].tags == ()
    assert found[ids[2]].damage == "card.json is missing or broken"
    (top / ids[2] / "card.json").unlink()
    assert library.find(workspace, ids[2])[0].damage
    assert library.add(workspace, files_of(2), {"name": "mended"}) == ids[2] and library.find(workspace, "mended")[0].damage is None


def test_many_who_ask_at_once_get_the_same_answer_and_the_process_lives(workspace, tmp_path):
    """Eight threads open a fresh index at once, as pages do: SQLite once ended the whole process over it (signal 7)."""
    code = """
import sys, threading
from pathlib import Path
from lora_studio.library import index
found = []
for turn in range(6):
    top = Path(sys.argv[1]) / str(turn)
    ask = lambda: found.extend(index.count(top, index.Question()) for _ in range(30))
    threads = [threading.Thread(target=ask) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print(len(found), sum(found))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split() == ["1440", "0"], done


def test_an_index_that_cannot_be_written_is_done_without(workspace):
    library.add(workspace, files_of(), {"name": "one"})
    shutil.rmtree(index_file(workspace).parent, ignore_errors=True)
    index_file(workspace).parent.write_text("a file in its place")
    assert [item.name for item in library.find(workspace)] == ["one"]


# ---- health and descent


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "zero", "delete", "swap"])
def test_verify_finds_every_damage_and_importing_again_mends_it(workspace, file, fault):
    id, other = library.add(workspace, files_of(), {"name": "one", "notes": "kept"}), library.add(workspace, files_of(1), {"name": "two"})
    path = library.adapter_folder(workspace, id) / file
    data = bytearray(path.read_bytes())
    if fault == "delete":
        path.unlink()
    elif fault == "swap":
        shutil.rmtree(path.parent)
        shutil.copytree(library.adapter_folder(workspace, other), path.parent)
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"flip": data, "truncate": data[:-1], "zero": bytes(len(data))}[fault])
    found = library.verify(workspace)
    assert found[id] and found[other] is None
    assert {item.id: item.damage for item in library.find(workspace)} == found
    with pytest.raises(AdapterError, match="are damaged"):
        library.adapter_folder(workspace, id)
    library.add(workspace, files_of(), {"name": "again"})
    assert library.verify(workspace) == {id: None, other: None} and library.card(workspace, id)["notes"] == "kept"
    assert library.adapter_folder(workspace, id).is_dir()


def test_parents_are_named_even_when_they_are_gone(workspace):
    one, two = (library.add(workspace, files_of(seed), {"name": f"p{seed}"}) for seed in range(2))
    parents = [{"id": id, "sha256": library.card(workspace, id)["sha256"], "name": library.card(workspace, id)["name"], "weight": weight} for id, weight in ((one, 1.0), (two, -0.5))]
    child = library.add(workspace, files_of(2), {"name": "blend", "parents": parents, "recipe": {"weights": [1.0, -0.5]}})
    grandchild = library.add(workspace, files_of(3), {"name": "blend of blend", "parents": [{"id": child, "weight": 2.0}]})
    library.remove(workspace, two)
    tree = library.lineage(workspace, grandchild)
    assert tree["parents"][0]["name"] == "blend" and tree["parents"][0]["weight"] == 2.0
    assert [(parent["name"], parent["weight"], parent["present"], parent["sha256"]) for parent in tree["parents"][0]["parents"]] == [
        ("p0", 1.0, True, parents[0]["sha256"]), ("p1", -0.5, False, parents[1]["sha256"]),
    ]  # fmt: skip
    assert library.children(workspace, one) == [child] and library.children(workspace, grandchild) == []


def test_a_card_that_names_itself_as_its_parent_ends(workspace):
    id = library.add(workspace, files_of(), {"name": "one", "parents": [{"id": files_id(files_of())}, "nonsense", {"id": "../.."}]})
    tree = library.lineage(workspace, id)
    assert tree["parents"][0]["id"] == id and tree["parents"][0]["parents"] == [] and tree["parents"][1]["present"] is False


def files_id(files) -> str:
    from lora_studio.library.cards import content_id

    return content_id(files)


def test_every_sentence_of_the_library_was_heard():
    assert {key for key in SENTENCES if key.startswith("library.")} == {
        "library.unknown", "library.ambiguous", "library.damaged", "library.name", "library.tag", "library.not_removed", "library.back_already",
    }  # fmt: skip


def test_a_survey_is_what_find_and_count_have_and_what_can_be_filtered_by(workspace):
    for number, (tags, base) in enumerate([(["a", "b"], "one"), (["B"], "two"), ([], "one")]):
        library.add(workspace, files_of(number), {"name": f"x{number}", "base": base, "tags": tags, "created": float(number)})
    found = library.survey(workspace, base="one", limit=1)
    assert (found.items, found.count, found.total) == (library.find(workspace, base="one", limit=1), 2, 3)
    assert (found.bases, [tag.casefold() for tag in found.tags], found.methods) == (["one", "two"], ["a", "b"], ["lora"])


@pytest.mark.slow
def test_ten_thousand_adapters_are_listed_and_searched(workspace, capsys):
    top, draw = workspace.root / "library", random.Random(0)
    words, wanted = ["pirate", "legal", "haiku", "sql", "medical", "terse", "polite"], 0
    for number in range(10_000):
        folder = top / f"{number:016x}"
        folder.mkdir(parents=True)
        style = draw.choice(words)
        wanted += style == "haiku"
        card = {**library.CARD, "name": f"{style} {number}", "base": f"base-{number % 20}", "tags": [style, f"t{number % 7}"], "notes": "some words about it " * 5, "created": float(number), "rank": 16}
        (folder / "card.json").write_text(json.dumps(card))
    asked = {
        "first (index built)": lambda: library.count(workspace),
        "newest 100": lambda: len(library.find(workspace, limit=100)),
        "search haiku, 100": lambda: len(library.find(workspace, "haiku", limit=100)),
        "count haiku": lambda: library.count(workspace, "haiku"),
        "a page of the library": lambda: library.survey(workspace, "haiku", limit=60).count,
        "all haiku": lambda: len(library.find(workspace, "haiku")),
        "tag and base": lambda: len(library.find(workspace, tag="t3", base="base-3")),
        "all 10,000": lambda: len(library.find(workspace)),
    }
    got, times = {}, {}
    for name, ask in asked.items():
        times[name] = []
        for _ in range(1 if name.startswith("first") else 7):
            start, busy = time.perf_counter(), time.process_time()
            got[name] = ask()
            times[name].append(((time.perf_counter() - start) * 1000, (time.process_time() - busy) * 1000))
    with capsys.disabled():
        for name, values in times.items():
            wall, cpu = (sorted(column)[len(values) // 2] for column in zip(*values))
            print(f"\n  {name}: median {wall:.0f} ms (CPU {cpu:.0f} ms), worst {max(values)[0]:.0f} ms, {got[name]} items", end="")
    assert got["first (index built)"] == got["all 10,000"] == 10_000 and got["newest 100"] == got["search haiku, 100"] == 100
    assert got["count haiku"] == got["all haiku"] == wanted and got["tag and base"] == sum(n % 7 == 3 and n % 20 == 3 for n in range(10_000))
    # A change is seen at once, by every later question.
    library.rename(workspace, f"{5:016x}", "renamed")
    assert [item.id for item in library.find(workspace, "renamed")] == [f"{5:016x}"]
