"""Taking an adapter away: which forms fit it, what the file will be, and the very file, which goes after a day."""

import os
import time
import zipfile

import pytest
from safetensors import safe_open

from lora_studio import adapters, exports, library
from lora_studio.errors import AdapterError, StudioError
from tests import tiny, tiny_image

pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture
def worded(workspace, base):
    return library.add(workspace, tiny.adapter_files(base, seed=1), {"name": "my pirate", "base": str(base)})


@pytest.fixture
def style(workspace, tmp_path):
    base = tiny_image.write_pipeline(tmp_path / "base")
    return library.add(workspace, tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=1)), {"name": "style", "base": str(base)})


def against(workspace, id):
    return {form.name: form.against for form in exports.forms(workspace, id)}


def test_only_the_forms_that_fit_are_offered_and_the_others_say_why(workspace, worded, style, base):
    told = against(workspace, worded)
    assert [name for name, why in told.items() if not why] == ["peft", "gguf"] and "language model" in told["kohya"]
    told = against(workspace, style)
    assert [name for name, why in told.items() if not why] == ["peft", "diffusers", "kohya"] and "image model" in told["gguf"]
    for name, words in (("", "does not say which base"), ("someone/not-here", "someone/not-here, which is not on this machine")):
        id = library.add(workspace, tiny.adapter_files(base, seed=7, name=name or "x"), {"name": f"of {name}", "base": name})
        library_card = library.card(workspace, id)
        assert library_card["base"] == name and words in against(workspace, id)["gguf"]


@pytest.mark.parametrize(("form", "dtype", "end"), [("gguf", "float16", ".gguf"), ("peft", "float32", ".zip")])
def test_the_file_has_the_numbers_that_were_told_before(workspace, worded, form, dtype, end):
    before = exports.outlook(workspace, worded, dtype)
    told = exports.make(workspace, worded, form=form, dtype=dtype)
    file = exports.file(workspace, told["token"], told["name"])
    assert file.name == f"my-pirate{end}" and told["modules"] == told["layers"] == before["layers"] and told["worst"] <= 4 * before["rounded"] + 1e-12
    assert told["bytes"] == file.stat().st_size and before["bytes"] <= told["bytes"] < before["bytes"] + 8000
    assert [path.name for path in file.parent.iterdir()] == [file.name] and (told["lost"] or form == "peft")
    if form == "peft":
        assert "my-pirate/adapter_model.safetensors" in zipfile.ZipFile(file).namelist()


def test_the_file_of_an_image_adapter_is_what_was_told_before(workspace, style):
    before, told = exports.outlook(workspace, style, "bfloat16"), exports.make(workspace, style, form="kohya", dtype="bfloat16")
    with safe_open(exports.file(workspace, told["token"], told["name"]), "pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys() if not name.endswith(".alpha")]  # noqa: SIM118
    assert sum(sizes) == before["bytes"] and told["by"].startswith("diffusers'")


def test_each_rank_of_a_mix_takes_the_layers_of_all_its_parts(workspace, base):
    ids = [library.add(workspace, tiny.adapter_files(base, seed=seed, rank=rank, ends=ends), {"name": str(seed)}) for seed, rank, ends in ((1, 2, ("q_proj", "v_proj")), (2, 3, ("q_proj", "up_proj")))]
    shapes = adapters.base_shapes(base)
    meant = sum(sum(shape) for name, shape in shapes.items() if name.endswith(("q_proj", "v_proj", "up_proj")))
    assert exports.width(workspace, ids) == meant > exports.width(workspace, ids[:1])


def test_the_room_of_a_mix_is_that_of_the_layers_it_changes(workspace, base):
    left, right = (library.add(workspace, tiny.adapter_files(base, seed=seed, rank=rank), {"name": str(seed)}) for seed, rank in ((1, 2), (2, 3)))
    whole = exports.room(workspace, [(left, 1.0), (right, 0.5)])
    assert whole == (5, exports.width(workspace, [left])) and exports.room(workspace, [(left, 0.0)]) == (0, 0)
    apart = [(left, {"model.layers.1": 0.0}), (right, {"": 0.0, "model.layers.1": 2.0})]
    assert exports.room(workspace, apart) == (3, whole[1]), "where each acts alone the ranks do not add"
    assert exports.room(workspace, [(left, {"model.layers.0": 0.0})]) == (2, whole[1] // 2)


def test_what_cannot_be_exported_leaves_nothing_and_what_is_old_or_not_there_is_not_found(workspace, worded):
    with pytest.raises(StudioError, match="for adapters of image models"):
        exports.make(workspace, worded, form="kohya", dtype="float32")
    assert not list((workspace.root / "exports").iterdir())
    told = exports.make(workspace, worded, form="gguf", dtype="float32")
    for token, name in ((told["token"], "x"), ("0" * 16, told["name"]), ("..", "config.json"), (told["token"], "../" + told["token"] + "/" + told["name"])):
        with pytest.raises(AdapterError, match="no such exported file"):
            exports.file(workspace, token, name)
    old = time.time() - exports.KEPT_SECONDS - 5
    os.utime(workspace.root / "exports" / told["token"], (old, old))
    exports.sweep(workspace)
    with pytest.raises(AdapterError, match="Export the adapter again"):
        exports.file(workspace, told["token"], told["name"])
