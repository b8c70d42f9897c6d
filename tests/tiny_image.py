"""Tiny image pipelines built from configs, the same every time, and pictures to train them on."""

import json
from pathlib import Path

import torch

from tests import tiny_flow

WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "on", "sks", "photo"]


def tokenizer():
    """A CLIP tokenizer that knows letters and a few words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges=[], model_max_length=77)


def _text_encoder(words, *, seed: int, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, projection_dim=16,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae(*, seed: int):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    ).eval()  # fmt: skip


def _unet(*, seed: int, width: int, **more):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, **more,
    ).eval()  # fmt: skip


def sd(prediction: str = "epsilon", seed: int = 0):
    """Stable Diffusion 1.5 (epsilon) or 2 (v_prediction), with about 30 thousand parameters."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    words = tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        prediction_type=prediction,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=_vae(seed=seed), text_encoder=_text_encoder(words, seed=seed), tokenizer=words, unet=_unet(seed=seed, width=16), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(seed: int = 0):
    """Stable Diffusion XL, as small."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words = tokenizer()
    unet = _unet(
        seed=seed, width=32, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear", timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        vae=_vae(seed=seed), text_encoder=_text_encoder(words, seed=seed), text_encoder_2=_text_encoder(words, seed=seed + 1, projection=True),
        tokenizer=words, tokenizer_2=words, unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


PIPELINES = {"sd15": sd, "sd2": lambda: sd("v_prediction"), "sdxl": sdxl, **tiny_flow.PIPELINES}


def write_pipeline(folder: Path, kind: str = "sd15") -> Path:
    """A tiny pipeline as a folder."""
    PIPELINES[kind]().save_pretrained(folder)
    return folder


def write_pictures(folder: Path, *, count: int = 6, size: tuple[int, int] = (32, 32)) -> Path:
    """Plain coloured pictures with captions, as an imagefolder."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        colour = ["red", "green", "blue"][number % 3]
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).ellipse([4, 4, 20 + number, 20 + number], fill=colour)
        picture.save(folder / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": f"a {colour} circle"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def random_adapter(base: Path, *, seed: int, ends=("to_q", "ff.net.2", "conv1"), rank: int = 3, size: float = 0.2) -> dict:
    """Random updates for the layers of a pipeline's part whose names end so, convolutions too."""
    from lora_studio import adapters
    from lora_studio.lowrank import LowRank

    draw, found = torch.Generator().manual_seed(seed), {}
    for name, shape in adapters.base_shapes(base).items():
        if name.endswith(ends):
            wide = shape[1:]
            A, B = torch.randn(rank, *wide, generator=draw) * size, torch.randn(shape[0], rank, *[1] * (len(wide) - 1), generator=draw) * size
            found[name] = LowRank(A, B, 0.5, "conv" if len(wide) == 3 else "linear")
    return found


def adapter_files(base: Path, modules: dict, *, name: str = "") -> dict[str, bytes]:
    """The files of an adapter for a pipeline's UNet, which calls the base `name`."""
    from lora_studio import adapters

    made_for = {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models.unets.unet_2d_condition"}
    return adapters.write(adapters.with_modules(adapters.Card("peft", base=name or str(base), config={"auto_mapping": made_for}), modules))
