"""The settings of each kind of adapter: how the update of a layer is made, and what of it is learnt."""

import math
from typing import Annotated, Literal, Union

from pydantic import Field

from lora_studio import weights
from lora_studio.spec.tasks import Part

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Targets = Literal["auto"] | list[str]


class Lora(Part):
    """Low-rank adaptation: W0 + scale·B·A, with A (rank, in) and B (out, rank). Hu et al. 2021, arXiv 2106.09685."""

    kind: Literal["lora"] = "lora"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Rank = 16
    """The rank r of the update. Rank, alpha and rate belong together."""
    alpha: Alpha = 32.0
    """Strength: the update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Share of the adapter's input that is dropped while training. Above 0 the fast path is off."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    rslora: bool = False
    """Rank-stabilised scale alpha / sqrt(rank), for high ranks."""
    dora: bool = False
    """DoRA: direction and length of each row of the weight are learnt apart. Slower; it is tried in the Playground, baked and published, but not blended into one adapter."""
    freeze_a: bool = False
    """LoRA-FA: A stays as it was drawn and only B is learnt, which takes less memory."""
    experts: bool = False
    """Adapt the experts of a mixture too, each at this rank. Their weights are put together anew at every step, which takes memory and time."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "loftq"] = "kaiming"
    """How A and B start. eva, corda and lora_ga look at up to 256 rows first: eva at what comes into a layer, corda at what matters of its weight for
    that, lora_ga at its first gradient. pissa and olora start from the weight alone. loftq makes up for what 4 bits lose. All of these but eva save a
    file of twice the rank, for the untouched base."""
    start: str | None = None
    """An adapter to go on from: its id in the library, or its folder. Its layers and ranks must fit; ranks above its own start afresh."""


class DyLora(Part):
    """Dynamic-rank LoRA: each step trains a rank drawn at random, so that the first rows and columns are an adapter of every lower rank.
    Valipour et al. 2022, arXiv 2210.07558."""

    kind: Literal["dylora"] = "dylora"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Rank = 16
    """The highest rank."""
    alpha: Alpha = 32.0
    """Strength: the update is scaled by alpha / rank, the same at every lower rank."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    rank_step: Rank = 1
    """Ranks that are trained are multiples of this."""


class AdaLora(Part):
    """AdaLoRA: starts with more rank than wanted and takes it away where it matters least. Zhang et al. 2023, arXiv 2303.10512."""

    kind: Literal["adalora"] = "adalora"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Rank = 8
    """The mean rank that is left at the end."""
    first_rank: Rank = 12
    """The rank of every layer at the start; half as much again as rank is usual."""
    alpha: Alpha = 32.0
    """Strength: the update is scaled by alpha / first_rank."""
    dropout: Share = 0.0
    """Share of the adapter's input that is dropped while training."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    begin: Share = 0.1
    """Share of the run before any rank is taken away."""
    settle: Share = 0.3
    """Share of the run at its end in which ranks stay as they are."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between two looks at what matters."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps directions apart."""


class Vera(Part):
    """VeRA: all layers share one random A and B, and only two vectors for each layer are learnt. Kopiczko et al. 2023, arXiv 2310.11454."""

    kind: Literal["vera"] = "vera"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Rank = 256
    """The rank of the shared matrices, which travel with the file. High ones are usual: they are not learnt."""
    dropout: Share = 0.0
    """Share of the adapter's input that is dropped while training."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    """Where the vector beside A starts."""


class LoHa(Part):
    """LoHa: the entrywise product of two low-rank products, of rank up to rank². Hyeon-Woo et al. 2022, arXiv 2108.06098."""

    kind: Literal["loha"] = "loha"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Annotated[int, Field(ge=1, le=64)] = 8
    """The rank of each of the two products."""
    alpha: Alpha = 8.0
    """Strength: the update is scaled by alpha / rank."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""


class LoKr(Part):
    """LoKr: a Kronecker product of a small matrix and a low-rank one; very small files. LyCORIS, arXiv 2309.14859."""

    kind: Literal["lokr"] = "lokr"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """The rank of the second factor."""
    alpha: Alpha = 8.0
    """Strength: the update is scaled by alpha / rank."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    factor: Annotated[int, Field(ge=-1, le=1024)] = -1
    """The size of the first factor; -1 takes the most even split."""


class Miss(Part):
    """MiSS: one small block that is repeated along the row, with no second matrix. Kang and Yin 2024, arXiv 2409.15371."""

    kind: Literal["miss"] = "miss"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    rank: Rank = 64
    """The height of the block, and the rank of the update."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    dropout: Share = 0.0
    """Share of the adapter's input that is dropped while training."""


