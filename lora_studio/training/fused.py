"""The fast paths of training, each proven equal to the plain one by `tests/training/test_fused.py`.

    fused.linear_cross_entropy    the loss of a frozen head, without keeping its logits
    fused.install                 LoRA linears, RMSNorm and SwiGLU with hand-written backward passes
    fused.self_check              how far the fast loss is from the model's own, on this very model
    fused.keep_memory             no page faults for the same buffers step after step

`install` touches only what it recognises (PEFT's plain linear by exact type, norms and gated layers by having the very bytecode of
Llama's), checks the state again at every call, and leaves the rest (dropout, DoRA, merged or disabled adapters, ...) to the plain forward.
"""

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from threading import get_ident

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import Function
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lora_studio.training import packed
from lora_studio.training.packed import Unsupported

# Children that attention and gated layers call with one and the same input; each call checks that it is so.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# The loss


class _LinearCrossEntropy(Function):
    """Loss and its gradient in one pass: the head is frozen, so nothing is left for the backward but a scale."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = hidden.new_zeros((), dtype=wide)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # The same buffers for every chunk: fresh ones of this size cost more in page faults than the softmax itself.
        scores = hidden.new_empty((min(rows, len(hidden)), len(weight)))
        exact = scores if scores.dtype == wide else torch.empty_like(scores, dtype=wide)
        chances = torch.empty_like(exact)
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows], labels[start : start + rows, None]
            z, x, p = (buffer[: len(part)] for buffer in (scores, exact, chances))
            torch.mm(part, weight.t(), out=z)
            if x is not z:
                x.copy_(z)
            torch.softmax(x, -1, out=p)
            # log of the normalizer = top - log p(top): the largest probability never underflows, the label's may.
            loss += (x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log() - x.gather(-1, target)).sum()
            if gradient is not None:
                p.scatter_add_(-1, target, p.new_full(target.shape, -1.0))
                torch.mm(p if z.dtype == wide else z.copy_(p), weight, out=gradient[start : start + rows])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[label], a float32 scalar (float64 for float64 input).

    hidden (N, d), weight (V, d) frozen, labels (N,) in 0..V-1; `chunk` rows are scored at a time, and no (N, V)
    tensor exists at any moment. Unsupported for a bias or a trainable weight. The idea is that of cut cross-entropy
    (Wijmans et al., arXiv 2411.09009) without its kernels.
    """
    if bias is not None:
        raise Unsupported("the head has a bias")
    if weight.requires_grad:
        raise Unsupported("the head is trained")
    if torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != weight.dtype:
        raise Unsupported(f"hidden states are {hidden.dtype} and the head is {weight.dtype}")
    if chunk is None:
        # On the CPU 16 MiB of float32 stay near the caches; a GPU wants larger products.
        elements = 2**22 if hidden.device.type == "cpu" else 2**26
        chunk = max(16, elements // len(weight) // 16 * 16)
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk)


def head_weight(model: nn.Module) -> Tensor:
    """The (V, d) weight of a head that is nothing but a frozen matrix. Unsupported for any other head."""
    inner = packed.bare(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Unsupported(f"the head is a {type(head).__name__}")
    if head.bias is not None:
        raise Unsupported("the head has a bias")
    if head.weight.requires_grad:
        raise Unsupported("the head is trained")
    config = inner.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1)):
        if getattr(config, name, neutral) not in (None, neutral):
            raise Unsupported(f"the head has {name}")
    return head.weight


# LoRA linears


class _Lora(Function):
    """Several LoRA linears on one input x (T, in): y_i = x W_i' + bias_i + s_i (x A_i') B_i'.

    One product gives every x A_i', and the gradients for x add up inside the products. `plan` holds (weight, bias,
    scale) per linear; `factors` are A_0, B_0, A_1, B_1, ... in their master dtype.
    """

    @staticmethod
    def forward(ctx, x, plan, *factors):
        downs = [a.to(x.dtype) for a in factors[0::2]]
        ups = [b.to(x.dtype) for b in factors[1::2]]
        ranks = [len(a) for a in downs]
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        low = x @ down.t()
        outputs = []
        for (weight, bias, scale), up, part in zip(plan, ups, low.split(ranks, 1), strict=True):
            outputs.append(F.linear(x, weight, bias).addmm_(part, up.t(), alpha=scale))
        ctx.save_for_backward(x, low, down, *ups)
        ctx.plan, ctx.ranks, ctx.masters = plan, ranks, [factor.dtype for factor in factors]
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        x, low, down, *ups = ctx.saved_tensors
        scaled, dups = low.new_empty(low.shape), []
        for (_, _, scale), up, gradient, part, into in zip(
            ctx.plan, ups, gradients, low.split(ctx.ranks, 1), scaled.split(ctx.ranks, 1), strict=True
        ):
            torch.mm(gradient, up, out=into).mul_(scale)
            dups.append(gradient.t() @ part)
        ddowns = (scaled.t() @ x).split(ctx.ranks)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = scaled @ down
            for (weight, _, _), gradient in zip(ctx.plan, gradients, strict=True):
                dx.addmm_(gradient, weight)
        factors = []
        for (_, _, scale), ddown, dup, master in zip(ctx.plan, ddowns, dups, ctx.masters[1::2], strict=True):
            factors += [ddown.to(ctx.masters[0]), dup.to(master).mul_(scale)]
        return dx, None, *factors


