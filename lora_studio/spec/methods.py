"""The settings of each kind of adapter: how the update of a layer is made, and what of it is learnt."""

from typing import Annotated, Literal, Union

from pydantic import Field

from lora_studio.spec.tasks import Part

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Targets = Literal["auto"] | list[str]


class Lora(Part):
    """Low-rank adaptation: W0 + scale·B·A, with A (rank, in) and B (out, rank). Hu et al. 2021, arXiv 2106.09685."""

    kind: Literal["lora"] = "lora"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
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
    """DoRA: direction and length of each row of the weight are learnt apart. Slower; it is published and loaded by PEFT, but not blended or baked here."""
    freeze_a: bool = False
    """LoRA-FA: A stays as it was drawn and only B is learnt, which takes less memory."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = "kaiming"
    """How A and B start; a fresh adapter changes nothing. pissa and olora start from the weight's own directions and take these out of the base
    while training; the finished file (twice the rank) is for the untouched base."""
    start: str | None = None
    """An adapter to go on from: its id in the library, or its folder. Its layers and ranks must fit; ranks above its own start afresh."""


class DyLora(Part):
    """Dynamic-rank LoRA: each step trains a rank drawn at random, so that the first rows and columns are an adapter of every lower rank.
    Valipour et al. 2022, arXiv 2210.07558."""

    kind: Literal["dylora"] = "dylora"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
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
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
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
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
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
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
    rank: Annotated[int, Field(ge=1, le=64)] = 8
    """The rank of each of the two products."""
    alpha: Alpha = 8.0
    """Strength: the update is scaled by alpha / rank."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""


class LoKr(Part):
    """LoKr: a Kronecker product of a small matrix and a low-rank one; very small files. LyCORIS, arXiv 2309.14859."""

    kind: Literal["lokr"] = "lokr"
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
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
    """The kind of adapter: lora, dylora, adalora, vera, loha, lokr, or miss."""
    rank: Rank = 64
    """The height of the block, and the rank of the update."""
    targets: Targets = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    dropout: Share = 0.0
    """Share of the adapter's input that is dropped while training."""


Method = Annotated[Union[Lora, DyLora, AdaLora, Vera, LoHa, LoKr, Miss], Field(discriminator="kind")]
KINDS = {option.model_fields["kind"].default: option for option in (Lora, DyLora, AdaLora, Vera, LoHa, LoKr, Miss)}
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
        return method.init not in ("pissa", "olora") and not method.freeze_a
    return method.kind in ("dylora", "loha", "lokr")


def parameters(method, out: int, width: int) -> int:
    """How many numbers one layer of that shape learns."""
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
