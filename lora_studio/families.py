"""The tables of base-model families: which layers an adapter goes on, and what their well-known models need."""

from dataclasses import dataclass

from lora_studio.errors import BaseModelError, StudioError

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A family of base models: transformers' model types, the default target layers, known Hub ids with billions of parameters."""

    name: str
    model_types: tuple[str, ...]
    targets: tuple[str, ...]
    sizes: dict[str, float]
    gated: bool = False


FAMILIES = (
    Family("Demo", (), LLAMA_LINEARS, {"demo-text": 0.002}),
    Family("Qwen3", ("qwen3",), LLAMA_LINEARS,
           {"Qwen/Qwen3-0.6B": 0.6, "Qwen/Qwen3-1.7B": 1.7, "Qwen/Qwen3-4B": 4.0, "Qwen/Qwen3-8B": 8.2}),
    Family("Qwen2", ("qwen2",), LLAMA_LINEARS, {"Qwen/Qwen2.5-0.5B-Instruct": 0.5, "Qwen/Qwen2.5-7B-Instruct": 7.6}),
    Family("Llama 3", ("llama",), LLAMA_LINEARS,
           {"meta-llama/Llama-3.2-1B-Instruct": 1.2, "meta-llama/Llama-3.2-3B-Instruct": 3.2, "meta-llama/Llama-3.1-8B-Instruct": 8.0},
           gated=True),
    Family("SmolLM", ("smollm3",), LLAMA_LINEARS,
           {"HuggingFaceTB/SmolLM2-135M-Instruct": 0.135, "HuggingFaceTB/SmolLM2-360M-Instruct": 0.36,
            "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1.7, "HuggingFaceTB/SmolLM3-3B": 3.1}),
    Family("Gemma", ("gemma", "gemma2", "gemma3_text", "gemma3"), LLAMA_LINEARS,
           {"google/gemma-3-270m-it": 0.27, "google/gemma-3-1b-it": 1.0, "google/gemma-2-2b-it": 2.6}, gated=True),
    Family("Mistral", ("mistral", "ministral"), LLAMA_LINEARS,
           {"mistralai/Mistral-7B-Instruct-v0.3": 7.2, "mistralai/Ministral-8B-Instruct-2410": 8.0}, gated=True),
    Family("Phi", ("phi3",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), {"microsoft/Phi-4-mini-instruct": 3.8}),
)  # fmt: skip


# CLIP's linear layers: attention, and the two of each block's MLP.
CLIP_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UNET_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ImageFamily:
    """A family of image models: the diffusers pipeline, the part that is trained, the default target layers, the edge its models were
    trained at, known Hub ids with billions of parameters of that part; `multiple` is what edges of pictures must be a multiple of, and
    `flow` says that it learns straight lines from picture to noise, not the steps of a noise schedule. `text_encoders` are those that may
    get an adapter too. `guidance` is what its own pipeline takes by default, `patch` the edge of a transformer's token in latent pixels.
    `films` says that it knows films, and `edits` that it makes a picture of a picture, so that it learns from pairs."""

    name: str
    pipeline: str
    component: str
    targets: tuple[str, ...]
    resolution: int
    sizes: dict[str, float]
    gated: bool = False
    multiple: int = 16
    flow: bool = True
    text_encoders: tuple[str, ...] = ()
    guidance: float = 5.0
    patch: int = 2
    edits: bool = False
    films: bool = False


IMAGE_FAMILIES = (
    ImageFamily("Stable Diffusion 1.5 and 2", "StableDiffusionPipeline", "unet", UNET_LINEARS, 512,
                {"demo-image": 0.004, "stable-diffusion-v1-5/stable-diffusion-v1-5": 0.86}, multiple=8, flow=False, text_encoders=("text_encoder",),
                guidance=7.5),
    ImageFamily("Stable Diffusion XL", "StableDiffusionXLPipeline", "unet", UNET_LINEARS, 1024,
                {"stabilityai/stable-diffusion-xl-base-1.0": 2.57}, multiple=8, flow=False, text_encoders=("text_encoder", "text_encoder_2")),
    ImageFamily("Stable Diffusion 3 and 3.5", "StableDiffusion3Pipeline", "transformer", JOINT, 1024,
                {"stabilityai/stable-diffusion-3-medium-diffusers": 2.1, "stabilityai/stable-diffusion-3.5-medium": 2.5,
                 "stabilityai/stable-diffusion-3.5-large": 8.1}, gated=True, guidance=7.0),
    ImageFamily("FLUX.1", "FluxPipeline", "transformer",
                (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"), 1024,
                {"black-forest-labs/FLUX.1-dev": 11.9, "black-forest-labs/FLUX.1-schnell": 11.9}, gated=True, text_encoders=("text_encoder",),
                guidance=3.5),
    ImageFamily("FLUX.1 Kontext", "FluxKontextPipeline", "transformer",
                (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"), 1024,
                {"black-forest-labs/FLUX.1-Kontext-dev": 11.9}, gated=True, text_encoders=("text_encoder",), guidance=2.5, edits=True),
    ImageFamily("FLUX.2 klein", "Flux2KleinPipeline", "transformer", (*ATTENTION, "to_qkv_mlp_proj"), 1024,
                {"black-forest-labs/FLUX.2-klein-base-4B": 3.9, "black-forest-labs/FLUX.2-klein-4B": 3.9}, guidance=4.0, patch=1),
    ImageFamily("Qwen-Image", "QwenImagePipeline", "transformer", ATTENTION, 1024, {"Qwen/Qwen-Image": 20.4}, guidance=4.0),
    ImageFamily("Z-Image", "ZImagePipeline", "transformer", ATTENTION, 1024,
                {"Tongyi-MAI/Z-Image": 6.2, "Tongyi-MAI/Z-Image-Turbo": 6.2}),
    ImageFamily("Sana", "SanaPipeline", "transformer", ATTENTION, 1024,
                {"Efficient-Large-Model/Sana_600M_1024px_diffusers": 0.59, "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": 1.6},
                multiple=32, guidance=4.5, patch=1),
    ImageFamily("Lumina Image 2", "Lumina2Pipeline", "transformer", ATTENTION, 1024, {"Alpha-VLLM/Lumina-Image-2.0": 2.6}, guidance=4.0),
    ImageFamily("PixArt-Sigma", "PixArtSigmaPipeline", "transformer", ATTENTION, 1024,
                {"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 0.61, "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": 0.61}, flow=False, guidance=4.5),
    ImageFamily("Wan 2.1", "WanPipeline", "transformer", (*ATTENTION, "ffn.net.0.proj", "ffn.net.2"), 480,
                {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.42, "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.3}, films=True),
)  # fmt: skip


VISION = "its text encoder sees pictures through Qwen2VLProcessor, which needs torchvision, and the studio runs without"
# Pipelines that are known and cannot be trained here, and why.
OUT_OF_REACH = {
    "QwenImageEditPipeline": VISION, "QwenImageEditPlusPipeline": VISION, "QwenImageEditInpaintPipeline": VISION, "QwenImageLayeredPipeline": VISION,
    "Flux2Pipeline": "its text encoder comes with PixtralProcessor, which needs torchvision, and the studio runs without",
}  # fmt: skip


def timesteps(pipeline: str, wanted: str) -> str:
    """What task.timesteps means for a pipeline: auto draws from the middle for flow matching, and evenly for the others."""
    family = of_pipeline(pipeline)
    return wanted if wanted != "auto" else "logit_normal" if family and family.flow else "uniform"


def misfits(pipeline: str, spec) -> list[tuple[str, StudioError]]:
    """The settings of an image run that do not go with its base, each with its field."""
    family, task, found = of_pipeline(pipeline), spec.task, []
    if family is None:
        return found
    if family.flow and task.weighting != "none":
        found.append(("task.weighting", BaseModelError("image.weighting", name=family.name, weighting=task.weighting)))
    if task.text_encoder and not family.text_encoders:
        known = ", ".join(one.name for one in IMAGE_FAMILIES if one.text_encoders)
        found.append(("task.text_encoder", BaseModelError("image.text_encoder", name=family.name, known=known)))
    if family.edits and task.prior_pictures:
        found.append(("task.prior_pictures", BaseModelError("image.prior_pairs", name=family.name)))
    if not family.films and task.frames > 1:
        found.append(("task.frames", BaseModelError("image.frames", name=family.name)))
    if not family.flow and task.shift != "auto":
        found.append(("task.shift", BaseModelError("image.shift", name=family.name)))
    edges = [("task.bucket_step", task.bucket_step)]
    if not task.buckets:
        edges = [("task.resolution", task.resolution), *(("task.more_resolutions", edge) for edge in task.more_resolutions)]
    for field, edge in edges:
        if edge % family.multiple:
            found.append((field, BaseModelError("image.multiple", name=family.name, field=field, value=edge, multiple=family.multiple)))
    return found


def of_pipeline(name: str) -> ImageFamily | None:
    """The family of a diffusers pipeline's class, if it is in the table."""
    return next((family for family in IMAGE_FAMILIES if family.pipeline == name), None)


# Bases that want another guidance than their family: the bundled one, and those distilled to do without.
GUIDANCE = {
    "demo-image": 2.0, "black-forest-labs/FLUX.1-schnell": 1.0, "black-forest-labs/FLUX.2-klein-4B": 1.0, "Tongyi-MAI/Z-Image-Turbo": 1.0,
}  # fmt: skip


# What undoes the distillation of a base while a run learns: by the base's id, the Hub repository and its file.
ASSISTANTS = {"Tongyi-MAI/Z-Image-Turbo": "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"}


def guidance(base: str, pipeline: str = "") -> float:
    """The guidance that a picture of a base usually wants: by its id, else by its pipeline."""
    family = of_pipeline(pipeline) or next((one for one in IMAGE_FAMILIES if base in one.sizes), None)
    return GUIDANCE.get(base) or (family.guidance if family else 5.0)


def edge(base: str) -> int | None:
    """The edge in pixels that a known image model was trained at, 0 for a known language model, None for any other id."""
    known = {**dict.fromkeys(id for family in FAMILIES for id in family.sizes), **{id: family.resolution for family in IMAGE_FAMILIES for id in family.sizes}}
    return (known[base] or 0) if base in known else None


def of_model_type(model_type: str) -> Family | None:
    """The family of transformers' model type, if it is in the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def billions(base: str) -> float | None:
    """Billions of parameters of a known Hub id."""
    return next((family.sizes[base] for family in (*FAMILIES, *IMAGE_FAMILIES) if base in family.sizes), None)


def known_bases() -> list[str]:
    """Every known base, the bundled ones first."""
    found = [base for family in (*FAMILIES, *IMAGE_FAMILIES) for base in family.sizes]
    return sorted(found, key=lambda base: not base.startswith("demo-"))
