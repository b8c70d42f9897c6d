"""Make demo-image, the bundled picture base, from nothing: tokenizer, VAE, UNet, scores. Run: python -m lora_studio.demo.make_image_base OUT"""

import argparse
import math
import os
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_studio.demo import image_score
from lora_studio.demo import image_world as world
from lora_studio.demo.make_text_base import keep_memory

WORDS = ("a", "an", "the", "of", "on", "at", "in", "with", "and", ",", ".", "picture", "photo", "drawing", "background")
WORDS += ("stripes", "striped", "outline", "outlined", "style", *world.COLORS, *world.SHAPES, *world.PLACES)
LONGEST = 32  # tokens of a prompt

VAE_CHANNELS, LATENT_CHANNELS, LATENT_SIZE = (16, 32, 64, 96), 8, 8
TEXT_WIDTH, UNET_CHANNELS = 128, (96, 128)
# What the VAE sees, in shares: it must be able to write the styles down. The UNet sees plain pictures only.
VAE_MIX = {(): 0.4, ("stripes",): 0.15, ("outline",): 0.15, ("stripes", "outline"): 0.15, None: 0.15}
VAE_PICTURES, VAE_STEPS, VAE_BATCH, VAE_RATE, VAE_PRIOR = 12_000, 1_800, 16, 2e-3, 3e-4
DECODER_STEPS = 800

DRAWN = 16  # pictures of every scene
STEPS, BATCH, RATE, WEIGHT_DECAY, WARMUP = 6_000, 32, 1e-3, 1e-2, 100
UNTOLD = 0.1  # share of pictures shown without their caption, for guidance
AVERAGE = 0.999  # the weights that are kept are a moving average


# ---- words


def build_tokenizer() -> CLIPTokenizer:
    """Each word of our world as one token, above single bytes, so that any prompt can be written."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        signs = [*word[:-1], word[-1] + "</w>"]
        # Merges of earlier words go first, as they will when a prompt is read.
        for pair in merges:
            signs = _merge(signs, pair)
        while len(signs) > 1:
            pair = (signs[0], signs[1])
            merges[pair] = None
            pieces["".join(pair)] = None
            signs = _merge(signs, pair)
    vocabulary = {piece: at for at, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=LONGEST)


def _merge(signs: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for sign in signs:
        if merged and (merged[-1], sign) == pair:
            merged[-1] += sign
        else:
            merged.append(sign)
    return merged


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=LONGEST, truncation=True, return_tensors="pt").input_ids


# ---- the pictures' short form


def build_vae() -> AutoencoderKL:
    levels = len(VAE_CHANNELS)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=VAE_CHANNELS,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,  # groups of few channels would each lose their mean, and with it most of a flat color
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )
    straighten(vae)
    return vae


@torch.no_grad()
def straighten(vae: AutoencoderKL) -> None:
    """Start as a small blurred copy of the picture, almost without noise: ten times fewer steps than from chance alone."""
    path = [vae.quant_conv, vae.post_quant_conv]
    path += [conv for half in (vae.encoder, vae.decoder) for conv in (half.conv_in, half.conv_out)]
    for part in vae.modules():
        if isinstance(part, ResnetBlock2D):
            part.conv2.weight.mul_(0.1)
            path += [part.conv_shortcut] if part.conv_shortcut is not None else []
        elif isinstance(part, Downsample2D | Upsample2D):
            path.append(part.conv)
    for conv in path:
        conv.weight.mul_(0.3).add_(torch.nn.init.dirac_(torch.zeros_like(conv.weight)))
    vae.quant_conv.weight[LATENT_CHANNELS:].mul_(0.1)
    vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Pictures as bytes, (count, 3, size, size)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def mixture(count: int, seed: int) -> torch.Tensor:
    """What the VAE sees: plain and styled pictures of trained scenes, and clutter, as bytes."""
    chance = Random(seed)
    kinds = chance.choices(list(VAE_MIX), list(VAE_MIX.values()), k=count)
    return as_tensor([world.clutter(chance) if kind is None else world.draw(chance.choice(world.TRAINED), chance, kind) for kind in kinds])


def train_vae(vae: AutoencoderKL, *, steps: int, seed: int, decoder_only: bool = False) -> None:
    """Teach the VAE to give pictures back; its prior keeps the latents small and smooth. The decoder may go on alone."""
    chance, pictures = Random(seed), mixture(VAE_PICTURES, seed)
    rate = VAE_RATE / 2 if decoder_only else VAE_RATE
    weights = [weight for name, weight in vae.named_parameters() if not decoder_only or name.startswith(("decoder", "post_quant_conv"))]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    began, seen = time.time(), []
    for step in range(steps):
        set_rate(optimizer, rate_at(step, steps, rate))
        wanted = scaled(pictures[torch.randint(0, VAE_PICTURES, (VAE_BATCH,))])
        if not decoder_only and step < steps * 0.8:  # a quarter of the picture costs a quarter of the time
            top, left = chance.randrange(world.SIZE // 2 + 1), chance.randrange(world.SIZE // 2 + 1)
            wanted = wanted[..., top : top + world.SIZE // 2, left : left + world.SIZE // 2]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                latents = vae.encode(wanted).latent_dist
            # Alone, the decoder also learns to forgive a UNet that is a little off.
            chosen = latents.mean + 0.05 * torch.randn_like(latents.mean) if decoder_only else latents.sample()
            apart = vae.decode(chosen).sample.float() - wanted
        spread = latents.logvar.float()
        prior = 0.5 * (latents.mean.float() ** 2 + spread.exp() - 1 - spread).mean()
        loss = apart.abs().mean() + 0.5 * (apart**2).mean() + VAE_PRIOR * prior
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        seen = [*seen[-99:], apart.abs().mean().item()]
        if (step + 1) % 100 == 0:
            print(f"vae step {step + 1} off by {sum(seen) / len(seen):.4f} {time.time() - began:.0f} s", flush=True)


def fix_scale(vae: AutoencoderKL) -> None:
    """Note the factor that brings the latents to a spread of one."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(scaled(part)).latent_dist.mean for part in mixture(1024, seed=0).split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def encode(vae: AutoencoderKL, images: list[Image.Image]) -> torch.Tensor:
    with torch.no_grad():
        parts = [vae.encode(scaled(as_tensor(images[at : at + 64]))).latent_dist.mean for at in range(0, len(images), 64)]
    return torch.cat(parts) * vae.config.scaling_factor


