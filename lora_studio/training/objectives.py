"""Noise and target of image models: how a picture is mixed with noise, what the model is to say of it, and how much it counts.

    diffusion   x_t = sqrt(a_t) x + sqrt(1 - a_t) n      target n (epsilon), sqrt(a_t) n - sqrt(1 - a_t) x (velocity), or x (sample)
    flow        x_t = (1 - s) x + s n                    target n - x

a_t is the scheduler's `alphas_cumprod`; SNR_t = a_t / (1 - a_t). s is from the scheduler's own table, so that its shift counts, and
training may move it further: s' = a s / (1 + (a - 1) s), which multiplies the odds s / (1 - s) by a (Esser et al. 2024, arXiv 2403.03206,
section 5.3.2). Two such moves are one by their product, so what is in the table already is divided out.
Everything is computed in fp32. Families that tell the time backwards, or answer x - n, turn that round in their `predict`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 5.0
MODE_SCALE = 1.29


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

    def shift(self, wanted: str | float, timesteps: str, tokens: float) -> float:
        """The steps of a schedule are where they are."""
        return 1.0

    def mix(self, x: Tensor, noise: Tensor, where: Tensor, weighting: str = "none", shift: float = 1.0) -> Mixed:
        """Mix pictures x with noise, each at its place in the schedule, `where` (b,) in [0, 1)."""
        if shift != 1:
            raise ValueError("the steps of a noise schedule have no shift")
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
class Line:
    """How far the shift goes with the size of a picture: its logarithm lies on the line through (least tokens, base) and (most, top)."""

    base: float = 0.5
    top: float = 1.15
    least: int = 256
    most: int = 4096

    def shift(self, tokens: float) -> float:
        """exp(mu), as the pipelines of FLUX and Qwen-Image take it (`calculate_shift` in diffusers)."""
        return math.exp(self.base + (self.top - self.base) * (tokens - self.least) / (self.most - self.least))


@dataclass(frozen=True)
class Flow:
    """Straight lines from picture to noise. `amounts` (T,) is how much of it is noise, rising, with the shift `table` in it already;
    `line` is the shift by size, and `sized` says that the pipeline itself goes by it."""

    amounts: Tensor
    table: float = 1.0
    line: Line = Line()
    sized: bool = False

    def shift(self, wanted: str | float, timesteps: str, tokens: float) -> float:
        """How far pictures of so many tokens are moved beyond the table for task.shift and task.timesteps; 1 leaves them where they are."""
        if timesteps == "sigmoid":
            wanted = 1.0
        if wanted == "auto":
            wanted = "resolution" if self.sized else self.table
        return (self.line.shift(tokens) if wanted == "resolution" else wanted) / self.table

    def mix(self, x: Tensor, noise: Tensor, where: Tensor, weighting: str = "none", shift: float = 1.0) -> Mixed:
        """Mix pictures x with noise, each at its place in the schedule, `where` (b,) in [0, 1), moved by `shift`. All count alike."""
        if weighting != "none":
            raise ValueError(f"{weighting} weighs by the signal of a noise schedule, and flow matching has none")
        count = len(self.amounts)
        amounts = self.amounts[(where * count).long().clamp(max=count - 1)].to(x.device)
        if shift != 1:
            amounts = shift * amounts / (1 + (shift - 1) * amounts)
        share = amounts.view(-1, *[1] * (x.ndim - 1))
        return Mixed((1 - share) * x + share * noise, amounts * count, noise - x, torch.ones_like(amounts))


def place(timesteps: str, generator: torch.Generator) -> float:
    """A place in the schedule, from 0 to 1 (Esser et al. 2024, section 3.1): any alike; logit-normal with mean 0 and deviation 1, mostly
    the middle (sigmoid is the same draw); or mode sampling, 1 - u - s (cos^2(pi u / 2) - 1 + u) with s = 1.29."""
    if timesteps in ("logit_normal", "sigmoid"):
        return float(torch.randn((), generator=generator).sigmoid())
    even = torch.rand((), generator=generator)
    if timesteps == "mode":
        even = 1 - even - MODE_SCALE * (torch.cos(math.pi * even / 2) ** 2 - 1 + even)
    return min(max(float(even), 0.0), 1 - 2**-24)


def of_scheduler(scheduler) -> Diffusion:
    """The objective that a pipeline's scheduler was made for."""
    from diffusers import DDPMScheduler

    same = DDPMScheduler.from_config(scheduler.config)
    return Diffusion(same.alphas_cumprod.float(), scheduler.config.prediction_type)


def flow_of_scheduler(scheduler) -> Flow:
    """The objective of a flow matching pipeline: the table that its scheduler has before any pipeline has used it. Where the shift
    depends on the picture's size the table is the unshifted one, and task.shift moves what is trained."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    shift = config.get("flow_shift") or 1.0 if "flow_shift" in config else config.get("shift", 1.0)
    sized = bool(config.get("use_dynamic_shifting", False))
    same = FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift, use_dynamic_shifting=sized)
    names = {"base": "base_shift", "top": "max_shift", "least": "base_image_seq_len", "most": "max_image_seq_len"}
    line = Line(**{name: config[known] for name, known in names.items() if config.get(known) is not None})
    return Flow(same.sigmas.float().flip(0), 1.0 if sized else shift, line, sized)
