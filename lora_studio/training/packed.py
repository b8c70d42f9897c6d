"""Padding-free batches: documents one after another in one row, each attending to itself only.

A padded batch of ragged documents spends more than half of its work on padding, and a packed row with a dense mask
spends it on the mask. Here the boundaries travel with the batch, and attention runs document by document (one varlen
kernel on a GPU), so the work is that of the real tokens.

    batch = packed.concatenate(documents, device=device)
    with packed.attention(model):
        states = packed.hidden(model, batch)

What cannot be honoured exactly (softcap, sinks, attention dropout, recurrent layers, ...) raises `Unsupported`;
the caller then trains on padded batches.
"""

import contextlib
import contextvars
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lora_studio_packed"
LAYERS = {"full_attention", "sliding_attention", "attention"}
# What modules hand to their attention function and which changes nothing when documents stand apart.
HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "is_causal", "layer_idx", "logits_to_keep", "deterministic",
}  # fmt: skip


class Unsupported(Exception):
    """This model cannot take the fast path; the message says why. Catch it and take the plain path."""


@dataclass(frozen=True)
class Packed:
    """Documents in one row of T tokens.

    `input_ids` and `position_ids` are (1, T), positions restart at 0; `lengths` are tokens per document;
    `boundaries` is (documents + 1,) int32, cumulative, from 0 to T.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    boundaries: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)


@dataclass(frozen=True)
class DocumentMask:
    """Stands where a dense mask would: which documents there are, and how far back a token sees (None: all).

    It travels through the layers as their attention_mask, so it is there again when checkpointing recomputes them,
    and any other attention function that meets it fails loudly instead of mixing documents.
    """

    batch: Packed
    window: int | None = None


_current: contextvars.ContextVar[Packed | None] = contextvars.ContextVar("packed", default=None)


def concatenate(documents: list[Tensor | list[int]], *, device: torch.device | str) -> Packed:
    """Put token ids one after another. ValueError if there is no document or one is empty."""
    rows = [torch.as_tensor(document, dtype=torch.long, device="cpu") for document in documents]
    lengths = tuple(len(row) for row in rows)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"every batch needs documents of at least one token, got lengths {lengths}")
    positions = torch.cat([torch.arange(length) for length in lengths])
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Packed(torch.cat(rows)[None].to(device), positions[None].to(device), lengths, boundaries.to(device))


def join(batches: list[Packed]) -> Packed:
    """Several packed rows as one."""
    if len(batches) == 1:
        return batches[0]
    ids, positions = (torch.cat([getattr(batch, name) for batch in batches], 1) for name in ("input_ids", "position_ids"))
    lengths = tuple(length for batch in batches for length in batch.lengths)
    return Packed(ids, positions, lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device))


def bare(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: nn.Module) -> nn.Module:
    """The part under the head, by `base_model_prefix`. Unsupported if there is none."""
    inner = bare(model)
    found = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
    if found is None:
        raise Unsupported(f"{type(inner).__name__} has no backbone under a known name")
    return found


def hidden(model: nn.Module, batch: Packed, modules: list[nn.Module] | None = None) -> Tensor:
    """Last hidden states (T, hidden) of the backbone, after its final norm. `modules`: what `walk` found."""
    body = backbone(model)
    token = _current.set(batch)
    try:
        with contextlib.nullcontext() if _switched(body) else attention(model, modules):
            output = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        _current.reset(token)
    return output.last_hidden_state[0]


@contextlib.contextmanager
def attention(model: nn.Module, modules: list[nn.Module] | None = None) -> Iterator[None]:
    """Inside, `hidden` attends document by document. `modules`: what `walk` found. Unsupported if this model cannot.

    Leaving restores the model's own attention; a backward pass may run after leaving, also with checkpointing.
    """
    modules = modules or walk(model)
    configs = _configs(modules)
    _refuse(model, configs)
    with _switch(configs), _checkpoints(modules, configs):
        yield


def refuse(model: nn.Module) -> None:
    """Raise Unsupported for what is known beforehand to mix documents or to need more than causal attention."""
    _refuse(model, _configs(walk(model)))


def _refuse(model: nn.Module, configs: list[PreTrainedConfig]) -> None:
    inner, body = bare(model), backbone(model)
    name = type(inner).__name__
    for peft_config in getattr(model, "peft_config", {}).values():
        if getattr(peft_config, "is_prompt_learning", False) or getattr(peft_config, "alora_invocation_tokens", None):
            raise Unsupported("this kind of adapter acts on whole padded rows")
    if getattr(inner, "_is_stateful", False):
        raise Unsupported(f"{name} carries a recurrent state from one document into the next")
    for config in configs:
        other = set(getattr(config, "layer_types", None) or ()) - LAYERS
        if other:
            raise Unsupported(f"{name} has layers of kind {', '.join(sorted(other))}")
        if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
            raise Unsupported(f"{name} is not a causal decoder")
        if getattr(config, "attention_chunk_size", None):
            raise Unsupported(f"{name} attends in chunks")
        if model.training and any(getattr(config, key, None) for key in ("attention_dropout", "attn_pdrop")):
            raise Unsupported(f"{name} has attention dropout")
    can_set = getattr(type(body), "_can_set_attn_implementation", None)
    if not getattr(body, "_supports_attention_backend", False) or (can_set and not can_set()):
        raise Unsupported(f"{name} does not take attention from transformers' registry")


def walk(model: nn.Module) -> list[nn.Module]:
    """The language model and all of its backbone. In a deep adapted model this takes milliseconds, as long as a small step."""
    return [bare(model), *backbone(model).modules()]


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    """Every distinct configuration these modules look into."""
    # By __dict__: a missing attribute of a module is slow to miss.
    found = (module.__dict__.get("config") for module in modules)
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def _switched(body: nn.Module) -> bool:
    return body.config._attn_implementation == NAME


@contextlib.contextmanager
def _switch(configs: list[PreTrainedConfig]) -> Iterator[None]:
    # The internal name: the public setter also writes into sub-configurations, which are listed here themselves.
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


@contextlib.contextmanager
def _checkpoints(modules: list[nn.Module], configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Make checkpointed layers recompute under the same attention, whenever backward comes."""

    def recomputing(original, function, *args):
        def run(*inputs):
            with _switch(configs):
                return function(*inputs)

        return original(run, *args)

    layers = [module for module in modules if module.__dict__.get("gradient_checkpointing")]
    layers = [layer for layer in layers if "_gradient_checkpointing_func" in layer.__dict__]
    before = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, original in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = partial(recomputing, original)
        yield
    finally:
        for layer, original in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = original