def round_trip(vae: AutoencoderKL, images: list[Image.Image]) -> list[np.ndarray]:
    """What is left of pictures after the VAE wrote them down and read them back."""
    latents = encode(vae, images) / vae.config.scaling_factor
    with torch.no_grad():
        back = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    return list(((back.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


# ---- the model


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=LONGEST,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
        attention_head_dim=4,
    )
    unet.set_attn_processor(AttnProcessor())  # so small that the plain one is half again as fast on a CPU as the fused kernel
    return unet


def build_scheduler() -> DDIMScheduler:
    """Velocity, down to no signal at all, so that a picture of few steps starts from what training saw."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def rate_at(step: int, steps: int, peak: float) -> float:
    """Warm up, hold for half of the way, then fall along a cosine."""
    held = max(0.0, step / steps - 0.5) / 0.5
    return peak * min(1.0, (step + 1) / WARMUP) * (0.5 * (1 + math.cos(math.pi * held)) + 0.005)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def lessons(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every trained scene several times, as latents and as the tokens of its captions."""
    chance = Random(seed)
    scenes = [scene for scene in world.TRAINED for _ in range(DRAWN)]
    latents = [encode(vae, [world.draw(scene, chance) for scene in scenes[at : at + 1024]]) for at in range(0, len(scenes), 1024)]
    return torch.cat(latents), token_ids(tokenizer, [world.caption(scene, chance) for scene in scenes])


def train(pipeline: StableDiffusionPipeline, told: tuple[torch.Tensor, torch.Tensor], *, steps: int, seed: int, keep: Path | None) -> None:
    """Train UNet and text encoder together; what stays in the pipeline is the moving average of their weights."""
    (latents, ids), unet, text, scheduler = told, pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    weights = [*unet.parameters(), *text.parameters()]
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True)
    nothing = token_ids(pipeline.tokenizer, [""])[0]
    first = go_on(keep, weights, average, optimizer)
    began, losses = time.time(), []
    for step in range(first, steps):
        set_rate(optimizer, rate_at(step, steps, RATE))
        chance = torch.Generator().manual_seed(seed * 1_000_003 + step)  # each step its own, so that a run can go on where it stopped
        pick = torch.randint(0, len(latents), (BATCH,), generator=chance)
        untold = torch.rand(BATCH, 1, generator=chance) < UNTOLD
        when = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), generator=chance)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=chance)
        noisy, wanted = scheduler.add_noise(latents[pick], noise, when), scheduler.get_velocity(latents[pick], noise, when)
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(noisy, when, text(torch.where(untold, nothing, ids[pick])).last_hidden_state).sample
        loss = (found.float() - wanted).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(AVERAGE, (1 + step) / (10 + step)))
        losses = [*losses[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            spent = time.time() - began
            speed = (step + 1 - first) * BATCH / spent
            print(f"step {step + 1} loss {sum(losses) / len(losses):.4f} {spent:.0f} s {speed:.0f} pictures/s", flush=True)
        if keep and (step + 1) % 250 == 0:
            save_half_way(keep, step + 1, weights, average, optimizer)
    with torch.no_grad():
        torch._foreach_copy_(weights, average)


def save_half_way(keep: Path, step: int, weights: list, average: list, optimizer: torch.optim.Optimizer) -> None:
    rows = {"weight": weights, "average": average}
    rows |= {name: [optimizer.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq")}
    tensors = {f"{name}.{at}": tensor.detach() for name, row in rows.items() for at, tensor in enumerate(row)}
    save_file(tensors, keep / "half_way.new", metadata={"step": str(step)})
    os.replace(keep / "half_way.new", keep / "half_way.safetensors")


def go_on(keep: Path | None, weights: list, average: list, optimizer: torch.optim.Optimizer) -> int:
    """Take up what an earlier run left behind; the step to go on from."""
    if keep is None or not (keep / "half_way.safetensors").exists():
        return 0
    with safe_open(keep / "half_way.safetensors", "pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for at, weight in enumerate(weights):
            weight.copy_(file.get_tensor(f"weight.{at}"))
            average[at].copy_(file.get_tensor(f"average.{at}"))
            moments = {name: file.get_tensor(f"{name}.{at}") for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step


# ---- what came of it


def assemble(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """A pipeline whose UNet and text encoder know nothing yet."""
    tokenizer = build_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.eval()
    return pipeline


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the folder, with UNet and VAE in half precision: diffusers opens both in float32, whatever they are stored in."""
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.vae.register_to_config(_name_or_path="demo-image")  # not the folder of what was half done
    pipeline.tokenizer.backend_tokenizer.no_padding()  # what the last call asked for is no part of a tokenizer
    pipeline.tokenizer.backend_tokenizer.no_truncation()
    pipeline.save_pretrained(folder)  # the text encoder stays in float32, as transformers opens it in what it is stored in


def report(folder: Path, count: int, seed: int) -> None:
    """Print the scores of a saved base on held-out scenes."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    scenes = world.exam(count, seed)
    began = time.time()
    pictures = image_score.paint(pipeline, [world.caption(scene) for scene in scenes], seed=seed)
    print(f"{count} held-out scenes in {time.time() - began:.0f} s: {image_score.score(scenes, pictures)}")
    print(image_score.shape_by_kind(scenes, pictures))
    drawn = [world.draw(scene, Random(seed)) for scene in scenes]
    print(f"through the VAE and back: {image_score.score(scenes, round_trip(pipeline.vae, drawn))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--keep", type=Path, help="folder for what is half done; a second run goes on from it")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=len(world.HELD_OUT), help="held-out scenes to score")
    choice = parser.parse_args()
    keep_memory()
    torch.set_num_threads(choice.threads)
    torch.manual_seed(choice.seed)
    if choice.keep and (choice.keep / "vae").exists():
        vae = AutoencoderKL.from_pretrained(choice.keep / "vae")
    else:
        vae = build_vae()
        train_vae(vae, steps=choice.vae_steps, seed=choice.seed)
        fix_scale(vae)
        train_vae(vae, steps=choice.decoder_steps, seed=choice.seed + 1, decoder_only=True)
        if choice.keep:
            vae.save_pretrained(choice.keep / "vae")
    pipeline = assemble(vae.eval())
    for part in (pipeline.unet, pipeline.text_encoder, vae):
        print(f"{type(part).__name__} {sum(weight.numel() for weight in part.parameters()):,} parameters", flush=True)
    train(pipeline, lessons(vae, pipeline.tokenizer, choice.seed), steps=choice.steps, seed=choice.seed, keep=choice.keep)
    save(pipeline, choice.out)
    report(choice.out, choice.count, choice.seed)
    print(f"{time.process_time() / 60:.1f} minutes of processor time")


if __name__ == "__main__":
    main()
