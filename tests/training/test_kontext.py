"""Pairs for FLUX.1 Kontext: what we train towards is what the stock pipeline goes by, the source counts, and a whole run learns from pairs."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_studio import adapters, albums, bases, families, library, pictures, preflight, runs, shelf
from lora_studio.adapters.pipeline_files import NAME
from lora_studio.errors import BaseModelError, BenchError, DataError
from lora_studio.inference.draw import Brush, Easel
from lora_studio.jobs import bench
from lora_studio.spec import Base, parse
from lora_studio.training import image, latents, methods, objectives, order, pairs, pipelines
from lora_studio.training.image_families import FAMILIES
from tests import tiny_flow, tiny_image
from tests.browser import made
from tests.training.test_image_families import SIZE, Oracle, adapted_layers, embedded, nothing_said, random_latents
from tests.training.test_job import adapter_bytes, train

FAMILY = FAMILIES["FluxKontextPipeline"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny FLUX with the pipeline of Kontext around it."""
    place = tmp_path_factory.mktemp("bases") / "tiny-kontext"
    parts = tiny_flow.flux().components
    diffusers.FluxKontextPipeline(**{name: parts[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")}).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Six pairs, the sources in control/, two of them wide."""
    place = tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pairs")
    (place / "control").mkdir()
    for number, file in enumerate(sorted(place.glob("*.png"))):
        picture = Image.open(file)
        if number > 3:
            picture = picture.resize((64, 32))
            picture.save(file)
        picture.convert("L").convert("RGB").save(place / "control" / file.name)
    return place


def tree(base, rows, **changes) -> dict:
    common = {
        "name": "tiny", "base": {"id": str(base)}, "data": [{"path": str(rows)}], "validation": {"size": 1},
        "task": {"kind": "image", "resolution": 32, "bucket_step": 16, "sample_steps": 2, "flip": True, "crop": "random"},
        "schedule": {"steps": 4, "batch_size": 3}, "method": {"rank": 2, "alpha": 4}, "optim": {"lr": 1e-2},
        "output": {"sample_prompts": ["a red circle"], "sample_every": 2}, "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
    }  # fmt: skip
    return {**common, **changes}


def test_the_stock_pipeline_with_a_source_reproduces_a_picture_from_what_we_train_towards(folder):
    part = pipelines.load_part(folder, "transformer", torch.float32, "tiny").eval()
    objective, x, source = FAMILY.objective(pipelines.load_scheduler(folder)), random_latents(folder), random_latents(folder, seed=8)

    class WithSource(Oracle):
        """What the pipeline says holds the source behind the picture's tokens; the pipeline reads back the picture's only."""

        def answer(self, *args, **more):
            told = self.names.bind(*args, **more).arguments
            own = told["hidden_states"].shape[1] - source[0, 0].numel() // 4
            assert own == x[0, 0].numel() // 4 and set(told["img_ids"][:own, 0].tolist()) == {0.0} and set(told["img_ids"][own:, 0].tolist()) == {1.0}
            return super().answer(*args, **more)

    oracle = WithSource(part, FAMILY, objective, x, FAMILY.batch(embedded(folder, ["a red circle"])) | {"source": source})
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder, transformer=part)
    pipeline.set_progress_bar_config(disable=True)
    oracle.scheduler = pipeline.scheduler
    found = pipeline(
        prompt="a red circle", num_inference_steps=6, width=SIZE[0], height=SIZE[1], generator=torch.Generator().manual_seed(0), output_type="latent",
        **FAMILY.guide(1.0), **FAMILY.edit(source[0], SIZE),
    ).images  # fmt: skip
    found = diffusers.FluxKontextPipeline._unpack_latents(found, SIZE[1], SIZE[0], 2)
    assert oracle.calls == 6 and oracle.apart < 1e-5 and isinstance(objective, objectives.Flow)
    assert float((found - x).abs().max()) < 1e-5 * max(1.0, float(x.abs().max()))


def test_latents_of_a_source_are_those_that_the_stock_pipeline_makes_of_the_picture(folder, rows):
    (group,) = pictures.collect(parse(tree(folder, rows)), cache=rows.parent / "cache")
    first = pairs.Shown(group.items[0], (32, 32), "center", 0, False, "x").source
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"prompt": "a red circle", "num_inference_steps": 2, "width": 32, "height": 32, "output_type": "np"}
    with torch.no_grad():
        ours = FAMILY.encode(pipeline.vae, latents.pixels(first)[None])[0]
        wanted = pipeline(image=Image.open(first.picture.path), generator=torch.Generator().manual_seed(1), max_area=1024, _auto_resize=False, **asked).images
        found = pipeline(generator=torch.Generator().manual_seed(1), **FAMILY.edit(ours[0], (32, 32)), **asked).images
    assert float(abs(wanted - found).max()) < 1e-5


def test_pairs_are_found_by_name_or_in_the_metadata_and_a_source_is_no_picture_of_its_own(folder, rows, tmp_path):
    (group,) = pictures.collect(parse(tree(folder, rows)), cache=tmp_path / "cache")
    assert len(group.items) == 6 and all(item.source.parent.name == "control" and item.source.name == item.path.name for item in group.items)
    assert any("6 pictures have a source, by its name" in note for note in group.notes)
    place = tmp_path / "named"
    shutil.copytree(rows, place)
    (place / "control").rename(place / "before")
    written = [json.loads(line) | {"source_file_name": f"before/{number:02d}.png"} for number, line in enumerate((place / "metadata.jsonl").read_text().splitlines())]
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (named,) = pictures.collect(parse(tree(folder, place)), cache=tmp_path / "cache")
    assert [item.source_digest for item in named.items] == [item.source_digest for item in group.items] and all(item.source_digest for item in named.items)
    before = pictures.fingerprint([named], parse(tree(folder, place)).task)
    Image.new("RGB", (32, 32), "pink").save(place / "before" / "00.png")
    (other,) = pictures.collect(parse(tree(folder, place)), cache=tmp_path / "cache")
    assert pictures.fingerprint([other], parse(tree(folder, place)).task) != before, "another source is other data"
    (place / "before" / "00.png").write_bytes(b"no picture")
    (broken,) = pictures.collect(parse(tree(folder, place)), cache=tmp_path / "cache")
    assert len(broken.items) == 5 and "source picture that cannot be read" in broken.skipped_in_words()


def test_an_album_takes_sources_in_with_their_pictures_and_out_with_them(rows, workspace, tmp_path):
    name, found = albums.copy(workspace, str(rows), name="pairs")
    assert len(found.items) == 6
    spec = parse(tree("demo-image", albums.folder(workspace, name)))
    (group,) = pictures.collect(spec, cache=tmp_path / "cache")
    assert all(item.source.read_bytes() == (rows / "control" / item.path.name).read_bytes() for item in group.items) and len(group.items) == 6
    albums.remove(workspace, name, ["00.png"])
    assert not (albums.folder(workspace, name) / "control" / "00.png").exists()
    albums.undo(workspace, name)
    assert (albums.folder(workspace, name) / "control" / "00.png").is_file()


def test_a_picture_without_its_source_is_said_before_start_and_refused(folder, rows, workspace, tmp_path):
    place = tmp_path / "half"
    shutil.copytree(rows, place)
    (place / "control" / "02.png").unlink()
    spec = parse(tree(folder, place))
    sentences = [problem.sentence for problem in preflight.preflight(workspace, spec).problems if problem.level == "error"]
    assert any("1 of 6 pictures" in sentence and "02.png" in sentence for sentence in sentences)
    with pytest.raises(DataError, match="have no source"):
        pairs.refuse_halves("it", pictures.collect(spec, cache=tmp_path / "cache"))
    other = tiny_image.write_pipeline(tmp_path / "sd")
    told = preflight.preflight(workspace, parse(tree(other, rows)))
    assert told.can_start and any("only editing models look at" in problem.sentence for problem in told.problems)


def test_a_cut_run_on_pairs_goes_on_to_the_identical_adapter_and_its_samples_are_made_of_a_source(folder, rows, workspace):
    whole, cut = (runs.create(workspace, parse(tree(folder, rows))) for _ in range(2))
    assert preflight.preflight(workspace, parse(tree(folder, rows))).can_start
    told = train(whole)
    train(cut, stop_at=2)
    train(cut)
    assert told[-1]["kind"] == "done" and adapter_bytes(whole) == adapter_bytes(cut)
    samples = [event["answer"] for event in told if event["kind"] == "sample"]
    assert len(samples) == 3 and samples[0] != samples[-1]


def test_the_source_counts_it_is_placed_as_its_picture_is_and_only_the_adapter_learns(folder, rows, workspace):
    run = runs.create(workspace, parse(tree(folder, rows)))
    task = image.ImageTask(runs.spec_of(run), device="cpu", note=lambda _: None, folder=run)
    model = methods.attach_peft(task.load(), task.spec, ["to_q"])
    (draws,) = order.Stream(order.Plan(task.counts, task.weights, 4, 1, 0)).step(0)
    groups = task.collate(draws)
    for shown in map(task.show.drawn, draws):
        one = shown.source
        assert (one.size, one.crop, one.crop_seed, one.flip) == (shown.size, shown.crop, shown.crop_seed, shown.flip) and one.picture.digest == shown.picture.source_digest
    assert all(group.source.shape == group.latents.shape for group in groups)
    with torch.no_grad():
        loss = float(task.loss(model, groups))
        for group in groups:
            group.source = torch.zeros_like(group.source)
        assert abs(float(task.loss(model, groups)) - loss) > 1e-4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.05, weight_decay=0)
    task.loss(model, task.collate(draws)).backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all(".lora_B" in name for name in changed), "one step from zero moves B alone"


