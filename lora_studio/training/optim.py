"""Optimizers, their parameter groups (LoRA+), and schedules as pure functions of the step."""

import contextlib
import io
import math
import re

import torch

from lora_studio.errors import MachineError, TrainingError
from lora_studio.spec import Optim, Schedule

# Which part of an adapter a parameter is, by its name. Embedding adapters come first: PEFT starts their A at zero and
# draws their B, so the roles are swapped there and the ratio must not touch them.
ROLES = (
    ("embedding", re.compile(r"\.lora_embedding_[AB]\b")),
    ("B", re.compile(r"\.lora_B\b")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector\b")),
    ("A", re.compile(r"\.lora_A\b")),
    ("vector", re.compile(r"\.(lora_E|vera_lambda_[bd]|ia3_l)\b")),
    ("factor", re.compile(r"\.(hada_\w+|lokr_\w+|miss_block|oft_R)\b")),
    ("virtual", re.compile(r"\bprompt_encoder\.")),
)


def role(name: str) -> str:
    """A, B, embedding, magnitude, vector (AdaLoRA's, VeRA's and IA3's), factor (of other products), virtual (tokens), or other (heads, biases, what is saved beside the adapter)."""
    return next((found for found, pattern in ROLES if pattern.search(name)), "other")


def is_text_encoder(name: str) -> bool:
    """Whether a parameter belongs to a text encoder that is trained beside an image model's part."""
    return name.startswith("encoders.")


def groups(parameters, optim: Optim) -> list[dict]:
    """Parameter groups of (name, parameter) pairs, one per role and decay, in a fixed order. Text encoders have groups (and, where it
    is set, a base rate) of their own.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): eta_B = ratio * eta_A. Only B matrices get the ratio; magnitudes,
    embeddings, biases and heads learn at the base rate. Vectors are never decayed.
    """
    ratio, made = optim.lora_plus_ratio or 1.0, {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        part = role(name)
        decay = 0.0 if parameter.ndim < 2 or part in ("magnitude", "vector") else optim.weight_decay
        base = optim.text_encoder_lr or optim.lr if is_text_encoder(name) else optim.lr
        rate = base * ratio if part == "B" else base
        part = f"text_{part}" if is_text_encoder(name) else part
        group = made.setdefault((part, decay), {"params": [], "lr": rate, "base_lr": rate, "weight_decay": decay, "role": part})
        group["params"].append(parameter)
    return [made[entry] for entry in sorted(made)]


def _adamw(groups: list[dict], optim: Optim):
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


def _bitsandbytes(name: str):
    """An optimizer of bitsandbytes. Its tensors of fewer than 4,096 numbers stay in fp32."""

    def build(groups: list[dict], optim: Optim):
        try:
            import bitsandbytes
        except ImportError:
            raise MachineError("machine.package", name="bitsandbytes", use=f"optim.kind {optim.kind}") from None
        return getattr(bitsandbytes.optim, name)(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))

    return build


def _muon(groups: list[dict], optim: Optim):
    """Orthogonalised momentum (Jordan 2024), for matrices only. Raises TrainingError for anything else."""
    other = next((value for group in groups for value in group["params"] if value.ndim != 2), None)
    if other is not None:
        raise TrainingError("training.muon", shape=list(other.shape))
    return torch.optim.Muon(groups, lr=optim.lr, momentum=optim.beta1, weight_decay=optim.weight_decay)


def _prodigy(groups: list[dict], optim: Optim):
    """Mishchenko and Defazio 2023, arXiv 2306.06101."""
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its settings
        return Prodigy(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, safeguard_warmup=True)


def _schedule_free(groups: list[dict], optim: Optim):
    """Defazio et al. 2024, arXiv 2405.15682. It steps from y and is judged, shown and saved at x, the running average: see `averaged`."""
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    made.train()
    return made


def _adafactor(groups: list[dict], optim: Optim):
    return torch.optim.Adafactor(groups, lr=optim.lr)


def _sgd(groups: list[dict], optim: Optim):
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.beta1)


