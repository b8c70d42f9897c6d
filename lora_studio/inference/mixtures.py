"""Weighted adapters on experts that a model keeps in one stack, a parameter (experts, out, in) or, as GPT-OSS has it, (experts, in, out).

There is no layer for one expert that a hook could hang on, so while an adapter is on, the module of the experts is given a stand-in for the
stack: an expert that is asked for multiplies as `W0·x + Σ w·ΔW·x`, in the dtype of the factors and rounded once, like any layer of
hooks.py. That takes the model's own forward, one expert after another, and not the kernels that want the whole stack in one piece. With
nothing on, the module does what it always does, bit for bit. The stack itself is never changed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from lora_studio.adapters import experts
from lora_studio.lowrank import LowRank

LINEAR = (functional.linear, torch._C._nn.linear)
MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


@dataclass(frozen=True)
class Slot:
    """Where an expert is: its module, which of its parameters, its number, and whether its matrix lies transposed there."""

    module: torch.nn.Module
    parameter: str
    number: int
    transposed: bool

    @property
    def stack(self) -> torch.nn.Parameter:
        """All experts of that parameter."""
        return self.module._parameters[self.parameter]


class Mixtures:
    """The stacked experts of a model, and the adapters on them. `active` gives (id, weight of a layer by its name) of those that are on."""

    def __init__(self, model: torch.nn.Module, active: Callable[[], Iterable[tuple[str, Callable[[str], float]]]]):
        self.modules = dict(model.named_modules())
        self.shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if experts.is_stack(name, tuple(value.shape))}
        self.kind = str(getattr(getattr(model, "config", None), "model_type", ""))
        self.active = active
        # By module, parameter, adapter and number: what the adapter calls that expert, what it adds, and whether the parameter lies transposed.
        self.parts: dict[torch.nn.Module, dict[str, dict[str, dict[int, tuple[str, LowRank, bool]]]]] = {}

    def find(self, name: str, update: object) -> Slot | None:
        """Where a layer's expert is; None when it means none here."""
        if not self.shapes or not isinstance(update, LowRank):
            return None
        for slot in experts.slots(name, update.shape, self.shapes, model=self.kind):
            if slot.layer in self.shapes:
                module, _, parameter = slot.layer.rpartition(".")
                return Slot(self.modules[module], parameter, slot.start // self.shapes[slot.layer][1], slot.transposed)
        return None

    def put(self, id: str, updates: dict[str, tuple[Slot, LowRank]], device: torch.device) -> None:
        """Hang an adapter's experts, each with the name of its layer."""
        for name, (slot, update) in updates.items():
            if slot.module not in self.parts:
                self.parts[slot.module] = {}
                slot.module.forward = self._forward(slot.module)
            A, B = (tensor.to(device).contiguous() for tensor in (update.A, update.B))
            self.parts[slot.module].setdefault(slot.parameter, {}).setdefault(id, {})[slot.number] = (name, replace(update, A=A, B=B), slot.transposed)

    def take(self, id: str) -> None:
        """Take an adapter off."""
        for parameters in self.parts.values():
            for adapters in parameters.values():
                adapters.pop(id, None)

    def _forward(self, module: torch.nn.Module):
        plain = type(module).forward
        one_by_one = getattr(plain, "__wrapped__", plain)

        def forward(*given, **more):
            standing_in = {name: made for name in self.parts[module] if (made := self._stack(module, name)) is not None}
            if not standing_in:
                return plain(module, *given, **more)
            try:
                # What is set on a module itself goes before its parameters.
                module.__dict__.update(standing_in)
                return one_by_one(module, *given, **more)
            finally:
                for name in standing_in:
                    del module.__dict__[name]

        return forward

    def _stack(self, module: torch.nn.Module, parameter: str) -> "_Stack | None":
        """A stand-in for a parameter; None where nothing acts on it."""
        found: dict[int, list[tuple[LowRank, float]]] = {}
        turned = False
        for id, weight_of in self.active():
            for number, (name, update, transposed) in self.parts[module][parameter].get(id, {}).items():
                turned = transposed
                if weight := weight_of(name):
                    found.setdefault(number, []).append((update, weight))
        return _Stack(module._parameters[parameter], found, turned) if found else None


class _Standing:
    """Stands in for a tensor. Whatever is not known to work on the parts is done with the whole sum."""

    def dense(self) -> torch.Tensor:
        """The sum as a tensor."""
        raise NotImplementedError

    def __getattr__(self, name: str):
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*(one.dense() if isinstance(one, _Standing) else one for one in args), **(kwargs or {}))


class _Stack(_Standing):
    """All experts: `stack` as the model has it, and the updates (out, in) of some by their number."""

    def __init__(self, stack: torch.Tensor, updates: dict[int, list[tuple[LowRank, float]]], turned: bool):
        self.stack, self.updates, self.turned = stack, updates, turned

    def __getitem__(self, number):
        if not (isinstance(number, int) or (isinstance(number, torch.Tensor) and number.ndim == 0)):
            return self.dense()[number]
        found = self.updates.get(int(number))
        return self.stack[number] if found is None else _Matrix(self.stack[number], found, self.turned)

    def dense(self) -> torch.Tensor:
        whole = self.stack.detach().clone()
        for number, updates in self.updates.items():
            whole[number] = _Matrix(self.stack[number], updates, self.turned).dense()
        return whole


class _Matrix(_Standing):
    """One expert: `weight`, (out, in) or transposed, and what is added to it."""

    def __init__(self, weight: torch.Tensor, updates: list[tuple[LowRank, float]], turned: bool):
        self.weight, self.updates, self.turned = weight, updates, turned

    def dense(self) -> torch.Tensor:
        update = sum(update.delta() * weight for update, weight in self.updates)
        return (self.weight + (update.T if self.turned else update)).to(self.weight.dtype)

    def applied(self, x: torch.Tensor) -> torch.Tensor:
        """`W0·x + Σ w·ΔW·x`."""
        output = x @ self.weight if self.turned else functional.linear(x, self.weight)
        for update, weight in self.updates:
            inner = functional.linear(x.to(update.A.dtype), update.A) * (weight * update.scale)
            output = output + functional.linear(inner, update.B)
        return output.to(x.dtype)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        first, own = args[:2] if len(args) > 1 else (None, None)
        if isinstance(own, cls) and isinstance(first, torch.Tensor):
            if func in LINEAR and not own.turned:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                output = own.applied(first)
                return output if bias is None else output + bias
            if func in MATMUL and own.turned:
                return own.applied(first)
        return super().__torch_function__(func, types, args, kwargs)
