"""What runs take at their peak, as their own processes report it, against what was told before Start.

    python -m tests.campaigns.memory               every tiny and demo model, and two of middle size
    python -m tests.campaigns.memory demo-text     the cases whose names hold these words
"""

import os
import sys
import tempfile
from pathlib import Path

STEPS = 6


def text_cases(folder: Path) -> dict[str, dict]:
    """Runs of language models: the demos, the tiny ones, and one of 30 M parameters."""
    from tests import tiny

    rows = tiny.write_rows(folder / "rows.jsonl", count=60)
    found = {f"tiny {kind}": tiny.tree(tiny.write_base(folder / kind, kind), rows, schedule={"steps": STEPS, "batch_size": 4}) for kind in ("llama", "qwen3", "mistral")}
    for name in ("pirate", "capitals"):
        found[f"demo-text {name}"] = demo(name)
    changes = {
        "checkpointing": {"compute": {"precision": "fp32", "checkpointing": True}}, "padded": {"compute": {"precision": "fp32", "packing": False}},
        "bf16": {"compute": {"precision": "bf16"}}, "batch 64": {"schedule": {"steps": STEPS, "batch_size": 64}},
    }  # fmt: skip
    virtual = {name: {"method": {"kind": name}, "optim": {"lr": 0.02, "lora_plus_ratio": None}} for name in ("prompt", "prefix")}
    found |= {f"demo-text {name}": demo("pirate", **change) for name, change in (changes | virtual).items()}
    sizes = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 8}
    middle = tiny.write_base(folder / "middle", "llama", **sizes)
    long = write_long_rows(folder / "long.jsonl")
    for name, compute in {"fp32": {}, "bf16": {"precision": "bf16"}, "checkpointing": {"checkpointing": True}, "padded": {"packing": False}}.items():
        found[f"middle text {name}"] = tiny.tree(
            middle, long, task={"kind": "chat", "max_length": 512}, schedule={"steps": 3, "batch_size": 8}, compute={"device": "cpu", "precision": "fp32", **compute}
        )
    found |= {f"middle text {name}": {**found["middle text fp32"], **change} for name, change in virtual.items()}
    experts = {"vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "moe_intermediate_size": 768, "num_experts": 8, "num_hidden_layers": 6, "num_attention_heads": 6, "head_dim": 64, "num_key_value_heads": 6}
    mixture = tiny.write_base(folder / "mixture", "qwen3_moe", **experts)
    for name, method, compute in (("plain", {}, {}), ("experts", {"experts": True}, {}), ("experts checkpointing", {"experts": True}, {"checkpointing": True}), ("experts bf16", {"experts": True}, {"precision": "bf16"})):
        found[f"middle mixture {name}"] = tiny.tree(
            mixture, long, task={"kind": "chat", "max_length": 512}, schedule={"steps": 3, "batch_size": 4}, method={"rank": 4, "alpha": 8, **method},
            compute={"device": "cpu", "precision": "fp32", **compute},
        )  # fmt: skip
    return found


def write_long_rows(path: Path) -> Path:
    """Conversations that fill 512 tokens."""
    import json

    turns = [[{"role": "user", "content": f"tell me {number}"}, {"role": "assistant", "content": "red fox runs " * 60}] for number in range(40)]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns), encoding="utf-8")
    return path


