"""Clips for a model of films: their latents are those of its VAE, clips and still pictures train together, and a cut run goes on."""

import pytest
import torch
from PIL import Image

from lora_studio import preflight, runs
from lora_studio.errors import SpecError
from lora_studio.spec import parse
from lora_studio.training import image, latents, order, pipelines
from tests import tiny_image
from tests.pictures.test_clips import write_clip
from tests.training.test_job import adapter_bytes, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-wan", "wan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of six frames and two still pictures."""
    place = tmp_path_factory.mktemp("rows") / "clips"
    for name in ("a", "b"):
        write_clip(place, name, 6)
    for number in range(2):
        Image.new("RGB", (64, 48), (0, 0, 90 * number)).save(place / f"still-{number}.png")
    return place


def tree(base, folder, **changes):
    return {
        "base": {"id": str(base)}, "data": [{"path": str(folder)}], "validation": {"size": 1}, "schedule": {"steps": 4, "batch_size": 2}, "optim": {"lr": 1e-2},
        "task": {"kind": "image", "resolution": 64, "bucket_step": 32, "frames": 5, "flip": True, "sample_steps": 2, "prefix": "a film"},
        "method": {"rank": 2, "alpha": 4}, "compute": {"device": "cpu", "precision": "fp32", "threads": 1}, **changes,
    }  # fmt: skip


def task_of(workspace, base, folder):
    spec = parse(tree(base, folder, validation={"size": 0}))
    task = image.ImageTask(spec, device="cpu", note=lambda _: None, folder=workspace.root)
    task.model = task.load()
    return task


def test_latents_of_a_clip_are_the_vaes_normalised_and_begin_with_those_of_its_first_picture(workspace, base, folder):
    task = task_of(workspace, base, folder)
    shown = next(one for one in task.show.everything() if one.frames == 5)
    vae = pipelines.load_part(base, "vae", torch.float32, "tiny")
    pixels = latents.pixels(shown)
    assert pixels.shape[:2] == (3, 5)
    with torch.no_grad():
        known = vae.encode(pixels[None]).latent_dist
    mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (vae.config.latents_mean, vae.config.latents_std))
    found = task.moments[shown.key]
    assert found[0].shape[1] == 2 and torch.allclose(found[0], ((known.mode() - mean) / std)[0], atol=1e-6) and torch.allclose(found[1], (known.std / std)[0], atol=1e-6)
    from dataclasses import replace

    first = task.family.encode(vae, latents.pixels(replace(shown, frames=1))[None])[0]
    assert torch.allclose(found[0][:, :1], first[0], atol=1e-4), "the VAE looks only back"


def test_clips_and_still_pictures_make_one_batch_and_each_counts_alike(workspace, base, folder):
    task = task_of(workspace, base, folder)
    draws = [draw for batch in order.Stream(order.Plan(task.counts, task.weights, 4, 1, 0)).step(0) for draw in batch]
    groups = task.collate(draws)
    assert {group.latents.shape[2] for group in groups} == {1, 2} and task.units(groups) == 4
    with torch.no_grad():
        whole, apart = task.loss(task.model, groups), sum(task.loss(task.model, task.collate([draw])) for draw in draws)
    assert torch.allclose(whole, apart, rtol=1e-5)


def test_a_cut_run_on_clips_goes_on_to_the_identical_adapter_and_its_samples_move(workspace, base, folder):
    spec = parse(tree(base, folder, output={"sample_prompts": ["a film"], "sample_every": 2}))
    whole, cut = (runs.create(workspace, spec) for _ in range(2))
    history = train(whole)
    train(cut, stop_at=2)
    assert train(cut)[-1]["kind"] == "done" and adapter_bytes(cut) == adapter_bytes(whole)
    names = [event["answer"] for event in history if event["kind"] == "sample"]
    with Image.open(whole / "samples" / names[-1]) as found:
        assert found.n_frames > 1 and found.text["lora-studio"]


def test_only_models_of_films_take_clips_and_only_whole_groups_of_frames(workspace, tmp_path, folder):
    still = tiny_image.write_pipeline(tmp_path / "sd", "sd15")
    told = preflight.preflight(workspace, parse(tree(still, folder)))
    assert [problem.path for problem in told.problems if problem.level == "error"] == ["task.frames"] and "knows still pictures only" in str(told.problems)
    with pytest.raises(SpecError, match=r"task\.frames must be one more than a multiple of 4"):
        parse({"data": [{"path": "x"}], "task": {"kind": "image", "frames": 6}})
