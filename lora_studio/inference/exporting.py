"""Exporting on the bench: an adapter in the form another program reads, and that form opened again by its own loader.

    peft        a folder; read back with PEFT's configuration and weights
    diffusers   one file; loaded by the base's own pipeline class into its parts, built without weights
    kohya       one file with an alpha for each layer, by diffusers' converter, for AUTOMATIC1111, Forge and ComfyUI; read back like that
    gguf        one file for llama.cpp, read back with its package
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load, save

from lora_studio import adapters, bases, blend, durable
from lora_studio.adapters import dialects, gguf_files, multiplying, pipeline_files, virtual
from lora_studio.adapters.files import LINEAGE, read_metadata, reheaded
from lora_studio.errors import AdapterError, BaseModelError, MachineError
from lora_studio.inference import flux_files
from lora_studio.inference.blends import digest, label_of, lineage
from lora_studio.inference.requests import argument, base_of, one_of
from lora_studio.lowrank import LowRank

FORMS, DTYPES = ("peft", "diffusers", "kohya", "gguf"), ("float32", "float16", "bfloat16")
LIMITS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
KOHYA = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
EVEN = "the ranks of single layers: all have rank {rank}, the rest is zeros"
FLUX = ("FluxPipeline", "FluxKontextPipeline")
LOST = {
    "peft": [EVEN],
    "diffusers": [EVEN, "the name, notes and recipe of the library"],
    "kohya": [EVEN, "the base's name and revision", "the name, notes and recipe of the library"],
    "gguf": [EVEN, "the base's name and revision", "notes and recipe of the library"],
}


def export(reader, job, request: dict) -> tuple[str, dict]:
    """Write the adapter at `path` to the new file or folder `target` and open it again: modules matched, the worst relative error of a
    layer, bytes, who opened it, and what the form cannot carry."""
    path, target, form = argument(request, "path", str), Path(argument(request, "target", str)), argument(request, "form", str)
    dtype = request.get("dtype") or "float32"
    one_of("form", form, FORMS)
    one_of("dtype", dtype, DTYPES[:2] if form == "gguf" else DTYPES)
    if target.exists():
        raise AdapterError("adapter.target", path=target)
    job.doing = "reading the adapter"
    adapter = adapters.read(path)
    if adapter.card.method in virtual.WORDS:
        raise AdapterError("export.virtual", what=virtual.WORDS[adapter.card.method])
    if adapter.card.method == "dora":
        raise AdapterError("export.dora")
    if adapter.card.method in multiplying.METHODS.values() and adapter.card.format == "peft":
        raise AdapterError("export.multiplies", method=adapter.card.method.upper())
    base = _checked_base(request.get("base") or adapter.card.base, form)
    job.doing = f"writing it as {form}"
    own = lineage({"made": "export", "form": form, "dtype": dtype}, [{"name": label_of(path), "sha256": digest(Path(path)), "weight": 1.0}])
    if form == "gguf":
        told = _gguf(adapter, base, target, dtype, name=str(request.get("name") or ""), lineage=own[LINEAGE])
    else:
        files = adapters.write(adapter, dtype=dtype)
        files[adapters.WEIGHTS] = reheaded(files[adapters.WEIGHTS], metadata=own)
        job.check()
        told = _peft(adapter, files, target, dtype) if form == "peft" else _of_images(adapter, files, base, target, form, dtype)
    rank = max(module.rank for module in adapter.modules.values())
    even = len({module.rank for module in adapter.modules.values()}) == 1
    told["lost"] = [text.format(rank=rank) for text in LOST[form] if not (even and text == EVEN)]
    return "result", {"target": str(target), "form": form, **told}


def _checked_base(given, form: str):
    """The base to read sizes from; one that is nowhere where the form does without. Raises AdapterError."""
    if not given and form == "gguf":
        raise AdapterError("export.base", form=form)
    return base_of(given or "unknown")


def _gguf(adapter, base, target: Path, dtype: str, **said: str) -> dict:
    """By gguf_files, which reads it back itself. Raises StudioError."""
    if pipeline_files.part_of(adapter.card.config):
        raise AdapterError("gguf.family", kind="image model", known=", ".join(gguf_files.ARCHITECTURES))
    folder = bases.fetch(base)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        report = gguf_files.export(adapter, config, target, dtype=dtype, **said)
    except OSError as error:
        raise MachineError("machine.write", path=target, reason=error.strerror or str(error)) from None
    return {"modules": report.modules, "layers": len(adapter.modules), "worst": report.worst, "bytes": report.bytes, "by": "gguf"}


def _peft(adapter, files: dict[str, bytes], target: Path, dtype: str) -> dict:
    """As a folder, read by PEFT before it gets its name."""
    import peft

    def opened(place: Path) -> dict[str, LowRank]:
        config, tensors = peft.PeftConfig.from_pretrained(str(place)), peft.utils.load_peft_weights(str(place), device="cpu")
        names = dialects.split(list(tensors))
        return {
            name: LowRank(tensors[parts["A"]], tensors[parts["B"]], config.lora_alpha / config.r, "conv" if tensors[parts["A"]].ndim > 2 else names.kinds[name])
            for name, parts in names.factors.items()
        }

    return {**_kept(files, target, lambda place: _compared(adapter, opened(place), dtype)), "by": "PEFT"}


def _of_images(adapter, files: dict[str, bytes], base, target: Path, form: str, dtype: str) -> dict:
    """As the one file of an image model's adapter, read by diffusers (or, where its base is not here, by this studio's own reader)."""
    config = json.loads(files[adapters.CONFIG])
    part = pipeline_files.part_of(config)
    if not part:
        raise AdapterError("export.language", form=form)
    data, info = pipeline_files.to_pipeline_file(files[adapters.WEIGHTS], config, part), _info(base)
    if form == "kohya" and info and info.pipeline in FLUX:
        made = flux_files.tensors(adapter.modules, getattr(torch, dtype))
        data = save(made, {"format": "pt", "ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"})
    elif form == "kohya":
        data = _kohya(load(data), adapter, info.pipeline if info else "", part)

    data = reheaded(data, metadata={LINEAGE: read_metadata(files[adapters.WEIGHTS])[LINEAGE]})

    def opened(place: Path) -> dict[str, LowRank]:
        file = place / pipeline_files.NAME
        return _by_pipeline(file, info) if info else adapters.read(file).modules

    told = _kept({pipeline_files.NAME: data}, target, lambda place: _compared(adapter, opened(place), dtype), single=True)
    return {**told, "by": f"diffusers' {info.pipeline}" if info else "this studio only, because the base is not on this machine"}


def _info(base) -> bases.BaseInfo | None:
    """What is known of a pipeline that is on this machine; None of another."""
    try:
        found = bases.inspect(base)
    except BaseModelError:
        return None
    return found if found.folder is not None and found.pipeline else None


def _kohya(tensors: dict[str, torch.Tensor], adapter, pipeline: str, part: str) -> bytes:
    """kohya's names and an alpha for each layer, equal to its rank: the scale is in the factors. Raises AdapterError."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    if part != "unet" or (pipeline and pipeline not in KOHYA):
        raise AdapterError("export.kohya", kind=pipeline or "transformer")
    names = [f"unet.{name}" for name in adapter.modules]
    wide = pipeline == KOHYA[1] if pipeline else dialects.family_of(names, {}) == "Stable Diffusion XL"
    found = convert_state_dict_to_kohya(tensors)
    # diffusers has XL's name for the first text encoder; programs know that of Stable Diffusion 1 and 2 by another.
    renamed = {name if wide else re.sub(r"^lora_te1_", "lora_te_", name): value for name, value in found.items()}
    rank = str(max(module.rank for module in adapter.modules.values()))
    told = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    told["ss_base_model_version"] = "sdxl_base_v1-0" if wide else "sd_v1"
    return save({name: value.float() if name.endswith(".alpha") else value.contiguous() for name, value in renamed.items()}, told)


