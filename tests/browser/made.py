"""Adapters made for the pages' tests: small random factors on the bundled base, on the shelf without any training."""

import contextlib
import os

from lora_studio import library
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.workspace import Workspace
from tests import tiny

BASE = "demo-text"


def adapter(home, name: str, *, seed: int, rank: int = 4, size: float = 0.08, base: str = BASE, ends=("q_proj", "v_proj", "up_proj")) -> str:
    """Put a random adapter on the shelf of a home. Returns its id."""
    files = tiny.adapter_files(demo_base(BASE), seed=seed, rank=rank, size=size, ends=ends, name=base)
    return library.add(Workspace(home), files, {"name": name, "base": base})


@contextlib.contextmanager
def at(home):
    """Within it, the bench that is asked is the one of that home."""
    before = os.environ.get("LORA_STUDIO_HOME")
    os.environ["LORA_STUDIO_HOME"] = str(home)
    try:
        yield bench
    finally:
        if before is None:
            del os.environ["LORA_STUDIO_HOME"]
        else:
            os.environ["LORA_STUDIO_HOME"] = before


def tuned_prompt(home, name: str, *, seed: int, tokens: int = 24) -> str:
    """Put random virtual tokens, as PEFT would save a tuned prompt, on the shelf of a home. Returns its id."""
    import json

    import torch
    from safetensors.torch import save

    config = json.loads((demo_base(BASE) / "config.json").read_text())
    values = torch.randn(tokens, config["hidden_size"], generator=torch.Generator().manual_seed(seed))
    said = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE, "num_virtual_tokens": tokens, "token_dim": config["hidden_size"],
        "num_layers": config["num_hidden_layers"], "num_attention_heads": config["num_attention_heads"], "num_transformer_submodules": 1, "inference_mode": True,
    }  # fmt: skip
    files = {"adapter_config.json": json.dumps(said).encode(), "adapter_model.safetensors": save({"prompt_embeddings": values})}
    return library.add(Workspace(home), files, {"name": name, "base": BASE})
