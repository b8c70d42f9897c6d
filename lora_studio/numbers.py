"""The numbers of an adapter: what the papers promise of LoRA, computed from headers, and the latency measured on the bench."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_studio import adapters, bases, library
from lora_studio.adapters import Card, experts, virtual
from lora_studio.errors import AdapterError, StudioError
from lora_studio.jobs import bench
from lora_studio.spec import Base
from lora_studio.workspace import Workspace

# Bytes of AdamW in fp32 for a number that is learnt: the number, its gradient and two averages, 4 each. Mixed precision comes to the same:
# 2 + 2 in bf16, 12 in fp32 (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1).
LEARNT, FROZEN = 16, 4
# What the multiply-adds of a method that has no rank are.
FORMULAS = {"ia3": "Σ out", "oft": "Σ in·side of a block", **dict.fromkeys(virtual.WORDS, "2·virtual tokens·layers·width of a query")}


@dataclass(frozen=True)
class Numbers:
    """The figures of an adapter beside its base's; those of the base are None where its files are not on this machine.

    `parameters` and `bytes` are of the files; `work` counts multiply-adds a token: r·(in + out) for each adapted layer, in·out for each
    linear layer or convolution of the base (of an image model at one place of the picture, its trained part only)."""

    base: str
    parameters: int
    bytes: int
    work: int
    base_parameters: int | None = None
    base_bytes: int | None = None
    base_work: int | None = None
    formula: str = "Σ r·(in + out)"
    merges: bool = True

    @property
    def training(self) -> int | None:
        """Bytes of weights, gradients and optimizer while the adapter is trained; activations come on top, for both alike."""
        return None if self.base_parameters is None else FROZEN * self.base_parameters + LEARNT * self.parameters

    @property
    def full(self) -> int | None:
        """The same while the whole base is trained."""
        return None if self.base_parameters is None else LEARNT * self.base_parameters

    def rows(self) -> list[tuple[str, str]]:
        """The figures in words, as (what, how much)."""
        found = [("trainable", f"{self.parameters:,} parameters"), ("file", megabytes(self.bytes)), ("extra work unmerged", f"{self.work:,} multiply-adds a token, {self.formula}")]
        if self.base_parameters:
            share = percent(self.parameters, self.base_parameters)
            found[0] = ("trainable", f"{self.parameters:,} of {self.base_parameters:,} parameters: {share}")
            words = f"{FROZEN}·{in_millions(self.base_parameters)} + {LEARNT}·{in_millions(self.parameters)} bytes = {megabytes(self.training)}"
            saved = 1 - self.training / self.full
            more = f"{100 * saved:.0f} % less" if saved > 0 else "nothing saved"
            found.insert(2, ("memory to train it", f"{words}, against {LEARNT}·{in_millions(self.base_parameters)} = {megabytes(self.full)} to train the whole base: {more} (fp32, AdamW, without activations)"))
        if self.base_bytes:
            found[1] = ("file", f"{megabytes(self.bytes)} against {megabytes(self.base_bytes)} of the base: {percent(self.bytes, self.base_bytes)}")
        if self.base_work:
            found[-1] = ("extra work unmerged", f"{self.work:,} multiply-adds a token, {self.formula}, on the base's {self.base_work:,}: {percent(self.work, self.base_work)} more" + ("; merged none" if self.merges else ""))
        return found


def of(workspace: Workspace, id: str) -> Numbers:
    """The numbers of an adapter in the library, from headers. Raises AdapterError."""
    card = library.card(workspace, id)
    return of_folder(library.adapter_folder(workspace, id), base=card["base"], revision=card["base_revision"])


def of_folder(folder: Path, *, base: str = "", revision: str | None = None) -> Numbers:
    """The numbers of an adapter's folder or file, beside those of its base where that is on this machine. Raises AdapterError."""
    card = adapters.inspect(folder)
    base = base or card.base
    try:
        info = bases.inspect(Base(id=base, revision=revision)) if base else None
    except (StudioError, ValueError):
        info = None
    own = {"base": base, "parameters": card.parameters, "bytes": card.bytes, "work": work(card, info), "formula": FORMULAS.get(card.method, "Σ r·(in + out)")}
    own["merges"] = card.method not in virtual.WORDS
    if info is None or info.folder is None:
        return Numbers(**own)
    size = sum(file.stat().st_size for file in _weights(info.folder))
    return Numbers(**own, base_parameters=info.parameters, base_bytes=size, base_work=work_of_base(info))


