"""Learning rates: at what each role learns, what to try with LoRA+, and what is worth a word before a run starts."""

from lora_studio.errors import Problem
from lora_studio.spec import TrainSpec, methods

HIGHEST = 0.1  # of B's rate times the scale: what lies above seldom trains well
LOWEST = 1e-3  # of virtual tokens


def rates(spec: TrainSpec) -> dict[str, float]:
    """The learning rate of each role at its highest."""
    return {"A": spec.optim.lr, "B": spec.optim.lr * (spec.optim.lora_plus_ratio or 1.0)}


def scale(spec: TrainSpec) -> float:
    """The factor of B·A: alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
    return methods.strength(spec.method)


def suggest_ratio(kind: str) -> float:
    """The ratio to try when LoRA+ is switched on: 16 for text (the authors' default), 4 for pictures (musubi-tuner's advice)."""
    return 4.0 if kind == "image" else 16.0


def suggest_lr(lr: float, kind: str = "chat") -> float:
    """The base rate to try when LoRA+ is switched on. On text the best rate was seen to move down about eightfold at ratio 16, so that
    B learns at twice the old rate; the same is taken for pictures."""
    return float(f"{lr * 2 / suggest_ratio(kind):.2g}")


def problems(spec: TrainSpec) -> list[Problem]:
    """A warning for a rate of B that lies far above what trains well, and for one of virtual tokens far below."""
    lr, ratio, found = spec.optim.lr, spec.optim.lora_plus_ratio, []
    if spec.method.kind in methods.VIRTUAL and lr < LOWEST:
        found.append(f"Virtual tokens hardly move at {lr:.2g}: 0.01 to 0.1 is usual for them, a hundred times what LoRA takes. Raise optim.lr.")
    if ratio and spec.optim.kind.startswith("adam") and lr * ratio * scale(spec) > HIGHEST:
        usual = suggest_ratio(spec.task.kind)
        found.append(
            f"With LoRA+ B learns at {lr * ratio:.2g}, which is high for scale {scale(spec):.2g}. Try optim.lr {suggest_lr(lr, spec.task.kind):.2g}"
            + (f", and the ratio {usual:g} that is usual here." if ratio > usual else ".")
        )
    return [Problem("optim.lr", sentence, "warning") for sentence in found]
