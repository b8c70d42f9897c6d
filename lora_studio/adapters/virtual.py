"""Adapters that are virtual tokens before the input, known from their headers: prompt tuning and prefix tuning. They change no weight.

    prompt   prompt_embeddings (tokens, width of the embedding)
    prefix   prompt_embeddings (tokens, 2·layers·keys): of every layer keys and values, however PEFT made them
"""

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_studio.adapters.config import PeftConfig, Positive
from lora_studio.adapters.files import FLOATS, Header, shown
from lora_studio.errors import AdapterError

METHODS = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
WORDS = {"prompt": "a tuned prompt", "prefix": "a tuned prefix"}
TENSOR = "prompt_embeddings"


class Sizes(BaseModel):
    """What adapter_config.json says of the virtual tokens; `token_dim` is the width of the embedding, of a prefix that of a key."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    num_virtual_tokens: Positive
    token_dim: Positive
    num_layers: Positive

    def shape(self, method: str) -> tuple[int, int]:
        """That of the one tensor."""
        return self.num_virtual_tokens, self.token_dim * (2 * self.num_layers if method == "prefix" else 1)


def sizes(label: str, header: Header, config: PeftConfig, tree: dict) -> Sizes:
    """What a file's configuration says, where its tensor is as that says. Raises AdapterError naming what is not."""
    method = METHODS[config.peft_type]
    try:
        found = Sizes.model_validate(tree)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        if tree.get(name) is None:
            raise AdapterError("adapter.config_lacks", name=name) from None
        raise AdapterError("adapter.config_value", name=name, value=shown(repr(tree[name]), 60), reason="It must be a whole number from 1 to 65,536") from None
    stranger = next((name for name, entry in header.tensors.items() if name != TENSOR or entry.dtype not in FLOATS), None)
    if stranger is not None:
        raise AdapterError("adapter.native_part", path=label, method=method, name=shown(stranger))
    if header.tensors[TENSOR].shape != found.shape(method):
        raise AdapterError("adapter.virtual", path=label, here=list(header.tensors[TENSOR].shape), said=list(found.shape(method)))
    return found
