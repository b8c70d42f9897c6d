"""Noise and target of image models: how a picture is mixed with noise, what the model is to say of it, and how much it counts.

    diffusion   x_t = sqrt(a_t) x + sqrt(1 - a_t) n      target n (epsilon), sqrt(a_t) n - sqrt(1 - a_t) x (velocity), or x (sample)
    flow        x_t = (1 - s) x + s n                    target n - x

a_t is the scheduler's `alphas_cumprod`; SNR_t = a_t / (1 - a_t). s is from the scheduler's own table, so that its shift counts.
Everything is computed in fp32. Families that tell the time backwards, or answer x - n, turn that round in their `predict`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 5.0


@dataclass(frozen=True)
class Mixed:
    """A batch with its noise: what goes in (b, ...), the times the model is told (b,), what it is to say, and how each picture counts (b,)."""

    noisy: Tensor
    times: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Diffusion:
    """Steps of a noise schedule. `signal` (T,) is alphas_cumprod, `prediction` is epsilon, v_prediction or sample."""

    signal: Tensor
    prediction: str

    def mix(self, x: Tensor, noise: Tensor, where: Tensor, weighting: str = "none") -> Mixed:
        """Mix pictures x with noise, each at its place in the schedule, `where` (b,) in [0, 1)."""
        times = (where * len(self.signal)).long().clamp(max=len(self.signal) - 1)
        signal = self.signal.to(x.device)[times.to(x.device)]
        a, b = (value.view(-1, *[1] * (x.ndim - 1)) for value in (signal.sqrt(), (1 - signal).sqrt()))
        target = {"epsilon": lambda: noise, "v_prediction": lambda: a * noise - b * x, "sample": lambda: x}[self.prediction]()
        return Mixed(a * x + b * noise, times.to(x.device), target, self.weight(signal, weighting))

    def weight(self, signal: Tensor, weighting: str) -> Tensor:
        """How a step counts: min-SNR (Hang et al. 2023, gamma 5) or 1/sqrt(SNR) (Yu et al. 2023), divided by what the target itself
        already brings: SNR for noise, SNR + 1 for velocity, nothing for the picture."""
        if weighting == "none":
            return torch.ones_like(signal)
        snr = (signal / (1 - signal).clamp_min(1e-12)).clamp_min(1e-8)  # a step without any signal counts as its neighbours do
        brought = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction]
        wanted = snr.clamp(max=GAMMA) if weighting == "min_snr" else snr.sqrt()
        return wanted / brought


@dataclass(frozen=True)
class Flow:
    """Straight lines from picture to noise. `amounts` (T,) is how much of it is noise, rising."""

    amounts: Tensor

    def mix(self, x: Tensor, noise: Tensor, where: Tensor, weighting: str = "none") -> Mixed:
        """Mix pictures x with noise, each at its place in the schedule, `where` (b,) in [0, 1). All count alike."""
        if weighting != "none":
            raise ValueError(f"{weighting} weighs by the signal of a noise schedule, and flow matching has none")
        count = len(self.amounts)
        amounts = self.amounts[(where * count).long().clamp(max=count - 1)].to(x.device)
        share = amounts.view(-1, *[1] * (x.ndim - 1))
        return Mixed((1 - share) * x + share * noise, amounts * count, noise - x, torch.ones_like(amounts))


def place(timesteps: str, generator: torch.Generator) -> float:
    """A place in the schedule, from 0 to 1: any alike, or mostly the middle (logit-normal with mean 0 and deviation 1, Esser et al. 2024)."""
    if timesteps == "uniform":
        return float(torch.rand((), generator=generator))
    return float(torch.randn((), generator=generator).sigmoid())


def of_scheduler(scheduler) -> Diffusion:
    """The objective that a pipeline's scheduler was made for."""
    from diffusers import DDPMScheduler

    same = DDPMScheduler.from_config(scheduler.config)
    return Diffusion(same.alphas_cumprod.float(), scheduler.config.prediction_type)


def flow_of_scheduler(scheduler) -> Flow:
    """The objective of a flow matching pipeline: the table that its scheduler has before any pipeline has used it. Where the shift
    depends on the picture's size the table is the unshifted one, as in diffusers' own training scripts."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    shift = config.get("flow_shift") or 1.0 if "flow_shift" in config else config.get("shift", 1.0)
    same = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=shift, use_dynamic_shifting=config.get("use_dynamic_shifting", False)
    )
    return Flow(same.sigmas.float().flip(0))
