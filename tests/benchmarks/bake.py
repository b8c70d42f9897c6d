"""Baking an adapter into a base: wall seconds and peak memory against copying the same bytes, and against PEFT's merge and save.

    python tests/benchmarks/bake.py --rounds 5

A Llama of about 1 GB in bf16, rank 16 on all linears. Every variant runs in a fresh process, rounds are interleaved, files are fsynced and
in the page cache; wall seconds are from the first byte read to the last fsync, without imports. The best of the rounds decides, and the
medians are printed too. The studio's file is compared with PEFT's, bit by bit.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.meter import ROOT, leave, measure, status

VARIANTS = {"ours": "LoRA Studio", "cp": "cp and fsync of the same bytes", "peft": "PEFT merge_and_unload, save_pretrained and fsync"}


def write_base(folder: Path, *, layers: int = 10, width: int = 2048, inner: int = 5632) -> None:
    """The base in one file, and an adapter of it."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        model.save_pretrained(folder / "base")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    adapted.save_pretrained(folder / "lora")


def sync(folder: Path) -> None:
    """Put every file of a folder on disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def bake_ours(folder: Path, target: Path) -> float:
    """Plan and apply."""
    import torch  # noqa: F401  imports are not what is measured

    from lora_studio import adapters, checkpoints

    began = time.perf_counter()
    checkpoints.apply(checkpoints.plan(folder / "base", [(adapters.read(folder / "lora"), 1.0)]), target)
    return time.perf_counter() - began


def bake_cp(folder: Path, target: Path) -> float:
    """The bytes alone."""
    target.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *map(str, (folder / "base").iterdir()), str(target)], check=True)
    sync(target)
    return time.perf_counter() - began


def bake_peft(folder: Path, target: Path) -> float:
    """Load, merge, save."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, folder / "lora").merge_and_unload().save_pretrained(target)
    sync(target)
    return time.perf_counter() - began


WORK = {"ours": bake_ours, "cp": bake_cp, "peft": bake_peft}


def work(variant: str, folder: Path) -> dict:
    """Run one variant in this process."""
    target = folder / f"out-{variant}"
    shutil.rmtree(target, ignore_errors=True)
    cpu = time.process_time()
    wall = WORK[variant](folder, target)
    return {"wall_seconds": round(wall, 3), "cpu_seconds": round(time.process_time() - cpu, 3), "peak_mb": round(status("VmHWM"), 1)}


def differing(folder: Path) -> int:
    """The tensors of ours that are not bit for bit PEFT's."""
    from safetensors import safe_open

    count = 0
    with safe_open(folder / "out-ours/model.safetensors", "pt") as ours, safe_open(folder / "out-peft/model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():  # noqa: SIM118  a safetensors file is no dict
            count += not bool((ours.get_tensor(name) == theirs.get_tensor(name)).all())
    return count


def table(found: dict[str, list[dict]]) -> str:
    """A markdown table: the best wall seconds decide, medians beside them."""
    lines = ["| variant | best wall s | against ours | median wall s | against ours | peak memory MB |", "|---|---|---|---|---|---|"]
    best = {variant: min(row["wall_seconds"] for row in rows) for variant, rows in found.items()}
    middle = {variant: statistics.median(row["wall_seconds"] for row in rows) for variant, rows in found.items()}
    for variant, rows in found.items():
        ratios = [f"{value[variant] / value['ours']:.2f}x" if variant != "ours" else "-" for value in (best, middle)]
        peak = max(row["peak_mb"] for row in rows)
        lines.append(f"| {VARIANTS[variant]} | {best[variant]:.2f} | {ratios[0]} | {middle[variant]:.2f} | {ratios[1]} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write, or run one variant for the driver."""
    parser = argparse.ArgumentParser(description="Baking against cp and PEFT.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--work", choices=sorted(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print("RESULT " + json.dumps(work(options.work, options.folder)), flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_base(folder)
        size = sum(file.stat().st_size for file in (folder / "base").iterdir())
        found = measure(__file__, options.rounds, 1, list(VARIANTS), "--folder", place)
        wrong = differing(folder)
    note = f"{size / 1e9:.2f} GB; {wrong} tensors differ from PEFT's in any bit."
    print(table(found), note, sep="\n")
    record = {"bytes": size, "differing_tensors": wrong, "rounds": options.rounds, "results": found}
    place = leave("bake", "Baking", f"{table(found)}\n\n{note}", record)
    print(f"written to {place.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