def _mask(*args, attention_mask: Tensor | None = None, local_size: int | None = None, **rest) -> DocumentMask:
    """The mask function of the registry: builds nothing, says which documents there are."""
    batch = _current.get()
    if batch is None:
        raise Unsupported("a packed batch goes through packed.hidden")
    if attention_mask is not None or rest.get("use_vmap") or rest.get("allow_is_bidirectional_skip"):
        raise Unsupported("this model asks for more than a causal mask")
    return DocumentMask(batch, local_size)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: DocumentMask | None, **options
) -> tuple[Tensor, None]:
    """The attention function of the registry. query (1, heads, T, d), key and value (1, groups, T, d).

    Returns (1, T, heads, d). Unsupported for any option it does not know.
    """
    scale, dropout = options.pop("scaling", None), options.pop("dropout", 0.0)
    window = options.pop("sliding_window", None)
    _refuse_call(module, attention_mask, dropout, options)
    batch = attention_mask.batch
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == sum(batch.lengths):
        raise Unsupported(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} are not the packed row")
    window = attention_mask.window if window is None else window
    mask = DocumentMask(batch, None if window is None or window >= batch.longest else window)
    kernel = _kernel(query, value, mask.window) or by_document
    return kernel(query, key, value, mask, scale), None


def _refuse_call(module: nn.Module, mask: DocumentMask | None, dropout: float, options: dict) -> None:
    if not isinstance(mask, DocumentMask):
        raise Unsupported(f"{type(module).__name__} gave no document boundaries to its attention")
    unknown = [key for key, given in options.items() if given is not None and key not in HARMLESS]
    if unknown:
        raise Unsupported(f"{type(module).__name__} asks for {', '.join(unknown)}")
    causally = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causally is None else causally):
        raise Unsupported(f"{type(module).__name__} is not causal")
    if dropout:
        raise Unsupported(f"{type(module).__name__} has attention dropout {dropout}")


