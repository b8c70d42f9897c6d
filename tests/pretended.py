"""A graphics card that is not there: tensors that are said to lie on cuda:0 are kept and computed in main memory, and an operation on
tensors of both places is refused as torch refuses it on a real card. It shows that no path mixes the two; it shows nothing of speed,
memory, kernels or the rounding of a card.
"""

import contextlib
from collections import Counter
from types import SimpleNamespace

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CARD, MAIN = torch.device("cuda:0"), torch.device("cpu")
ATEN = torch.ops.aten
# A copy may cross over, and whoever is picked from may lie on the card while the numbers of the rows do not.
CROSSING = {ATEN.copy_.default, ATEN._to_copy.default, ATEN.set_.source_Tensor, ATEN.set_.source_Storage_storage_offset, ATEN._has_compatible_shallow_copy_type.default}
BY_NUMBER = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}
TOGETHER = {ATEN.cat.default, ATEN.stack.default}  # take not even one number from main memory


def _histogram(tensor, *given):
    return ATEN._to_copy.default(ATEN.histc.default(ATEN._to_copy.default(tensor, dtype=torch.float64), *given), dtype=tensor.dtype)


def _documents(query, key, value, ends, most, scale, window):
    """The parts of causal attention of documents that end at `ends`, as torch.nn.attention.varlen has it on a card, in float64: for each the
    slice of its tokens, its queries, keys and values (heads, length, d), its chances (heads, length, length) and the scale."""
    assert ends.dtype == torch.int32 and window[1] == 0 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    places, scale = ends.tolist(), query.shape[-1] ** -0.5 if scale is None else scale
    assert places[0] == 0 and places[-1] == len(query) and most == max(end - begin for begin, end in zip(places, places[1:]))
    for begin, end in zip(places, places[1:]):
        q, k, v = (part[begin:end].double().transpose(0, 1) for part in (query, key, value))
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (back >= 0) & ((back <= window[0]) | (window[0] < 0))
        yield slice(begin, end), q, k, v, (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1), scale


def _varlen(query, key, value, ends, _, most, __, is_causal, scale, window, is_grouped, *rest):
    assert is_grouped or query.shape == key.shape
    out = torch.cat([(chances @ v).transpose(0, 1) for _, _, _, v, chances, _ in _documents(query, key, value, ends, most, scale, window)])
    return out.to(query.dtype), query.new_zeros(query.shape[1], len(query), dtype=torch.float32), query.new_zeros(2, dtype=torch.uint64)


def _varlen_backward(gradient, query, key, value, out, lse, ends, _, most, __, is_causal, state, scale, window):
    found = [torch.zeros(part.shape, dtype=torch.float64) for part in (query, key, value)]
    for place, q, k, v, chances, factor in _documents(query, key, value, ends, most, scale, window):
        above = gradient[place].double().transpose(0, 1)
        of_chances = above @ v.transpose(1, 2)
        of_scores = chances * (of_chances - (of_chances * chances).sum(-1, keepdim=True)) * factor
        for whole, part in zip(found, (of_scores @ k, of_scores.transpose(1, 2) @ q, chances.transpose(1, 2) @ above)):
            whole[place] = part.unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(whole.to(query.dtype) for whole in found)


# What only a card can: count whole numbers, and attend to documents of several lengths in one kernel.
OTHERWISE = {"aten::histc": _histogram, "torch_attn::_varlen_attn": _varlen, "torch_attn::_varlen_attn_backward": _varlen_backward}


