"""The kinds of adapter: how each is attached to a model, grouped for the optimizer, stepped and finished.

A method is a row of plain functions. METHODS is the table; the loop asks it and knows no kind by name.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from safetensors.torch import save

from lora_studio.adapters import pipeline_files
from lora_studio.errors import BaseModelError
from lora_studio.spec import TrainSpec
from lora_studio.training import optim, order, text_encoders

ADAPTER = "default"


def _nothing(model, step: int, steps: int) -> None:
    """What most methods do before and after a step."""


@dataclass(frozen=True)
class Method:
    """`attach(model, spec, targets)` returns the model with a fresh adapter that changes nothing yet; `groups(model, spec)`
    the parameter groups; `before_step` and `after_step(model, step, steps)` stand around each optimizer step;
    `finish(model, spec)` gives the files of the finished adapter as {name: bytes}."""

    attach: Callable
    groups: Callable
    finish: Callable
    before_step: Callable = _nothing
    after_step: Callable = _nothing


def attach_lora(model: torch.nn.Module, spec: TrainSpec, targets: list[str]) -> torch.nn.Module:
    """Put LoRA on the layers whose names end with `targets`, and on those of the text encoders that are trained too. A is
    Kaiming-uniform or Gaussian, B is zero."""
    main, encoders = text_encoders.split(model)
    wrapped = _attach(main, spec, targets, "init")
    if not encoders:
        return wrapped
    return text_encoders.Parts(wrapped, {name: _attach(one, spec, text_encoders.targets_in(one), "init", name) for name, one in encoders.items()})


def _attach(model: torch.nn.Module, spec: TrainSpec, targets: list[str], *seed: str) -> peft.PeftModel:
    method = spec.method
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=list(targets),
        use_rslora=method.rslora,
        init_lora_weights=True if method.init == "kaiming" else "gaussian",
        task_type=None if spec.task.kind == "image" else "CAUSAL_LM",
    )
    torch.manual_seed(order.key(spec.compute.seed, *seed))
    try:
        wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    except ValueError as error:
        if "arget module" not in str(error):
            raise
        known = sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)})
        raise BaseModelError("base.targets", id=spec.base.id, targets=", ".join(targets), known=", ".join(known)) from None
    wrapped.peft_config[ADAPTER].base_model_name_or_path = spec.base.id  # what people know it by, not a folder here
    wrapped.peft_config[ADAPTER].revision = spec.base.revision
    return wrapped


def group_parameters(model: torch.nn.Module, spec: TrainSpec) -> list[dict]:
    """The parameter groups of whatever is trainable."""
    return optim.groups(model.named_parameters(), spec.optim)


def finish_peft(model: torch.nn.Module, spec: TrainSpec) -> dict[str, bytes]:
    """The files of a PEFT folder: the adapter in fp32 safetensors, and its configuration with sorted keys. Layers of a text encoder are
    in the same file, behind the encoder's name; the configuration is one, because rank and strength are."""
    model, encoders = text_encoders.split(model)
    tensors = _state(model)
    config = model.peft_config[ADAPTER].to_dict()
    config["inference_mode"] = True
    if spec.task.kind == "image":
        config["auto_mapping"] = pipeline_files.made_for(model.get_base_model())
    for name, encoder in encoders.items():
        tensors |= {pipeline_files.with_part(key, name): value for key, value in _state(encoder).items()}
        config["target_modules"] = {*config["target_modules"], *encoder.peft_config[ADAPTER].target_modules}
    return {
        "adapter_model.safetensors": save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}),
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n").encode(),
    }


def _state(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    # "auto" would look for the base's configuration to see whether its embeddings grew, which they never do here.
    return peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def _plain(value):
    """Sets in a fixed order, enums by value: the same adapter gives the same bytes."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


METHODS = {"lora": Method(attach_lora, group_parameters, finish_peft)}
