"""Write a pipeline of Stable Diffusion as one file, in the layout of the programs it came from: diffusers' conversion, the other way round."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_name(name: str, per_block: int, with_attention: tuple[bool, ...]) -> str:
    """Where the file has a tensor of the UNet; `with_attention` says which blocks on the way up have attention."""
    layer, _, end = name.rpartition(".")
    if layer in UNET:
        return f"{UNET[layer]}.{end}"
    words = layer.split(".")
    if words[0] == "mid_block":
        place = 1 if words[1] == "attentions" else 2 * int(words[2])
        rest = ".".join(words[3:])
        return f"middle_block.{place}.{rest if place == 1 else RESNET[rest]}.{end}"
    down, block, what, number, rest = words[0] == "down_blocks", int(words[1]), words[2], int(words[3]), ".".join(words[4:])
    if what == "downsamplers":
        return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op.{end}"
    if what == "upsamplers":
        return f"output_blocks.{block * (per_block + 1) + per_block}.{2 if with_attention[block] else 1}.conv.{end}"
    top = f"input_blocks.{1 + block * (per_block + 1) + number}" if down else f"output_blocks.{block * (per_block + 1) + number}"
    return f"{top}.0.{RESNET[rest]}.{end}" if what == "resnets" else f"{top}.1.{rest}.{end}"


def vae_name(name: str, blocks: int) -> str:
    """Where the file has a tensor of the VAE."""
    name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("to_out.0.", "proj_out.").replace("group_norm", "norm")
    name = re.sub(r"attn_1\.to_([qkv])\.", r"attn_1.\1.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}.block.{found[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", name)
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def unet(model) -> dict[str, torch.Tensor]:
    """The UNet's tensors by their names in the file."""
    up = tuple("CrossAttn" in kind for kind in model.config.up_block_types)
    return {f"model.diffusion_model.{unet_name(name, model.config.layers_per_block, up)}": value for name, value in model.state_dict().items()}


def vae(model) -> dict[str, torch.Tensor]:
    """The VAE's tensors; its attention was of 1x1 convolutions there."""
    found = {}
    for name, value in model.state_dict().items():
        wide = ".attentions." in name and name.endswith("weight") and value.ndim == 2
        found[f"first_stage_model.{vae_name(name, len(model.config.block_out_channels))}"] = value[:, :, None, None] if wide else value
    return found


def clip(model, start: str) -> dict[str, torch.Tensor]:
    """A text encoder as CLIP's own code in transformers keeps it."""
    found = {f"{start}text_model.{name.removeprefix('text_model.')}": value for name, value in model.state_dict().items()}
    return found | {f"{start}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(model, start: str, beyond: int = 0) -> dict[str, torch.Tensor]:
    """A text encoder as OpenCLIP keeps it; `beyond` layers behind the last one, which nobody reads."""
    state = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"], "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"], "ln_final.bias": state["final_layer_norm.bias"],
    }  # fmt: skip
    found["logit_scale"] = state["final_layer_norm.bias"].new_ones(())
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    count = model.config.num_hidden_layers
    for number in range(count + beyond):
        old, new = f"encoder.layers.{min(number, count - 1)}", f"transformer.resblocks.{number}"
        for end in ("weight", "bias"):
            found[f"{new}.attn.in_proj_{end}"] = torch.cat([state[f"{old}.self_attn.{word}_proj.{end}"] for word in "qkv"])
            for there, here in (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                found[f"{new}.{there}.{end}"] = state[f"{old}.{here}.{end}"]
    return {f"{start}{name}": value for name, value in found.items()}


def tensors(pipeline, kind: str) -> dict[str, torch.Tensor]:
    """All of a pipeline: kind is sd1, sd2 or sdxl."""
    found = unet(pipeline.unet) | vae(pipeline.vae) | {"alphas_cumprod": torch.zeros(3), "model_ema.decay": torch.zeros(())}
    if kind == "sd1":
        return found | clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    if kind == "sd2":
        return found | open_clip(pipeline.text_encoder, "cond_stage_model.model.", beyond=1)
    return found | clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.") | open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")


def write(file: Path, pipeline, kind: str, *, dtype=torch.float32, ema: bool = False, sizes: bool = True, **metadata) -> Path:
    """The one file, and beside it the folder of its sizes, because those of tiny models do not ship."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {name: (value.to(dtype) if value.is_floating_point() else value).clone().contiguous() for name, value in tensors(pipeline, kind).items()}
    if ema:
        found |= {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in found.items() if name.startswith("model.diffusion")}
    save_file(found, file, {"format": "pt", **metadata})
    if sizes:
        pipeline.save_pretrained(file.with_suffix(""))
        for weights in file.with_suffix("").rglob("*.safetensors"):
            weights.unlink()
    return file
