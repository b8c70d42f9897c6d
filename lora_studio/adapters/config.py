"""adapter_config.json by a schema of our own: what it says of ranks, strengths and layers, and which layers it means."""

import re
from functools import lru_cache
from math import sqrt
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_studio.adapters.files import CONFIG, CONFIG_LIMIT, parse_json, shown
from lora_studio.errors import AdapterError

Positive = Annotated[int, Field(ge=1, le=65536)]
Strength = Annotated[float, Field(ge=-1e9, le=1e9)]
PATTERN_LIMIT = 2000


class PeftConfig(BaseModel):
    """The fields that decide what an adapter computes. Unknown ones are kept aside, never obeyed."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    peft_type: str
    base_model_name_or_path: str = ""
    revision: str | None = None
    task_type: str | None = None
    r: Positive | None = None
    lora_alpha: Strength | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Positive] = {}
    alpha_pattern: dict[str, Strength] = {}
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] = []
    modules_to_save: list[str] = []
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    # of OFT
    oft_block_size: Annotated[int, Field(ge=0, le=65536)] | None = None
    block_share: bool = False
    coft: bool = False
    eps: Annotated[float, Field(ge=0, le=1e9)] = 6e-5
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Field(ge=1, le=1000)] = 5
    peft_version: str = ""

    @property
    def is_old_oft(self) -> bool:
        """Whether it is an OFT that PEFT itself no longer reads (its config.py): without blocks before 0.15, with another series before 0.18."""
        version = re.match(r"(\d+)\.(\d+)", self.peft_version)
        is_told = "use_cayley_neumann" in self.model_fields_set and self.use_cayley_neumann
        return self.oft_block_size is None or (is_told and (version is None or (int(version[1]), int(version[2])) < (0, 18)))

    def rank_of(self, layer: str) -> int | None:
        """The rank the configuration gives a layer."""
        return self.rank_pattern.get(match(self.rank_pattern, layer), self.r)

    def alpha_of(self, layer: str) -> float | None:
        """The alpha the configuration gives a layer; None when it gives none."""
        return self.alpha_pattern.get(match(self.alpha_pattern, layer), self.lora_alpha)

    def scale_of(self, layer: str, rank: int) -> float | None:
        """α/r, or α/√r for rank-stabilised adapters; None without an alpha."""
        alpha = self.alpha_of(layer)
        return None if alpha is None else alpha / (sqrt(rank) if self.use_rslora else rank)


def read(raw: bytes | None, given: dict | None) -> tuple[PeftConfig, dict]:
    """The configuration and all its fields, with those the user `given` on top. Raises AdapterError."""
    if raw is not None and len(raw) > CONFIG_LIMIT:
        raise AdapterError("adapter.header_limit", path=CONFIG, what="a longer text", limit=f"{CONFIG_LIMIT:,}")
    tree = {**(parse_json(CONFIG, raw) if raw is not None else {"peft_type": "LORA"}), **(given or {})}
    idle = {"r"} if tree.get("peft_type") == "OFT" else set()  # it has blocks, and an r of 0
    try:
        # PEFT writes null where it means its default.
        return PeftConfig.model_validate({name: value for name, value in tree.items() if value is not None and name not in idle}), tree
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "bool", "int", "list[str]", "list[int]"))
        if first["type"] == "missing":
            raise AdapterError("adapter.config_lacks", name=where) from None
        value = shown(repr(first["input"]), 60)
        raise AdapterError("adapter.config_value", name=shown(where), value=value, reason=first["msg"]) from None


@lru_cache(maxsize=4096)
def pattern(text: str) -> re.Pattern:
    """A regular expression out of a file, compiled if it cannot take forever. Raises AdapterError."""
    # A repeated group is what makes matching exponential.
    if len(text) > PATTERN_LIMIT or re.search(r"\)(?:[*+]|\{\d*,)", text):
        raise AdapterError("adapter.pattern", pattern=shown(text), reason="it could take forever to match")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError("adapter.pattern", pattern=shown(text), reason=shown(error)) from None


def match(patterns: dict[str, object], layer: str) -> str | None:
    """The first key that means this layer: the end of its name, as a regular expression (PEFT's rule)."""
    return next((key for key in patterns if pattern(rf"(.*\.)?({key})$").match(layer)), None)


def means(config: PeftConfig, layer: str) -> bool:
    """Whether the configuration puts an adapter on this layer (PEFT's rules); True when it does not say which ones."""
    targets, exclude = config.target_modules, config.exclude_modules
    if isinstance(exclude, str) and pattern(exclude).fullmatch(layer):
        return False
    if isinstance(exclude, list) and _ends(layer, exclude):
        return False
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return bool(pattern(targets).fullmatch(layer))
    if layer in targets:
        return True
    return _ends(layer, targets) and _in_chosen_blocks(config, layer)


def _ends(layer: str, ends: list[str]) -> bool:
    return any(layer == end or layer.endswith("." + end) for end in ends)


def _in_chosen_blocks(config: PeftConfig, layer: str) -> bool:
    """Whether the number of the layer's block is among `layers_to_transform`; True when all are."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    within = config.layers_pattern or []
    for before in [within] if isinstance(within, str) else within:
        found = pattern(rf"(?:^|.*?\.){before}\.(?P<number>\d+)\.").match(layer)
        if found:
            break
    else:
        found = None if within else re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", layer)
    return found is not None and int(found["number"]) in ([chosen] if isinstance(chosen, int) else chosen)