def image_cases(folder: Path) -> dict[str, dict]:
    """Runs of image models: the demos, and every tiny pipeline."""
    from tests import tiny_image

    pictures = tiny_image.write_pictures(folder / "pictures")
    found = {f"demo-image {name}": demo(name) for name in ("stripes", "outline")}
    found["demo-image checkpointing"] = demo("stripes", compute={"precision": "fp32", "checkpointing": True})
    found["demo-image no samples"] = demo("stripes", output={"sample_prompts": []})
    for kind in tiny_image.PIPELINES:
        found[f"tiny {kind}"] = {
            "name": "tiny", "base": {"id": str(tiny_image.write_pipeline(folder / kind, kind))}, "data": [{"path": str(pictures)}], "validation": {"size": 2},
            "task": {"kind": "image", "resolution": 32, "bucket_step": 32, "sample_steps": 2}, "method": {"rank": 4, "alpha": 8},
            "schedule": {"steps": 3, "batch_size": 2}, "compute": {"device": "cpu", "precision": "fp32"}, "output": {"sample_prompts": ["a red circle"]},
        }  # fmt: skip
    middle = write_middle(folder / "middle-image")
    for name, compute in {"fast": {}, "plain": {"fused": False}, "checkpointing": {"checkpointing": True, "fused": False}}.items():
        found[f"middle image {name}"] = {
            "name": "middle", "base": {"id": str(middle)}, "data": [{"path": str(tiny_image.write_pictures(folder / f"wide-{name}", size=(64, 64)))}],
            "validation": {"size": 0}, "task": {"kind": "image", "resolution": 64, "bucket_step": 16}, "method": {"rank": 4, "alpha": 8},
            "schedule": {"steps": 3, "batch_size": 4, "warmup": 1}, "compute": {"device": "cpu", "precision": "fp32", **compute},
        }  # fmt: skip
    return found


def write_middle(folder: Path) -> Path:
    """A Stable Diffusion with a UNet of 34 M parameters, whose latents are 32 wide at 64 pixels."""
    import torch
    from diffusers import UNet2DConditionModel

    from tests import tiny_image

    torch.manual_seed(0)
    pipeline = tiny_image.sd()
    sizes = {"block_out_channels": (64, 128, 256, 256), "sample_size": 32, "cross_attention_dim": 16, "attention_head_dim": 8}
    pipeline.register_modules(unet=UNet2DConditionModel(in_channels=4, out_channels=4, **sizes))
    pipeline.save_pretrained(folder)
    return folder


def demo(name: str, **changes) -> dict:
    """The tree of a demo preset, cut to a few steps."""
    from lora_studio import presets, settings

    short = {"schedule": {"steps": STEPS, "warmup": 1}, "task": {"sample_steps": 2} if name in ("stripes", "outline") else {}}
    return settings.overlay(settings.overlay(presets.find(f"demo/{name}").tree(), short), changes)


def measure(tree: dict) -> dict:
    """Run a spec in a worker of its own. Returns {told, measured, loaded, parts}: bytes."""
    from lora_studio import studio
    from lora_studio.spec import parse
    from lora_studio.workspace import local

    workspace, spec = local(), parse(tree)
    facts = studio.preflight(workspace, spec, deep=True).facts
    id = studio.start(workspace, spec)
    status = studio.wait_until_ended(workspace, id, seconds=300)
    if status.state != "done":
        raise RuntimeError(f"{spec.name} ended as {status.state}: {status.reason}")
    seen = [(event["kind"], event["memory"]) for event in studio.events(workspace, id) if "memory" in event]
    return {"told": facts.get("memory_peak"), "parts": facts.get("memory_parts"), "measured": max(size for _, size in seen), "loaded": dict(seen[::-1])["started"], "stepped": max(size for kind, size in seen if kind == "step")}


def main(words: list[str]) -> None:
    """Measure every case, print a line each."""
    with tempfile.TemporaryDirectory() as place:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        cases = text_cases(Path(place)) | image_cases(Path(place))
        for number, (name, tree) in enumerate(cases.items()):
            if words and not any(word in name for word in words):
                continue
            os.environ["LORA_STUDIO_HOME"] = f"{place}/home-{number}"
            found = measure(tree)
            off = f"{100 * (found['told'] / found['measured'] - 1):+6.1f} %" if found["told"] else ""
            print(f"{name:28} loaded {found['loaded'] / 1e6:7.0f}  stepped {found['stepped'] / 1e6:7.0f}  peak {found['measured'] / 1e6:7.0f}  told {(found['told'] or 0) / 1e6:7.0f} MB {off}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
