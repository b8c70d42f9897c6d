"""LoRA against LoRA+, in two tables: on demo-text, as `compare` measures it, and over the width of a model, which shows where an advantage comes from.

    python -m tests.benchmarks.lora_plus [--preset demo/pirate --steps 100 --seeds 3] [--widths 32 64 128 256]

The width scan makes Llamas of two layers from nothing, teaches each a random language (a Markov chain of 64 words) with all its weights, and
then adapts it to a second such language with rank 4, at every ratio and rate of a grid, the same rows for all. Rows never repeat, so the loss
is that of unseen rows. The paper (Hayou et al. 2024, arXiv 2402.12354) says that in wide models equal rates cannot let both A and B learn;
`A's part` is the share of the update that would be missing had A stayed as it was drawn, |B (A - A0)| / |B A|.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests import tiny
from tests.benchmarks.meter import ROOT, leave
from tests.benchmarks.parallel import work

WORDS, LENGTH, ROWS, RANK = 64, 32, 16, 4
LEARNT = 200  # steps of the first language
RATIOS = (1, 4, 16, 64)
# The geometric means of the rates of A and B that are tried at every ratio, in steps of two.
MEANS = tuple(4e-3 * 2**power for power in range(5))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERY = 5


def chain(seed: int) -> torch.Tensor:
    """The chances of the next word after each, (WORDS, WORDS): a random language in which few words follow a word."""
    draw = torch.Generator().manual_seed(seed)
    return torch.softmax(3.0 * torch.randn(WORDS, WORDS, generator=draw), -1)


def rows(chances: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Rows of that language, (count, LENGTH)."""
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(WORDS, (count,), generator=draw)]
    for _ in range(LENGTH - 1):
        words.append(torch.multinomial(chances[words[-1]], 1, generator=draw)[:, 0])
    return torch.stack(words, 1)


def entropy(chances: torch.Tensor) -> float:
    """The lowest loss there is: nats a word, each word as frequent as the chain makes it."""
    often = torch.full((WORDS,), 1 / WORDS)
    for _ in range(200):
        often = often @ chances
    return float(-(often[:, None] * chances * chances.log()).sum())


