"""Adapters for llama.cpp: the names, the order of rows and the strength that its own converter gives the base."""

import json

import numpy
import pytest
import torch

from lora_studio import adapters
from lora_studio.adapters import gguf_files
from lora_studio.errors import AdapterError
from lora_studio.lowrank import LowRank
from tests import tiny

ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def of_base(tmp_path, kind="llama", **changes):
    base = tiny.write_base(tmp_path / kind, kind, **changes)
    files = tiny.adapter_files(base, seed=1, ends=ENDS)
    return base, json.loads((base / "config.json").read_text()), adapters.read(files)


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """How llama.cpp's converter of a base reorders the rows of q and k (LlamaModel.permute, written down from its definition)."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def rotated(x: torch.Tensor, angles: torch.Tensor, *, neighbours: bool) -> torch.Tensor:
    """Rotary embedding of one head (d,): of halves, as transformers has it, or of neighbours, as llama.cpp has it for this family."""
    a, b = (x[0::2], x[1::2]) if neighbours else x.chunk(2)
    turned = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.stack(turned, dim=1).flatten() if neighbours else torch.cat(turned)


@pytest.mark.parametrize(("kind", "arch", "reorders"), [("llama", "llama", True), ("mistral", "llama", True), ("qwen3", "qwen3", False)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_file_holds_the_update_of_the_converted_base(tmp_path, kind, arch, reorders, dtype):
    import gguf

    base, config, adapter = of_base(tmp_path, kind)
    told = gguf_files.export(adapter, config, tmp_path / "out.gguf", dtype=dtype, name="mine")
    assert told.modules == 14 and told.worst < (1e-6 if dtype == "float32" else 2e-3)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: reader.get_field(name).contents() for name in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")}
    tensors = {tensor.name: torch.from_numpy(numpy.array(tensor.data)).double() for tensor in reader.tensors}
    assert fields == {"general.architecture": arch, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 3.0}
    assert len(tensors) == 28
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, module in adapter.modules.items():
        _, _, number, _, word = name.split(".")
        A, B = (tensors[f"blk.{number}.{short[word]}.weight.lora_{part}"] for part in "ab")
        meant = module.cast(torch.float64).delta()
        if reorders and word in ("q_proj", "k_proj"):
            meant = permuted(meant, config["num_attention_heads" if word == "q_proj" else "num_key_value_heads"])
        assert (3.0 / len(A) * B @ A - meant).norm() < (1e-6 if dtype == "float32" else 2e-3) * meant.norm()


def test_the_order_of_rows_makes_both_kinds_of_rotary_embedding_agree():
    draw = torch.Generator().manual_seed(0)
    W, x, angles = torch.randn(16, 6, generator=draw), torch.randn(6, generator=draw), torch.randn(4, generator=draw)
    config = {"num_attention_heads": 2}
    turned = W[gguf_files._order(config, "model.layers.0.self_attn.q_proj", 16)]
    for head in range(2):
        ours = rotated((W @ x)[8 * head : 8 * head + 8], angles, neighbours=False)
        theirs = rotated((turned @ x)[8 * head : 8 * head + 8], angles, neighbours=True)
        assert torch.allclose(torch.cat([theirs[0::2], theirs[1::2]]), ours, atol=1e-6)


def test_what_the_format_cannot_carry_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    base, config, adapter = of_base(tmp_path)
    head = adapters.with_modules(adapter.card, {"model.embed_tokens": LowRank(torch.randn(2, 261), torch.randn(32, 2), 1.0, "embedding")})
    cases = [
        (lambda: gguf_files.export(adapter, {**config, "model_type": "mamba"}, tmp_path / "x.gguf"), "this base is of the kind mamba"),
        (lambda: gguf_files.export(adapter, {}, tmp_path / "x.gguf"), "of the kind image model"),
        (lambda: gguf_files.export(head, config, tmp_path / "x.gguf"), "model.embed_tokens is no layer"),
        (lambda: gguf_files.export(adapters.Adapter(adapter.modules, {"score.weight": torch.ones(2)}, adapter.card), config, tmp_path / "x.gguf"), "holds score.weight whole"),
        (lambda: gguf_files.export(adapter, config, base), "is there already|exists"),
    ]
    for act, said in cases:
        with pytest.raises(AdapterError, match=said):
            act()
    whole = gguf_files._order
    calls = []

    def wrong(*given):
        calls.append(given)
        return whole(*given) if len(calls) > 4 else whole(*given).flip(0)

    monkeypatch.setattr(gguf_files, "_order", wrong)
    with pytest.raises(AdapterError, match="What was read back differs"):
        gguf_files.export(adapter, config, tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]