def test_the_published_file_makes_of_a_source_in_a_fresh_stock_pipeline_what_the_bench_makes(folder, rows, workspace, tmp_path):
    train(runs.create(workspace, parse(tree(folder, rows, optim={"lr": 0.1}, output={"sample_prompts": []}))))
    (item,) = library.find(workspace)
    place = shelf.export_adapter(workspace, item.id, tmp_path / "out")
    easel, brush = Easel(Base(id=str(folder))), Brush(seed=3, steps=2, guidance=2.5, width=64, height=32)
    easel.put("it", adapters.read(place / "adapter_model.safetensors").modules)
    source = rows / "control" / "05.png"
    drawn = {name: Image.open(easel.draw("a red circle", brush, tmp_path / "drawn", weights=weights, step=lambda _: None, source=given)) for name, weights, given in
             (("it", {"it": 1.0}, source), ("bare", {}, source), ("text alone", {"it": 1.0}, None))}  # fmt: skip
    assert len({picture.tobytes() for picture in drawn.values()}) == 3 and all(picture.size == (64, 32) for picture in drawn.values())
    stock = diffusers.FluxKontextPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    with nothing_said():
        stock.load_lora_weights(place, weight_name=NAME, adapter_name="it")
    assert adapted_layers(stock.transformer) == len(load_file(place / NAME)) / 2
    wanted = stock(image=Image.open(source), prompt="a red circle", num_inference_steps=2, guidance_scale=2.5, width=64, height=32, max_area=2048, _auto_resize=False, generator=torch.Generator().manual_seed(3)).images[0]
    apart = torch.tensor(list(wanted.tobytes())).float() - torch.tensor(list(drawn["it"].tobytes())).float()
    assert wanted.size == (64, 32) and float(apart.abs().max()) <= 1


