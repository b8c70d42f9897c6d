"""Base models: where they are, what their headers say, and how they are fetched. Reads headers only; loads no torch."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora_studio import families, fence, single_files
from lora_studio.adapters import experts
from lora_studio.errors import BaseModelError, StudioError
from lora_studio.home import demo_base
from lora_studio.spec import Base, methods

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
VARIANTS = ["*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors", "*.ema_only.safetensors"]


LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
EXPERTS = ".experts."  # in the name of a weight
# What a part of an expert is called: in a mixture PEFT takes layers of these names for its experts (utils/transformers_weight_conversion.py).
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
# Where PEFT refuses two layers that their kernels read past the module (tuners/tuners_utils.py).
MAMBA, READ_PAST = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d")


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base before it is loaded. `folder` is None while a Hub model has not been fetched, and a file where the whole
    model is one. `keys` are the numbers of a token's key in one layer's attention, and of its value; `context` how many tokens it was made
    to read at once; `experts` are the parameters that hold all of a layer's, as (name, experts, out, in),
    and `per_token` is how many of them a token passes; `pipeline` is the class of an image model's pipeline, "" for a language model; `note` says what is only a guess."""

    id: str
    folder: Path | None
    model_type: str = ""
    parameters: int | None = None
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    vocabulary: int | None = None
    context: int | None = None
    keys: int | None = None
    linears: tuple[tuple[str, int, int], ...] = ()
    is_mixture: bool = False
    experts: tuple[tuple[str, int, int, int], ...] = ()
    per_token: int = 1
    commit: str = ""
    pipeline: str = ""
    note: str = ""

    @property
    def adaptable(self) -> list[tuple[str, int, int]]:
        """The linear layers that an adapter can go on. Experts are none: transformers keeps them in one stack, whatever a checkpoint does."""
        return [layer for layer in self.linears if EXPERTS not in layer[0]]

    @property
    def stacks(self) -> dict[str, int]:
        """The numbers of all experts of a layer, by the layer."""
        found: dict[str, int] = {}
        for name, count, out, width in self.experts:
            found[name.rpartition(".")[0]] = found.get(name.rpartition(".")[0], 0) + count * out * width
        return found

    def targets(self, wanted) -> list[str]:
        """The ends of the names of the layers that `method.targets` means here, from the headers. Empty when unknown."""
        layers = [name for name, *_ in self.adaptable]
        if wanted != "auto":
            return [name for name in wanted if any(full == name or full.endswith("." + name) for full in layers)]
        left_out = (*(OF_EXPERTS if self.is_mixture else ()), *(READ_PAST if self.model_type in MAMBA else ()))
        layers = [name for name in layers if name.rsplit(".", 1)[-1] not in left_out]
        family = families.of_pipeline(self.pipeline) if self.pipeline else families.of_model_type(self.model_type)
        known = [name for name in family.targets if any(full.endswith("." + name) for full in layers)] if family else []
        return known or sorted({name.rsplit(".", 1)[-1] for name in layers})

    def trainable(self, targets: list[str], method) -> int:
        """Parameters that a method (of spec.method) learns on those layers, or as virtual tokens; 0 where the headers do not tell."""
        if method.kind in methods.VIRTUAL:
            return methods.virtual_parameters(method, self.hidden or 0, self.layers or 0, self.keys or 0)
        fits = (shape for name, *shape in self.adaptable if any(name == end or name.endswith("." + end) for end in targets))
        stacks = self.experts if getattr(method, "experts", False) else ()
        return sum(methods.parameters(method, *shape) for shape in fits) + sum(count * methods.parameters(method, *shape) for _, count, *shape in stacks)


def locate(base: Base) -> Path | None:
    """The folder (or the one file) of a base on this machine; None when it is a Hub id that has to be fetched. Raises BaseModelError."""
    fence.refuse_base(base.id)
    bundled = demo_base(base.id)
    if bundled:
        return bundled
    here = fence.place(base.id)
    if here is not None and here.is_dir():
        return here
    if here is not None and here.is_file():
        single_files.header(base.id, here)
        return here
    if Path(base.id).suffix.lower() in (".safetensors", *single_files.PICKLED):
        raise BaseModelError("base.no_file", id=base.id)
    if not _is_hub_id(base.id):
        raise BaseModelError("base.missing", id=base.id, hint="Known: " + ", ".join(families.known_bases()[:4]) + ", ...")
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "model_index.json"):
        cached = try_to_load_from_cache(base.id, name, revision=base.revision)
        folder = Path(cached).parent if isinstance(cached, str) else None
        if folder and any(weights_folder(folder).glob("*.safetensors")):
            return folder
    return None


