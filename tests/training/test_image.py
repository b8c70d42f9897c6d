"""Whole image runs on a tiny pipeline: a cut run goes on to the same bytes, encoders leave the memory, pictures of several sizes go together."""

import gc
from pathlib import Path

import pytest
import torch

from lora_studio import adapters, library, runs
from lora_studio.errors import DataError
from lora_studio.home import home
from lora_studio.spec import parse
from lora_studio.training import image, job, order
from tests import tiny_image
from tests.training.test_job import adapter_bytes, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of one size and four wide ones."""
    place = tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures")
    tiny_image.write_pictures(place / "wide", count=4, size=(64, 24))
    for number, file in enumerate(sorted((place / "wide").glob("*.png"))):
        file.replace(place / f"wide-{number}.png")
        (place / f"wide-{number}.txt").write_text(f"a wide {number} circle, photo, star")
    for rest in (place / "wide").iterdir():
        rest.unlink()
    (place / "wide").rmdir()
    (place / "metadata.jsonl").unlink()
    for number in range(6):
        (place / f"{number:02d}.txt").write_text(f"a {['red', 'green', 'blue'][number % 3]} circle, photo")
    return place


def tree(base, folder, **changes) -> dict:
    task = {"kind": "image", "resolution": 32, "bucket_step": 8, "flip": True, "crop": "random", "caption_dropout": 0.3, "shuffle_tags": True, "sample_steps": 2}
    common = {
        "name": "tiny", "base": {"id": str(base)}, "data": [{"path": str(folder)}], "task": {**task, **changes.pop("task", {})},
        "schedule": {"steps": 6, "batch_size": 3}, "method": {"rank": 2, "alpha": 4}, "optim": {"lr": 1e-2, "lora_plus_ratio": 4},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1}, "output": {"sample_prompts": ["a red circle"], "sample_every": 3},
    }  # fmt: skip
    return {**common, **changes}


def made(workspace, *args, **changes) -> Path:
    return runs.create(workspace, parse(tree(*args, **changes)))


VARIANTS = {
    "crops, flips, dropout": {},
    "min-SNR and noise offset": {"task": {"weighting": "min_snr", "noise_offset": 0.05}},
    "convolutions": {"method": {"rank": 2, "alpha": 4, "targets": ["to_q", "conv1"]}},
    "bf16": {"compute": {"device": "cpu", "precision": "bf16", "threads": 1}},
    "checkpointing": {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_to_the_identical_adapter(workspace, base, folder, variant):
    whole, cut = (made(workspace, base, folder, **VARIANTS[variant]) for _ in range(2))
    history = train(whole)
    train(cut, stop_at=3)
    resumed = train(cut)
    assert history[-1]["kind"] == resumed[-1]["kind"] == "done"
    assert adapter_bytes(cut) == adapter_bytes(whole)
    told = [[(event["step"], event.get("loss"), event.get("answer")) for event in events if event["kind"] in ("step", "eval", "sample")] for events in (history, resumed)]
    assert told[0] == told[1]


def test_the_adapter_is_in_the_library_with_its_pictures_beside_the_run(workspace, base, folder):
    run = made(workspace, base, folder)
    history = train(run)
    (item,) = library.find(workspace)
    assert item.base == str(base) and item.rank == 2
    found = adapters.read(library.adapter_folder(workspace, item.id))
    assert found.modules and not [problem for problem in adapters.check(found.card, adapters.base_shapes(base)) if problem.level == "error"]
    samples = [event["answer"] for event in history if event["kind"] == "sample"]
    assert len(samples) == 3 and all((run / "samples" / name).stat().st_size > 100 for name in samples)
    assert samples[0] != samples[-1], "training has changed the picture"


def test_encoders_are_out_of_memory_before_the_first_step_and_a_second_run_needs_none(workspace, base, folder, monkeypatch):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    def encoders() -> list:
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL | CLIPTextModel)]

    seen, real, others = [], image.ImageTask.loss, encoders()  # those that other tests of this process left

    def looking(self, model, batch):
        seen.append(sum(not any(thing is other for other in others) for thing in encoders()))
        return real(self, model, batch)

    monkeypatch.setattr(image.ImageTask, "loss", looking)
    told = train(made(workspace, base, folder, output={"sample_prompts": []}))
    assert seen and not any(seen)
    assert any("Encoded 2" in event["text"] or "Encoded 1" in event["text"] for event in told if event["kind"] == "note")
    monkeypatch.setattr(image.latents.pipelines, "load_pipeline", lambda *_, **__: pytest.fail("the text encoders were loaded again"))
    told = train(made(workspace, base, folder, output={"sample_prompts": []}))
    assert "Latents and embeddings come from the cache." in [event["text"] for event in told if event["kind"] == "note"]


def test_a_broken_cache_file_is_made_again(workspace, base, folder):
    first = made(workspace, base, folder, output={"sample_prompts": []})
    train(first)
    for number, file in enumerate(sorted((home() / "cache" / "latents").rglob("*.safetensors"))):
        file.write_bytes(b"" if number % 2 else file.read_bytes()[:-3])
    second = made(workspace, base, folder, output={"sample_prompts": []})
    train(second)
    assert adapter_bytes(first) == adapter_bytes(second)


def task_of(workspace, base, folder, **changes) -> image.ImageTask:
    run = made(workspace, base, folder, **changes)
    found = image.ImageTask(runs.spec_of(run), device="cpu", note=lambda _: None, folder=run)
    found.model = found.load()
    return found


def test_pictures_of_several_sizes_make_one_batch_and_each_counts_alike(workspace, base, folder):
    task = task_of(workspace, base, folder, validation={"size": 0})
    stream = order.Stream(order.Plan(task.counts, task.weights, 10, 1, 0))
    (draws,) = stream.step(0)
    together = task.collate(draws)
    assert {group.size for group in together} == {(32, 32), (48, 24)} or len({group.size for group in together}) == 2
    assert task.units(together) == 10
    with torch.no_grad():
        whole = task.loss(task.model, together)
        apart = sum(task.loss(task.model, task.collate([draw])) for draw in draws)
    assert torch.allclose(whole, apart, rtol=1e-5), "noise and place belong to the picture, not to the batch"


def test_held_out_pictures_are_judged_the_same_every_time_and_never_trained_on(workspace, base, folder):
    task = task_of(workspace, base, folder, validation={"size": 3})
    trained, judged = {picture.digest for source in task.train for picture in source}, {picture.digest for _, picture in task.judged}
    assert len(task.judged) == 3 and not trained & judged
    with torch.no_grad():
        losses = [float(task.loss(task.model, task.collate_held_out([0, 1, 2]))) for _ in range(2)]
    assert losses[0] == losses[1] and task.units(task.collate_held_out([0, 1, 2])) == 3 * len(image.PLACES)


def test_nothing_left_to_train_on_is_a_sentence(workspace, base, tmp_path):
    only = tiny_image.write_pictures(tmp_path / "one", count=1)
    with pytest.raises(DataError, match="too few to train and validate"):
        task_of(workspace, base, only, validation={"size": 1})


def test_a_language_model_and_an_image_model_are_told_apart(workspace, base, folder, chat_rows):
    from lora_studio import preflight

    told = preflight.preflight(workspace, parse(tree("demo-text", folder)))
    assert any("demo-text is a language model" in problem.sentence for problem in told.problems) and not told.can_start
    told = preflight.preflight(workspace, parse({"base": {"id": str(base)}, "data": [{"path": str(chat_rows)}]}))
    assert any("is an image model, and task.kind is chat" in problem.sentence for problem in told.problems) and not told.can_start


def test_looking_at_a_form_fetches_no_data_set_of_the_hub(workspace, base, monkeypatch):
    from lora_studio import pictures, preflight

    monkeypatch.setattr(pictures.sources.hub_sets, "fetch", lambda *_, **__: pytest.fail("it was fetched"))
    told = preflight.preflight(workspace, parse(tree(base, "someone/pictures")))
    assert any("someone/pictures will be fetched from the Hub" in problem.sentence for problem in told.problems) and told.can_start


def test_the_task_is_made_for_its_kind():
    assert job.task_class("image") is image.ImageTask and job.task_class("chat").__name__ == "TextTask"
