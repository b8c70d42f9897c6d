"""Adapters of image models by other programs: which layer of diffusers' model each tensor is for. Names only; no torch.

    diffusers   unet.… transformer.… text_encoder.…  .lora_A .lora_B (or .lora.down .lora.up), its settings in the header
    kohya       lora_unet_… lora_te1_…               .lora_down .lora_up .alpha; words joined by _, SDXL by its first programs' names
    native      diffusion_model.…                    .lora_A .lora_B; FLUX by Black Forest Labs' names

A layer that holds several of diffusers' layers (FLUX's qkv) is one A and rows of one B for each of these.
"""

import re
from dataclasses import dataclass

from lora_studio.single_files import names

# (what ends a tensor's name, its part)
ENDS = (
    (re.compile(r"\.lora_A(?:\.\w+)?\.weight$|\.lora_A$|[._]lora\.down\.weight$|_lora\.down\.weight$|\.lora_down\.weight$"), "A"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.weight$|\.lora_B$|[._]lora\.up\.weight$|_lora\.up\.weight$|\.lora_up\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
)
# Words of layers that hold an underscore, the longer ones first; what is between two of them is a word or a number.
WORDS = re.compile(
    "|".join([
        "single_transformer_blocks", "transformer_blocks", "double_blocks", "single_blocks", "down_blocks", "up_blocks", "mid_block", "input_blocks",
        "middle_block", "output_blocks", "conv_shortcut", "time_emb_proj", "time_embedding", "time_embed", "add_embedding", "label_emb", "in_layers",
        "emb_layers", "out_layers", "skip_connection", "ff_context", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_out", "to_q", "to_k",
        "to_v", "proj_in", "proj_out", "proj_mlp", "conv_in", "conv_out", "linear_1", "linear_2", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
        "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "norm1_context", "x_embedder", "context_embedder", r"[a-z][a-z0-9]*", r"\d+",
    ])
)  # fmt: skip
ENCODERS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
FLUX_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
WAN = {
    **{
        f"{old}.{word}": f"{new}.{there}"
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for word, there in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
FUSED = {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.out": ("attention.to_out.0",)}
MADE_FOR = {
    "unet": {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models.unets.unet_2d_condition"},
    "transformer": {"base_model_class": "FluxTransformer2DModel", "parent_library": "diffusers.models.transformers.transformer_flux"},
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One layer's update: its tensors' names in the file, and of B the rows (None: all of them)."""

    A: str
    B: str
    alpha: str = ""
    rows: tuple[int, int] | None = None


def pieces(tensors: dict) -> tuple[dict[str, Piece], list[str]]:
    """The layers of a file (name to entry with a shape) by diffusers' names, text encoders behind their own; and the names that say nothing here."""
    groups: dict[str, dict[str, str]] = {}
    strangers = []
    for name in tensors:
        end = next(((sign.search(name), part) for sign, part in ENDS if sign.search(name)), None)
        if end is None:
            strangers.append(name)
            continue
        groups.setdefault(name[: end[0].start()], {})[end[1]] = name
    found = {}
    for stem, group in groups.items():
        layers = layers_of(stem)
        if not layers or "A" not in group or "B" not in group:
            strangers += group.values()
            continue
        A, B = (tensors[group[part]].shape for part in "AB")
        for layer, rows in zip(layers, rows_of(A, B, len(layers))):
            found[layer] = Piece(group["A"], group["B"], group.get("alpha", ""), rows)
    return found, strangers


def rows_of(A: tuple[int, ...], B: tuple[int, ...], count: int) -> list[tuple[int, int] | None]:
    """The rows of B for each of the layers that one holds: three alike, and behind them whatever is left (FLUX's linear1)."""
    if count == 1:
        return [None]
    third = B[0] // 3 if count == 3 else A[1]
    return [(third * number, third * (number + 1) if number < 3 else B[0]) for number in range(count)]


def layers_of(stem: str) -> tuple[str, ...]:
    """The layers of diffusers' model that a layer of a file stands for; none when it is not known."""
    for start, part in ENCODERS.items():
        if stem.startswith(start):
            return (f"{part}.{_words(stem.removeprefix(start)).removeprefix('text_model.')}",)
    if stem.startswith(("lora_unet_", "lora_transformer_")):
        return _main(_words(re.sub(r"^lora_(unet|transformer)_", "", stem)))
    encoder = re.match(r"(text_encoder(?:_\d)?)\.(.+)$", stem)
    if encoder:
        return (f"{encoder[1]}.{_attention(encoder[2]).removeprefix('text_model.')}",)
    for start in ("unet.", "transformer.", "diffusion_model.", "base_model.model."):
        if stem.startswith(start):
            return _main(_attention(stem.removeprefix(start)))
    return _main(stem) if re.match(r"(double|single)_blocks\.", stem) else ()


def _main(layer: str) -> tuple[str, ...]:
    """A layer of the main part, by diffusers' name or by that of its first programs."""
    if re.match(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.", layer):
        other = names.of_layer(layer, 2)
        return (other,) if other else ()
    for top, table, there in (("double_blocks", FLUX_DOUBLE, "transformer_blocks"), ("single_blocks", FLUX_SINGLE, "single_transformer_blocks")):
        match = re.match(rf"{top}\.(\d+)\.(.+)$", layer)
        if match:
            return tuple(f"{there}.{match[1]}.{end}" for end in table.get(match[2], ()))
    wan = re.match(r"(blocks\.\d+)\.((?:self_attn|cross_attn|ffn)\.\w+)$", layer)
    if wan:
        return (f"{wan[1]}.{WAN[wan[2]]}",) if wan[2] in WAN else ()
    if layer.startswith("joint_blocks."):  # Stable Diffusion 3 by its first programs
        return ()
    for end, several in FUSED.items():
        if layer.endswith("." + end):
            return tuple(layer.removesuffix(end) + one for one in several)
    return (layer,) if re.search(r"\.\d+\.|^(conv_in|conv_out|mid_block|time_embedding|add_embedding|x_embedder|context_embedder)", layer) else ()


def _attention(layer: str) -> str:
    """A layer without the processor that once stood between: attn1.processor.to_out for attn1.to_out.0."""
    layer = re.sub(r"\.processor\.(to_[qkv])$", r".\1", layer)
    return re.sub(r"\.processor\.to_out$", ".to_out.0", layer)


def _words(flat: str) -> str:
    """Words joined by underscores, with dots between them as they were."""
    words = WORDS.findall(flat)
    return ".".join(words) if "_".join(words) == flat else flat


def settings(metadata: dict[str, str], parse) -> dict[str, dict]:
    """What diffusers wrote into the header of each part: {part: PEFT's configuration}. `parse` reads a JSON text strictly."""
    text = metadata.get("lora_adapter_metadata", "")
    told: dict[str, dict] = {}
    for key, value in (parse(text).items() if text else ()):
        part, _, field = key.partition(".")
        told.setdefault(part, {})[field] = value
    return told


def unencoded(layer: str) -> str:
    """A layer's name within its own part."""
    return re.sub(r"^text_encoder(_\d)?\.", "", layer)


def part_of(layer: str, main: str) -> str:
    """The part of the pipeline that a layer belongs to."""
    encoder = re.match(r"(text_encoder(?:_\d)?)\.", layer)
    return encoder[1] if encoder else main


def main_part(layers) -> str:
    """unet or transformer, by the names of layers."""
    return "unet" if any(re.match(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b", name) for name in layers) else "transformer"
