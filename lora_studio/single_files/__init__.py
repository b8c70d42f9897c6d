"""A whole image model in one .safetensors file, as programs of Stable Diffusion's first days keep it: which kind it is, from its header.

The sizes of each kind ship in a folder beside this file (sd1, sd2, sdxl), laid out as diffusers lays out a pipeline, without weights.
A folder NAME/ with a model_index.json beside NAME.safetensors goes before them: for a model of other sizes.
"""

import json
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml

from lora_studio.errors import BaseModelError
from lora_studio.single_files import names

HERE = Path(__file__).resolve().parent
HEADER_LIMIT = 100 << 20
PICKLED = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
UNET, FIRST = "model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"
# (shipped sizes, a name that only this kind has, tensors of its UNet, what people call it)
KINDS = (
    ("sdxl", re.compile(r"^conditioner\.embedders\.1\.model\.transformer\.resblocks\."), 1680, "Stable Diffusion XL"),
    ("sd2", re.compile(r"^cond_stage_model\.model\.transformer\.resblocks\."), 686, "Stable Diffusion 2"),
    ("sd1", re.compile(r"^cond_stage_model\.transformer\."), 686, "Stable Diffusion 1"),
)
# What else such a file may be, by a name in it: refused, and called by its name.
OTHERS = (
    (re.compile(r"double_blocks\.\d+\.img_attn"), "a FLUX or HunyuanVideo model"),
    (re.compile(r"joint_blocks\.\d+\."), "a Stable Diffusion 3 model"),
    (re.compile(r"(context_refiner|noise_refiner)\."), "a Z-Image or Lumina model"),
    (re.compile(r"transformer_blocks\.\d+\.(img|txt)_mlp"), "a Qwen-Image model"),
    (re.compile(r"blocks\.\d+\.cross_attn\."), "a Wan model"),
    (re.compile(r"control_model\.|controlnet_"), "a ControlNet"),
    (re.compile(r"^(down_blocks|up_blocks|mid_block|conv_in|transformer_blocks|single_transformer_blocks)\."), "one part of a pipeline in diffusers' form"),
    (re.compile(r"^(first_stage_model\.|encoder\.(conv_in|down\.|down_blocks\.)|decoder\.(conv_in|up\.|up_blocks\.)|vae\.)"), "a VAE alone"),
    (re.compile(r"^((text_encoders?|te|cond_stage_model|conditioner|clip_[lg])\.|text_model\.|transformer\.resblocks\.)"), "a text encoder alone"),
    (re.compile(r"^model\.layers\.\d+\."), "a language model"),
)  # fmt: skip


@dataclass(frozen=True)
class Single:
    """A checkpoint in one file that is known: the folder of its sizes, the class of its pipeline, what its scheduler must know besides,
    the edge of the pictures it was trained on (0: as the sizes say), and a sentence where something about it is a guess."""

    file: Path
    sizes: Path
    pipeline: str
    scheduler: dict = field(default_factory=dict)
    edge: int = 0
    note: str = ""


def recognise(id: str, file: Path) -> Single:
    """Which kind of model a file holds. Raises BaseModelError naming what it is where it is none that can be trained."""
    stat = file.stat()
    beside = file.with_suffix("") / "model_index.json", said_beside(file)
    marks = tuple(place.stat().st_mtime_ns if place.is_file() else 0 for place in beside)
    return _recognised(id, file, (stat.st_size, stat.st_mtime_ns, *marks))


@lru_cache(maxsize=32)
def _recognised(id: str, file: Path, marks: tuple) -> Single:
    shapes, metadata = header(id, file)
    own = file.with_suffix("")
    if (own / "model_index.json").is_file():
        return Single(file, own, _index(id, own), _told(file, shapes, metadata))
    name = _kind(id, shapes)
    told = _told(file, shapes, metadata)
    note, edge = "", 0
    if name == "sd2":
        if "prediction_type" not in told:
            note = (
                f"{file.name} does not say whether it answers with noise or with velocity; it is taken for Stable Diffusion 2 with velocity "
                f"(768 pixels). If its pictures are grey mud, write `parameterization: eps` into {said_beside(file).name} beside it."
            )
        edge = 512 if told.get("prediction_type") == "epsilon" else 768
    return Single(file, HERE / name, _index(id, HERE / name), told, edge, note)


def said_beside(file: Path) -> Path:
    """The file beside a checkpoint in which its settings are by custom: of the same name, .yaml."""
    return file.with_suffix(".yaml")


def _index(id: str, folder: Path) -> str:
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BaseModelError("base.no_config", id=f"{id} ({folder.name}/ beside it)") from None