def test_a_source_for_a_model_that_edits_nothing_or_that_is_no_picture_is_a_sentence(folder, rows, tmp_path):
    easel = Easel(Base(id=str(folder)))
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(BenchError, match="cannot be used"):
        easel.draw("x", Brush(steps=1, width=32, height=32), tmp_path, weights={}, step=lambda _: None, source=tmp_path / "x.png")
    plain = Easel(Base(id=str(tiny_image.write_pipeline(tmp_path / "sd"))))
    with pytest.raises(BenchError, match="no picture of a picture"):
        plain.draw("x", Brush(steps=1, width=32, height=32), tmp_path, weights={}, step=lambda _: None, source=rows / "00.png")


@pytest.mark.parametrize("name", families.OUT_OF_REACH)
def test_editing_models_that_need_torchvision_are_refused_with_the_reason(name, tmp_path):
    assert hasattr(diffusers, name)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "transformer": ["diffusers", "X"]}))
    with pytest.raises(BaseModelError, match="torchvision"):
        bases.inspect(Base(id=str(tmp_path)))


def test_the_bench_makes_a_picture_of_a_source_where_one_is_given(folder, rows, home, workspace):
    with made.at(home):
        try:
            brush = {"steps": 2, "width": 32, "height": 32, "seed": 1}
            paths = [
                list(shelf.draw(workspace, str(folder), "a red circle", {"x": []}, **brush, **given))[-1]["sides"]["x"]["path"]
                for given in ({"source": str(rows / "control" / "00.png")}, {})
            ]
            assert paths[0] != paths[1] and json.loads(Image.open(paths[0]).text["lora-studio"])["source"] == "00.png"
        finally:
            bench.stop()
