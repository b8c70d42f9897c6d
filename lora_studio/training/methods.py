"""The kinds of adapter: how each is attached to a model, grouped for the optimizer, stepped and finished.

A method is a row of plain functions. METHODS is the table; the loop asks it and knows no kind by name.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from safetensors.torch import save

from lora_studio import adapters, bases
from lora_studio.adapters import experts, multiplying, natives, pipeline_files
from lora_studio.adapters.files import NESTED, reheaded
from lora_studio.errors import BaseModelError
from lora_studio.spec import TrainSpec
from lora_studio.spec.methods import MULTIPLYING
from lora_studio.training import adalora, dylora, first_look, full, optim, order, residual, starts, text_encoders, virtual
from lora_studio.training.encode import first_line

ADAPTER = "default"


def _nothing(*given) -> None:
    """What most methods do around a step."""


def _no_tensors(model) -> dict[str, torch.Tensor]:
    """What most methods keep beside parameters and optimizer."""
    return {}


@dataclass(frozen=True)
class Method:
    """`attach(model, spec, targets)` returns the model with a fresh adapter that changes nothing yet; `groups(model, spec)`
    the parameter groups; `begin(model, task, spec, folder, world)` sees the fresh one, with the task's rows, before anything is restored or made fast;
    `before_step` and `after_step(model, step, steps)` stand around each optimizer step, the gradients being there
    in both the second and `penalty(model, spec)`, which is added to the loss or None, and `abandon` in place of the second where the step
    was broken off; `state(model)` and `restore(model, tensors)` are
    what a checkpoint keeps besides; `finish(model, spec)` gives the files of the finished adapter as {name: bytes, or the place to copy from}; `facts(model)` is told
    of the finished adapter; `place(spec)` is the folder of the run that it goes to, and `words(folder, spec)` what to say of it, or ""; `ranks(model)` are the ranks it also works at, and `at_rank(model, rank)` a context in which it does."""

    attach: Callable
    groups: Callable
    finish: Callable
    begin: Callable = _nothing
    before_step: Callable = _nothing
    after_step: Callable = _nothing
    abandon: Callable = _nothing
    penalty: Callable = _nothing
    state: Callable = _no_tensors
    restore: Callable = _nothing
    facts: Callable = _no_tensors
    place: Callable = lambda spec: "adapter"
    words: Callable = lambda folder, spec: ""
    ranks: Callable = lambda model: ()
    at_rank: Callable = _nothing


# ---- attaching


def _lora(method, common: dict) -> peft.LoraConfig:
    init = True if method.init in ("kaiming", *first_look.KINDS) else method.init  # the latter are put in by first_look.py
    return peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, use_rslora=method.rslora, use_dora=method.dora, init_lora_weights=init, **common)


def _dylora(method, common: dict) -> peft.LoraConfig:
    return peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, **common)


def _adalora(method, common: dict) -> peft.AdaLoraConfig:
    # The budget is followed by adalora.py; PEFT only wants to know of some length.
    return peft.AdaLoraConfig(
        init_r=method.first_rank, target_r=method.rank, r=method.first_rank, lora_alpha=method.alpha, lora_dropout=method.dropout, total_step=1 << 40, **common
    )


def _vera(method, common: dict) -> peft.VeraConfig:
    return peft.VeraConfig(r=method.rank, d_initial=method.d_initial, vera_dropout=method.dropout, save_projection=True, **common)


def _loha(method, common: dict) -> peft.LoHaConfig:
    return peft.LoHaConfig(r=method.rank, alpha=method.alpha, **common)


def _lokr(method, common: dict) -> peft.LoKrConfig:
    return peft.LoKrConfig(r=method.rank, alpha=method.alpha, decompose_factor=method.factor, **common)


def _miss(method, common: dict) -> peft.MissConfig:
    return peft.MissConfig(r=method.rank, miss_dropout=method.dropout, **common)


def _oft(method, common: dict) -> peft.OFTConfig:
    # Cayley's own formula: PEFT's default is a series of it, which is no rotation once Q is large.
    return peft.OFTConfig(r=0, oft_block_size=method.block, use_cayley_neumann=False, **common)


def _ia3(method, common: dict) -> peft.IA3Config:
    return peft.IA3Config(feedforward_modules=[], **common)


CONFIGS = {"lora": _lora, "dylora": _dylora, "adalora": _adalora, "vera": _vera, "loha": _loha, "lokr": _lokr, "miss": _miss, "oft": _oft, "ia3": _ia3, "prompt": virtual.prompt_config, "prefix": virtual.prefix_config}


def attach_peft(model: torch.nn.Module, spec: TrainSpec, targets: list[str]) -> torch.nn.Module:
    """Put adapters on the layers whose names end with `targets`, and on those of the text encoders that are trained too. Fresh ones change
    nothing; one to go on from is as it was."""
    main, encoders = text_encoders.split(model)
    wrapped = _attach(main, spec, targets, "init")
    if encoders:
        wrapped = text_encoders.Parts(wrapped, {name: _attach(one, spec, text_encoders.targets_in(one), "init", name) for name, one in encoders.items()})
    if getattr(spec.method, "start", None):
        starts.put(wrapped, spec)
    if getattr(spec.method, "freeze_a", False):
        for name, parameter in wrapped.named_parameters():
            if optim.role(name) == "A":
                parameter.requires_grad_(False)
    return wrapped


def attach_beside(model: torch.nn.Module, spec: TrainSpec, targets: list[str], adapter: str) -> peft.PeftModel:
    """Put a further fresh adapter of that name on a model, as it would start alone. What others are there stay as they are."""
    return _attach(model, spec, targets, "init", adapter=adapter)


def _attach(model: torch.nn.Module, spec: TrainSpec, targets: list[str], *seed: str, adapter: str = ADAPTER) -> peft.PeftModel:
    common = {"target_modules": list(targets), "task_type": None if spec.task.kind == "image" else "CAUSAL_LM"}
    config, wanted = CONFIGS[spec.method.kind](spec.method, common), set()
    if getattr(spec.method, "experts", False):
        config.target_parameters = _stacks(model, spec)
        wanted = set(config.target_parameters)
    torch.manual_seed(order.key(spec.compute.seed, *seed))
    known = sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)})
    try:
        if isinstance(model, peft.PeftModel):
            wrapped = model
            wrapped.add_adapter(adapter, config)
        else:
            wrapped = peft.get_peft_model(model, config, adapter_name=adapter)
    except ValueError as error:
        if "arget module" not in str(error):
            reason = first_line(error)[:200].rstrip(".")
            raise BaseModelError("base.unadaptable", id=spec.base.id, targets=", ".join(targets), reason=reason) from None
        raise BaseModelError("base.targets", id=spec.base.id, targets=", ".join(targets), known=", ".join(known)) from None
    if set(getattr(wrapped.peft_config[adapter], "target_parameters", None) or ()) != wanted:  # PEFT took names of plain layers for those of experts
        raise BaseModelError("base.experts", id=spec.base.id, targets=", ".join(bases.OF_EXPERTS))
    wrapped.peft_config[adapter].base_model_name_or_path = spec.base.id  # what people know it by, not a folder here
    wrapped.peft_config[adapter].revision = spec.base.revision
    return wrapped


def _stacks(model: torch.nn.Module, spec: TrainSpec) -> list[str]:
    """The ends of the names of the parameters that hold the experts of a layer. Raises BaseModelError when there are none."""
    found = sorted({".".join(name.rsplit(".", 2)[-2:]) for name, parameter in model.named_parameters() if experts.is_stack(name, tuple(parameter.shape))})
    if not found:
        raise BaseModelError("base.no_experts", id=spec.base.id)
    return found


def group_parameters(model: torch.nn.Module, spec: TrainSpec) -> list[dict]:
    """The parameter groups of whatever is trainable."""
    return optim.groups(model.named_parameters(), spec.optim)


# ---- finishing


def finish_peft(model: torch.nn.Module, spec: TrainSpec, adapter: str = ADAPTER) -> dict[str, bytes]:
    """The files of a PEFT folder: the adapter in fp32 safetensors, and its configuration with sorted keys. Layers of a text encoder are
    in the same file, behind the encoder's name; the configuration is one, because rank and strength are."""
    main, encoders = text_encoders.split(model)
    tensors = _state(main, adapter)
    config = main.peft_config[adapter].to_dict()
    config["inference_mode"] = True
    if spec.task.kind == "image":
        config["auto_mapping"] = pipeline_files.made_for(main.get_base_model())
    for name, encoder in encoders.items():
        tensors |= {pipeline_files.with_part(key, name): value for key, value in _state(encoder).items()}
        config["target_modules"] = {*config["target_modules"], *encoder.peft_config[ADAPTER].target_modules}
    if residual.is_one(spec):
        tensors, config = residual.for_the_untouched_base(model, tensors, config)
    if spec.method.kind == "adalora":
        tensors, config = adalora.as_lora(tensors, config)
    more = _widths(main, spec.method.kind) if spec.method.kind in ("vera", "miss", "oft", "ia3") else {NESTED: "true"} if spec.method.kind == "dylora" else {}
    files = {
        adapters.WEIGHTS: reheaded(save({name: tensor.contiguous() for name, tensor in tensors.items()}), metadata=more),
        adapters.CONFIG: (json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n").encode(),
    }
    return _as_plain(files) if spec.task.kind == "image" and spec.method.kind in natives.METHODS.values() else files


def _as_plain(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same update as plain LoRA: the loaders of image models know no other of PEFT's kinds."""
    found = adapters.read(files)
    return adapters.write(adapters.with_modules(found.card, found.modules))


def _state(model: peft.PeftModel, adapter: str = ADAPTER) -> dict[str, torch.Tensor]:
    # "auto" would look for the base's configuration to see whether its embeddings grew, which they never do here.
    return peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def _widths(model: peft.PeftModel, kind: str) -> dict[str, str]:
    """How many inputs each adapted layer has, of methods that multiply also how many outputs; the tensors do not say."""
    base = model.get_base_model()
    layers = {name: layer.get_base_layer() for name, layer in base.named_modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)}
    if kind in MULTIPLYING:
        return {multiplying.SHAPES: json.dumps({name: [layer.out_features, layer.in_features] for name, layer in layers.items()}, sort_keys=True)}
    return {natives.WIDTHS: json.dumps({name: layer.in_features for name, layer in layers.items()}, sort_keys=True)}


def _plain(value):
    """Sets in a fixed order, enums by value: the same adapter gives the same bytes."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def _attach_lora(model: torch.nn.Module, spec: TrainSpec, targets: list[str]) -> torch.nn.Module:
    wrapped = attach_peft(model, spec, targets)
    if residual.is_one(spec):
        residual.remember(wrapped)  # of those that look at the rows first, again then
    return wrapped


def _attach_adalora(model: torch.nn.Module, spec: TrainSpec, targets: list[str]) -> torch.nn.Module:
    return adalora.follow(attach_peft(model, spec, targets), spec)


def _attach_dylora(model: torch.nn.Module, spec: TrainSpec, targets: list[str]) -> torch.nn.Module:
    return dylora.follow(attach_peft(model, spec, targets), spec)


PLAIN = {"groups": group_parameters, "finish": finish_peft}
METHODS = {
    "lora": Method(_attach_lora, **PLAIN, begin=first_look.begin),
    "dylora": Method(_attach_dylora, **PLAIN, before_step=dylora.narrow, after_step=dylora.widen, abandon=dylora.widen, ranks=dylora.ranks, at_rank=dylora.at_rank),
    "adalora": Method(
        _attach_adalora, **PLAIN, after_step=adalora.allocate, penalty=adalora.penalty, state=adalora.state, restore=adalora.restore, facts=adalora.facts
    ),
    "vera": Method(attach_peft, **PLAIN),
    "loha": Method(attach_peft, **PLAIN),
    "lokr": Method(attach_peft, **PLAIN),
    "miss": Method(attach_peft, **PLAIN),
    "oft": Method(attach_peft, **PLAIN),
    "ia3": Method(attach_peft, **PLAIN),
    "prompt": Method(attach_peft, **PLAIN, begin=virtual.begin),
    "prefix": Method(attach_peft, **PLAIN, begin=virtual.begin),
    "full": Method(full.attach, group_parameters, full.finish, place=full.place, words=full.words),
}
