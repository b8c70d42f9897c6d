"""The language tasks chat, prompt_completion and text: rows to tokens, batches, the loss on what is to be learnt, answers."""

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from lora_studio import bases, rows
from lora_studio.errors import BaseModelError, MachineError
from lora_studio.spec import TrainSpec, methods
from lora_studio.training import encode, fused, order, packed, quantized
from lora_studio.training.encode import Example, first_line
from lora_studio.training.loop import Pass

CLOSE_ENOUGH = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass
class Batch:
    """Rows on the device. `targets` are the ids to be learnt and `places` where the states that foretell them stand:
    indices into the packed row, or into the flattened padded one."""

    packed: packed.Packed | None
    padded: dict[str, torch.Tensor] | None
    places: torch.Tensor
    targets: torch.Tensor
    tokens: int


class TextTask:
    """A causal language model and its rows, as the loop asks for them."""

    unit = "tokens"
    fold: tuple[int, int] | None = None
    walked: tuple[torch.nn.Module, list[torch.nn.Module]] | None = None  # a model and its modules

    def __init__(self, spec: TrainSpec, *, device: str, note: Callable[[str], None], folder: Path | None = None):
        self.spec, self.device, self.note = spec, torch.device(device), note
        self.dtype = choose_dtype(methods.precision(spec.method, spec.compute.precision), device)
        self.fast = False
        if self.device.type == "cpu":
            fused.keep_memory()

    def load(self, model: torch.nn.Module | None = None) -> torch.nn.Module:
        """Load base (unless it is given), tokenizer and rows. Returns the bare model. Raises StudioError with the way out."""
        folder = bases.fetch(self.spec.base)
        self.info = bases.inspect(self.spec.base)
        self.tokenizer = encode.load_tokenizer(folder, self.spec.base.id)
        self.encoder = encode.Encoder(self.tokenizer, self.spec)
        collected = rows.collect(self.spec)
        for found in collected:
            if found.skipped:
                self.note(f"{found.source.path}: left out are {found.skipped_in_words()}.")
        self.encoded = encode.encode_all(self.spec, self.encoder, collected, self.fold)
        for sentence in encode.losses_in_words(self.encoded):
            self.note(sentence)
        self.counts = tuple(len(source) for source in self.encoded.train)
        self.weights = tuple(source.weight for source in self.spec.data)
        self.held_out = len(self.encoded.held_out)
        if model is None:
            how = quantized.options(self.spec.compute.quantize, self.dtype, self.device)
            model = load_model(folder, self.spec.base.id, self.dtype, **how)
            model = quantized.keep_trainable(model) if how else model.to(self.device)
        self.prints = {"base": base_print(folder), "rows": self.encoded.print}
        return model

    def parts(self, model: torch.nn.Module) -> list[str]:
        """The ends of the names of the layers that get an adapter."""
        wanted = self.spec.method.targets
        found = self.info.targets(wanted)
        if wanted != "auto":
            return found or list(wanted)
        # A checkpoint may have matrices that are no layer of the model. A layer that has an adapter already is one of PEFT's.
        there = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D | BaseTunerLayer)}
        return [name for name in found if name in there] or linears_of(model)

    def prepare(self, model: torch.nn.Module) -> str:
        """Choose between the fast path and the plain one, by trying the fast one on this very model. Returns it in words."""
        compute = self.spec.compute
        if compute.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not compute.packing:
            return "padded batches, plain layers"
        try:
            model.train()
            packed.refuse(model)
            counts = fused.install(model) if compute.fused else {}
            probe = [list(example.ids[:24]) for source in self.encoded.train for example in source if len(example.ids) > 1][:2]
            off = fused.self_check(model, probe)
        except packed.Unsupported as reason:
            fused.remove(model)
            return f"padded batches, plain layers ({reason})"
        if not off <= CLOSE_ENOUGH[self.dtype]:
            fused.remove(model)
            self.note(f"The fast path differs by {off:.1e} on this model, so the plain one is used.")
            return "padded batches, plain layers"
        self.fast = True
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
        return f"packed rows; fused layers: {kinds}; checked on this model, off by {off:.1e}"

    # ---- what the loop asks

    def collate(self, draws: list[order.Draw]) -> Batch:
        """Training rows as a batch on the device."""
        return self._batch([self.encoded.train[draw.source][draw.index] for draw in draws])

    def collate_held_out(self, indices: list[int]) -> Batch:
        """Held-out rows as a batch on the device."""
        return self._batch([self.encoded.held_out[index] for index in indices])

    def units(self, batch: Batch) -> float:
        """The number of learnt tokens."""
        return float(len(batch.targets))

    def size(self, batch: Batch) -> int:
        """The number of tokens, padding not counted."""
        return batch.tokens

    def _batch(self, examples: list[Example]) -> Batch:
        width = max(len(example.ids) for example in examples)
        tokens = sum(len(example.ids) for example in examples)
        places, targets, start = [], [], 0
        for example in examples:
            for at in range(1, len(example.ids)):
                if example.learnt[at]:
                    places.append(start + at - 1)
                    targets.append(example.ids[at])
            start += len(example.ids) if self.fast else width
        where = torch.tensor(places, device=self.device)
        what = torch.tensor(targets, device=self.device)
        if self.fast:
            return Batch(packed.concatenate([list(example.ids) for example in examples], device=self.device), None, where, what, tokens)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            mask[row, : len(example.ids)] = 1
        return Batch(None, {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}, where, what, tokens)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Minus the log-likelihood of the learnt tokens, summed."""
        [one] = self.passes([batch])
        return one.losses(model)[0]

    def passes(self, batches: list[Batch]) -> list[Pass]:
        """Batches of several adapters as one pass: one after another in the packed row, or below one another, as wide as the widest."""
        if self.fast:
            return [Pass([(number, batch.tokens) for number, batch in enumerate(batches)], lambda model: self._packed_losses(model, batches))]
        return [Pass([(number, len(batch.padded["input_ids"])) for number, batch in enumerate(batches)], lambda model: self._padded_losses(model, batches))]

    def shared(self, model: torch.nn.Module) -> contextlib.AbstractContextManager:
        """A while in which several threads may take passes: each of them would put the model's own attention back under the others."""
        return packed.attention(model, self._walk(model)) if self.fast else contextlib.nullcontext()

    def _walk(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        inside = packed.bare(model)
        if self.walked is None or self.walked[0] is not inside:
            self.walked = (inside, packed.walk(model))
        return self.walked[1]

    def _packed_losses(self, model: torch.nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
        states = packed.hidden(model, packed.join([batch.packed for batch in batches]), self._walk(model))
        parts, head = states.split([batch.tokens for batch in batches]), fused.head_weight(model)
        return [fused.linear_cross_entropy(part[batch.places], head, batch.targets) for part, batch in zip(parts, batches)]

    def _padded_losses(self, model: torch.nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
        sizes = [batch.padded["input_ids"].shape for batch in batches]
        widest = max(width for _, width in sizes)
        given = {
            name: torch.cat([torch.nn.functional.pad(batch.padded[name], (0, widest - width)) for batch, (_, width) in zip(batches, sizes)])
            for name in batches[0].padded
        }
        # Virtual tokens before the input foretell nothing that is learnt, but have logits too.
        parts = model(**given, use_cache=False).logits[:, -widest:].split([count for count, _ in sizes])
        return [
            torch.nn.functional.cross_entropy(part[:, :width].flatten(0, 1)[batch.places].float(), batch.targets, reduction="sum")
            for part, batch, (_, width) in zip(parts, batches, sizes)
        ]

    def sample(self, model: torch.nn.Module, prompt: str, seed: int) -> str:
        """The model's greedy answer to a prompt; the same weights give the same answer."""
        ids = torch.tensor([self.encoder.prompt(prompt)], device=self.device)
        room = self.spec.output.sample_tokens
        stop = {token for token in (self.tokenizer.eos_token_id, *_ends(model)) if token is not None}
        checkpointing = self.spec.compute.checkpointing
        if checkpointing:
            model.gradient_checkpointing_disable()
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(stop, default=0),
            eos_token_id=sorted(stop) or None,
            use_cache=True,
        )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def extras(self) -> dict[str, bytes]:
        """Files that belong beside the adapter: the chat template it was trained with, where that is not the base's own."""
        template = self.encoder.template
        if template is None or template.origin == "the tokenizer's own":
            return {}
        return {"chat_template.jinja": template.text.encode()}


def choose_dtype(precision: str, device: str) -> torch.dtype:
    """bf16 where it is asked for or where the device has it, else fp32. Raises MachineError."""
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda") else _cpu_has_bf16() if device == "cpu" else True
    if precision == "bf16" and not able and device != "cpu":
        raise MachineError("machine.no_bf16", device=device)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and able) else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware; elsewhere torch emulates it slowly."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_model(folder: Path, id: str, dtype: torch.dtype, **how) -> torch.nn.Module:
    """A causal language model from safetensors; `how` may say how it is quantised. Raises BaseModelError."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model = _loaded(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, **how)
    except (ValueError, KeyError) as error:
        if "Unrecognized configuration class" in str(error):
            config = transformers.AutoConfig.from_pretrained(folder)
            raise BaseModelError("base.not_causal", id=id, model_type=config.model_type) from None
        if "trust_remote_code" in str(error) or "does not recognize this architecture" in str(error):
            raise BaseModelError("base.remote_code", id=id) from None
        raise BaseModelError("base.broken", id=id, reason=first_line(error)) from None
    except (OSError, RuntimeError) as error:
        raise BaseModelError("base.broken", id=id, reason=first_line(error)) from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _loaded(folder: Path, **how) -> torch.nn.Module:
    """With torch's fused attention, or plain for a family that has no other, such as GPT-OSS."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **how)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **how)


def linears_of(model: torch.nn.Module) -> list[str]:
    """The ends of the names of all linear layers but the head."""
    head = model.get_output_embeddings()
    return sorted({name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head})


def base_print(folder: Path) -> str:
    """A hash that changes when a base's weights do: its configuration, and the headers, sizes and ends of its files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        bases.digest_ends(digest, file, file.name)
    return digest.hexdigest()


def _ends(model: torch.nn.Module) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]