OPTIMIZERS = {
    "adamw": _adamw, "adamw_8bit": _bitsandbytes("AdamW8bit"), "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"), "lion": _bitsandbytes("Lion"),
    "lion_8bit": _bitsandbytes("Lion8bit"), "muon": _muon, "prodigy": _prodigy, "adafactor": _adafactor, "sgd": _sgd,
    "adamw_schedule_free": _schedule_free,
}  # fmt: skip
# What an optimizer keeps in its groups while it works; the rest of a group is settings.
KEPT = ("d", "d_max", "d_numerator", "k", "weight_sum", "lr_max", "train_mode")


def build(parameters, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer of a spec over (name, parameter) pairs. Each group knows its role and its highest rate (`base_lr`)."""
    return OPTIMIZERS[optim.kind](groups(parameters, optim), optim)


def kept(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The numbers an optimizer keeps in its groups (Prodigy's, and schedule-free ones'), for a checkpoint."""
    return [{name: float(group[name]) for name in KEPT if name in group} for group in optimizer.param_groups]


def put_back(optimizer: torch.optim.Optimizer, found: list[dict[str, float]]) -> None:
    """Put them back, and the parameters to where a step starts from."""
    for group, numbers in zip(optimizer.param_groups, found):
        group.update({name: int(value) if name in ("k", "train_mode") else value for name, value in numbers.items()})
    with torch.no_grad():
        for parameter, entry in optimizer.state.items():
            if "y" in entry:
                parameter.copy_(entry.pop("y"))


def state(optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """What an optimizer keeps of each parameter, for a checkpoint; of a schedule-free one also y, because the checkpoint's adapter is x."""
    found = optimizer.state_dict()["state"]
    if not _steps_elsewhere(optimizer):
        return found
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number: {**entry, "y": parameters[number].detach()} for number, entry in found.items()}


def _steps_elsewhere(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the parameters are where the next step starts from, and not what is judged and saved."""
    return bool(optimizer.param_groups[0].get("train_mode"))


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer):
    """A while in which the parameters are what is judged, shown and saved. Afterwards they are what they were to the bit, which the
    package's own way back is not: otherwise whoever asks for a sample would change the run."""
    if not _steps_elsewhere(optimizer):
        yield
        return
    before = [(parameter, parameter.detach().clone()) for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["train_mode"] = True
        with torch.no_grad():
            for parameter, y in before:
                parameter.copy_(y)


def settle(optimizer: torch.optim.Optimizer) -> None:
    """The last step is made: the parameters stay what is judged and saved."""
    if _steps_elsewhere(optimizer):
        optimizer.eval()


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate to factor * its highest rate. Returns the rate of each role."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        rates[group["role"]] = group["lr"]
    return rates


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """The warm-up in steps."""
    return int(schedule.warmup * steps) if schedule.warmup < 1 else int(schedule.warmup)


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """The rate at step `step` (from 0) of `steps`, as a share of the highest: a linear warm-up from zero, then the kind's
    course. The formulas are those of transformers.get_scheduler; wsd decays linearly over the last fifth."""
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return step / max(1, warmup)
    return COURSES[schedule.kind](step, steps, warmup)


def _linear(step: int, steps: int, warmup: int) -> float:
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _cosine(step: int, steps: int, warmup: int) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def _inverse_sqrt(step: int, steps: int, warmup: int) -> float:
    # transformers' default time scale where there is no warm-up
    scale = warmup or 10_000
    return 1.0 / math.sqrt((step - warmup + scale) / scale)


def _wsd(step: int, steps: int, warmup: int) -> float:
    decay = max(1, round(0.2 * steps))
    return min(1.0, max(0.0, (steps - step) / decay))


COURSES = {
    "constant": lambda step, steps, warmup: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}
