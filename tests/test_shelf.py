"""The verbs of adapters: what enters the library and what does not, names, archives, and the draft of what would be published."""

import os
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from lora_studio import library, shelf
from lora_studio.errors import AdapterError, HubError, MachineError
from lora_studio.home import demo_base
from lora_studio.workspace import Workspace
from tests.browser import made
from tests.tiny import write_adapter

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home whose bench serves all tests of this file."""
    folder = tmp_path_factory.mktemp("shelf")
    yield folder
    with made.at(folder / "home") as bench:
        bench.stop()


@pytest.fixture
def space(place, tmp_path, monkeypatch):
    """A workspace of the test's own, on the shared bench."""
    monkeypatch.setenv("LORA_STUDIO_HOME", str(place / "home"))
    root = tmp_path / "space"
    root.mkdir()
    return Workspace(root)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a random adapter that says it is for demo-text."""
    return Path(write_adapter(tmp_path_factory.mktemp("made") / "pirate", demo_base("demo-text"), seed=1, name="demo-text"))


def entries(space) -> set[str]:
    """What lies in the workspace, but for what a library keeps for itself."""
    return {path.relative_to(space.root).as_posix() for path in space.root.rglob("*") if ".index" not in path.parts and path.name != ".lock"} - {"library"}


def packed(target, members: dict[str, bytes]):
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def contents(adapter) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in adapter.iterdir()}


def test_uploaded_files_a_zip_of_them_and_a_folder_are_the_same_adapter(space, adapter, tmp_path):
    one = shelf.import_files(space, sorted(adapter.iterdir()), name="one")
    card = library.card(space, one)
    assert card["name"] == "one" and card["base"] == "demo-text" and card["source"] == "adapter_model.safetensors"
    archive = packed(tmp_path / "two.zip", {f"some/folder/{name}": data for name, data in contents(adapter).items()})
    assert shelf.import_files(space, [archive]) == one and shelf.import_adapter(space, str(adapter)) == one
    assert library.count(space) == 1 and library.card(space, one)["name"] == "one", "what is there keeps its name"
    assert not [path for path in space.root.iterdir() if path.name != "library"], "nothing is left of what was unpacked"


def test_a_download_comes_back_as_the_same_adapter(space, adapter, tmp_path):
    id = shelf.import_adapter(space, str(adapter), name="x/../y")
    archive = shelf.archive(space, id, tmp_path)
    assert zipfile.ZipFile(archive).namelist() == ["x-..-y/adapter_config.json", "x-..-y/adapter_model.safetensors"]
    library.remove(space, id)
    assert shelf.import_files(space, [archive]) == id


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a/adapter_model.bin": b"\x80\x04pickled"}, "pickle"),
        ({"a/adapter_model.safetensors": b"1", "b/adapter_model.safetensors": b"2"}, "in several folders"),
        ({"readme.txt": b"nothing"}, "has no"),
        ({"../../adapter_model.safetensors": b"oh no"}, "is cut off"),
    ],
)
def test_an_archive_that_cannot_be_used_is_a_sentence_and_leaves_nothing(space, tmp_path, members, words):
    before = entries(space)
    with pytest.raises(AdapterError, match=words):
        shelf.import_files(space, [packed(tmp_path / "it.zip", members)])
    assert entries(space) == before and not (tmp_path / "adapter_model.safetensors").exists()


def test_what_is_no_archive_and_no_file_at_all_are_sentences(space, tmp_path):
    broken = tmp_path / "it.zip"
    broken.write_bytes(b"PK no")
    with pytest.raises(AdapterError, match="Pack it again"):
        shelf.import_files(space, [broken])
    with pytest.raises(AdapterError, match="No file was chosen"):
        shelf.import_files(space, [])


def test_a_full_disk_during_import_leaves_the_library_as_it_was(space, adapter, tmp_path, monkeypatch):
    archive = packed(tmp_path / "it.zip", contents(adapter))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    for files in ([archive], sorted(adapter.iterdir())):
        with pytest.raises(MachineError, match="has 0.* free, and this needs about"):
            shelf.import_files(space, files)
    monkeypatch.undo()
    monkeypatch.setenv("LORA_STUDIO_HOME", os.environ.get("LORA_STUDIO_HOME", ""))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf, "_link_or_copy", full)
    with pytest.raises(MachineError, match="No space left on device"):
        shelf.import_files(space, sorted(adapter.iterdir()))
    assert library.count(space) == 0 and not [path for path in space.root.iterdir() if path.name != "library"]


def test_a_base_that_differs_and_a_broken_file_are_named_and_nothing_enters(space, adapter, base, tmp_path):
    with pytest.raises(AdapterError, match="It was made for demo-text"):
        shelf.import_adapter(space, str(adapter), base=str(base))
    cut = tmp_path / "adapter_model.safetensors"
    cut.write_bytes((adapter / cut.name).read_bytes()[:-100])
    with pytest.raises(AdapterError, match="is cut off"):
        shelf.import_files(space, [cut, adapter / "adapter_config.json"])
    assert library.count(space) == 0


def test_a_name_that_is_taken_is_refused_with_one_that_is_free(space, adapter, tmp_path):
    first = shelf.import_adapter(space, str(adapter), name="pirate")
    other = write_adapter(tmp_path / "other", demo_base("demo-text"), seed=2)
    with pytest.raises(AdapterError, match=r"called pirate already .* such as pirate 2\."):
        shelf.import_adapter(space, other, name="pirate")
    second = shelf.import_adapter(space, other, name="other")
    with pytest.raises(AdapterError, match="already"):
        shelf.rename(space, second, " pirate ")
    with pytest.raises(AdapterError, match="already"):
        shelf.blend(space, [(first, 1.0), (second, 1.0)], name="other")
    assert shelf.rename(space, first, "pirate")["name"] == "pirate", "its own name is its own"
    assert shelf.import_adapter(space, str(adapter), name="pirate") == first, "the same content is no other adapter"
    assert library.count(space) == 2


def test_a_draft_is_what_is_sent_and_names_what_must_not_be(space, place, adapter):
    id = shelf.import_adapter(space, str(adapter), name="pirate")
    draft = shelf.draft(space, id, shelf.Push("me/pirate", license="mit"))
    assert [name for name, _ in draft.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "license: mit" in draft.readme and "me/pirate" in draft.readme and not draft.findings
    assert dict(draft.files)["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").stat().st_size
    home, token = place / "home", "hf_" + "a1B2" * 8
    library.note(space, id, f"made in {home}/runs with {token} & <more>")
    found = shelf.draft(space, id, shelf.Push("me/pirate")).findings
    assert any("Hugging Face token" in line for line in found) and any(f"{home}/runs" in line for line in found), "though Markdown escapes them"
    assert any("the token you are signed in with" in line for line in shelf.draft(space, id, shelf.Push("me/pirate"), token=token).findings)


def test_publishing_without_a_login_is_a_sentence(space, adapter, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    id = shelf.import_adapter(space, str(adapter))
    with pytest.raises(HubError, match="hf auth login"):
        shelf.publish(space, id, shelf.Push("me/pirate"))
    with pytest.raises(HubError, match="hf auth login"):
        shelf.who()
    assert shelf.suggest_repo(space, id, owner="me") == "me/pirate"
