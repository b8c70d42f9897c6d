"""The grid: every cell is the picture its adapter at its strength draws, strength 0 is the base, and one file holds all with its settings."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_studio import durable, grids, library, pictures, runs, shelf
from lora_studio.adapters import steps
from lora_studio.adapters.files import CONFIG, WEIGHTS, reheaded
from lora_studio.errors import BenchError, RunError
from lora_studio.spec import parse
from tests import tiny_image

BRUSH = {"seed": 3, "steps": 2, "guidance": 3.0, "width": 32, "height": 32}
pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


def files(base, seed: int) -> dict[str, bytes]:
    return tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=seed))


def trained(workspace, base) -> str:
    """An adapter of a run that has a checkpoint with other weights."""
    run = runs.create(workspace, parse({"name": "style", "base": {"id": str(base)}, "task": {"kind": "image"}, "data": [{"path": "x"}]}))
    durable.publish_folder(run / "adapter", files(base, 1))
    early = reheaded(files(base, 2)[WEIGHTS], lambda name: name.replace(".weight", ".default.weight"))
    durable.publish_folder(run / "checkpoints" / "step-000010", {"adapter.safetensors": early})
    return library.add(workspace, files(base, 1), {"name": "style", "base": str(base), "run": run.name})


def drawn(workspace, base, parts) -> bytes:
    *_, done = shelf.draw(workspace, str(base), "a red circle", {"it": parts}, **BRUSH)
    return Image.open(done["sides"]["it"]["path"]).tobytes()


def test_every_cell_is_what_its_adapter_draws_and_the_file_holds_all_with_its_settings(workspace, base):
    id = trained(workspace, base)
    early = library.add(workspace, files(base, 2), {"name": "early", "base": str(base)})
    parts = [[id, 0.8]]
    assert grids.choices(workspace, parts) == [("style", id), ("style, step 10", f"{id}@10")]
    rows = grids.rows(workspace, [id, f"{id}@10"], parts)
    asked = grids.Asked(str(base), ("a red circle", "a star"), rows, (0.0, 0.5, 1.0), BRUSH)
    events = list(grids.draw(workspace, asked))
    cells = {place: event["path"] for event in events if event["event"] == "cell" and event["prompt"] == 0 for place in event["places"]}
    assert len(cells) == 6 and cells[0, 0] == cells[1, 0]
    seen = {place: Image.open(path).tobytes() for place, path in cells.items()}
    assert seen[0, 0] == drawn(workspace, base, [])
    assert seen[0, 1] == drawn(workspace, base, [[id, 0.4]]) and seen[0, 2] == drawn(workspace, base, [[id, 0.8]])
    assert seen[1, 2] == drawn(workspace, base, [[early, 0.8]]) and len(set(seen.values())) == 5
    last = events[-1]
    assert last["event"] == "grid" and last["pictures"] == 10 and last["base_is_bare"]
    with Image.open(last["path"]) as whole:
        told = json.loads(whole.text["lora-studio"])
        assert whole.width > 3 * 32 and whole.height > 4 * 32
    assert told["strengths"] == [0.0, 0.5, 1.0] and told["seed"] == 3 and told["prompts"] == ["a red circle", "a star"]
    assert told["rows"][1] == {"label": "style, step 10", "adapters": [{"name": "style, step 10", "weight": 0.8}]}


def test_weights_by_block_are_multiplied_by_each_strength(workspace, base):
    id, weight = trained(workspace, base), {"": 0.8, "mid_block": 0.0, "up_blocks.0-1": -0.6}
    rows = grids.rows(workspace, [id], [[id, weight]])
    events = list(grids.draw(workspace, grids.Asked(str(base), ("a red circle",), rows, (0.0, 0.5, 1.0), BRUSH)))
    seen = {place: Image.open(event["path"]).tobytes() for event in events if event["event"] == "cell" for place in event["places"]}
    assert seen[0, 0] == drawn(workspace, base, []) and seen[0, 2] == drawn(workspace, base, [[id, weight]]) != drawn(workspace, base, [[id, 0.8]])
    assert seen[0, 1] == drawn(workspace, base, [[id, {"": 0.4, "mid_block": 0.0, "up_blocks.0-1": -0.3}]])
    told = json.loads(Image.open(events[-1]["path"]).text["lora-studio"])
    assert events[-1]["base_is_bare"] and told["rows"][0]["adapters"] == [{"name": "style", "weight": weight}]


def test_a_checkpoint_becomes_an_adapter_once_and_only_where_there_is_one(workspace, base):
    run = workspace.root / "runs" / library.card(workspace, trained(workspace, base))["run"]
    folder = steps.adapter_of(run, 10)
    assert durable.damage(folder) is None and (folder / CONFIG).read_bytes() == (run / "adapter" / CONFIG).read_bytes()
    assert (folder / WEIGHTS).read_bytes() == reheaded(files(base, 2)[WEIGHTS])
    before = (folder / WEIGHTS).stat().st_mtime_ns
    assert steps.adapter_of(run, 10) == folder and (folder / WEIGHTS).stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"no whole checkpoint of step 11 \(it has 10\)"):
        steps.adapter_of(run, 11)
    (run / "checkpoints" / "step-000010" / "adapter.safetensors").write_bytes(b"cut")
    assert steps.steps(run) == []


@pytest.mark.parametrize(
    ("prompts", "strengths", "said"),
    [((), (1.0,), "no prompt"), (("a",), (), "no strength"), (tuple("abcdefghij"), tuple(map(float, range(41))), "410 pictures; at most 400")],
)
def test_a_grid_of_nothing_or_too_much_is_refused(prompts, strengths, said):
    with pytest.raises(BenchError, match=said):
        grids.Asked("demo-image", prompts, (grids.Row("Base", ()),), strengths, BRUSH)


def test_strengths_are_numbers_and_a_row_is_one_of_the_mix(workspace):
    assert grids.strengths("0, .5 1,1, -2") == (0.0, 0.5, 1.0, -2.0)
    with pytest.raises(BenchError, match="'1, much' are not all numbers"):
        grids.strengths("1, much")
    with pytest.raises(BenchError, match="is no row of this mix"):
        grids.rows(workspace, ["elsewhere"], [])


def test_a_large_grid_is_scaled_to_64_megapixels_and_every_cell_is_at_its_place(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (1024, 512), colour).save(tmp_path / f"{number}.png")
    row = [tmp_path / f"{number}.png" for number in range(3)]
    small = pictures.compose([pictures.Block("a prompt of many words " * 40, [("one", row), ("two", [None, *row[1:]])])], ["x 0", "x 1", "x 2"])
    found = [pixel for _, pixel in sorted(small.getcolors(1 << 24), reverse=True) if pixel in colours]
    assert set(found) == set(colours)
    large = pictures.compose([pictures.Block("a", [(str(number), row * 10) for number in range(30)])], [str(number) for number in range(30)])
    assert large.width * large.height < 80_000_000


def test_the_command_draws_a_grid(workspace, base):
    from tests.test_cli import command

    id = trained(workspace, base)
    words = ("grid", base, "a red circle", "--with", f"{id}=0.5", "--row", id, "--row", f"{id}@10", "--strengths", "0,1", "--steps", "2", "--size", "32x32")
    done = json.loads(command(*words, "--json").stdout)
    assert Path(done["picture"]).is_file() and done["rows"] == [id, f"{id}@10"]
