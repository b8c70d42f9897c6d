"""Several LoRA adapters on one base in one pass: each row goes through the adapter it belongs to.

    router = Router()
    routed.install(model, router, fast=True)
    with router.over([("v0", 120), ("v1", 80)]):      # 120 tokens of v0's rows, then 80 of v1's
        loss_0, loss_1 = ...                          # the backward pass belongs inside too: checkpointing computes layers again

The base's product is one for all rows; what an adapter adds to its rows, and the gradients it gets, are those it would have alone.
Rows of different adapters never meet, so a NaN stays with its own.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import Function

from lora_studio.training import fused


class Apart(Exception):
    """This model does not keep rows in their order along the leading axis; the message says where."""


class Router(threading.local):
    """Whose rows are going through the model on this thread: shares of the leading axis, in order."""

    def __init__(self):
        self.shares: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def over(self, shares: list[tuple[str, int]]) -> Iterator[None]:
        """Inside, so many rows (or tokens of a packed row) belong to each of these adapters."""
        before, self.shares = self.shares, shares
        try:
            yield
        finally:
            self.shares = before

    def only(self, adapter: str):
        """Inside, all rows belong to one adapter."""
        return self.over([(adapter, 1)])

    def spans(self, rows: int) -> list[tuple[str, int, int]]:
        """(adapter, from, to) over so many rows: a layer may have several for each of the shares' (tokens of a picture). Raises Apart."""
        total = sum(count for _, count in self.shares)
        if not total or rows % total:
            raise Apart(f"a layer has {rows} rows for {total}")
        found, start = [], 0
        for adapter, count in self.shares:
            end = start + count * (rows // total)
            found.append((adapter, start, end))
            start = end
        return found


def install(model: nn.Module, router: Router, *, fast: bool) -> None:
    """Let every adapted layer ask the router. `fast`: with the fused paths of `fused.py`. Raises Apart for a layer that is neither linear
    nor a convolution."""
    if fast:
        fused.remove(model)
        fused.install(model, partial(Siblings, router))
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer) or "forward" in layer.__dict__:
            continue
        if type(layer) not in (lora.Linear, lora.Conv2d):
            raise Apart(f"{name} is a {type(layer.base_layer).__name__}")
        layer.forward = partial(_plain, router, layer)


def _plain(router: Router, layer, x: Tensor, *args, **kwargs) -> Tensor:
    """What PEFT's own layer gives for each adapter's rows."""
    flat = type(layer) is lora.Linear
    x = x if flat else _Laid.apply(x)
    result = layer.base_layer(x, *args, **kwargs)
    rows, out = (x.reshape(-1, x.shape[-1]), result.reshape(-1, result.shape[-1])) if flat else (x, result)
    parts = []
    for adapter, start, end in router.spans(len(rows)):
        part = out[start:end]
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            part = part + up(down(rows[start:end].to(down.weight.dtype))) * layer.scaling[adapter]
        parts.append(part.to(result.dtype))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not flat and result.is_contiguous(memory_format=torch.channels_last):
        return whole.contiguous(memory_format=torch.channels_last)  # what comes after sums in another order otherwise
    return whole.view(result.shape)


class _Laid(Function):
    """A picture whose gradient lies in memory as a convolution leaves it, though it was added up from slices: normalization before it
    would sum another order, and the last bits would tell that there are others."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous(memory_format=torch.channels_last)


class Siblings(fused.Siblings):
    """LoRA linears on one input, for the rows of several adapters."""

    def __init__(self, router: Router, members: list[lora.Linear]):
        super().__init__(members)
        self.router, self.known = router, {}

    def plan(self, layer: lora.Linear):
        """((weight, bias), {adapter: (scale, A, B)}) of a plain LoRA linear; None if it is anything else. Asked once: no adapter of a sweep
        comes, goes or is merged."""
        if layer not in self.known:
            self.known[layer] = self._plan(layer)
        return self.known[layer]

    def _plan(self, layer: lora.Linear):
        base, found = layer.base_layer, {}
        for adapter in layer.lora_A:
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            if type(down) is not nn.Linear or down.bias is not None or up.bias is not None:
                return None
            found[adapter] = (float(layer.scaling[adapter]), down.weight, up.weight)
        plain = type(base) is nn.Linear and not layer.merged_adapters and not layer.lora_variant and not base.weight.requires_grad
        return ((base.weight, base.bias), found) if plain else None

    def run(self, x: Tensor, plans: list) -> list[Tensor]:
        """The linears on x (..., in); outputs (..., out_i)."""
        rows, routes, factors = x.reshape(-1, x.shape[-1]), [], []
        for adapter, start, end in self.router.spans(len(rows)):
            members = [(number, *found[adapter]) for number, (_, found) in enumerate(plans) if adapter in found]
            if members:
                routes.append((start, end, [(number, scale) for number, scale, _, _ in members]))
                factors += [factor for _, _, *pair in members for factor in pair]
        outputs = _Routed.apply(rows, tuple(base for base, _ in plans), routes, *factors)
        return [output.view(*x.shape[:-1], -1) for output in outputs]


class _Routed(Function):
    """Several linears on one input x (T, in), with LoRA on spans of it: y_i = x W_i' + bias_i, and for each route (from, to, its linears
    with their scales) y_i[from:to] += s_i (x[from:to] A_i') B_i'. `factors` are A, B of each linear of each route in turn.

    What a span adds and gets is computed as `fused._Lora` does it for a run of its own.
    """

    @staticmethod
    def forward(ctx, x, linears, routes, *factors):
        outputs = [F.linear(x, weight, bias) for weight, bias in linears]
        given, saved, ranks = iter(factors), [x], []
        for start, end, members in routes:
            pairs = [(next(given).to(x.dtype), next(given).to(x.dtype)) for _ in members]
            ranks.append([len(down) for down, _ in pairs])
            down = pairs[0][0] if len(pairs) == 1 else torch.cat([down for down, _ in pairs])
            low = x[start:end] @ down.t()
            for (number, scale), (_, up), part in zip(members, pairs, low.split(ranks[-1], 1), strict=True):
                outputs[number][start:end].addmm_(part, up.t(), alpha=scale)
            saved += [low, down, *(up for _, up in pairs)]
        ctx.save_for_backward(*saved)
        ctx.linears, ctx.routes, ctx.ranks, ctx.masters = linears, routes, ranks, [factor.dtype for factor in factors]
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        x, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        dx, factors, rest = torch.zeros_like(x) if wanted else None, [], iter(saved)
        for (start, end, members), ranks in zip(ctx.routes, ctx.ranks, strict=True):
            low, down = next(rest), next(rest)
            scaled, dups = low.new_empty(low.shape), []
            for (number, scale), part, into in zip(members, low.split(ranks, 1), scaled.split(ranks, 1), strict=True):
                gradient = gradients[number][start:end]
                torch.mm(gradient, next(rest), out=into).mul_(scale)
                dups.append((gradient.t() @ part, scale))
            for ddown, (dup, scale) in zip((scaled.t() @ x[start:end]).split(ranks), dups, strict=True):
                factors += [ddown.to(ctx.masters[len(factors)]), dup.to(ctx.masters[len(factors) + 1]).mul_(scale)]
            if wanted:
                torch.mm(scaled, down, out=dx[start:end])
        if wanted:
            for (weight, _), gradient in zip(ctx.linears, gradients, strict=True):
                dx.addmm_(gradient, weight)
        return dx, None, None, *factors
