"""Class pictures in a run: their weight in the loss, those the base draws itself, and a cut run that goes on to the same bytes."""

import pytest
import torch
from PIL import Image

from lora_studio import runs
from lora_studio.home import home
from lora_studio.spec import parse
from lora_studio.training import image, order
from tests import tiny_image
from tests.training.test_job import adapter_bytes, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of pictures, one inverted."""
    place = tmp_path_factory.mktemp("rows")
    subject, prior = tiny_image.write_pictures(place / "sks", count=4), tiny_image.write_pictures(place / "dogs", count=5)
    for file in prior.glob("*.png"):
        with Image.open(file) as found:
            turned = found.rotate(90)
        turned.save(file)
    return subject, prior


def tree(base, *sources, **task):
    return {
        "base": {"id": str(base)}, "data": list(sources), "validation": {"size": 0}, "schedule": {"steps": 4, "batch_size": 4}, "optim": {"lr": 1e-2},
        "task": {"kind": "image", "resolution": 32, "bucket_step": 8, "sample_steps": 2, **task}, "method": {"rank": 2, "alpha": 4},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
    }  # fmt: skip


def task_of(workspace, spec):
    run = runs.create(workspace, spec)
    notes = []
    found = image.ImageTask(spec, device="cpu", note=notes.append, folder=run)
    found.model, found.notes = found.load(), notes
    return found


def test_the_loss_of_class_pictures_counts_by_their_weight(workspace, base, folders):
    sources = [{"path": str(folders[0])}, {"path": str(folders[1]), "prior": True}]
    light, full = task_of(workspace, parse(tree(base, *sources, prior_weight=0.25))), task_of(workspace, parse(tree(base, *sources)))
    draws = [draw for step in range(4) for batch in order.Stream(full.show.plan()).step(step) for draw in batch]
    with torch.no_grad():
        subject, prior = ([full.loss(full.model, full.collate([draw])).item() for draw in draws if draw.source == source] for source in (0, 1))
        together = light.loss(light.model, light.collate(draws)).item()
    assert subject and prior and together == pytest.approx(sum(subject) + 0.25 * sum(prior), rel=1e-5)
    assert light.units(light.collate(draws)) == len(draws), "the mean is over all pictures"


def test_the_base_draws_class_pictures_once_and_a_cut_run_goes_on_with_them(workspace, base, folders, monkeypatch):
    spec = parse(tree(base, {"path": str(folders[0])}, trigger="sks", prior_prompt="a circle", prior_pictures=3, prior_weight=0.5))
    whole, cut = (runs.create(workspace, spec) for _ in range(2))
    told = train(whole)
    assert any("The base drew 3 class pictures." in event["text"] for event in told if event["kind"] == "note")
    files = sorted((home() / "cache" / "priors").rglob("*.png"))
    assert len(files) == 3 and len({file.read_bytes() for file in files}) == 3
    first = [file.read_bytes() for file in files]
    with monkeypatch.context() as only:
        only.setattr(image.ImageTask, "_pipeline", lambda *_: pytest.fail("it was drawn again"))
        train(cut, stop_at=2)
        assert train(cut)[-1]["kind"] == "done" and adapter_bytes(cut) == adapter_bytes(whole)
    more = task_of(workspace, parse(tree(base, {"path": str(folders[0])}, prior_prompt="a circle", prior_pictures=4)))
    assert more.notes[0] == "The base drew 1 class pictures." and [file.read_bytes() for file in files] == first
    assert {one.caption for one in more.show.everything() if one.picture.path.is_relative_to(home())} == {"a circle"}


def test_drawn_class_pictures_are_those_of_the_stock_pipeline(workspace, base, folders):
    import numpy
    from diffusers import StableDiffusionPipeline

    task_of(workspace, parse(tree(base, {"path": str(folders[0])}, prior_prompt="a circle", prior_pictures=2, guidance=3)))
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for number, file in enumerate(sorted((home() / "cache" / "priors").rglob("*.png"))):
        draw = torch.Generator().manual_seed(order.key("class picture", number))
        wanted = pipeline("a circle", num_inference_steps=2, guidance_scale=3.0, width=32, height=32, generator=draw).images[0]
        with Image.open(file) as found:
            assert int(abs(numpy.asarray(found).astype(int) - numpy.asarray(wanted).astype(int)).max()) <= 1


def test_a_cut_run_with_all_of_it_goes_on_to_the_identical_adapter(workspace, base, tmp_path):
    subject = tiny_image.write_pictures(tmp_path / "sks", count=5, size=(64, 48))
    tiny_image.write_pictures(tmp_path / "dogs", count=4, size=(48, 64))
    for number in (0, 2):
        Image.linear_gradient("L").resize((64, 48)).save(subject / f"{number:02d}_mask.png")
    sources = [{"path": str(subject)}, {"path": str(tmp_path / "dogs"), "prior": True}]
    task = {"more_resolutions": [48], "timesteps": "mode", "prior_weight": 0.5, "crop": "random", "flip": True, "caption_dropout": 0.3}
    spec = parse(tree(base, *sources, **task) | {"validation": {"size": 1}, "schedule": {"steps": 6, "batch_size": 3}})
    whole, cut = (runs.create(workspace, spec) for _ in range(2))
    history = train(whole)
    train(cut, stop_at=3)
    resumed = train(cut)
    assert history[-1]["kind"] == resumed[-1]["kind"] == "done" and adapter_bytes(cut) == adapter_bytes(whole)
    told = [[(event["step"], event["loss"]) for event in events if event["kind"] in ("step", "eval")] for events in (history, resumed)]
    assert told[0] == told[1]
