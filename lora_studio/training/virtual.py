"""Prompt and prefix tuning: virtual tokens before the input, which start as real ones and are proven on the very model before step 1.

    prompt   the embeddings of the tokens are learnt                          Lester et al. 2021, arXiv 2104.08691
    prefix   their keys and values in every layer are, (tokens, 2·layers·keys)  Li and Liang 2021, arXiv 2101.00190

PEFT starts both from noise, which trains badly (Li and Liang, section 6.4: start from the activations of words). From real tokens a fresh
adapter answers as the base does with these tokens before the input, and where PEFT does not make that so, the base is refused.
"""

import warnings

import peft
import torch
import transformers

from lora_studio.errors import BaseModelError, TrainingError
from lora_studio.spec import TrainSpec
from lora_studio.training import order
from lora_studio.training.loop import is_out_of_memory

# How far logits may be apart, as a share of the largest: of fp32, and of bf16 and quantised bases, where batches of other sizes round otherwise.
CLOSE_ENOUGH = {True: 1e-4, False: 0.1}
# PEFT says so at every sample of a tuned prompt; the positions it takes in their place are the right ones, which `difference` sees.
warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
BROKEN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)


def prompt_config(method, common: dict) -> peft.PromptTuningConfig:
    """What PEFT is told for prompt tuning; it goes on no layer."""
    return peft.PromptTuningConfig(num_virtual_tokens=method.tokens, task_type=common["task_type"])


def prefix_config(method, common: dict) -> peft.PrefixTuningConfig:
    """What PEFT is told for prefix tuning; keys and values are learnt as they are, without a network that makes them."""
    return peft.PrefixTuningConfig(num_virtual_tokens=method.tokens, task_type=common["task_type"])


def begin(model: peft.PeftModel, task, spec: TrainSpec, folder, world) -> None:
    """Put in what the virtual tokens start as, and look whether they do here what the real ones would. Raises TrainingError for a text without
    tokens, and BaseModelError where they do not."""
    ids = start(task.tokenizer, spec).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            put(model, ids)
            off = difference(model, ids)
    except BROKEN as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise _refusal(spec, f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}") from error
    model.train(was_training)
    if not off <= CLOSE_ENOUGH[task.dtype == torch.float32 and spec.compute.quantize == "none"]:
        raise _refusal(spec, f"the answers differ by {off:.1e}")


def _refusal(spec: TrainSpec, reason: str) -> BaseModelError:
    return BaseModelError("base.virtual", id=spec.base.id, method=spec.method.kind, reason=reason)


def start(tokenizer, spec: TrainSpec) -> torch.Tensor:
    """The ids (tokens,) of the real tokens that the virtual ones start as: those of method.text, cut or repeated, or drawn from the vocabulary
    by the seed. Raises TrainingError."""
    count, text = spec.method.tokens, spec.method.text
    if text is None:
        draw = torch.Generator().manual_seed(order.key(spec.compute.seed, "init"))
        return torch.randint(len(tokenizer), (count,), generator=draw)
    found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not found:
        raise TrainingError("training.virtual_text", text=text[:40])
    return torch.tensor((found * -(-count // len(found)))[:count])


def put(model: peft.PeftModel, ids: torch.Tensor) -> None:
    """Make the virtual tokens what the real ones are: their embeddings, or their keys and values."""
    config, base = model.active_peft_config, model.get_base_model()
    values = _keys_and_values(base, ids, config) if isinstance(config, peft.PrefixTuningConfig) else base.get_input_embeddings()(ids)
    model.prompt_encoder[model.active_adapter].embedding.weight.copy_(values)


def _keys_and_values(base: torch.nn.Module, ids: torch.Tensor, config: peft.PrefixTuningConfig) -> torch.Tensor:
    """(tokens, 2·layers·keys) in PEFT's order: of every layer its keys, then its values, head by head. Layers that have none of their own, or
    narrower ones, leave zeros."""
    cache = base(input_ids=ids[None], past_key_values=transformers.DynamicCache(), use_cache=True).past_key_values
    heads = config.num_attention_heads
    found = torch.zeros(len(ids), 2 * config.num_layers, heads, config.token_dim // heads, device=ids.device)
    for number, layer in enumerate(cache.layers):
        for place, part in enumerate((layer.keys, layer.values)):
            rows = part[0].transpose(0, 1)
            found[:, 2 * number + place, : rows.shape[1], : rows.shape[2]] = rows
    return found.flatten(1)


def difference(model: peft.PeftModel, ids: torch.Tensor) -> float:
    """How far the adapter's logits are from the base's with the real tokens before the input, as a share of the largest; for two rows, one
    of them padded."""
    base = model.get_base_model()
    row = ids.new_tensor([0, 1, 2, 3, 4, 5])
    given, mask = torch.stack([row, row]), torch.stack([row >= 0, row < 3]).long()
    before = ids.expand(2, -1)
    wanted = base(input_ids=torch.cat([before, given], 1), attention_mask=torch.cat([torch.ones_like(before), mask], 1), use_cache=False).logits[:, len(ids) :]
    found = model(input_ids=given, attention_mask=mask, use_cache=False).logits[:, -len(row) :]
    wanted, found = wanted[mask.bool()].float(), found[mask.bool()].float()
    return float((found - wanted).abs().max() / wanted.abs().max())