class Oft(Part):
    """OFT: what comes into a layer is rotated, W0·Rᵀ, in square blocks that are learnt; angles and lengths stay. For language models; it is tried in the
    Playground, baked and published, but not blended into one adapter. Qiu et al. 2023, arXiv 2306.07280."""

    kind: Literal["oft"] = "oft"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    block: Annotated[int, Field(ge=2, le=1024)] = 32
    """The side of a block. Where it does not divide the width of a layer, the nearest number that does is taken."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""


class Ia3(Part):
    """IA3: each output of a layer is multiplied by a learnt number; the smallest files of all, at rates about ten times higher. For language models;
    it is tried in the Playground, baked and published, but not blended into one adapter. Liu et al. 2022, arXiv 2205.05638."""

    kind: Literal["ia3"] = "ia3"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [k_proj, v_proj, up_proj] are the paper's. auto takes all linear layers of the blocks."""


class Virtual(Part):
    """What prompt and prefix tuning have in common: virtual tokens, and no adapter on any layer."""

    kind: str
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """How many virtual tokens stand before the input. They take room in the context."""
    text: Annotated[str, Field(max_length=4000)] | None = None
    """What the virtual tokens start as, cut or repeated to their number: an instruction, for example. null draws tokens of the vocabulary."""

    @property
    def targets(self) -> str:
        """No adapter stands on any layer, so none is chosen."""
        return "auto"


class Prompt(Virtual):
    """Prompt tuning: virtual tokens stand before the input, and their embeddings are learnt; nothing of the base changes. The least there is to learn, at
    rates about a hundred times higher. For language models; it is tried in the Playground and published, but neither blended nor baked. Lester et al. 2021,
    arXiv 2104.08691."""

    kind: Literal["prompt"] = "prompt"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""


class Prefix(Virtual):
    """Prefix tuning: virtual tokens stand before the input of every layer's attention, and their keys and values are learnt; nothing of the base changes.
    For language models, without checkpointing; it is tried in the Playground and published, but neither blended nor baked. Li and Liang 2021, arXiv 2101.00190."""

    kind: Literal["prefix"] = "prefix"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""


class Full(Part):
    """Full or partial fine-tuning: no adapter; the base's own weights learn, all or those of chosen layers; of an image model those of the part that
    draws. For small bases."""

    kind: Literal["full"] = "full"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, miss, oft, ia3, prompt, prefix, or full: none, the base itself learns."""
    layers: Literal["all"] | list[str] = "all"
    """What learns, by words of the names: [model.layers.2-3, lm_head], * for any one word; of an image model for example [up_blocks, attn2]. all takes every weight; with save lora every linear layer
    of the blocks, which is what an adapter can carry."""
    save: Literal["model", "lora"] = "model"
    """What is left: a model of its own, or the difference to the base as a LoRA."""
    rank: Rank = 16
    """The rank of the LoRA that is taken out of the difference."""

    @property
    def targets(self) -> str:
        """No adapter stands on any layer, so none is chosen."""
        return "auto"


Method = Annotated[Union[Lora, DyLora, AdaLora, Vera, LoHa, LoKr, Miss, Oft, Ia3, Prompt, Prefix, Full], Field(discriminator="kind")]
KINDS = {option.model_fields["kind"].default: option for option in (Lora, DyLora, AdaLora, Vera, LoHa, LoKr, Miss, Oft, Ia3, Prompt, Prefix, Full)}
FROM_SOMETHING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # starts where B·A is not zero: what is saved is the difference
EMBEDDED = ("embed", "wte", "lm_head", "shared")  # words of layers that no adapter carries which is taken out of a model
MULTIPLYING = ("oft", "ia3")  # they are no sum with the base's weights
VIRTUAL = ("prompt", "prefix")  # they stand before the input, and on no layer
LAYERLESS = (*VIRTUAL, "full")  # no layer is chosen that an adapter goes on
WITH_B = ("lora", "dylora", "adalora")


def defaults(kind: str) -> dict[str, object]:
    """The settings of a kind as they are where nothing is said, by path."""
    return {f"method.{name}": field.get_default() for name, field in KINDS[kind].model_fields.items()}


def strength(method) -> float:
    """The factor of B·A (for LoHa and LoKr of their product): alpha / rank, or alpha / sqrt(rank) when rank-stabilised; 1 where there is none."""
    alpha = getattr(method, "alpha", None)
    if alpha is None:
        return 1.0
    rank = getattr(method, "first_rank", method.rank)
    return alpha / (rank**0.5 if getattr(method, "rslora", False) else rank)


def is_checkpoint_an_adapter(method) -> bool:
    """Whether the trainable parameters of a checkpoint are the adapter, with the finished one's configuration."""
    if method.kind == "lora":
        return method.init not in FROM_SOMETHING and not method.freeze_a
    return method.kind in ("dylora", "loha", "lokr")


