"""A tuned prompt or prefix in the Playground: virtual tokens before the input, as the cache that an answer begins with.

They are there or not, so their weight is 1 or 0, and there is room for those of one adapter. PEFT makes the cache, so that a base takes
them here as it did in training; nothing of the base is changed by that.
"""

import peft
import torch

from lora_studio import adapters
from lora_studio.adapters import virtual
from lora_studio.errors import AdapterError

CONFIGS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}


class Before:
    """The virtual tokens of one adapter on one model."""

    def __init__(self, model: torch.nn.Module, adapter: adapters.Adapter, *, label: str, base: str):
        """Raises AdapterError where they are of another width or number of layers than the base takes."""
        card, values = adapter.card, adapter.extras[virtual.TENSOR]
        self.label, self.model, self.method, self.tokens = label, model, card.method, len(values)
        config = CONFIGS[card.method](num_virtual_tokens=self.tokens, task_type="CAUSAL_LM", inference_mode=True)
        self.made = peft.PeftModelForCausalLM(model, config)
        weight = self.made.prompt_encoder[self.made.active_adapter].embedding.weight
        if weight.shape != values.shape:
            own = card.base or "another base"
            raise AdapterError("adapter.virtual_base", path=label, here=list(values.shape), there=list(weight.shape), base=base, own=own)
        with torch.no_grad():
            weight.copy_(values)

    @property
    def words(self) -> str:
        """What it is, in words."""
        return virtual.WORDS[self.method]

    def cache(self):
        """A cache of its keys and values in every layer, (1, heads, tokens, width), a new one for each answer."""
        given = self.made.get_prompt(batch_size=1)
        if self.method == "prefix":
            return given
        return self.model(inputs_embeds=given.to(self.model.dtype), use_cache=True).past_key_values
