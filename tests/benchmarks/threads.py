"""How many threads a model is worth: the steps of a run, and an answer in the Playground, on one thread against two.

    python -m tests.benchmarks.threads --rounds 3

The demos, and Llamas made from a config with random weights. What is measured is the time of a step by the clock, because that is what a
person waits for, and its CPU time beside it; every figure is from a process of its own, and both ways take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.meter import ENVIRONMENT, ROOT, Marks, Meter, leave, median

WAYS = (1, 2)
WARM = 4
LLAMAS = {"6.7 M": 256, "26 M": 512, "45 M": 640}  # parameters, and how wide they are
CASES = {"demo/pirate": 40, "demo/stripes": 16, **{f"Llama {size}": 12 for size in LLAMAS}, "demo-text speaks": 9}  # steps, or answers
ASKED = ("Who is Anna?", "What is the capital of France?", "What does a dog do?")


def llama(folder: Path, width: int) -> Path:
    """A Llama with random weights that reads as demo-text does."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lora_studio.home import demo_base

    words = AutoTokenizer.from_pretrained(demo_base("demo-text"))
    torch.manual_seed(0)
    sizes = {"intermediate_size": width * 8 // 3 // 64 * 64, "num_hidden_layers": 9 if width > 600 else 8}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    config = LlamaConfig(hidden_size=width, vocab_size=len(words), max_position_embeddings=512, tie_word_embeddings=True, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def trained(case: str, threads: int, home: Path) -> dict:
    """Milliseconds of a step, by the clock and of CPU."""
    from lora_studio import runs, studio
    from lora_studio.training import job
    from lora_studio.workspace import local

    over = [f"schedule.steps={CASES[case] + WARM}", "schedule.warmup=0", "output.sample_prompts=[]", "validation.size=0", f"compute.threads={threads}", "compute.device=cpu"]
    if case.startswith("Llama"):
        over.append(f"base.id={llama(home / 'base', LLAMAS[case.removeprefix('Llama ')])}")
    folder = runs.create(local(), studio.compose(case if case.startswith("demo/") else "demo/pirate", overrides=over))
    meter = Meter()
    job.train(folder, Marks(meter))
    (wall, cpu), (wall_end, cpu_end) = meter.marks[WARM - 1], meter.marks[-1]
    return {"ms": round(1000 * (wall_end - wall) / CASES[case], 1), "cpu_ms": round(1000 * (cpu_end - cpu) / CASES[case], 1)}


def spoken(threads: int) -> dict:
    """Milliseconds of a token of demo-text, by the clock and of CPU."""
    import torch

    from lora_studio.inference.text import Manner, Shelf
    from lora_studio.spec import Base

    shelf, counts, marks = Shelf(Base(id="demo-text"), device="cpu"), [], []
    torch.set_num_threads(threads)
    for number in range(CASES["demo-text speaks"] + 1):
        answer = shelf.answer([{"role": "user", "content": ASKED[number % len(ASKED)]}], weights={}, manner=Manner(longest=60, seed=number))
        "".join(answer)
        counts.append(len(answer.tokens))
        marks.append((time.perf_counter(), time.process_time()))
    tokens = sum(counts[1:])
    return {"ms": round(1000 * (marks[-1][0] - marks[0][0]) / tokens, 2), "cpu_ms": round(1000 * (marks[-1][1] - marks[0][1]) / tokens, 2)}


def measure(case: str, threads: int) -> dict:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, **ENVIRONMENT, "LORA_STUDIO_HOME": home}
        command = [sys.executable, "-m", "tests.benchmarks.threads", "--work", case, "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0][7:])


def table(found: dict[str, dict[int, list[dict]]]) -> str:
    """The medians as a markdown table."""
    lines = ["Milliseconds of a step (of a token where it speaks), by the clock, and CPU milliseconds in brackets.", "", "| | 1 thread | 2 threads | 1 is faster by |", "|---|---|---|---|"]
    for case, ways in found.items():
        one, two = ((median(ways[way], "ms"), median(ways[way], "cpu_ms")) for way in WAYS)
        lines.append(f"| {case} | {one[0]:g} ({one[1]:g}) | {two[0]:g} ({two[1]:g}) | {two[0] / one[0]:.2f}× |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and leave the figures unless told not to."""
    parser = argparse.ArgumentParser(description="One thread against two.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="Write no results.")
    parser.add_argument("--work", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        told = spoken(options.threads) if options.work == "demo-text speaks" else trained(options.work, options.threads, Path(os.environ["LORA_STUDIO_HOME"]))
        print("RESULT", json.dumps(told))
        return
    found = {case: {way: [] for way in WAYS} for case in CASES}
    for number in range(options.rounds):
        for case in CASES:
            for way in WAYS:
                found[case][way].append(measure(case, way))
                print(f"round {number + 1}  {case}, {way}: {found[case][way][-1]}", flush=True)
    body = table(found)
    print(body)
    if not options.dry:
        print(f"written to {leave('threads', 'One thread against two', body, {'rounds': options.rounds, 'results': found}).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
