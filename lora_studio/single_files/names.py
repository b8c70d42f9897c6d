"""The names of a model's layers in the one-file form of Stable Diffusion, and what diffusers calls them. Names and shapes only."""

import re

Shapes = dict[str, list[int]]
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
ENDS = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
# Of each text encoder: where it begins in the file, in CLIP's own form and in OpenCLIP's.
CLIP = {"text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")}
OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
OPEN_CLIP_LAYERS = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def of_layer(name: str, per_block: int) -> str | None:
    """What diffusers calls a layer of the UNet (without .weight or .bias); `per_block` is its layers_per_block. None when unknown."""
    if name in ENDS:
        return ENDS[name]
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.(\d+))?\.(.+)$", name)
    if not match:
        return None
    where, number, place, rest = match[1], int(match[2]), match[3], match[4]
    if where == "middle_block":
        inner = name.split(".", 2)[2]
        return f"mid_block.attentions.0.{inner}" if number == 1 else _resnet(f"mid_block.resnets.{number // 2}", inner)
    block, layer = divmod(number - 1 if where == "input_blocks" else number, per_block + 1)
    top = f"{'down' if where == 'input_blocks' else 'up'}_blocks.{block}"
    if where == "input_blocks" and rest == "op":
        return f"{top}.downsamplers.0.conv"
    if where == "output_blocks" and rest == "conv":
        return f"{top}.upsamplers.0.conv"
    return _resnet(f"{top}.resnets.{layer}", rest) if place == "0" else f"{top}.attentions.{layer}.{rest}"


def _resnet(top: str, inner: str) -> str | None:
    return f"{top}.{RESNET[inner]}" if inner in RESNET else None


def of_unet(found: Shapes, per_block: int) -> Shapes:
    """Every tensor of the UNet under the name that diffusers gives it; what has none there is left out."""
    made = {}
    for name, shape in found.items():
        layer, _, end = name.rpartition(".")
        other = of_layer(layer, per_block)
        if other:
            made[f"{other}.{end}"] = shape
    return made


def of_text_encoder(found: Shapes, part: str, layers: int) -> Shapes:
    """The matrices of a text encoder's layers as transformers calls them, without `text_model.`. OpenCLIP keeps three in one."""
    made = {}
    for start in CLIP.get(part, ()):
        for name, shape in found.items():
            if name.startswith(start) and name.endswith("weight") and len(shape) == 2:
                made[name.removeprefix(start).removeprefix("text_model.")] = shape
    start = OPEN_CLIP[part] + "transformer.resblocks."
    for name, shape in found.items():
        number, _, rest = name.removeprefix(start).partition(".")
        if not name.startswith(start) or int(number) >= layers:
            continue
        top = f"encoder.layers.{number}"
        if rest == "attn.in_proj_weight":
            for word in ("q_proj", "k_proj", "v_proj"):
                made[f"{top}.self_attn.{word}.weight"] = [shape[0] // 3, shape[1]]
        elif rest.removesuffix(".weight") in OPEN_CLIP_LAYERS:
            made[f"{top}.{OPEN_CLIP_LAYERS[rest.removesuffix('.weight')]}.weight"] = shape
    return made


def with_text_model(name: str) -> str:
    """A tensor of CLIP's own form as transformers wrote it for long: some files lack the `text_model.`, which diffusers looks for."""
    start = next((start for start in CLIP["text_encoder"] if name.startswith(start)), None)
    if start is None or name.startswith(f"{start}text_model."):
        return name
    return f"{start}text_model.{name.removeprefix(start)}"


def owners(name: str) -> str:
    """Which part of the pipeline a tensor of such a file belongs to; "" for what no part needs (EMA copies, the noise schedule)."""
    if name.startswith("model.diffusion_model."):
        return "unet"
    if name.startswith("first_stage_model."):
        return "vae"
    if name.startswith(OPEN_CLIP["text_encoder_2"]):
        return "text_encoder_2"
    return "text_encoder" if name.startswith((*CLIP["text_encoder"], OPEN_CLIP["text_encoder"])) else ""