def work(card: Card, info: bases.BaseInfo | None = None) -> int:
    """Multiply-adds a token that the layers of an adapter take beside the base: r·(in + out). An embedding's A is looked up, not multiplied, and
    of the experts of a layer a token passes those that `info` of the base tells, else all.
    IA3 takes out (in before a feedforward layer), each by a number of its own, OFT in times the side of its blocks, which have side·(side - 1)/2 entries each. With virtual tokens each query meets their
    keys and values in every layer; how wide it is `info` of the base tells, else the adapter's own width is taken."""
    if card.method == "ia3":
        return card.parameters
    if card.method in virtual.WORDS:
        wide = max((columns for name, _, columns in info.linears if name.endswith(".o_proj")), default=0) if info is not None else 0
        return 2 * card.config["num_virtual_tokens"] * card.config["num_layers"] * (wide or card.config["token_dim"])
    if card.method == "oft":
        return sum(layer.shape[1] for layer in card.layers.values()) + 2 * card.parameters
    stack_of = {name: name.rpartition(".")[0] for name in card.layers if experts.SLOT.match(name)}
    counts, total = Counter(stack_of.values()), 0.0
    for name, layer in card.layers.items():
        own = layer.rank * (layer.shape[-1] if layer.kind == "embedding" else layer.shape[0] + math.prod(layer.shape[1:]))
        total += own * min(1, info.per_token / counts[stack_of[name]]) if name in stack_of and info is not None else own
    return round(total)


def work_of_base(info: bases.BaseInfo) -> int:
    """Multiply-adds a token of the base's linear layers: in·out each, of a mixture those of the experts that it passes and what chooses them; and those of a
    language model's head."""
    head = (info.vocabulary or 0) * (info.hidden or 0) if not info.pipeline else 0
    passed = info.per_token * sum(out * width for _, _, out, width in info.experts)
    passed += sum(count * width for name, count, _, width in info.experts if name.endswith("gate_up_proj"))  # what chooses them
    return sum(rows * columns for _, rows, columns in (info.adaptable if info.experts else info.linears)) + passed + head


def measure(workspace: Workspace, id: str, *, base: str | None = None, rounds: int = 15) -> dict:
    """Time the same forward pass of the base, with the adapter beside its layers, and merged into them, in turns, on the bench. Returns
    {base, unmerged, merged: milliseconds (medians), rounds, of, device, off}: `off` is how far merged and unmerged outputs are apart, as a
    share of the largest. Raises StudioError."""
    card = library.card(workspace, id)
    wanted = base or card["base"]
    if not wanted:
        raise AdapterError("bake.base")
    path = str(library.adapter_folder(workspace, id))
    return bench.ask("measure", base=wanted, parts=[[path, 1.0, card["name"]]], rounds=rounds)


def measured_in_words(told: dict) -> str:
    """What `measure` found, as a sentence."""
    beside, merged = (100 * told[name] / told["base"] for name in ("unmerged", "merged"))
    return (
        f"Merged it takes {merged:.0f} % of the base's time, unmerged {beside:.0f} %: {told['merged']:.2f} and {told['unmerged']:.2f} ms against {told['base']:.2f} "
        f"(medians of {told['rounds']} rounds in turns; {told['of']} on {told['device']})."
    )


def _weights(folder: Path) -> list[Path]:
    """The files of weights of a base: its own, or those of every part of a pipeline."""
    if folder.is_file():
        return [folder]
    pipeline = (folder / "model_index.json").is_file()
    return sorted(folder.glob("*/*.safetensors" if pipeline else "*.safetensors"))


def percent(part: float, whole: float) -> str:
    """A share in words, with two digits that count."""
    return f"{float(f'{100 * part / whole:.2g}'):g} %"


def megabytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def in_millions(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} G"