def base_of(width: int, seed: int) -> dict:
    """The weights of a model of that width that knows the first language."""
    model = fresh(width, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 * math.sqrt(64 / width), weight_decay=0.0)
    for step in range(LEARNT):
        given = rows(chain(1), ROWS, 10_000 + step)
        model(input_ids=given, labels=given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def fresh(width: int, seed: int):
    """A Llama of two layers."""
    return tiny.model(
        seed=seed,
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
    )


def adapt(width: int, base: dict, ratio: float, mean: float, *, steps: int, seed: int) -> dict:
    """Adapt to the second language. Returns the loss on unseen rows over the steps, and A's part in the update."""
    from lora_studio.spec import parse
    from lora_studio.training import methods, optim

    rate = mean / math.sqrt(ratio)
    tree = {
        "method": {"rank": RANK, "alpha": RANK},
        "optim": {"lr": rate, "lora_plus_ratio": ratio if ratio > 1 else None},
        "compute": {"seed": seed},
    }
    spec = parse({"data": [{"path": "x"}], **tree})
    model = fresh(width, seed)
    model.load_state_dict(base)
    model = methods.METHODS["lora"].attach(model, spec, TARGETS)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    drawn = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer, held_out, curve = optim.build(model.named_parameters(), spec.optim), rows(chain(2), 64, 1), []
    for step in range(steps + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                curve.append([step, float(model(input_ids=held_out, labels=held_out).loss)])
        given = rows(chain(2), ROWS, 20_000 + 1000 * seed + step)
        model(input_ids=given, labels=given).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"rate": rate, "curve": curve, "loss": curve[-1][1], "part_of_a": part_of_a(parameters, drawn)}


@torch.no_grad()
def part_of_a(parameters: dict, drawn: dict) -> float:
    """The share of the update that is there because A moved, the median over the layers."""
    found = []
    for name, B in parameters.items():
        if ".lora_B." in name:
            other = name.replace(".lora_B.", ".lora_A.")
            A, A0 = parameters[other], drawn[other]
            found.append(float((B @ (A - A0)).norm() / (B @ A).norm().clamp_min(1e-12)))
    return statistics.median(found)


def scan(width: int, *, steps: int, seeds: int) -> dict:
    """Every ratio and rate at one width, each the mean over the seeds. Returns the best of each ratio."""
    from lora_studio.comparisons import reach

    started, found = time.process_time(), {}
    bases = [base_of(width, seed) for seed in range(seeds)]
    for ratio in RATIOS:
        tried = []
        for mean in MEANS:
            each = [adapt(width, base, ratio, mean, steps=steps, seed=seed) for seed, base in enumerate(bases)]
            curve = [[points[0][0], statistics.mean(loss for _, loss in points)] for points in zip(*(one["curve"] for one in each))]
            part = statistics.mean(one["part_of_a"] for one in each)
            ends = [one["loss"] for one in each]
            tried.append({"mean": mean, "rate": each[0]["rate"], "loss": curve[-1][1], "ends": ends, "curve": curve, "part_of_a": part})
        best = min((one for one in tried if math.isfinite(one["loss"])), key=lambda one: one["loss"])
        found[ratio] = {**best, "at_edge": best["mean"] in (MEANS[0], MEANS[-1]), "tried": [[one["rate"], one["loss"]] for one in tried]}
    for one in found.values():
        at = reach([[step, loss] for step, loss in one["curve"]], found[1]["loss"])
        one["speedup"] = steps / at if at else None
    return {"width": width, "floor": entropy(chain(2)), "ratios": found, "cpu_seconds": round(time.process_time() - started, 1)}


def table(found: list[dict], steps: int, seeds: int) -> str:
    """The scan as a markdown table, and in words."""
    lines = ["| width | ratio | best rate of A | of B | final loss | lowest to highest | steps to LoRA's loss | A's part |", "|---|---|---|---|---|---|---|---|"]
    for one in found:
        for ratio, best in one["ratios"].items():
            faster = "-" if ratio == 1 else "not reached" if best["speedup"] is None else f"{best['speedup']:.2f}x fewer"
            edge = "*" if best["at_edge"] else ""
            lines.append(
                f"| {one['width']} | {ratio} | {best['rate']:.1e}{edge} | {best['rate'] * ratio:.1e} | {best['loss']:.4f} | {min(best['ends']):.4f} to {max(best['ends']):.4f} | {faster} | {best['part_of_a']:.0%} |"
            )
    lines += [
        "",
        f"Rank {RANK}, {steps} steps of {ROWS} rows of {LENGTH} words, {'one seed' if seeds == 1 else f'means of {seeds} seeds'}; * the best rate is at the edge of the grid.",
    ]
    lines += [f"The lowest loss there is: {found[0]['floor']:.4f}."]
    return "\n".join([*lines, *summary(found)])


def summary(found: list[dict]) -> list[str]:
    """What the scan says of width: what the best ratio gives at tuned rates, and what ratio 16 gives whoever keeps LoRA's lowest rate of A."""
    said = []
    for one in found:
        ratios = {int(ratio): best for ratio, best in one["ratios"].items()}
        best = min(ratios, key=lambda ratio: ratios[ratio]["loss"])
        gain = 1 - ratios[best]["loss"] / ratios[1]["loss"]
        wins = sum(plus < lora for plus, lora in zip(ratios[best]["ends"], ratios[1]["ends"]))
        often = "" if best == 1 else f" (lower with {wins} of {len(ratios[1]['ends'])} seeds)"
        lora, plus = (dict(map(tuple, ratios[ratio]["tried"])) for ratio in (1, 16))
        rate = min(lora.keys() & plus.keys())
        said.append(
            f"Width {one['width']}: at tuned rates the best ratio is {best}, {gain:.1%} below plain LoRA's loss{often}; at equal rates A's part is {ratios[1]['part_of_a']:.0%}, "
            f"at ratio 16 {ratios[16]['part_of_a']:.0%}. At the same rate of A, {rate:.1e}, LoRA ends at {lora[rate]:.4f} and ratio 16 at {plus[rate]:.4f}."
        )
    return ["", *said]


def compared(preset: str, *, steps: int, seeds: int, full: bool) -> dict:
    """What `compare` finds on a preset, in a process of its own."""
    from lora_studio import comparisons, runs, studio
    from lora_studio.workspace import local

    run = studio.compose(preset, {"schedule": {"steps": steps}, "compute": {"device": "cpu"}, "output": {"sample_prompts": []}})
    folder = runs.create(local(), comparisons.compose(run, full=full, seeds=seeds))
    cpu, _ = work(folder)
    return {**comparisons.result(local(), folder.name), "id": preset, "cpu_seconds": round(cpu, 1)}


def main() -> None:
    """Measure, print, and leave the figures unless told not to."""
    from lora_studio.cli_compare import table as table_of_compared

    parser = argparse.ArgumentParser(description="LoRA against LoRA+.")
    parser.add_argument("--preset", default="demo/pirate")
    parser.add_argument("--steps", type=int, default=100, help="Steps of the comparison on the preset; 0 leaves it out.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-full", action="store_true", help="No reference of full fine-tuning.")
    parser.add_argument("--widths", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--scan-steps", type=int, default=60)
    parser.add_argument("--scan-seeds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="Write no results.")
    options = parser.parse_args()
    body, record = [], {"options": {name: value for name, value in vars(options).items() if name != "dry"}}
    if options.steps:
        with tempfile.TemporaryDirectory() as home:
            os.environ["LORA_STUDIO_HOME"] = home
            told = compared(options.preset, steps=options.steps, seeds=options.seeds, full=not options.no_full)
        record["compared"] = told
        body += [
            f"{options.preset}, {options.steps} steps, {told['cpu_seconds']} CPU seconds in all:",
            "",
            "```",
            table_of_compared(told),
            "```",
            "",
        ]
        print("\n".join(body), flush=True)
    if options.widths:
        record["scan"] = []
        for width in options.widths:
            record["scan"].append(scan(width, steps=options.scan_steps, seeds=options.scan_seeds))
            print(f"width {width}: {record['scan'][-1]['cpu_seconds']} CPU seconds", flush=True)
        scanned = table(record["scan"], options.scan_steps, options.scan_seeds)
        print(scanned)
        body.append(scanned)
    if not options.dry:
        place: Path = leave("lora_plus", "LoRA against LoRA+", "\n".join(body), record)
        print(f"written to {place.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
