"""Blending: CPU seconds, memory and error of compressing a sum of adapters, against PEFT's own; and of the curve behind the sliders.

    python tests/benchmarks/blend.py --rounds 3

One layer of 4096 x 4096 with adapters of rank 16, 32 and 64 goes to rank 32: by `blend.stack` and `blend.compress`, and by PEFT's
add_weighted_adapter(combination_type="svd"). The curve is what dragging a weight asks for: the exact error at every rank, over 224 such
layers whose factors were cached (`blend.Preview`). Every variant runs in a fresh process with one thread, rounds are interleaved; CPU
seconds are of the process, memory is the peak since the work began above what was resident then. The error is against fp64, on the
whole matrix.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.meter import ROOT, Meter, leave, measure, median, status

Plan = tuple[Callable[[], object], Callable[[object], dict]]  # what is measured, and what is told of its result

WIDTH, RANKS, TARGET, WEIGHTS, LAYERS, DRAGS = 4096, (16, 32, 64), 32, (0.6, 0.9, 0.3), 224, 5
VARIANTS = {
    "ours": "LoRA Studio: stack and compress", "peft": "PEFT: add_weighted_adapter, svd",
    "cache": f"LoRA Studio: factors of {LAYERS} layers cached", "curve": f"LoRA Studio: one curve of {LAYERS} cached layers",
}  # fmt: skip


def factors(seed: int) -> list:
    """(A, B) of each rank, fp32, with spectra that fall as those of trained adapters do."""
    import torch

    draw, found = torch.Generator().manual_seed(seed), []
    for rank in RANKS:
        falling = torch.linspace(1, 0.1, rank)
        found.append((torch.randn(rank, WIDTH, generator=draw) * 0.02 * falling[:, None], torch.randn(WIDTH, rank, generator=draw) * 0.02))
    return found


def error(given: list, A, B) -> float:
    """How far B·A is from the weighted sum, relative, in fp64 and on whole matrices."""
    meant = sum(weight * 2.0 * (b.double() @ a.double()) for weight, (a, b) in zip(WEIGHTS, given))
    return float((B.double() @ A.double() - meant).norm() / meant.norm())


def compress_ours() -> Plan:
    """The way of the Blend page and of `blend --rank`."""
    from lora_studio import blend
    from lora_studio.lowrank import LowRank

    given = factors(0)
    adapters = [{"layer": LowRank(A, B, 2.0)} for A, B in given]

    def act():
        return blend.compress(blend.stack(adapters, list(WEIGHTS)), TARGET)

    def tell(found) -> dict:
        module = found[0]["layer"].folded()
        return {"error": error(given, module.A, module.B), "told": found[1].overall}

    blend.compress(
        blend.stack([{"layer": LowRank(A[:, :128], B[:128], 2.0)} for A, B in given], list(WEIGHTS)), 8
    )  # libraries wake up once
    return act, tell


def compress_peft() -> Plan:
    """PEFT's own, on a model of that one layer."""
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    given, model = factors(0), None
    for number, (rank, (A, B)) in enumerate(zip(RANKS, given)):
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
        if model is None:
            model = peft.get_peft_model(Model(), config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
        layer = model.base_model.model.layer
        with torch.no_grad():
            layer.lora_A[str(number)].weight.copy_(A)
            layer.lora_B[str(number)].weight.copy_(B)

    def act():
        model.add_weighted_adapter(
            [str(number) for number in range(len(RANKS))], list(WEIGHTS), "all", combination_type="svd", svd_rank=TARGET
        )

    def tell(_) -> dict:
        return {"error": error(given, layer.lora_A["all"].weight.detach(), layer.lora_B["all"].weight.detach() * layer.scaling["all"])}

    return act, tell


def many() -> list[dict]:
    """Adapters of 224 layers."""
    from lora_studio.lowrank import LowRank

    found: list[dict] = [{} for _ in RANKS]
    for number in range(LAYERS):
        for adapter, (A, B) in zip(found, factors(number)):
            adapter[f"layers.{number}"] = LowRank(A, B, 2.0)
    return found


def cache() -> Plan:
    """The QRs, done once for a set of adapters."""
    from lora_studio import blend

    adapters = many()
    return lambda: blend.Preview(adapters), lambda preview: {"layers": len(preview.triangles)}


def curve() -> Plan:
    """A weight is dragged."""
    from itertools import count

    from lora_studio import blend

    preview, dragged = blend.Preview(many()), count()
    return lambda: preview.curve([0.5 + 0.01 * next(dragged), 0.9, 0.3]), lambda found: {
        "ranks": len(found.overall) - 1,
        "layers": len(found.layers),
    }


WORK = {"ours": (compress_ours, 1), "peft": (compress_peft, 1), "cache": (cache, 1), "curve": (curve, DRAGS)}


def work(variant: str) -> dict:
    """Run one variant in this process; where it is repeated, the median counts."""
    import torch

    torch.set_num_threads(1)
    plan, times = WORK[variant]
    meter = Meter()
    act, tell = plan()
    meter.begin()
    for _ in range(times):
        found = act()
        meter.mark()
    extra = status("VmHWM") - meter.resident  # before anything else is computed
    pieces = [(after[0] - before[0], after[1] - before[1]) for before, after in zip(meter.marks, meter.marks[1:])]
    wall, cpu = (statistics.median(piece[place] for piece in pieces) for place in (0, 1))
    return {"cpu_seconds": round(cpu, 4), "wall_seconds": round(wall, 4), "extra_mb": round(extra, 1), **tell(found)}


def table(found: dict[str, list[dict]]) -> str:
    """A markdown table of medians."""
    lines = ["| variant | CPU s | against ours | wall s | extra memory MB | relative error |", "|---|---|---|---|---|---|"]
    for variant, rows in found.items():
        ratio = f"{median(rows, 'cpu_seconds') / median(found['ours'], 'cpu_seconds'):.0f}x" if variant == "peft" else "-"
        wrong = f"{median(rows, 'error'):.9f}" if "error" in rows[0] else "-"
        lines.append(
            f"| {VARIANTS[variant]} | {median(rows, 'cpu_seconds'):.3f} | {ratio} | {median(rows, 'wall_seconds'):.3f} | {max(row['extra_mb'] for row in rows):.0f} | {wrong} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write, or run one variant for the driver."""
    parser = argparse.ArgumentParser(description="Blending against PEFT.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--work", choices=sorted(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print("RESULT " + json.dumps(work(options.work)), flush=True)
        return
    found = measure(__file__, options.rounds, 1, list(VARIANTS))
    told = max(abs(row["told"] - row["error"]) for row in found["ours"])
    note = (
        f"{WIDTH} x {WIDTH}, ranks {', '.join(map(str, RANKS))} to {TARGET}, one thread, medians of {options.rounds} rounds, the largest memory. "
        f"The error that the studio tells, without the whole matrix, is {told:.1e} off the one measured on it."
    )
    print(table(found), note, sep="\n")
    place = leave(
        "blend",
        "Blending",
        f"{table(found)}\n\n{note}",
        {"width": WIDTH, "ranks": RANKS, "target": TARGET, "layers": LAYERS, "rounds": options.rounds, "results": found},
    )
    print(f"written to {place.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