# ---- reading it back


def _by_pipeline(file: Path, info: bases.BaseInfo) -> dict[str, LowRank]:
    """What a base's own pipeline class makes of a file: what PEFT then holds in each layer of its parts, which have no weights here."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    sizes = bases.sizes_folder(info.folder)
    index, made = json.loads((sizes / "model_index.json").read_text(encoding="utf-8")), {}
    for part, (library, kind) in ((part, row) for part, row in index.items() if isinstance(row, list)):
        if part in ("unet", "transformer") and kind:
            owner = getattr(diffusers, kind)
            with init_empty_weights():
                made[part] = _weightless(owner.from_config(owner.load_config(sizes / part)))
        elif part.startswith("text_encoder") and library == "transformers" and kind:
            owner = getattr(transformers, kind)
            with init_empty_weights():
                made[part] = _weightless(owner(owner.config_class.from_pretrained(sizes / part)))
    pipeline = getattr(diffusers, info.pipeline)(**_parts(getattr(diffusers, info.pipeline), made))
    try:
        pipeline.load_lora_weights(file, adapter_name="read")
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:  # its converters give up like that, as on text encoders in kohya's form without out_proj
        raise AdapterError("export.unread", loader=f"diffusers' {info.pipeline}", reason=(str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")) from None
    found = {}
    for part, model in made.items():
        for name, layer in model.named_modules():
            if "read" in getattr(layer, "lora_A", {}):
                own = name if part in ("unet", "transformer") else f"{part}.{name.removeprefix('text_model.')}"
                A, B = layer.lora_A["read"].weight.detach(), layer.lora_B["read"].weight.detach()
                found[own] = LowRank(A, B, layer.scaling["read"], "conv" if A.ndim > 2 else "linear")
    return found


def _weightless(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose weights have their shapes and take no memory: loaders put an adapter where its layer's weight is."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)
    return model


def _parts(owner: type, made: dict) -> dict:
    """What a pipeline is built of: the parts that are here, and nothing for the others that it asks for."""
    import inspect

    wanted = [name for name, parameter in inspect.signature(owner.__init__).parameters.items() if parameter.default is parameter.empty]
    more = {"requires_safety_checker": False} if "requires_safety_checker" in inspect.signature(owner.__init__).parameters else {}
    return {name: made.get(name) for name in [*wanted, *made] if name != "self"} | more


def _compared(adapter, found: dict[str, LowRank], dtype: str) -> dict:
    """Every layer that was written against what was read back. Raises AdapterError when one is missing, new, or another."""
    found = {name: module for name, module in found.items() if name in adapter.modules or blend.norm(module)}  # FLUX's q, k, v come together
    wrong = next((name for name in [*adapter.modules, *found] if name not in found or name not in adapter.modules), "")
    worst, name = 0.0, wrong
    for layer, module in adapter.modules.items() if not wrong else ():
        apart = blend.difference({layer: found[layer].cast(torch.float64)}, {layer: module.cast(torch.float64)}).overall
        worst, name = max((worst, name), (apart, layer))
    if wrong or not worst <= LIMITS[dtype]:
        raise AdapterError("export.differs", name=adapters.shown(name), what="missing or unknown there" if wrong else f"{worst:.1e} off")
    return {"modules": len(found), "layers": len(adapter.modules), "worst": worst}


def _kept(files: dict[str, bytes], target: Path, look, *, single: bool = False) -> dict:
    """Write beside the target, look at it, and only then give it its name; a failure leaves nothing."""
    place = target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.publish_folder(place, files)
        told = look(place)
        os.replace(place / pipeline_files.NAME if single else place, target)
        durable.sync_folder(target.parent)
    except OSError as error:
        raise MachineError("machine.write", path=target, reason=error.strerror or str(error)) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {**told, "bytes": sum(len(data) for data in files.values())}