def weights_folder(folder: Path) -> Path:
    """Where the weights lie that an adapter goes on: the folder itself, or the trained part of a pipeline."""
    family = _family_in(folder)
    return folder / family.component if family else folder


def _family_in(folder: Path) -> families.ImageFamily | None:
    """The family of the pipeline in a folder; None for a language model."""
    try:
        return families.of_pipeline(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sizes_folder(folder: Path) -> Path:
    """The folder with the configurations of a pipeline's parts: its own, or for a model in one file the one that goes with it."""
    return single_files.recognise(folder.name, folder).sizes if folder.is_file() else folder


def adaptable(folder: Path) -> dict[str, list[int]]:
    """The weights of a base that an adapter may go on, by name: of a language model all, of an image model those of the trained part,
    and of its text encoders the layers behind the encoder's name and a dot. Raises BaseModelError."""
    single = single_files.recognise(folder.name, folder) if folder.is_file() else None
    family = families.of_pipeline(single.pipeline) if single else _family_in(folder)
    if family is None:
        return _shapes(folder.name, folder)

    def shapes(part: str) -> dict[str, list[int]]:
        return single_files.shapes_of(folder.name, single, part) if single else _shapes(folder.name, folder / part)

    found = shapes(family.component)
    for part in family.text_encoders:
        if (single and (single.sizes / part).is_dir()) or any((folder / part).glob("*.safetensors")):
            found |= {f"{part}.{name.removeprefix('text_model.')}": shape for name, shape in shapes(part).items() if ".layers." in name}
    return found


def _is_hub_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def inspect(base: Base) -> BaseInfo:
    """What the files of a base say; only its id when it has not been fetched. Raises BaseModelError."""
    folder = locate(base)
    if folder is None:
        size = families.billions(base.id)
        return BaseInfo(base.id, None, parameters=int(size * 1e9) if size else None)
    if folder.is_file() or (folder / "model_index.json").is_file():
        return _inspect_pipeline(base, folder)
    config = _config(base.id, folder)
    if config.get("auto_map") and not config.get("model_type"):
        raise BaseModelError("base.remote_code", id=base.id)
    classes = config.get("architectures") or []
    if classes and not any(re.search(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", name) for name in classes):
        raise BaseModelError("base.not_causal", id=base.id, model_type=config.get("model_type", classes[0]))
    text = config.get("text_config") or config
    shapes = _shapes(base.id, folder)
    is_mixture = any(EXPERTS in name for name in shapes)
    routers = (".router.weight", ".router.layer.weight", *((".gate.weight",) if is_mixture else ()))
    linears = tuple(
        (name.removesuffix(".weight"), shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and LAYER.search(name) and "norm" not in name and not name.endswith(routers)
    )
    return BaseInfo(
        base.id,
        folder,
        model_type=str(config.get("model_type", "")),
        parameters=sum(_count(shape) for shape in shapes.values()),
        layers=text.get("num_hidden_layers"),
        hidden=text.get("hidden_size"),
        intermediate=text.get("intermediate_size"),
        vocabulary=text.get("vocab_size"),
        context=text.get("max_position_embeddings") or text.get("n_positions"),
        keys=_keys(text),
        linears=linears,
        is_mixture=is_mixture,
        experts=tuple(experts.in_headers(shapes, model=config.get("model_type", ""))) if is_mixture else (),
        per_token=next((text[name] for name in PER_TOKEN if isinstance(text.get(name), int)), 1),
        commit=folder.name if folder.parent.name == "snapshots" else "",
    )


def _keys(config: dict) -> int | None:
    """The numbers of a key in one layer, by the configuration of a language model."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not heads or not hidden:
        return None
    return (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads)


def _inspect_pipeline(base: Base, folder: Path) -> BaseInfo:
    """What the files of an image model's pipeline say, or its one file. Raises BaseModelError."""
    single = single_files.recognise(base.id, folder) if folder.is_file() else None
    index = _config(base.id, sizes_folder(folder), "model_index.json")
    name = str(index.get("_class_name", ""))
    family = families.of_pipeline(name)
    if name in families.OUT_OF_REACH:
        raise BaseModelError("image.out_of_reach", id=base.id, pipeline=name, reason=families.OUT_OF_REACH[name])
    if family is None:
        known = ", ".join(one.name for one in families.IMAGE_FAMILIES)
        raise BaseModelError("base.pipeline", id=base.id, pipeline=name[:60], known=known)
    if any(index.get(f"{family.component}_2") or [None]):
        raise BaseModelError("image.two_parts", id=base.id, part=family.component)
    shapes = single_files.shapes_of(base.id, single, family.component) if single else _shapes(base.id, folder / family.component)
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) in (2, 4)}
    linears = tuple((name, shape[0], _count(shape[1:])) for name, shape in layers.items() if "embed" not in name)
    commit = folder.name if folder.parent.name == "snapshots" else ""
    size, note = sum(map(_count, shapes.values())), single.note if single else ""
    return BaseInfo(base.id, folder, parameters=size, linears=linears, commit=commit, pipeline=name, note=note)


def sample_edge(info: BaseInfo) -> int:
    """The edge in pixels of the pictures a pipeline's own files speak of: what its part was trained at, times what its VAE shrinks by."""
    try:
        if info.folder.is_file() and (edge := single_files.recognise(info.id, info.folder).edge):
            return edge
        sizes = sizes_folder(info.folder)
        part, vae = (json.loads((sizes / name / "config.json").read_text(encoding="utf-8")) for name in (weights_folder(sizes).name, "vae"))
        return int(part["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _config(id: str, folder: Path, name: str = "config.json") -> dict:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BaseModelError("base.no_config", id=id) from None
    if not isinstance(config, dict):
        raise BaseModelError("base.no_config", id=id)
    return config


def _shapes(id: str, folder: Path) -> dict[str, list[int]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseModelError("base.no_weights", id=id)
    return {name: shape for file in files for name, shape in header_shapes(id, file).items()}


def header_shapes(id: str, file: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file, from its header. Raises BaseModelError."""
    return single_files.header(id, file)[0]


def _count(shape: list[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def digest_spread(digest, file: Path) -> None:
    """Add to a hash 64 kB from each of 64 places of a large file: two models of one kind differ in most of them."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        for number in range(64):
            handle.seek(size * number // 64)
            digest.update(handle.read(1 << 16))


def digest_ends(digest, file: Path, name: str) -> None:
    """Add to a hash what tells a file from others at little cost: its name and size, its first and its last megabyte."""
    size = file.stat().st_size
    digest.update(f"{name}:{size}".encode())
    with open(file, "rb") as handle:
        digest.update(handle.read(1 << 20))
        handle.seek(max(0, size - (1 << 20)))
        digest.update(handle.read())


def fetch(base: Base, *, token: str | None = None) -> Path:
    """The folder of a base, fetched from the Hub when it is not here. Raises BaseModelError with the way out."""
    folder, token = locate(base), token or fence.lent()
    if folder is not None:
        return folder
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        wanted = _pipeline_files(base, token) or WANTED
        return Path(
            huggingface_hub.snapshot_download(base.id, revision=base.revision, allow_patterns=wanted, ignore_patterns=VARIANTS, token=token)
        )
    except hub.GatedRepoError:
        raise BaseModelError("base.gated", id=base.id) from None
    except hub.RepositoryNotFoundError as error:
        raise BaseModelError(_refusal(error), id=base.id) from None
    except hub.RevisionNotFoundError:
        raise BaseModelError("base.missing", id=f"{base.id}@{base.revision}", hint="Check the revision.") from None
    except hub.LocalEntryNotFoundError as error:
        raise _unreachable(base, error.__cause__ or error) from None
    except hub.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise BaseModelError("base.bad_token", id=base.id) from None
        raise _unreachable(base, error) from None
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _unreachable(base, error) from None


def _pipeline_files(base: Base, token: str | None) -> list[str]:
    """The files of an image model's parts, without the single-file copies beside them; nothing for a language model."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        index = Path(huggingface_hub.hf_hub_download(base.id, "model_index.json", revision=base.revision, token=token))
        parts = [name for name, value in json.loads(index.read_text(encoding="utf-8")).items() if isinstance(value, list) and value[:1] != [None]]
    except (hub.EntryNotFoundError, ValueError, AttributeError):
        return []
    return ["model_index.json", *(f"{part}/{pattern}" for part in parts if part not in ("safety_checker", "feature_extractor") for pattern in WANTED)]


def _refusal(error) -> str:
    """A 401 with a token at hand means that the token is wrong; without one, that the model is not there (or private)."""
    from huggingface_hub import get_token

    status = error.response.status_code if getattr(error, "response", None) is not None else None
    return "base.bad_token" if status == 401 and (fence.lent() or get_token()) else "base.not_found"


def _unreachable(base: Base, error: BaseException) -> StudioError:
    reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else (str(error).splitlines() or [type(error).__name__])[0][:160]
    return BaseModelError("base.offline", id=base.id, reason=reason)