def _linear_plan(module: lora.Linear):
    """(weight, bias, scale), A and B of a plain LoRA linear as it stands now; None if it is anything else."""
    if module._disable_adapters or module.merged_adapters or len(module.active_adapters) != 1:
        return None
    adapter = module.active_adapters[0]
    if adapter not in module.lora_A or module.lora_variant or module.fan_in_fan_out:
        return None
    base, down, up = module.base_layer, module.lora_A[adapter], module.lora_B[adapter]
    dropout = module.lora_dropout[adapter]
    quiet = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p == 0)
    linear = all(type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in (base, down, up))
    if not quiet or not linear or down.bias is not None or up.bias is not None:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return (base.weight, base.bias, float(module.scaling[adapter])), down.weight, up.weight


def _apply_lora(x: Tensor, plans: list) -> list[Tensor]:
    """Run LoRA linears that share x (..., in); outputs (..., out_i)."""
    rows = x.reshape(-1, x.shape[-1])
    factors = [factor for _, down, up in plans for factor in (down, up)]
    outputs = _Lora.apply(rows, tuple(plan for plan, _, _ in plans), *factors)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


def _takes(x: Tensor, plan) -> bool:
    return plan is not None and x.dtype == plan[0][0].dtype and not torch.is_autocast_enabled(x.device.type)


class Siblings:
    """LoRA linears whose parent calls them one after another with the same input: the first call runs them all.

    A waiting output is handed out only on the same thread, for the same tensor, unchanged, in the same grad mode. Members that turn
    out to be called with other inputs go on alone. `plan` and `run` are what `routed.py` does in its own way.
    """

    def plan(self, module: lora.Linear):
        return _linear_plan(module)

    def run(self, x: Tensor, plans: list) -> list[Tensor]:
        return _apply_lora(x, plans)

    def __init__(self, members: list[lora.Linear]):
        self.members, self.turns = members, {}  # of each thread: what was given, and the outputs that wait

    def __call__(self, module: lora.Linear, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or x.is_inference():
            return self._alone(module, x, *args, **kwargs)
        now = (x, x._version, torch.is_grad_enabled())
        given, waiting = self.turns.pop(get_ident(), (None, {}))
        if module in waiting and given[0] is x and given[1:] == now[1:]:
            output = waiting.pop(module)
            if waiting:
                self.turns[get_ident()] = now, waiting
            return output
        if waiting:  # somebody was not called, or with another input: not siblings after all
            self.members = []
        plans = [self.plan(member) for member in self.members]
        if len(plans) < 2 or not all(_takes(x, plan) for plan in plans):
            return self._alone(module, x)
        outputs = dict(zip(self.members, self.run(x, plans), strict=True))
        output = outputs.pop(module)
        self.turns[get_ident()] = now, outputs
        return output

    def _alone(self, module: lora.Linear, x: Tensor, *args, **kwargs) -> Tensor:
        plan = None if args or kwargs else self.plan(module)
        if _takes(x, plan):
            return self.run(x, [plan])[0]
        return type(module).forward(module, x, *args, **kwargs)


# Norms and gated layers


class _Norm(Function):
    """weight * (x / rms(x)) with a frozen weight; x (..., d). Keeps x and 1/rms instead of three wide copies."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        wide = (gradient * weight).float()
        shared = torch.linalg.vecdot(wide, normed).unsqueeze(-1).div_(-x.shape[-1])
        return wide.addcmul_(normed, shared).mul_(inverse).to(x.dtype), None, None


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    weight = module.weight
    if weight.requires_grad or weight.dtype != x.dtype or x.dtype == torch.float64:
        return type(module).forward(module, x)
    return _Norm.apply(x, weight, module.variance_epsilon)


class _SwiGLU(Function):
    """silu(gate) * up, both (..., d): keeps its two inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient * up, gate), dup