def _kind(id: str, shapes: dict[str, list[int]]) -> str:
    """The shipped sizes that fit. Raises BaseModelError."""
    from lora_studio.adapters import dialects  # adapters read bases

    if dialects.format_of(list(shapes)):
        raise BaseModelError("base.adapter_file", id=id)
    if FIRST not in shapes:
        what = next((words for sign, words in OTHERS if any(sign.search(name) for name in shapes)), "no image model that is known here")
        raise BaseModelError("base.single_other", id=id, what=what)
    channels, width = shapes[FIRST][1], shapes[FIRST][0]
    if channels != 4:
        what = {9: "an inpainting model (9 channels)", 8: "an InstructPix2Pix model (8 channels)"}.get(channels, f"a model of {channels} channels")
        raise BaseModelError("base.single_other", id=id, what=what)
    if width == 384 or (any(name.startswith("conditioner.embedders.0.model.") for name in shapes) and not any(KINDS[0][1].match(name) for name in shapes)):
        raise BaseModelError("base.single_other", id=id, what="the refiner of Stable Diffusion XL")
    if "edm_mean" in shapes:
        raise BaseModelError("base.single_other", id=id, what="Playground 2.5")
    kind = next((row for row in KINDS if any(row[1].match(name) for name in shapes)), None)
    if kind is None:
        raise BaseModelError("base.single_part", id=id, what="no text encoder")
    if not any(name.startswith("first_stage_model.") for name in shapes):
        raise BaseModelError("base.single_part", id=id, what="no VAE")
    count = sum(name.startswith(UNET) for name in shapes)
    if count != kind[2]:
        raise BaseModelError("base.single_other", id=id, what=f"a relative of {kind[3]} with {count} tensors in its UNet, not {kind[2]}")
    return kind[0]


def _told(file: Path, shapes: dict[str, list[int]], metadata: dict) -> dict:
    """What the file, or the .yaml beside it, says of the answer of its UNet: settings for the scheduler."""
    said = " ".join(str(value) for key, value in metadata.items() if key.lower() in ("modelspec.prediction_type", "modelspec.predictiontype")).lower()
    word = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", _text(said_beside(file)), re.M)
    said = word[1].lower() if word else said
    architecture = str(metadata.get("modelspec.architecture", "")).lower()
    if not said and "stable-diffusion-v2" in architecture:
        said = "v" if "768" in architecture else "epsilon"
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in shapes else {}
    if said.startswith("v") or (not said and "v_pred" in shapes):
        return {"prediction_type": "v_prediction", **more}
    return {"prediction_type": "epsilon", **more} if said.startswith("eps") else more


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")[: 1 << 20]
        yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return text


@lru_cache(maxsize=32)
def _config(folder: Path, part: str) -> dict:
    return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))


def shapes_of(id: str, single: Single, part: str) -> dict[str, list[int]]:
    """The weights of one part of the model by the names that diffusers gives them. Raises BaseModelError."""
    found = header(id, single.file)[0]
    config = _config(single.sizes, part)
    if part == "unet":
        return names.of_unet({name.removeprefix(UNET): shape for name, shape in found.items() if name.startswith(UNET)}, config["layers_per_block"])
    return names.of_text_encoder(found, part, config["num_hidden_layers"])


def header(id: str, file: Path) -> tuple[dict[str, list[int]], dict]:
    """The shape of every tensor of a safetensors file, and its metadata. Raises BaseModelError, for a file that is cut off too."""
    if file.suffix.lower() in PICKLED:
        raise BaseModelError("base.pickle", id=id)
    if file.suffix.lower() != ".safetensors":
        raise BaseModelError("base.file_kind", id=id, suffix=file.suffix or "unnamed")
    stat = file.stat()
    return _header(id, file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _header(id: str, file: Path, size: int, _changed: int) -> tuple[dict[str, list[int]], dict]:
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > HEADER_LIMIT:
                raise ValueError("its header is not one of safetensors")
            tree = json.loads(handle.read(length))
        metadata = tree.pop("__metadata__", {})
        shapes = {name: [int(edge) for edge in entry["shape"]] for name, entry in tree.items()}
        promised = 8 + length + max((int(entry["data_offsets"][1]) for entry in tree.values()), default=0)
        if promised > size:
            raise ValueError(f"it is cut off: it has {size:,} bytes of {promised:,}")
        return shapes, metadata if isinstance(metadata, dict) else {}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError("base.broken", id=id, reason=f"{file.name}: {error}") from None