def by_document(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None) -> Tensor:
    """Causal attention of each document to itself: (1, heads, T, d) and (1, groups, T, d) to (1, T, heads, d).

    A token sees itself and the `mask.window - 1` tokens before it (None: all before it).
    """
    lengths = mask.batch.lengths
    if key.shape[1] != query.shape[1]:
        # Repeated rather than enable_gqa: on the CPU that option leaves the fast kernel.
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        outputs.append(_one_document(q, k, v, scale, mask.window).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _one_document(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of one document, (1, heads, L, d)."""
    length, device = query.shape[2], query.device
    if window is not None and length > window:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=_band(length, window, device), scale=scale)
    if device.type == "cpu" and query.dtype == torch.bfloat16 and length <= 512 and query.requires_grad:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _Explicit.apply(query[0], key[0], value[0], scale)[None]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


class _Explicit(Function):
    """Causal attention (heads, L, d) with its probabilities kept.

    On a CPU the backward of the fused bfloat16 kernel runs at a tenth of the speed of matrix products; for documents
    of a few hundred tokens four products and a softmax take half of its time. Errors are those of eager attention.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale):
        bias = _future(query.shape[1], query.dtype)
        chances = torch.softmax(torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale), -1)
        ctx.save_for_backward(query, key, value, chances)
        ctx.scale = scale
        return chances @ value

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, chances = ctx.saved_tensors
        dchances = gradient @ value.transpose(1, 2)
        dscores = torch.ops.aten._softmax_backward_data(dchances, chances, -1, chances.dtype)
        dquery, dkey = (dscores @ key).mul_(ctx.scale), (dscores.transpose(1, 2) @ query).mul_(ctx.scale)
        return dquery, dkey, chances.transpose(1, 2) @ gradient, None


def _future(length: int, dtype: torch.dtype) -> Tensor:
    """(length, length): -inf where a token would see a later one."""
    return _future_block(-(-length // 128) * 128, dtype)[:length, :length]


@lru_cache(maxsize=8)
def _future_block(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype).triu_(1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Who sees whom in one document, (length, length) bool."""
    positions = torch.arange(length, device=device)
    back = positions[:, None] - positions[None, :]
    return (back >= 0) & (back < window)


def _kernel(query: Tensor, value: Tensor, window: int | None):
    """A varlen kernel that fits these tensors, or None for the loop over documents."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return None
    if torch.version.hip or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    parameters = _varlen_parameters()
    if parameters and (window is None or "window_size" in parameters):
        return _torch_varlen
    return _flash_varlen if _flash_attention() is not None else None


@cache
def _varlen_parameters() -> frozenset[str]:
    """The parameters of this torch's varlen attention; empty where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _flash_attention():
    """The flash-attn package's varlen function, or None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _rows(*tensors: Tensor) -> list[Tensor]:
    """(1, heads, T, d) to (T, heads, d), as the kernels want them."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None) -> Tensor:
    """torch.nn.attention.varlen; its options grew from release to release, so only those it has are given."""
    from torch.nn.attention.varlen import varlen_attn

    has, options, batch = _varlen_parameters(), {}, mask.batch
    q, k, v = _rows(query, key, value)
    if "window_size" in has:
        options["window_size"] = (-1 if mask.window is None else mask.window - 1, 0)
    if "is_causal" in has:
        options["is_causal"] = True
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in has:
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    if scale is not None:
        if "scale" in has:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
    ends = batch.boundaries
    return varlen_attn(q, k, v, ends, ends, batch.longest, batch.longest, **options)[None]


def _flash_varlen(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float | None) -> Tensor:
    """The same through the flash-attn package."""
    batch, sides = mask.batch, (-1, -1) if mask.window is None else (mask.window - 1, 0)
    q, k, v = _rows(query, key, value)
    ends, options = batch.boundaries, {"causal": True, "softmax_scale": scale, "window_size": sides}
    return _flash_attention()(q, k, v, ends, ends, batch.longest, batch.longest, **options)[None]


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
