"""Tiny real models, tokenizers and rows for the tests: seconds to build, the same every time, nothing fetched."""

import json
import random
from pathlib import Path

TEMPLATE = (
    "{%- for message in messages %}{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}{{- message['content'] + '<|end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer(template: str | None = TEMPLATE):
    """A byte-level tokenizer of 261 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + letters)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", extra_special_tokens=SPECIAL[2:], model_max_length=512
    )
    made.chat_template = template
    return made


def model(kind: str = "llama", *, seed: int = 0, **changes):
    """A causal language model of two layers, 32 wide."""
    import torch
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    few = {"gpt_oss": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}}
    config_class, model_class = classes[kind]
    settings = {
        "vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": None, "tie_word_embeddings": True, **few.get(kind, {}), **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    return model_class(config_class(**settings))


def write_base(folder: Path, kind: str = "llama", *, template: str | None = TEMPLATE, **changes) -> Path:
    """A base model folder: weights, configuration, tokenizer."""
    model(kind, **changes).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def conversations(count: int, *, seed: int = 0) -> list[dict]:
    """Short conversations with answers of different lengths."""
    draw = random.Random(seed)
    words = ["red", "green", "blue", "fox", "bear", "owl", "runs", "sleeps", "sings", "fast", "slow"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{number} {' '.join(draw.choices(words, k=draw.randint(1, 4)))}?"},
                {"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(1, 6)))},
            ]
        }
        for number in range(count)
    ]


def write_rows(path: Path, *, count: int) -> Path:
    """Conversations as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(count)), encoding="utf-8")
    return path


def tree(base: Path, rows: Path, **changes) -> dict:
    """The settings of a small CPU run."""
    return {
        "name": "tiny",
        "base": {"id": str(base)},
        "task": {"kind": "chat", "max_length": 64},
        "data": [{"path": str(rows)}],
        "validation": {"size": 8, "every": 4},
        "method": {"rank": 4, "alpha": 8},
        "optim": {"lr": 2e-3, "lora_plus_ratio": 16},
        "schedule": {"steps": 12, "batch_size": 4, "accumulate": 2},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "output": {"checkpoint_every": 3, "sample_prompts": ["red fox?"], "sample_tokens": 8},
        **changes,
    }


def adapter_files(base: Path, *, seed: int, rank: int = 3, size: float = 0.3, ends=("q_proj", "down_proj"), name: str = "") -> dict[str, bytes]:
    """The files of a random PEFT adapter for a base's folder, which it calls `name`."""
    import torch

    from lora_studio import adapters
    from lora_studio.lowrank import LowRank

    draw = torch.Generator().manual_seed(seed)
    modules = {
        layer: LowRank(torch.randn(rank, columns, generator=draw) * size, torch.randn(rows, rank, generator=draw) * size, 1.0)
        for layer, (rows, columns) in adapters.base_shapes(base).items()
        if layer.endswith(ends)
    }
    return adapters.write(adapters.with_modules(adapters.Card("peft", base=name or str(base), task_type="CAUSAL_LM"), modules))


def write_adapter(folder: Path, base: Path, **how) -> str:
    """A random PEFT adapter as a folder. Returns it as a text."""
    folder.mkdir(parents=True)
    for name, data in adapter_files(base, **how).items():
        (folder / name).write_bytes(data)
    return str(folder)
