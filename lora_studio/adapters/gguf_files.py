"""An adapter as the GGUF file that llama.cpp loads beside a converted base (`llama-cli -m base.gguf --lora adapter.gguf`).

The file is written and read with the `gguf` package. Where llama.cpp's converter of a base reorders rows, the adapter's B must be reordered
alike: for the families whose rotary embedding it turns from halves into neighbours, the rows of q and k of each head.
"""

import os
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from lora_studio import durable
from lora_studio.adapters.card import Adapter
from lora_studio.adapters.files import shown
from lora_studio.errors import AdapterError

# transformers' model_type: llama.cpp's architecture, and whether its converter reorders q and k.
ARCHITECTURES = {
    "llama": ("LLAMA", True), "mistral": ("LLAMA", True), "smollm3": ("SMOLLM3", True), "qwen2": ("QWEN2", False), "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False), "gemma2": ("GEMMA2", False), "gemma3_text": ("GEMMA3", False), "phi3": ("PHI3", False),
}  # fmt: skip

LINEAGE_KEY = "lora_studio.lineage"  # what the adapter was made of, as JSON


@dataclass(frozen=True)
class Report:
    """What came of an export, as read back from the file: modules matched, the worst relative error of one, bytes."""

    modules: int
    worst: float
    bytes: int


def export(adapter: Adapter, config: dict, target: Path, *, dtype: str = "float32", name: str = "", lineage: str = "") -> Report:
    """Write an adapter of a language model whose config.json is `config` to the new file `target`, whole or not at all, and read it back.
    dtype is float32 or float16. Raises AdapterError for what the format cannot carry, and when what is read back is something else."""
    import gguf
    import numpy

    known, reorders = _architecture(config)
    if target.exists():
        raise AdapterError("adapter.target", path=target)
    if adapter.extras:
        raise AdapterError("gguf.extras", name=shown(next(iter(adapter.extras))))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, known), int(config["num_hidden_layers"]))
    rank = max(module.rank for module in adapter.modules.values())
    part = target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, known)])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # the scale is in the factors
        writer.add_string(gguf.Keys.General.NAME, name or "adapter")
        if lineage:
            writer.add_string(LINEAGE_KEY, lineage)
        for layer, module in adapter.modules.items():
            place = _place(names, layer, module)
            even = module.balanced().padded(rank)
            B = even.B[_order(config, layer, len(even.B))] if reorders else even.B
            for end, tensor in (("lora_a", even.A), ("lora_b", B)):
                writer.add_tensor(f"{place}.weight.{end}", numpy.ascontiguousarray(tensor.numpy().astype(dtype)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        report = _compared(adapter, config, part, names, reorders)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
        durable.sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
    return report


def _architecture(config: dict) -> tuple[str, bool]:
    kind = str(config.get("model_type", ""))
    if kind not in ARCHITECTURES:
        raise AdapterError("gguf.family", kind=kind or "image model", known=", ".join(ARCHITECTURES))
    return ARCHITECTURES[kind]


def _place(names, layer: str, module) -> str:
    """What llama.cpp calls a layer. Raises AdapterError."""
    place = names.get_name(layer) or names.get_name(f"model.{layer}")
    if place is None or module.kind != "linear":
        raise AdapterError("gguf.layer", name=shown(layer))
    return place


def _order(config: dict, layer: str, rows: int):
    """The order of the rows of q and k in a converted base: of each head the first half and the second half in turns."""
    import torch

    word = layer.rsplit(".", 1)[-1]
    if word not in ("q_proj", "k_proj"):
        return torch.arange(rows)
    heads = int(config["num_attention_heads"])
    heads = heads if word == "q_proj" else int(config.get("num_key_value_heads") or heads)
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _compared(adapter: Adapter, config: dict, path: Path, names, reorders: bool) -> Report:
    """The file as the package reads it, against the adapter: every module there, and how far each is from what it was."""
    import gguf
    import torch

    from lora_studio import blend
    from lora_studio.lowrank import LowRank

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    worst = 0.0
    for layer, module in adapter.modules.items():
        place = _place(names, layer, module)
        A, B = tensors.pop(f"{place}.weight.lora_a"), tensors.pop(f"{place}.weight.lora_b")
        if reorders:
            B = B[torch.argsort(_order(config, layer, len(B)))]
        there = LowRank(A, B, alpha / len(A))
        size = blend.norm(module)
        apart = blend.norm(blend.stack([{"x": there}, {"x": module}], [1.0, -1.0])["x"])
        worst = max(worst, apart / size if size else sqrt(apart))
    if tensors or not worst < 1e-2:
        raise AdapterError("gguf.differs", worst=worst, name=shown(next(iter(tensors), "")))
    return Report(len(adapter.modules), worst, path.stat().st_size)
