"""Where the repeated blocks of an image base lie and how they run: in fewer bits, in main memory until their turn, or compiled."""

import torch

from lora_studio.errors import BaseModelError
from lora_studio.spec import Compute

# Sizes of pictures, training and judging each make a compiled block of their own; torch stops at 8 by default.
MOST_COMPILED = 64


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a diffusers model, in the order in which it declares them; without the few that refine its input (Lumina,
    Z-Image), because diffusers does not checkpoint those."""
    names = set(getattr(model, "_repeated_blocks", None) or ())
    names = names or {name for name in getattr(model, "_no_split_modules", None) or () if name.endswith("Block")}
    return [block for name, block in model.named_modules() if type(block).__name__ in names and "refiner" not in name]


def options(quantize: str, dtype: torch.dtype, device: torch.device) -> dict:
    """What loading a part takes so that its linear layers are kept in 8 bits (LLM.int8) or 4 (NF4, as QLoRA has it, Dettmers et al. 2023)."""
    if quantize == "none":
        return {}
    import diffusers

    known = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}}
    return {"quantization_config": diffusers.BitsAndBytesConfig(**known[quantize]), "device_map": {"": str(device)}}


def encoder_options(encoders: str, names: list[str]) -> dict:
    """What loading a pipeline takes so that its text encoders are kept as compute.encoders says."""
    if encoders != "4bit":
        return {}
    from diffusers.quantizers import PipelineQuantizationConfig

    kept = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": PipelineQuantizationConfig(quant_backend="bitsandbytes_4bit", quant_kwargs=kept, components_to_quantize=names)}


def place(model: torch.nn.Module, compute: Compute, device: torch.device, name: str) -> "Swap | None":
    """Put a base on the device, but for the blocks that stay in main memory. Raises BaseModelError."""
    if compute.block_swap:
        return Swap(model, compute.block_swap, device, name)
    if compute.quantize == "none":  # what is quantized was put there while it was loaded, and may not be moved
        model.to(device)
    return None


def compiled(model: torch.nn.Module) -> int:
    """Compile each block in place, so that no name changes. Returns how many there are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
    found = blocks_of(model)
    for block in found:
        block.compile(dynamic=False)  # what was seen before must not change what is computed: a run that goes on has seen less
    return len(found)


class Swap:
    """The last blocks of a base, kept in main memory; each is copied to the device for its turn, where one of them is at a time.

    A frozen weight is never copied back. With gradient checkpointing the backward pass runs each block's forward again, so its hook
    fetches it again; what autograd still holds of the one before stays alive until it has been used. Adapters stay on the device.
    """

    def __init__(self, model: torch.nn.Module, count: int, device: torch.device, name: str):
        blocks = blocks_of(model)
        if count > len(blocks):
            raise BaseModelError("image.blocks", id=name, count=len(blocks), value=count)
        # The last ones: after the forward pass the very last is there already, and the backward pass begins with it.
        self.blocks, self.device, self.resident, self.moves = blocks[-count:], device, None, 0
        self.held: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        inside = {id(tensor) for block in self.blocks for tensor in (*block.parameters(), *block.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)

    def adopt(self) -> None:
        """Once adapters are attached: put what is trained on the device, and let each block come for its turn."""
        for block in self.blocks:
            self.held[block] = []
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.requires_grad:
                    tensor.data = tensor.data.to(self.device)
                    continue
                tensor.data = _pinned(tensor.data, self.device)
                self.held[block].append((tensor, tensor.data))
            block.register_forward_pre_hook(self._enter)

    def _enter(self, block: torch.nn.Module, _given) -> None:
        if block is self.resident:
            return
        self.leave()
        for tensor, kept in self.held[block]:
            tensor.data = kept.to(self.device, non_blocking=True, copy=True)
        self.resident, self.moves = block, self.moves + 1

    def leave(self) -> None:
        """Let go of the block that is on the device."""
        for tensor, kept in self.held.get(self.resident, ()):
            tensor.data = kept
        self.resident = None


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor in memory that is copied to the card fast; as it is where there is no more of that."""
    try:
        return tensor.pin_memory() if device.type == "cuda" else tensor
    except RuntimeError:
        return tensor
