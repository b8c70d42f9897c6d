"""The speed of image training against the loop of diffusers' own LoRA script, with exactness beside it.

    python tests/benchmarks/image.py --rounds 3 --steps 4

Stable Diffusion 1.5 at its real widths (860 M UNet, 123 M text encoder, the VAE) with random weights, 256 px, batch 1, bf16, rank 4 on the
attention's linears: what `train_text_to_image_lora.py` of diffusers does at a step, which encodes the picture and the caption anew, and
what the studio does, whose latents and embeddings are made once. Each variant runs in a fresh process, rounds are interleaved, and the
measure is CPU seconds of the process (all threads). What the studio spends once on the cache is told beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.meter import ROOT, WARM_UP, Marks, Meter, leave, measure, median

EDGE, RANK, PICTURES = 256, 4, 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
VARIANTS = {
    "ours": "LoRA Studio",
    "plain": "LoRA Studio, compute.fused off",
    "script": "diffusers' LoRA script",
}


# The base, made once for all


def write_base(folder: Path) -> None:
    """A pipeline's folder at the real widths, in bf16; weights are random and of a size that keeps activations finite."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests import tiny_image

    words = tiny_image.tokenizer()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, vocab_size=49408,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=_random(lambda: AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512, **blocks)),
        unet=_random(lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)),
        text_encoder=_random(lambda: CLIPTextModel(text)), tokenizer=words, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        image_encoder=None, requires_safety_checker=False,
    ).save_pretrained(folder / "base")  # fmt: skip
    tiny_image.write_pictures(folder / "pictures", count=PICTURES, size=(EDGE, EDGE))


def _random(build):
    """A model with random bf16 weights, made without the time its own initialisation takes."""
    with torch.device("meta"):
        model = build()
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=draw)
            else:
                parameter.fill_(1.0 if "norm" in name and "weight" in name else 0.0)
        for name, buffer in model.named_buffers():
            if "position_ids" in name:
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return model.eval().requires_grad_(False)


# Our side


def train_ours(folder: Path, steps: int, meter: Meter, *, fused: bool = True) -> dict:
    """The studio's own loop over its own task, reports included."""
    from lora_studio.spec import parse
    from lora_studio.training import loop
    from lora_studio.training.image import ImageTask
    from lora_studio.training.methods import METHODS

    spec = parse({
        "base": {"id": str(folder / "base")}, "data": [{"path": str(folder / "pictures")}], "validation": {"size": 0},
        "task": {"kind": "image", "resolution": EDGE}, "method": {"rank": RANK, "alpha": RANK, "targets": TARGETS, "init": "gaussian"},
        "optim": {"lr": 1e-4, "weight_decay": 0.01}, "schedule": {"kind": "constant", "steps": steps + WARM_UP, "warmup": 0, "batch_size": 1},
        "compute": {"precision": "bf16", "fused": fused}, "output": {"checkpoint_every": 10**6},
    })  # fmt: skip
    os.environ["LORA_STUDIO_HOME"] = str(folder / f"home-{os.getpid()}")
    task = ImageTask(spec, device="cpu", note=lambda sentence: print(sentence, file=sys.stderr), folder=folder)
    began = time.process_time()
    model = METHODS["lora"].attach(task.load(), spec, TARGETS)
    once = time.process_time() - began
    task.prepare(model)
    with tempfile.TemporaryDirectory() as place:
        trainer = loop.Trainer(task, METHODS["lora"], model, spec, Marks(meter), Path(place))
        meter.begin()
        trainer.save = lambda: None  # the script's checkpoints are off too
        trainer.run()
    return {"once_cpu_seconds": round(once, 2)}


# Their side