def directions(method, out: int, width: int) -> float:
    """How many directions the start of a method finds in a layer of that shape, where it does not draw them."""
    init = getattr(method, "init", "")
    if init in FROM_SOMETHING:
        return min(out, width) // (2 if init == "lora_ga" else 1)
    return width if init == "eva" else math.inf


def precision(method, wanted: str) -> str:
    """The precision of the base's numbers where `wanted` is compute.precision: those that learn themselves are kept in fp32, because a step of
    theirs is often smaller than the gap between two numbers of bf16."""
    return "fp32" if method.kind == "full" else wanted


def learns(method: Full, name: str, shape) -> bool:
    """Whether full fine-tuning changes the base's tensor of that name and shape. Raises BlendError when a pattern is none."""
    layer, is_weight = name.removesuffix(".weight"), name.endswith(".weight")
    carried = is_weight and len(shape) == 2 and min(shape) > 1 and not any(part in layer for part in EMBEDDED)
    if method.save == "lora" and not carried:
        return False
    return method.layers == "all" or any(weights.means(pattern, layer) for pattern in method.layers)


def learns_head(method) -> bool:
    """Whether what the tokens are foretold by learns (or the embedding, which often is the same)."""
    return method.kind == "full" and any(learns(method, name, (2, 2)) for name in ("lm_head.weight", "model.embed_tokens.weight"))


def is_padded(method) -> bool:
    """Whether rows go through the model padded and its plain layers, whatever is said of packing."""
    return method.kind in VIRTUAL or learns_head(method)


def virtual_parameters(method, hidden: int, layers: int, keys: int) -> int:
    """How many numbers virtual tokens learn: an embedding of the width each, or a key and a value of `keys` numbers in every layer."""
    return method.tokens * (hidden if method.kind == "prompt" else 2 * layers * keys)


def parameters(method, out: int, width: int) -> int:
    """How many numbers one layer of that shape learns."""
    if method.kind == "ia3":
        return out
    if method.kind == "oft":
        size = _nearest(width, method.block)
        return width // size * (size * (size - 1) // 2)
    rank = method.rank
    if method.kind == "vera":
        return rank + out
    if method.kind == "miss":
        return rank * out
    if method.kind == "loha":
        return 2 * rank * (out + width)
    if method.kind == "lokr":
        return _lokr(rank, method.factor, out, width)
    if method.kind == "adalora":
        return method.first_rank * (out + width + 1)
    learnt = rank * (out if getattr(method, "freeze_a", False) else out + width)
    return learnt + (out if getattr(method, "dora", False) else 0)


def _nearest(width: int, block: int) -> int:
    """The number nearest to a block's side that divides a width, the smaller of two, as PEFT takes it."""
    fits = [size for size in range(1, width + 1) if width % size == 0]
    return min(fits, key=lambda size: (abs(size - block), size))


def _lokr(rank: int, factor: int, out: int, width: int) -> int:
    """LyCORIS' split of both sides; the second factor is decomposed where that is smaller."""
    (a, c), (b, d) = _split(out, factor), _split(width, factor)
    return a * b + (rank * (c + d) if rank < max(c, d) / 2 else c * d)


def _split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size, the smaller first: the wanted one where it divides, else the most even split at or below it."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    top = size if factor < 0 else factor
    best = (1, size)
    for low in range(1, int(size**0.5) + 1):
        if size % low == 0 and low <= top:
            best = (low, size // low)
    return best
