"""The speed of language-model training against transformers' Trainer and TRL's SFTTrainer, with exactness beside it.

    python tests/benchmarks/text.py --rounds 3 --steps 4

A Llama of about 58 M parameters, rank 16 on all linears, batch 8, lognormal lengths of mean 180: the same samples, the
same samples per step, bf16 on every side. Each variant runs in a fresh process, rounds are interleaved, and the measure
is CPU seconds of the process (all threads), which a busy neighbour disturbs least. Memory is the peak since training
began minus what was resident then.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.meter import ROOT, WARM_UP, Marks, Meter, leave, measure, median

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, BATCH, LONGEST = 16, 32, 8, 512
VARIANTS = {
    "ours": "LoRA Studio",
    "trainer": "transformers Trainer, dynamic padding",
    "sft": "TRL SFTTrainer, defaults",
}


@dataclass(frozen=True)
class Size:
    """The model that is trained."""

    vocabulary: int = 32000
    width: int = 512
    inner: int = 1408
    layers: int = 8
    heads: int = 8


LARGE, TINY = Size(), Size(vocabulary=199, width=48, inner=96, layers=2, heads=4)


# The work, the same for everybody


def lengths(count: int, *, seed: int, mean: float = 180, sigma: float = 0.8) -> list[int]:
    """Lognormal lengths in tokens, clipped to 8..512."""
    draw, location = random.Random(seed), math.log(mean) - sigma * sigma / 2
    return [min(LONGEST, max(8, int(draw.lognormvariate(location, sigma)))) for _ in range(count)]


def samples(count: int, *, seed: int, size: Size = LARGE, mean: float = 180) -> list[list[int]]:
    """Documents of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lengths(count, seed=seed, mean=mean)
    return [torch.randint(5, size.vocabulary, (length,), generator=generator).tolist() for length in drawn]


def base(size: Size, dtype: torch.dtype):
    """A randomly initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=2048, tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def lora_config():
    """Rank 16 on every linear of every block, no dropout."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


# Our side


def own_model(size: Size, dtype: torch.dtype):
    """An adapted model with the fast paths installed."""
    from peft import get_peft_model

    from lora_studio.training import fused

    model = get_peft_model(base(size, dtype), lora_config())
    model.train()
    fused.install(model)
    return model


def own_step(model, documents: list[list[int]]) -> torch.Tensor:
    """Mean loss of the next token over `documents`, with gradients left in the parameters."""
    from lora_studio.training import fused, packed

    batch = packed.concatenate(documents, device="cpu")
    labelled = batch.position_ids[0] > 0
    with packed.attention(model):
        states = packed.hidden(model, batch)[labelled.roll(-1)]
    total = fused.linear_cross_entropy(states, fused.head_weight(model), batch.input_ids[0][labelled])
    loss = total / labelled.sum()
    loss.backward()
    return loss.detach()


def train_ours(steps: int, meter: Meter, size: Size) -> None:
    """The studio's own loop over its own task: everything a run does at a step, reports included."""
    from peft import get_peft_model

    from lora_studio.spec import parse
    from lora_studio.training import encode, loop, text
    from lora_studio.training.methods import METHODS

    tree = {
        "data": [{"path": "x"}], "task": {"kind": "text", "max_length": LONGEST}, "optim": {"lr": 1e-4}, "validation": {"size": 0},
        "schedule": {"kind": "linear", "steps": steps + WARM_UP, "warmup": 0, "batch_size": BATCH}, "compute": {"precision": "bf16"},
        "output": {"checkpoint_every": 10**6},
    }  # fmt: skip
    task = text.TextTask(parse(tree), device="cpu", note=print)
    model = get_peft_model(base(size, torch.bfloat16), lora_config())
    documents = samples((steps + WARM_UP) * BATCH, seed=7, size=size)
    task.counts, task.weights, task.held_out = (len(documents),), (1.0,), 0
    task.encoded = encode.Encoded(train=[[encode.Example(tuple(row), (True,) * len(row)) for row in documents]], held_out=[])
    task.prepare(model)
    with tempfile.TemporaryDirectory() as place:
        trainer = loop.Trainer(task, METHODS["lora"], model, task.spec, Marks(meter), Path(place))
        # The run's order puts the rows into other steps; here each step must see what the others' steps see.
        shuffled = trainer.plan.epoch(0)
        rows = dict(zip((index for _, index in shuffled), task.encoded.train[0], strict=True))
        task.encoded.train[0] = [rows[index] for index in range(len(rows))]
        meter.begin()
        trainer.run()


# Their sides


def arguments(steps: int) -> dict:
    """What both trainers are told."""
    return dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=steps + WARM_UP, learning_rate=1e-4,
        report_to=[], save_strategy="no", logging_steps=500, use_cpu=True, disable_tqdm=True, seed=7, bf16=True,
    )  # fmt: skip


def tokenizer(size: Size):
    """Words t0, t1, ...: the trainers want one, the samples are ids already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size.vocabulary)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def run_trainer(trainer, meter: Meter) -> None:
    """Train in the order of the samples, metered from the first step on."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class Metered(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            meter.begin()

        def on_step_end(self, *args, **kwargs):
            meter.mark()

    trainer.add_callback(Metered())
    trainer._get_train_sampler = lambda *args: SequentialSampler(trainer.train_dataset)
    meter.loss = trainer.train().training_loss


