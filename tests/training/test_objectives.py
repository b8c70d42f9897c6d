"""Noise, target and weight are those of diffusers' own schedulers, for steps of a noise schedule and for straight lines."""

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
    for way, share in {"uniform": 0.5, "logit_normal": 0.7286}.items():  # the normal distribution within ±ln 3
        middle = ((draws[way] > 0.25) & (draws[way] < 0.75)).float().mean()
        assert float(middle) == pytest.approx(share, abs=0.03) and float(draws[way].min()) >= 0 and float(draws[way].max()) < 1
