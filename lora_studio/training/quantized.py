"""QLoRA: a language model whose frozen weights are kept in 8 or 4 bits, on a GPU and on a CPU. Dettmers et al. 2023, arXiv 2305.14314.

4 bits are nf4 with double quantisation. On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights in place at the first evaluation;
after that a training step gets no gradient through the layer, and merges read garbage. The layers are told not to.
"""

import torch
import transformers

KNOWN = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def options(quantize: str, dtype: torch.dtype, device: torch.device) -> dict:
    """What `from_pretrained` is told; nothing for a base that is not quantised."""
    if quantize == "none":
        return {}
    more = {"bnb_4bit_compute_dtype": dtype} if quantize == "4bit" else {}
    return {"quantization_config": transformers.BitsAndBytesConfig(**KNOWN[quantize], **more), "device_map": {"": str(device)}}


def keep_trainable(model: torch.nn.Module) -> torch.nn.Module:
    """Forbid that weights are repacked for inference, which a model that still learns does not survive."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model