def train_script(folder: Path, steps: int, meter: Meter) -> dict:
    """What diffusers' script does at a step, with its defaults: bf16 through accelerate, nothing cached."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig
    from transformers import CLIPTextModel

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    base, dtype = folder / "base", torch.bfloat16
    vae = AutoencoderKL.from_pretrained(base / "vae").requires_grad_(False).to(dtype=dtype)
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder").requires_grad_(False).to(dtype=dtype)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False).to(dtype=dtype)
    noise_scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    draw = torch.Generator().manual_seed(0)
    rows = [{"pixels": torch.rand(3, EDGE, EDGE, generator=draw) * 2 - 1, "ids": torch.randint(0, 49000, (77,), generator=draw)} for _ in range(steps + WARM_UP)]
    batches = torch.utils.data.DataLoader(rows, batch_size=1)
    unet, optimizer, batches, rates = accelerator.prepare(unet, optimizer, batches, get_scheduler("constant", optimizer))
    unet.train()
    meter.begin()
    for batch in batches:
        with accelerator.accumulate(unet):
            latents = vae.encode(batch["pixels"].to(dtype=dtype)).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            times = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),)).long()
            said = unet(noise_scheduler.add_noise(latents, noise, times), times, text_encoder(batch["ids"], return_dict=False)[0], return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(said.float(), noise.float(), reduction="mean")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        meter.mark(loss.detach().item())
    return {}


WORK = {
    "ours": train_ours,
    "plain": lambda folder, steps, meter: train_ours(folder, steps, meter, fused=False),
    "script": train_script,
}


def work(variant: str, folder: Path, steps: int) -> dict:
    """Run one variant in this process."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
    meter = Meter()
    more = WORK[variant](folder, steps, meter)
    return {**meter.result(steps, "pictures"), **more}


# Exactness


def exactness() -> dict[str, float]:
    """Loss and gradients of the fast paths against the plain ones on a tiny UNet, float32, B not zero: relative differences by norm."""
    from peft import LoraConfig, get_peft_model

    from lora_studio.training import fused_image
    from tests import tiny_image

    model = get_peft_model(tiny_image.sd().unet, LoraConfig(r=RANK, target_modules=[*TARGETS, "conv1"]))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    x, text = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 77, 16, generator=draw)

    def step():
        loss = model(x, torch.tensor([10, 700]), encoder_hidden_states=text).sample.square().mean()
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        return loss.item(), found

    plain, expected = step()
    fused_image.install(model)
    fast, gradients = step()
    worst = max(((gradients[name] - value).norm() / value.norm()).item() for name, value in expected.items())
    return {"loss": abs(fast - plain) / plain, "gradients": worst}


# The driver


def table(found: dict[str, list[dict]]) -> str:
    """A markdown table of medians, with ratios to ours (of the same round; the median, and from least to most)."""
    lines = ["| variant | CPU s a picture | ours is faster by | peak memory MB | CPU s once (loading, cache) |", "|---|---|---|---|---|"]
    for variant, rows in found.items():
        each = [row["cpu_seconds"] / own["cpu_seconds"] for row, own in zip(rows, found.get("ours", []))]
        faster = f"{statistics.median(each):.2f}x ({min(each):.2f} to {max(each):.2f})" if each and variant != "ours" else "-"
        once = f"{median(rows, 'once_cpu_seconds'):.1f}" if "once_cpu_seconds" in rows[0] else "-"
        speed = statistics.median(row["cpu_seconds"] / row["pictures"] for row in rows)
        lines.append(f"| {VARIANTS[variant]} | {speed:.2f} | {faster} | {median(rows, 'peak_mb'):.0f} | {once} |")
    return "\n".join(lines)


def write(found: dict, exact: dict, options: argparse.Namespace) -> Path:
    """Leave the figures under results/, named by machine and date."""
    import diffusers
    import peft

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
    note = f"float32, B not zero: loss {exact['loss']:.1e}, gradients {exact['gradients']:.1e} (fast paths relative to the plain ones)."
    record = {"rounds": options.rounds, "steps": options.steps, "versions": versions, "exactness": exact, "results": found}
    return leave("image", f"Image training (SD 1.5 widths, {EDGE} px, batch 1, bf16)", f"{table(found)}\n\n{note}", record)


def main() -> None:
    """Measure and write, or run one variant for the driver."""
    parser = argparse.ArgumentParser(description="Training speed against diffusers' LoRA script.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of: " + ", ".join(VARIANTS))
    parser.add_argument("--work", choices=sorted(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print("RESULT " + json.dumps(work(options.work, options.folder, options.steps)), flush=True)
        return
    exact = exactness()
    print(f"float32, B not zero: loss differs by {exact['loss']:.1e}, gradients by {exact['gradients']:.1e}")
    with tempfile.TemporaryDirectory() as place:
        write_base(Path(place))
        found = measure(__file__, options.rounds, options.steps, options.variants.split(","), "--folder", place)
    print(table(found))
    print(f"written to {write(found, exact, options).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