class Card(TorchDispatchMode):
    """While it is entered, cuda:0 can be asked for. `operations` counts what was computed on it, by name."""

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # with it torch does not look for a driver
        # A storage's number is not given again while a weak reference to it is kept.
        self.held: dict[int, StorageWeakRef] = {}
        # What torch's own backward made and no tensor of the card has met: it takes its place from those it saw, which torch says is here.
        self.undecided: dict[int, StorageWeakRef] = {}
        self.operations, self.generators, self.follows, self.inside = Counter(), {}, False, False

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on the card. Told by its storage, so views and new names for it are with it."""
        with torch._C.DisableTorchFunction():
            return not self.inside and _key(tensor) in self.held

    def take(self, tensor: torch.Tensor) -> None:
        """From now on it lies on the card."""
        if len(self.held) % 5000 == 4999:
            self.held = {number: kept for number, kept in self.held.items() if not kept.expired()}
        self.held.setdefault(_key(tensor), StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, function, types, given=(), named=None):
        if function is ATEN.is_pinned.default:
            return False
        if function is ATEN._pin_memory.default:
            return given[0].clone()
        named = {name: value for name, value in (named or {}).items() if name != "pin_memory"}
        wanted = None if self.follows else named.get("device")
        if named.get("device") is not None and torch.device(named["device"]).type == "cuda":
            named["device"] = MAIN
        tensors = [part for part in tree_flatten((given, named))[0] if isinstance(part, torch.Tensor)]
        if any(self.holds(tensor) for tensor in tensors):
            for tensor in tensors:
                if _key(tensor) in self.undecided:
                    self.take(tensor)
        on_card = [tensor for tensor in tensors if self.holds(tensor)]
        to_card = torch.device(wanted).type == "cuda" if wanted is not None else self.follows or bool(on_card)
        if named.get("generator") is not None and (named["generator"]._cdata in self.generators) != to_card:
            raise RuntimeError(f"{function}: the generator is not on the device of what it fills")
        if on_card and function not in CROSSING:
            self._judge(function, given, tensors)
        self.inside = True  # an operation that is written in Python sees its tensors where they are
        try:
            out = OTHERWISE.get(function.name(), function)(*given, **named)
        finally:
            self.inside = False
        self.operations[function.name()] += to_card
        made = {_key(part): part for part in tree_flatten(out)[0] if isinstance(part, torch.Tensor)}
        for number in made.keys() - {_key(tensor) for tensor in tensors}:
            if to_card:
                self.take(made[number])
            elif torch._C._current_graph_task_id() != -1 and (wanted is not None or any(_key(tensor) in self.undecided for tensor in tensors)):
                self.undecided[number] = StorageWeakRef(made[number].untyped_storage())
        return out

    def _judge(self, function, given, tensors: list[torch.Tensor]) -> None:
        """Raise what torch raises for tensors that lie in both places."""
        if function in BY_NUMBER:
            if not self.holds(given[0]) and any(self.holds(number) for number in given[1] if number is not None):
                raise RuntimeError(f"{function}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            tensors = [given[0], *given[2:3]] if function is not ATEN.index.Tensor else given[:1]
        shaped = [tensor for tensor in tensors if tensor.dim() or function in TOGETHER]
        there = sum(self.holds(tensor) for tensor in shaped)
        # A single number of main memory may meet the card's tensors, one of the card those of main memory not.
        if len(shaped) > there and (there or any(self.holds(tensor) for tensor in tensors)):
            raise RuntimeError(f"{function}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")


class _Following(TorchFunctionMode):
    """What one call of torch makes for itself lies where the tensors lie that it was given: inside, torch asks for their place, which is said
    to be main memory here."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __torch_function__(self, function, types, given=(), named=None):
        named, before, name = named or {}, self.card.follows, getattr(function, "__name__", "")
        if name in ("__get__", "__set__", "backward"):
            return function(*given, **named)
        if name in ("tensor", "as_tensor", "asarray") and named.get("device") is not None:
            return function(*given, **{**named, "device": MAIN}).to(torch.device(named["device"]))
        tensors = [part for part in tree_flatten((given, named))[0] if isinstance(part, torch.Tensor)]
        self.card.follows = named.get("device") is None and any(self.card.holds(tensor) for tensor in tensors)
        try:
            return function(*given, **named)
        finally:
            self.card.follows = before


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Move(torch.autograd.Function):
    """A copy in the other place; its gradient goes back."""

    @staticmethod
    def forward(context, tensor, place, options):
        context.place, context.dtype = tensor.device, tensor.dtype
        return ATEN._to_copy.default(tensor, device=place, **options)

    @staticmethod
    def backward(context, gradient):
        return ATEN._to_copy.default(gradient, device=context.place, dtype=context.dtype), None, None


@contextlib.contextmanager
def card(*, capability=(7, 5), bf16=True):
    """Pretend that there is a card. Within, `tensor.device`, `.to`, `.cpu`, `.cuda` and torch.cuda speak of it; yields the `Card`. Only for
    this thread: torch's modes are."""
    mode, real = Card(), SimpleNamespace(device=torch._C.TensorBase.device, to=torch.Tensor.to, generator=torch.Generator)

    def to(tensor, *given, copy=False, **named):
        if given and isinstance(given[0], torch.Tensor):
            given = (given[0].device, given[0].dtype, *given[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*given, **named)
        return moved(tensor, device, dtype, copy, layout)

    def moved(tensor, device, dtype=None, copy=False, layout=None):
        here = tensor.device
        there = here if device is None else CARD if device.type == "cuda" else device
        options = {name: value for name, value in (("dtype", dtype), ("memory_format", layout)) if value is not None}
        if here != there:
            return _Move.apply(tensor, there, options)
        return real.to(tensor, **options, copy=copy) if copy or dtype not in (None, tensor.dtype) else tensor

    class Generator(real.generator):
        def __new__(cls, device="cpu"):
            made = real.generator()
            if torch.device(device).type == "cuda":
                mode.generators[made._cdata] = made
            return made

    parts = {
        torch.Tensor: {
            "device": property(lambda tensor: CARD if mode.holds(tensor) else real.device.__get__(tensor)), "is_cuda": property(mode.holds), "is_cpu": property(lambda tensor: tensor.device == MAIN),
            "to": to, "cpu": lambda tensor, **_: moved(tensor, MAIN), "cuda": lambda tensor, *_, **__: moved(tensor, CARD),
            "new_tensor": lambda tensor, data, *, dtype=None, device=None, **more: torch.tensor(data, dtype=dtype or tensor.dtype, device=device or tensor.device, **more),
        },
        torch: {"Generator": Generator},
        torch.cuda: {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: CARD, "is_bf16_supported": lambda including_emulation=True: bf16, "get_device_capability": lambda *_: capability,
            "max_memory_allocated": lambda *_: 0, "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0, "empty_cache": lambda: None, "synchronize": lambda *_: None, "mem_get_info": lambda *_: (8 << 30, 16 << 30),
        },
    }  # fmt: skip
    before = [(where, name, where.__dict__.get(name)) for where, named in parts.items() for name in named]
    for where, named in parts.items():
        for name, value in named.items():
            setattr(where, name, value)
    torch._C._ensureCUDADeviceGuardSet()
    try:
        with mode, _Following(mode):
            yield mode
    finally:
        for where, name, value in before:
            if value is None:
                delattr(where, name)  # the base class has it
            else:
                setattr(where, name, value)
