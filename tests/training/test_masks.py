"""Masks in the loss: placed as their pictures are, a weighted mean, and without masks nothing changes."""

import numpy
import pytest
import torch
from PIL import Image

from lora_studio import pictures, preflight, runs
from lora_studio.spec import parse
from lora_studio.training import image, masks, order
from lora_studio.training.showing import Shown
from tests import tiny_image


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


def write(folder, count=4, *, mask=None):
    """Random pictures; `mask(number)` gives the mask of each, or None."""
    folder.mkdir(parents=True)
    chances = numpy.random.default_rng(3)
    for number in range(count):
        Image.fromarray(chances.integers(0, 255, (40, 40, 3), dtype=numpy.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a circle")
        found = mask(number) if mask else None
        if found is not None:
            Image.fromarray(found).save(folder / f"{number}_mask.png")
    return folder


def half(number):
    """White on the left, black on the right."""
    return numpy.repeat(numpy.array([[255] * 20 + [0] * 20], dtype=numpy.uint8), 40, axis=0)


def task_of(workspace, base, folder, **task):
    tree = {
        "base": {"id": str(base)}, "data": [{"path": str(folder)}], "validation": {"size": 0}, "schedule": {"steps": 2, "batch_size": 4},
        "task": {"kind": "image", "resolution": 32, "bucket_step": 8, "crop": "random", "flip": True, **task}, "compute": {"device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    run = runs.create(workspace, parse(tree))
    found = image.ImageTask(runs.spec_of(run), device="cpu", note=lambda _: None, folder=run)
    found.model = found.load()
    return found


def batch_of(task):
    return task.collate(order.Stream(task.show.plan()).step(0)[0])


def loss_of(task):
    with torch.no_grad():
        return task.loss(task.model, batch_of(task)).item()


def test_a_mask_lies_where_its_picture_does(tmp_path):
    chances = numpy.random.default_rng(0)
    spots = numpy.kron(chances.integers(0, 2, (6, 9), dtype=numpy.uint8) * 255, numpy.ones((20, 20), dtype=numpy.uint8))
    Image.fromarray(spots).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(spots).save(tmp_path / "a_mask.png")
    picture = pictures.Picture(tmp_path / "a.png", "a.png", "", 180, 120, "", tmp_path / "a_mask.png", "m")
    for seed, flip in ((1, False), (2, True), (3, False)):
        shown = Shown(picture, (96, 96), "random", seed, flip, "")
        seen = numpy.asarray(pictures.load(picture, size=(96, 96), crop="random", seed=seed, flip=flip).convert("L")).astype(numpy.float64) / 255
        found = masks.weights_of(shown, torch.zeros(4, 12, 12), 0.25).numpy()
        wanted = 0.25 + 0.75 * seen.reshape(12, 8, 12, 8).mean((1, 3))
        assert abs(found - wanted).max() < 0.04 and found.max() > 0.9 and found.min() < 0.35, "the area of each place"


def test_the_loss_is_the_weighted_mean_of_each_picture():
    errors, weights = torch.rand(3, 4, 1, 6, 5), torch.rand(3, 6, 5) + 0.01
    wanted = [numpy.average(one.double().numpy().mean((0, 1)), weights=weight.double().numpy()) for one, weight in zip(errors, weights)]
    assert masks.mean(errors, weights).tolist() == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(masks.mean(errors, weights * 0.03), masks.mean(errors, weights)), "the area of a mask is no strength"
    assert masks.mean(errors, torch.zeros(3, 6, 5)).tolist() == [0.0] * 3


def test_a_white_mask_changes_nothing_and_a_picture_without_one_beside_it_neither(workspace, base, tmp_path):
    plain = write(tmp_path / "plain")
    white = write(tmp_path / "white", mask=lambda number: None if number == 2 else numpy.full((40, 40), 255, numpy.uint8))
    tasks = [task_of(workspace, base, folder) for folder in (plain, white)]
    assert loss_of(tasks[1]) == pytest.approx(loss_of(tasks[0]), rel=1e-5)
    assert all(group.masks is None for group in batch_of(tasks[0])) and all(group.masks is not None for group in batch_of(tasks[1]))


def test_what_is_black_counts_as_little_as_is_said(workspace, base, tmp_path):
    folder = write(tmp_path / "half", mask=half)
    plain, ignored, soft, hard = (task_of(workspace, base, folder, **more) for more in ({"outside_mask": 1}, {"outside_mask": 0.999}, {}, {"outside_mask": 0}))
    assert loss_of(plain) == pytest.approx(loss_of(ignored), rel=1e-3) and all(group.masks is None for group in batch_of(plain))

    (group,) = batch_of(hard)
    group.noise.requires_grad_()
    mixed = hard.objective.mix(group.latents, group.noise, group.places)
    said = hard.family.predict(hard.model, mixed.noisy, mixed.times, group.conditions, group.size).detach()
    squares = (said - mixed.target).square()
    (slope,) = torch.autograd.grad(masks.mean(squares, group.masks).sum(), group.noise)
    assert float(slope[(group.masks == 0)[:, None].expand_as(slope)].abs().max()) == 0 and float(slope.abs().max()) > 0
    assert float(group.masks.mean()) == pytest.approx(0.5, abs=0.05)

    (group,) = batch_of(soft)
    known = masks.mean(squares.detach(), group.masks).sum().item()
    assert loss_of(soft) == pytest.approx(known, rel=1e-5) and known != pytest.approx(loss_of(hard), rel=1e-4)


def test_two_pictures_of_the_same_bytes_keep_their_own_masks(workspace, base, tmp_path):
    folder = write(tmp_path / "rows", 2, mask=lambda number: half(number) if number else 255 - half(number))
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    task = task_of(workspace, base, folder, crop="center", flip=False, outside_mask=0)
    left, right = sorted(mask[:, 0].mean().item() for mask in task.masks.values())
    assert (left, right) == (0.0, 1.0)


def test_preflight_counts_masks_and_refuses_a_setting_for_none(workspace, base, tmp_path):
    tree = {"base": {"id": str(base)}, "task": {"kind": "image", "resolution": 32, "bucket_step": 8, "outside_mask": 0.5}}
    told = preflight.preflight(workspace, parse({**tree, "data": [{"path": str(write(tmp_path / "some", mask=lambda n: half(n) if n % 2 else None))}]}))
    assert told.facts["masks"] == 2 and told.can_start and any("2 of 4 pictures have a mask" in problem.sentence for problem in told.problems)
    told = preflight.preflight(workspace, parse({**tree, "data": [{"path": str(write(tmp_path / "none"))}]}))
    assert not told.can_start and any(problem.path == "task.outside_mask" for problem in told.problems)
