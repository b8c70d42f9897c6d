"""Noise, target and weight are those of diffusers' own schedulers, for steps of a noise schedule and for straight lines."""

import math

import diffusers
import pytest
import torch

from lora_studio import families
from lora_studio.training import objectives
from lora_studio.training.image_families import FAMILIES
from tests import tiny_image

DIFFUSION = ["sd15", "sd2", "sdxl", "pixart"]
FLOW = [kind for kind in tiny_image.PIPELINES if kind not in DIFFUSION]


def scheduled(kind):
    """The scheduler of a tiny pipeline, and the objective that its family makes of it."""
    pipeline = tiny_image.PIPELINES[kind]()
    return pipeline.scheduler, FAMILIES[type(pipeline).__name__].objective(pipeline.scheduler)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_mixing_is_the_schedulers_own_and_its_target_too(kind):
    scheduler, objective = scheduled(kind)
    same = diffusers.DDPMScheduler.from_config(scheduler.config)
    x, noise, where = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0.0, 0.2, 0.5, 0.9, 0.9999])
    mixed = objective.mix(x, noise, where)
    assert torch.allclose(mixed.noisy, same.add_noise(x, noise, mixed.times), atol=1e-6)
    wanted = noise if scheduler.config.prediction_type == "epsilon" else same.get_velocity(x, noise, mixed.times)
    assert torch.allclose(mixed.target, wanted, atol=1e-6)
    assert mixed.times.tolist() == [0, 200, 500, 900, 999]


@pytest.mark.parametrize("kind", FLOW)
def test_flow_mixing_is_the_schedulers_own_with_its_shift_and_its_target_is_the_way(kind):
    scheduler, objective = scheduled(kind)
    x, noise, where = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0.0, 0.2, 0.5, 0.9999])
    mixed = objective.mix(x, noise, where)
    shift = 1.0 if scheduler.config.get("use_dynamic_shifting") else scheduler.config.get("flow_shift") or scheduler.config.shift
    same = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    assert objective.amounts.tolist() == sorted(objective.amounts.tolist()) and float(objective.amounts[-1]) == 1.0
    for number, place in enumerate([999, 799, 499, 0]):
        wanted = same.scale_noise(x[number : number + 1], same.timesteps[place : place + 1], noise[number : number + 1])
        assert torch.allclose(mixed.noisy[number], wanted[0], atol=1e-6)
        assert float(mixed.times[number]) == pytest.approx(float(same.timesteps[place]), abs=1e-3)
    amount = (mixed.times / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(mixed.noisy - amount * mixed.target, x, atol=1e-5) and mixed.weight.tolist() == [1.0] * 4
    scheduler.set_timesteps(5, **({"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}))
    assert torch.equal(objectives.flow_of_scheduler(scheduler).amounts, objective.amounts), "a scheduler that was used teaches the same"
    with pytest.raises(ValueError, match="min_snr"):
        objective.mix(x, noise, where, "min_snr")


@pytest.mark.parametrize("kind", DIFFUSION)
def test_min_snr_weights_are_those_of_diffusers(kind):
    from diffusers.training_utils import compute_snr

    scheduler, objective = scheduled(kind)
    same = diffusers.DDPMScheduler.from_config(scheduler.config)
    x, where = torch.zeros(4, 1), torch.tensor([0.01, 0.3, 0.6, 0.99])
    mixed = objective.mix(x, x, where, "min_snr")
    snr = compute_snr(same, mixed.times)
    wanted = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr if scheduler.config.prediction_type == "epsilon" else snr + 1)
    assert torch.allclose(mixed.weight, wanted, rtol=1e-4)
    debiased = objective.mix(x, x, where, "debiased").weight
    assert torch.allclose(debiased, snr.sqrt() / (snr if scheduler.config.prediction_type == "epsilon" else snr + 1), rtol=1e-4)
    assert objective.mix(x, x, where).weight.tolist() == [1.0] * 4


def test_a_step_without_any_signal_has_a_finite_weight():
    for prediction in ("epsilon", "v_prediction", "sample"):
        objective = objectives.Diffusion(torch.tensor([1.0, 0.5, 0.0]), prediction)
        for weighting in ("none", "min_snr", "debiased"):
            assert bool(torch.isfinite(objective.mix(torch.ones(3, 1), torch.ones(3, 1), torch.tensor([0.0, 0.4, 0.9]), weighting).weight).all())


def test_places_are_drawn_evenly_or_mostly_from_the_middle():
    assert (families.timesteps("FluxPipeline", "auto"), families.timesteps("StableDiffusionPipeline", "auto")) == ("logit_normal", "uniform")
    assert families.timesteps("FluxPipeline", "uniform") == "uniform"
    draws = {way: torch.tensor([objectives.place(way, torch.Generator().manual_seed(seed)) for seed in range(4000)]) for way in ("uniform", "logit_normal")}
    assert objectives.place("sigmoid", torch.Generator().manual_seed(5)) == objectives.place("logit_normal", torch.Generator().manual_seed(5))
    for way, share in {"uniform": 0.5, "logit_normal": 0.7286}.items():  # the normal distribution within ±ln 3
        middle = ((draws[way] > 0.25) & (draws[way] < 0.75)).float().mean()
        assert float(middle) == pytest.approx(share, abs=0.03) and float(draws[way].min()) >= 0 and float(draws[way].max()) < 1


@pytest.mark.parametrize("way", ["uniform", "logit_normal", "mode"])
def test_places_are_those_of_diffusers(way):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    for seed in range(200):
        (wanted,) = compute_density_for_timestep_sampling(way, 1, 0.0, 1.0, 1.29, generator=torch.Generator().manual_seed(seed))
        assert objectives.place(way, torch.Generator().manual_seed(seed)) == pytest.approx(float(wanted), abs=1e-6)


def amounts(objective, shift):
    """How much of each of a thousand places is noise once it is moved."""
    x = torch.zeros(1000, 1)
    return objective.mix(x, x + 1, (torch.arange(1000) + 0.5) / 1000, shift=shift).noisy[:, 0]


@pytest.mark.parametrize("kind", FLOW)
def test_a_shift_by_number_is_the_schedulers_whatever_is_in_its_table_already(kind):
    _, objective = scheduled(kind)
    for wanted in (1.0, 2.2, 3.0, 6.0):
        same = diffusers.FlowMatchEulerDiscreteScheduler(shift=wanted).sigmas.flip(0)
        assert torch.allclose(amounts(objective, objective.shift(wanted, "logit_normal", 1024)), same, atol=1e-6)
    assert torch.allclose(amounts(objective, objective.shift("auto", "sigmoid", 1024)), torch.arange(1, 1001) / 1000, atol=1e-6)


@pytest.mark.parametrize("kind", FLOW)
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 6000])
def test_the_shift_by_size_is_the_pipelines_own(kind, tokens):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler, objective = scheduled(kind)
    known = {name: scheduler.config[name] for name in ("base_shift", "max_shift") if name in scheduler.config}
    mu = calculate_shift(tokens, scheduler.config.get("base_image_seq_len", 256), scheduler.config.get("max_image_seq_len", 4096), **known)
    even = torch.arange(1, 1001) / 1000
    same = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, even)
    assert torch.allclose(amounts(objective, objective.shift("resolution", "uniform", tokens)), same, atol=1e-6)