def train_trainer(steps: int, meter: Meter, size: Size) -> None:
    """transformers' Trainer with its language-modelling collator."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    data = samples((steps + WARM_UP) * BATCH, seed=7, size=size)
    trainer = Trainer(
        model=get_peft_model(base(size, torch.bfloat16), lora_config()),
        args=TrainingArguments(**arguments(steps)),
        train_dataset=Dataset.from_dict({"input_ids": data}),
        data_collator=DataCollatorForLanguageModeling(tokenizer(size), mlm=False),
    )
    run_trainer(trainer, meter)


def train_sft(steps: int, meter: Meter, size: Size) -> None:
    """TRL's SFTTrainer as it comes (gradient checkpointing on, chunked head)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = samples((steps + WARM_UP) * BATCH, seed=7, size=size)
    trainer = SFTTrainer(
        model=base(size, torch.bfloat16),
        args=SFTConfig(max_length=LONGEST, **arguments(steps)),
        train_dataset=Dataset.from_dict({"input_ids": data}),
        processing_class=tokenizer(size),
        peft_config=lora_config(),
    )
    run_trainer(trainer, meter)


WORK = {"ours": train_ours, "trainer": train_trainer, "sft": train_sft}


# Measuring


def work(variant: str, steps: int) -> dict:
    """Run one variant in this process."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    meter = Meter()
    WORK[variant](steps, meter, LARGE)
    return meter.result(sum(lengths((steps + WARM_UP) * BATCH, seed=7)[WARM_UP * BATCH :]))


# Exactness


def exactness(size: Size = TINY, *, mean: float = 24) -> dict[str, float]:
    """Our loss and gradients against PEFT's plain padded ones, float32, B not zero: worst relative differences.

    A gradient's difference is measured by norm over the gradient's norm, tensor by tensor.
    """
    from lora_studio.training import fused

    model, documents = own_model(size, torch.float32), samples(4, seed=3, size=size, mean=mean)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    ours = own_step(model, documents).item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fused.remove(model)
    longest = max(map(len, documents))
    ids = torch.tensor([document + [0] * (longest - len(document)) for document in documents])
    mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in documents])
    plain = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    plain.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(expected) == set(gradients)
    worst = max(((gradients[name] - g).norm() / g.norm()).item() for name, g in expected.items())
    return {"loss": abs(ours - plain.item()) / plain.item(), "gradients": worst}


# The driver


def table(found: dict[str, list[dict]]) -> str:
    """A markdown table of medians, with ratios to ours (of the same round; the median, and from least to most)."""
    lines = [
        "| variant | CPU s | real tokens per CPU s | ours is faster by | working set MB | ours takes | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, rows in found.items():
        cpu, memory = median(rows, "cpu_seconds"), median(rows, "working_set_mb")
        faster = smaller = "-"
        if "ours" in found and variant != "ours":
            each = [row["cpu_seconds"] / own["cpu_seconds"] for row, own in zip(rows, found["ours"], strict=True)]
            faster = f"{statistics.median(each):.2f}x ({min(each):.1f} to {max(each):.1f})"
            smaller = f"1/{memory / median(found['ours'], 'working_set_mb'):.1f}"
        speed = median(rows, "tokens") / cpu
        lines.append(
            f"| {VARIANTS[variant]} | {cpu:.2f} | {speed:.0f} | {faster} | {memory:.0f} | {smaller} | {median(rows, 'loss'):.4f} |"
        )
    return "\n".join(lines)


def write(found: dict, exact: dict, options: argparse.Namespace) -> Path:
    """Leave the figures under results/, named by machine and date."""
    import peft
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    if "sft" in found:
        versions["trl"] = importlib.metadata.version("trl")
    note = f"float32, B not zero: loss {exact['loss']:.1e}, gradients {exact['gradients']:.1e} (relative to PEFT)."
    record = {"rounds": options.rounds, "steps": options.steps, "versions": versions, "exactness": exact, "results": found}
    return leave("text", "Text training", f"{table(found)}\n\n{note}", record)


def main() -> None:
    """Measure and write, or run one variant for the driver."""
    parser = argparse.ArgumentParser(description="Training speed against Trainer and SFTTrainer.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of: " + ", ".join(VARIANTS))
    parser.add_argument("--work", choices=sorted(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print("RESULT " + json.dumps(work(options.work, options.steps)), flush=True)
        return
    variants = options.variants.split(",")
    if "sft" in variants and importlib.util.find_spec("trl") is None:
        print("TRL is not installed, so SFTTrainer is left out.")
        variants.remove("sft")
    exact = exactness(LARGE, mean=180)
    print(f"float32, B not zero: loss differs by {exact['loss']:.1e}, gradients by {exact['gradients']:.1e}")
    found = measure(__file__, options.rounds, options.steps, variants)
    print(table(found))
    print(f"written to {write(found, exact, options).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
