"""The fast paths of image training on a CPU, each proven equal to the plain one by `tests/training/test_fused_image.py`.

    convolutions    the weights of frozen convolutions are laid out for the processor once, not at every call; at batch 1 a deep layer
                    of a UNet spends more time on that than on the product. So for the backward pass, which for stride 1 is itself a
                    convolution: of the gradient with the mirrored, transposed weight.
    attention       between few tokens the plain products are faster than the kernel that saves memory

The first call of each convolution is compared with the plain one; a processor on which they differ keeps the plain one. The price is
memory: two more copies of the convolutions' weights.
"""

from collections import Counter
from functools import partial

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd import Function

MOST_SCORES = 1 << 20  # per head: 1024 tokens among themselves
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # the difference's norm over the result's; two roundings to bf16 differ by 0.4 %


class _Product(Function):
    """A convolution with a frozen, laid out weight; x (b, in, h, w)."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.packed, ctx.shape = packed, x.shape
        return packed.forward(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.packed.backward(gradient, ctx.shape), None


class _Packed:
    """A frozen convolution's weight as oneDNN wants it, for both passes. The layout is chosen for the first input's size and right for all."""

    def __init__(self, layer: nn.Conv2d, x: Tensor):
        self.layer, size = layer, layer.kernel_size
        padding, stride, dilation = layer.padding, layer.stride, layer.dilation
        weight = layer.weight.detach()
        self.there = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, 1, tuple(x.shape))
        self.back, self.back_padding = None, (size[0] - 1 - padding[0], size[1] - 1 - padding[1])
        if stride == dilation == (1, 1) and min(self.back_padding) >= 0:
            high, wide = (x.shape[axis + 2] + 2 * padding[axis] - size[axis] + 1 for axis in (0, 1))
            mirrored = weight.flip(2, 3).transpose(0, 1).contiguous()
            given = (len(x), layer.out_channels, high, wide)
            self.back = torch.ops.mkldnn._reorder_convolution_weight(mirrored, self.back_padding, (1, 1), (1, 1), 1, given)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return _convolve(x, self.there, layer.bias, layer.padding, layer.stride, layer.dilation)

    def backward(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        layer = self.layer
        if self.back is None:
            return nn.grad.conv2d_input(shape, layer.weight, gradient, layer.stride, layer.padding, layer.dilation)
        return _convolve(gradient, self.back, None, self.back_padding, (1, 1), (1, 1))


def _convolve(x: Tensor, packed: Tensor, bias, padding, stride, dilation) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, dilation, 1, "none", [], "")


class _Convolution:
    """What a frozen convolution does instead: laid out at its first call, and only if that gives what the plain one gives."""

    def __init__(self):
        self.packed: _Packed | None = None
        self.plain = False

    def __call__(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        fits = x.ndim == 4 and x.dtype == layer.weight.dtype and not torch.is_autocast_enabled("cpu") and not x.is_inference()
        if self.plain or not fits:
            return type(layer).forward(layer, x)
        if self.packed is None:
            self.packed = _Packed(layer, x)
            expected, found = type(layer).forward(layer, x.detach()).float(), self.packed.forward(x.detach()).float()
            if not (found - expected).norm() <= NEAR[x.dtype] * expected.norm().clamp_min(1e-30):
                self.plain, self.packed = True, None
                return type(layer).forward(layer, x)
        return _Product.apply(x, self.packed)


class _Attention:
    """diffusers' own attention, the plain one between few tokens."""

    few, many = AttnProcessor(), AttnProcessor2_0()

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        tokens = hidden_states.flatten(2).shape[-1] if hidden_states.ndim == 4 else hidden_states.shape[1]
        others = tokens if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        chosen = self.few if tokens * others <= MOST_SCORES else self.many
        return chosen(attention, hidden_states, encoder_hidden_states, *args, **kwargs)


class _Forward(partial):
    """What stands in `layer.__dict__["forward"]` while the fast path is installed."""


def install(model: nn.Module) -> dict[str, int]:
    """Put the fast paths into every frozen layer they fit; returns how many of each kind. Parameters and names stay as they are."""
    counts: Counter[str] = Counter()
    if not torch.backends.mkldnn.is_available():
        return {}
    for layer in model.modules():
        if _is_plain(layer):
            layer.forward = _Forward(_Convolution(), layer)
            counts["convolutions"] += 1
        elif type(layer) is Attention and type(layer.processor) is AttnProcessor2_0:
            layer.processor = _Attention()
            counts["attention"] += 1
    return dict(counts)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a frozen convolution on the CPU without anything that its product would miss."""
    if type(layer) is not nn.Conv2d or "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    known = layer.groups == 1 and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return frozen and known and layer.weight.device.type == "cpu" and layer.weight.dtype in NEAR


def remove(model: nn.Module) -> None:
    """Take out what `install` put in, and let go of the copies."""
    for layer in model.modules():
        if isinstance(layer.__dict__.get("forward"), _Forward):
            del layer.forward
        elif isinstance(getattr(layer, "processor", None), _Attention):
            layer.processor = AttnProcessor2_0()