def _gated(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


# Putting them in, taking them out


class _Forward(partial):
    """What stands in `module.__dict__["forward"]` while a fast path is installed."""


def _put(module: nn.Module, function) -> bool:
    """Install `function` as this module's forward unless something else already stands there."""
    if "forward" in module.__dict__:
        return False
    module.forward = _Forward(function, module)
    return True


def _does(module: nn.Module, known: type) -> bool:
    """Whether this module's forward is, instruction by instruction, that of `known`."""
    forward, other = getattr(type(module).forward, "__code__", None), known.forward.__code__
    parts = ("co_code", "co_names", "co_consts", "co_varnames", "co_freevars")
    return forward is not None and all(getattr(forward, part) == getattr(other, part) for part in parts)


def _is_plain(module: nn.Module | None, siblings) -> bool:
    return type(module) is lora.Linear and siblings([module]).plan(module) is not None


def install(model: nn.Module, siblings=Siblings) -> dict[str, int]:
    """Put the fast paths into every module they fit; returns how many of each kind, for the log. Parameters, state_dict keys and
    the modules themselves stay as they are. `remove` takes it all out again."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        for names in TOGETHER:
            joined = _join(module, names, siblings)
            counts["linear"] += joined
            counts["shared input"] += joined > 0
        if _does(module, LlamaMLP) and type(module.act_fn) in (nn.SiLU, type(ACT2FN["silu"])):
            counts["gated"] += _put(module, _gated)
        if _does(module, LlamaRMSNorm) and not module.weight.requires_grad:
            counts["norm"] += _put(module, _norm)
    counts["linear"] += sum(_put(module, siblings([module])) for module in model.modules() if _is_plain(module, siblings))
    return {kind: count for kind, count in counts.items() if count}


def _join(parent: nn.Module, names: tuple[str, ...], siblings) -> int:
    """Let those of the named children that are plain LoRA linears run together; how many, if at least two do."""
    members = [getattr(parent, name, None) for name in names]
    members = [member for member in members if _is_plain(member, siblings) and "forward" not in member.__dict__]
    if len(members) < 2 or len({member.in_features for member in members}) > 1:
        return 0
    together = siblings(members)
    return sum(_put(member, together) for member in members)


def remove(model: nn.Module) -> None:
    """Take out what `install` put in; every forward is the plain one again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.forward


@contextlib.contextmanager
def removed(model: nn.Module) -> Iterator[None]:
    """The plain model for a moment."""
    before = {module: module.forward for module in model.modules() if isinstance(module.__dict__.get("forward"), _Forward)}
    remove(model)
    try:
        yield
    finally:
        for module, forward in before.items():
            module.forward = forward


def keep_memory() -> bool:
    """Let this process keep the memory it frees, for a training process on the CPU; whether that could be asked for.

    Every step needs the same buffers again. glibc hands them back to the system in between, and faulting them in anew costs a tenth of
    the step; and what one thread frees it would not give to another. They are the system's again when the process ends.
    """
    ask = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of malloc.h, where 32 MiB is the most before a mapping of its own
    return bool(ask and ask(mmap_threshold, 32 * 2**20) and ask(trim_threshold, 2**31 - 1) and ask(arena_max, 1))


# The probe


@contextlib.contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Eval mode and small noise on everything trainable: a fresh B is zero and would hide a wrong adapter path."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, training = [parameter.detach().clone() for parameter in trained], model.training
    generator = torch.Generator().manual_seed(0)
    try:
        model.eval()
        with torch.no_grad():
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.add_(noise.to(parameter.device, parameter.dtype))
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
        model.train(training)


def self_check(model: nn.Module, documents: list) -> float:
    """Relative difference of the fast loss (packed, as installed) from the model's own loss, document by document.

    Give it two tiny documents of two tokens or more; nothing of the model is changed. Unsupported if the fast path
    refuses this model. Expect under 1e-5 in float32 and under 2e-2 in bfloat16.
    """
    batch, weight = packed.concatenate(documents, device=next(model.parameters()).device), head_weight(model)
    packed.refuse(model)
    keep = batch.position_ids[0] > 0
    with stirred(model):
        try:
            states = packed.hidden(model, batch)
        except (AttributeError, TypeError) as error:  # a model that looks into its mask meets an object it does not know
            raise Unsupported(f"{type(packed.bare(model)).__name__} cannot run a packed row: {error}") from error
        fast = linear_cross_entropy(states[keep.roll(-1)], weight, batch.input_ids[0][keep]).item()
        with removed(model):
            plain = 0.0
            for row in batch.input_ids[0].split(batch.lengths):
                loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
                plain += loss.item() * (len(row) - 1)
    return abs(fast - plain) / max(abs(plain), 1e-12)