def test_auto_moves_by_size_where_the_pipeline_does_and_else_leaves_the_table_to_the_bit():
    for kind in FLOW:
        scheduler, objective = scheduled(kind)
        found = objective.shift("auto", "logit_normal", 4096)
        if scheduler.config.get("use_dynamic_shifting"):
            assert found == pytest.approx(math.exp(scheduler.config.max_shift)), kind
        else:
            assert found == 1.0 and objective.shift(objective.table, "uniform", 64) == 1.0, kind
    assert {kind for kind in FLOW if scheduled(kind)[1].sized} == {"flux", "flux2", "qwen_image"}


def test_steps_of_a_noise_schedule_have_no_shift():
    _, objective = scheduled("sd15")
    assert objective.shift("auto", "sigmoid", 4096) == 1.0
    with pytest.raises(ValueError, match="no shift"):
        objective.mix(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), shift=3.0)


def test_training_moves_pictures_by_their_size_and_held_out_ones_stay_where_they_are(workspace, tmp_path):
    from PIL import Image

    from lora_studio.spec import parse
    from lora_studio.training import image, order

    base = tiny_image.write_pipeline(tmp_path / "flux", "flux")
    (tmp_path / "rows").mkdir()
    for number in range(4):
        Image.new("RGB", (64 * (number + 1), 64), (number, 0, 0)).save(tmp_path / "rows" / f"{number}.png")
    tree = {"base": {"id": str(base)}, "data": [{"path": str(tmp_path / "rows")}], "validation": {"size": 1}, "compute": {"device": "cpu", "precision": "fp32"}}
    judged = []
    for task, wanted in (({}, None), ({"shift": 1}, 1.0), ({"shift": 3}, 3.0), ({"timesteps": "sigmoid"}, 1.0)):
        spec = parse({**tree, "task": {"kind": "image", "resolution": 128, "bucket_step": 32, "more_resolutions": [64], **task}, "schedule": {"steps": 4, "batch_size": 8}})
        found = image.ImageTask(spec, device="cpu", note=lambda _: None, folder=tmp_path)
        model = found.load()
        groups = found.collate([draw for batch in order.Stream(found.show.plan()).step(0) for draw in batch])
        assert len({group.size for group in groups}) > 2
        for group in groups:
            tokens = group.latents.shape[-2] * group.latents.shape[-1] / 4
            assert group.shift == pytest.approx(wanted or objectives.Line().shift(tokens))
        held_out = found.collate_held_out([0])
        assert {group.shift for group in held_out} == {1.0}
        with torch.no_grad():
            judged.append(found.loss(model, held_out).item())
    assert len(set(judged)) == 1, "runs with other settings can be compared"
