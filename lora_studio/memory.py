"""What a run takes of the memory, part by part, before it starts; and what to change so that it takes less. From headers and settings; loads no torch.

A run goes through phases and never needs all parts at once: it loads, encodes (pictures only), steps, and samples. The peak is that of the
worst phase. On a processor it is what the whole process holds, as the system counts it; on a GPU what torch holds of the card.
"""

import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import bases, families
from lora_studio.bases import BaseInfo
from lora_studio.errors import StudioError
from lora_studio.spec import TrainSpec, methods
from lora_studio.spec.idle import NO_EFFECT

MB = 1_000_000
# The libraries of a worker, before any model: measured on x86-64 with torch's own CPU build. On a GPU torch does not count its context.
LIBRARIES = {"text": 440 * MB, "image": 500 * MB}
CONTEXT = 600 * MB
# What the encoders of some pipelines bring besides, as it was measured on tiny ones.
MORE_LIBRARIES = {"SanaPipeline": 105 * MB}
# oneDNN keeps kernels, tiles and copies for bf16 products.
BF16_LIBRARIES = 170 * MB
# Bytes of a parameter in 8 bits and in 4, with what else bitsandbytes keeps of it.
KEPT_BYTES = {"8bit": 1.02, "4bit": 0.57}
# Bytes of an optimizer's state for a number that is learnt; gradients take 4 more, as the number itself does.
STATE = {
    "adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion": 4, "lion_8bit": 1, "muon": 4, "prodigy": 16, "adafactor": 0.1, "sgd": 4,
    "adamw_schedule_free": 8,
}  # fmt: skip
# What the backward pass needs for each token, in numbers of (the width, the inner width): of every block, and besides, for what is being
# computed and what malloc keeps. Padded batches go through the plain layers; where only virtual tokens learn, no linear layer keeps its input. With checkpointing a block keeps so many numbers of the
# width, and one block is there whole. Fitted to runs of 2 M to 35 M parameters (tests/campaigns/memory.py).
KEPT = {"packed": (20.5, 2.85), "padded": (20.0, 8.0), "virtual": (10.5, 3.0)}
WORKING = {"packed": (7.0, 0.0), "padded": (22.0, 8.0), "virtual": (22.0, 8.0)}
CHECKPOINTED = 10.0
# Of a mixture: for each expert a token passes, numbers of (the width, its inner width); how much a processor keeps of the parts that a stack was
# read from; and where experts learn, how much of a layer's stacks is put together beside what the backward pass needs of each of them.
KEPT_OF_EXPERTS, READ_EXPERTS, MADE_EXPERTS = (1.5, 3.8), 1.2, 2.2
CHUNK = 2**22  # scores of the head at a time (training.fused)
HEAD_COPIES = 3
PLAIN_HEAD_COPIES = 3.6
# Numbers kept for each input and output of a layer of an image model; an adapted convolution has copies of both.
KEPT_OF_PICTURES, KEPT_OF_ADAPTED = 1.7, 3.4
# Attention between few tokens keeps its scores on a processor (training.fused_image): so many of each head, and the usual number of heads.
SCORES, HEADS, MOST_SCORES = 1.5, 8, 1 << 20
BLOCK = re.compile(r"(.*transformer_blocks\.\d+|(?:blocks|layers)\.\d+)\.")
HEAVY = 4 << 30
# What method.init eva, corda and lora_ga collect in one pass over the rows (training.first_look), at most, unless one layer has more.
PORTION = 2 << 30
TIGHT = 0.85


@dataclass(frozen=True)
class Rows:
    """What is known of a run's rows: tokens of a row in the mean, how far they spread (standard deviation), the longest, and the share of
    tokens that is learnt; of pictures how many there are."""

    mean: float = 0.0
    spread: float = 0.0
    longest: float = 0.0
    learnt: float = 1.0
    count: int = 0

    def tokens(self, batch: int, *, padded: bool) -> float:
        """Tokens of a large batch: padded to about the longest, or the mean and three standard deviations of a sum over it."""
        return batch * self.longest if padded else min(batch * self.longest, batch * self.mean + 3 * self.spread * math.sqrt(batch))


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part, and which parts are there together in each phase. `unknown` names what no header tells yet."""

    parts: dict[str, int]
    phases: dict[str, tuple[str, ...]]
    context: int = 0
    unknown: tuple[str, ...] = ()

    def of(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(self.parts[name] for name in self.phases[phase])

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.of)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, as the run itself reports them."""
        return self.of(self.worst)

    @property
    def needed(self) -> int:
        """Bytes that have to be free."""
        return self.peak + self.context

    def badge(self, free: int | None) -> str:
        """fits, tight or too big; unknown where nobody can say what is free."""
        if free is None:
            return "unknown"
        return "too big" if self.needed > free else "tight" if self.needed > TIGHT * free else "fits"


@dataclass(frozen=True)
class Change:
    """Settings that take less memory: new values by path, the peak with them, and by which share it is less."""

    values: dict[str, object] = field(default_factory=dict)
    peak: int = 0
    share: float = 0.0


def in_words(values: dict[str, object]) -> str:
    """Settings as they are written: schedule.batch_size 2, compute.checkpointing true."""
    return ", ".join(f"{path} {str(value).lower() if isinstance(value, bool) else value}" for path, value in values.items())


# ---- the estimate


def estimate(spec: TrainSpec, info: BaseInfo, rows: Rows, *, trainable: int, device: str) -> Estimate:
    """What the run of a spec takes. `trainable` is how many numbers its adapter learns."""
    kind = "image" if spec.task.kind == "image" else "text"
    cpu = not device.startswith("cuda")
    wide = width_of(spec, device)
    parts = {"libraries": (LIBRARIES[kind] + (BF16_LIBRARIES if wide == 2 else 0) + MORE_LIBRARIES.get(info.pipeline, 0)) if cpu else 0}
    parts["base"] = int((info.parameters or 0) * KEPT_BYTES.get(spec.compute.quantize, wide)) - _elsewhere(spec, info, wide)
    if cpu and any(bases.EXPERTS in name for name, *_ in info.linears):
        parts["base"] += int(READ_EXPERTS * wide * sum(info.stacks.values()))
    is_full = spec.method.kind == "full"
    parts["adapter"], parts["gradients"] = 0 if is_full else 4 * trainable, 4 * trainable
    parts["optimizer"] = int(STATE[spec.optim.kind] * trainable)
    (_picture_parts if kind == "image" else _text_parts)(parts, spec, info, rows, wide, cpu)
    held = ("libraries", "base", "adapter")
    steps = (*held, "gradients", "optimizer", *(name for name in ("layouts", "latents", "encoders kept", "activations", "logits", "experts") if name in parts))
    phases = {"it trains": steps}
    if is_full:  # the gradients are gone by then; the optimizer's state is there thrice while it is put into bytes, the weights once more
        parts["checkpoint"] = 2 * parts["optimizer"] + 4 * trainable
        phases["it saves"] = (*held, "optimizer", "checkpoint")
    looked = _looked_at(spec, info, wide)
    if looked:
        row = sum(parts.get(name, 0) for name in ("activations", "logits")) // spec.schedule.batch_size
        parts["first look"] = looked + row
        phases["it looks at the rows"] = (*held, "first look", *(name for name in ("latents", "encoders kept") if name in parts))
    if kind == "image":
        phases["it encodes captions"] = ("libraries", "text encoders")
        phases["it encodes pictures"] = ("libraries", "VAE", "VAE's activations")
        if spec.output.sample_prompts:
            phases["it draws samples"] = (*held, "optimizer", *(name for name in ("layouts", "latents", "encoders kept") if name in parts), "VAE", "VAE's activations")
    unknown = tuple(name for name, is_there in (("activations", parts.get("activations")), ("base", info.parameters)) if not is_there)
    return Estimate(parts, phases, 0 if cpu else CONTEXT, unknown)


def _looked_at(spec: TrainSpec, info: BaseInfo, wide: int) -> int:
    """Bytes of what a start that looks at the rows first collects: a gradient of each layer, or products of all its inputs, and what is made of one."""
    init, targets = getattr(spec.method, "init", ""), info.targets(spec.method.targets)
    own = [4 * columns * (rows if init == "lora_ga" else columns) for name, rows, columns in info.adaptable if _is_adapted(name, targets)]
    if init not in ("eva", "corda", "lora_ga") or not own:
        return 0
    portion = max(min(sum(own), PORTION), *own)
    return int(portion * (1 + wide / 4)) + max(own) if init == "lora_ga" else portion + 3 * max(own)


def width_of(spec: TrainSpec, device: str) -> int:
    """Bytes of a number of the base while it is used."""
    wanted = methods.precision(spec.method, spec.compute.precision)
    return 4 if wanted == "fp32" or (wanted == "auto" and not device.startswith("cuda") and not _has_bf16()) else 2


def _has_bf16() -> bool:
    """Whether precision auto takes bf16 on this processor (as training.text asks it)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _elsewhere(spec: TrainSpec, info: BaseInfo, wide: float) -> int:
    """Bytes of the blocks that wait in main memory; one at a time is on the card."""
    known = list(blocks_of(info.linears).values())
    return int(sum(known[len(known) - spec.compute.block_swap + 1 :]) * wide) if spec.compute.block_swap else 0


def blocks_of(linears) -> dict[str, int]:
    """The repeated blocks of an image base with the parameters of their linear layers, by the names of these layers, in order."""
    found: dict[str, int] = {}
    for name, rows, columns in sorted(linears, key=lambda layer: [int(part) if part.isdigit() else -1 for part in layer[0].split(".")]):
        match = BLOCK.match(name)
        if match:
            found[match[1]] = found.get(match[1], 0) + rows * columns
    return found


def _text_parts(parts: dict[str, int], spec: TrainSpec, info: BaseInfo, rows: Rows, wide: float, cpu: bool) -> None:
    """Activations and logits of a language model."""
    if not (info.layers and info.hidden and info.intermediate):
        return
    is_packed = spec.compute.packing and not methods.is_padded(spec.method)
    how = "packed" if is_packed else "virtual" if spec.method.kind in methods.VIRTUAL else "padded"
    tokens = rows.tokens(spec.schedule.batch_size, padded=not is_packed)
    if spec.method.kind == "prompt":  # they go through every layer, and have logits
        tokens += spec.schedule.batch_size * spec.method.tokens

    inner = _inner(info, KEPT[how][1])
    # The norms of a mixture are none of the fused ones, and keep what comes in in fp32.
    block = KEPT[how][0] * info.hidden * (4 / wide if info.experts else 1) + inner / info.layers
    kept = info.layers * CHECKPOINTED * info.hidden + block if spec.compute.checkpointing else info.layers * block
    working = WORKING[how][0] * info.hidden + (0 if info.experts else WORKING[how][1] * info.intermediate)
    parts["activations"] = int(tokens * (kept + working) * wide)
    if getattr(spec.method, "experts", False) and info.experts:
        every = 0 if spec.compute.checkpointing else sum(info.stacks.values())
        parts["experts"] = int(wide * (every + MADE_EXPERTS * max(info.stacks.values())))
    vocabulary = info.vocabulary or 0
    scored = tokens * vocabulary * PLAIN_HEAD_COPIES if not is_packed else min(tokens * rows.learnt, max(16, CHUNK // max(1, vocabulary))) * vocabulary * HEAD_COPIES
    parts["logits"] = int(4 * scored)


def _inner(info: BaseInfo, of_inner: float) -> float:
    """Numbers kept for a token in the inner layers of all blocks: dense ones, `of_inner` for each of their width, and experts."""
    if not info.experts:
        return info.layers * of_inner * info.intermediate
    of_width, of_own = KEPT_OF_EXPERTS
    routed = sum(of_width * info.hidden + of_own * out / 2 for name, _, out, _ in info.experts if name.endswith("gate_up_proj"))
    return of_inner * sum(rows for name, rows, _ in info.adaptable if name.endswith("up_proj")) + info.per_token * routed


def _picture_parts(parts: dict[str, int], spec: TrainSpec, info: BaseInfo, rows: Rows, wide: float, cpu: bool) -> None:
    """What the encoders, the latents and the steps of an image model take; nothing while its files are not here."""
    if info.folder is None:
        parts |= {"text encoders": 0, "VAE": 0, "VAE's activations": 0}
        return
    encoders, vae, channels, shrink, latent = _pipeline_sizes(info)
    fewer = {"4bit": 0.57}.get(spec.compute.encoders, 2 if encoders * 4 > HEAVY else 4)
    parts["text encoders"] = 0 if spec.compute.encoders == "cpu" and not cpu else int(encoders * fewer)
    if spec.task.text_encoder:
        parts["encoders kept"] = int(encoders * wide)
    parts["VAE"] = vae * 4
    places, fast = spec.task.resolution**2 * spec.task.frames, cpu and spec.compute.fused and spec.method.kind != "full"
    parts["VAE's activations"] = int(places * channels * 4 * 6)
    parts["latents"] = rows.count * int(places / shrink**2) * latent * 8
    parts["activations"] = int(spec.schedule.batch_size * _kept_of_pictures(spec, info, shrink, keeps_scores=fast) * wide)
    if fast:
        targets = _adapted_ends(spec, info)
        parts["layouts"] = int(2 * wide * sum(out * columns for name, out, columns in info.linears if "conv" in name and not _is_adapted(name, targets)))


def _adapted_ends(spec: TrainSpec, info: BaseInfo) -> list[str]:
    """The ends of the names of the layers that an adapter goes on, or of the base itself those that learn."""
    if spec.method.kind != "full":
        return info.targets(spec.method.targets)
    return [name for name, *_ in info.linears if methods.learns(spec.method, f"{name}.weight", (2, 2))]


def _is_adapted(name: str, targets: list[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in targets)


def _kept_of_pictures(spec: TrainSpec, info: BaseInfo, shrink: int, *, keeps_scores: bool) -> float:
    """Numbers that the backward pass needs of one picture: what goes into each layer and comes out of it, at as many places as it works at."""
    latent = spec.task.resolution / shrink
    family = families.of_pipeline(info.pipeline)
    frames = (spec.task.frames + 3) // 4
    total, blocks, targets = 0.0, {}, _adapted_ends(spec, info)
    levels = 1 + max((int(found[1]) for name, *_ in info.linears if (found := re.match(r"(?:down|up)_blocks\.(\d+)", name))), default=0)
    for name, rows, columns in info.linears:
        places = frames * (latent / family.patch) ** 2 if family.component == "transformer" else (latent / 2 ** _level(name, levels)) ** 2
        if any(word in name for word in ("time_emb", "adaln", "norm", "modulation", "timestep")):
            places = 1
        convolves = "conv" in name
        size = places * (rows + columns / (9 if convolves and "shortcut" not in name else 1))
        size *= KEPT_OF_ADAPTED if convolves and _is_adapted(name, targets) else KEPT_OF_PICTURES
        if keeps_scores and name.endswith("attn1.to_q") and places**2 <= MOST_SCORES:
            size += SCORES * HEADS * places**2
        total += size
        match = re.match(r"(.*?\.\d+)\.", name)
        blocks[match[1] if match else ""] = blocks.get(match[1] if match else "", 0) + size
    return max(blocks.values(), default=0) + 0.05 * total if spec.compute.checkpointing else total


def _level(name: str, levels: int) -> int:
    """How often a UNet has halved the picture where a layer stands."""
    found = re.match(r"(down|up)_blocks\.(\d+)", name)
    if found is None:
        return levels - 1 if name.startswith("mid_block") else 0
    return int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])


def _pipeline_sizes(info: BaseInfo) -> tuple[int, int, int, int, int]:
    """Parameters of the text encoders and of the VAE, the VAE's first channels, how much it shrinks an edge, and the latents' channels."""
    folder = info.folder
    if folder.is_file():
        return 123_000_000, 84_000_000, 128, 8, 4  # Stable Diffusion's; XL's encoders are larger

    def count(part: Path) -> int:
        return sum(math.prod(shape) for file in part.glob("*.safetensors") for shape in bases.header_shapes(info.id, file).values())

    try:
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        encoders = sum(count(part) for part in folder.glob("text_encoder*"))
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [config.get("base_dim", 96)] * 4
        return encoders, count(folder / "vae"), int(channels[0]), 2 ** (len(channels) - 1), int(config.get("latent_channels") or config.get("z_dim") or 4)
    except (OSError, ValueError, StudioError):
        return 0, 0, 128, 8, 4


# ---- rows


def rows_of_facts(facts: dict) -> Rows | None:
    """The rows as the check of every row counted them; None where none was made."""
    if not facts.get("rows_train") or not facts.get("tokens"):
        return None
    mean, longest = facts["tokens"] / facts["rows_train"], facts["longest"]
    return Rows(mean, (longest - mean) / 3, longest, facts.get("tokens_learnt", facts["tokens"]) / facts["tokens"])


def rows_of_sizes(sizes: list[int], spec: TrainSpec, vocabulary: int | None) -> Rows:
    """The rows by the bytes of their texts. English text has about 0.36 · ln(vocabulary) bytes a token (3 for 2,700 tokens, 4.3 for 150,000)."""
    a_token = 1.0 if (vocabulary or 0) < 300 else 0.36 * math.log(vocabulary)
    most = spec.task.max_length
    lengths = [min(most, 8 + size / a_token) for size in sizes] or [most]
    mean = sum(lengths) / len(lengths)
    return Rows(mean, math.sqrt(sum((one - mean) ** 2 for one in lengths) / len(lengths)), max(lengths))


# ---- what to change


def lighter(spec: TrainSpec, peak_of: Callable[[TrainSpec], int], limit: float, *, on_gpu: bool) -> list[Change]:
    """Ways to come below `limit` bytes, the mildest first: single settings that do it alone, else as many as it takes; at most three.
    `peak_of` gives the bytes of another spec. Empty where nothing known is enough."""
    now, ladder = peak_of(spec), _ways(spec, on_gpu)

    def first(ways: list[dict]) -> Change | None:
        for values in ways:
            peak = peak_of(changed(spec, values))
            if peak <= limit:
                return Change(dict(values), peak, 1 - peak / now)
        return None

    found = [change for change in map(first, ladder) if change]
    values: dict[str, object] = {}
    for ways in ladder if not found else ():
        values |= ways[-1] if ways else {}
        found = [change for change in [first([values])] if values and change]
        if found:
            break
    return found[:3]


def after_running_out(spec: TrainSpec, info: BaseInfo, rows: Rows, *, trainable: int, device: str) -> list[Change]:
    """Ways to take a third less than the run that ran out took by the estimate, not counting what every run takes: the estimate was too
    low, or something else has the memory. Where nothing saves that much, the step that saves most of those that save a twentieth."""

    def peak_of(one: TrainSpec) -> int:
        found = estimate(one, info, rows, trainable=trainable, device=device)
        return max(1, found.peak - found.parts["libraries"])

    now, on_gpu = peak_of(spec), device.startswith("cuda")
    found = lighter(spec, peak_of, now * 2 / 3, on_gpu=on_gpu)
    if found:
        return found
    all_ways = [Change(values, peak, 1 - peak / now) for ways in _ways(spec, on_gpu) for values in ways if (peak := peak_of(changed(spec, values))) < 0.95 * now]
    return sorted(all_ways, key=lambda change: change.peak)[:1]


def _ways(spec: TrainSpec, on_gpu: bool) -> list[list[dict]]:
    """For each setting that saves memory its values, the mildest first; a setting that is already there has none."""
    batch, accumulate = spec.schedule.batch_size, spec.schedule.accumulate
    halves = [2**power for power in range(1, batch.bit_length())]
    ways = [
        [{"schedule.batch_size": max(1, batch // by), "schedule.accumulate": accumulate * by} for by in halves],
        [] if spec.compute.checkpointing else [{"compute.checkpointing": True}],
        [{"compute.precision": "bf16"}] if spec.compute.precision == "fp32" and spec.method.kind != "full" and on_gpu else [],
    ]
    if spec.task.kind == "image":
        step = spec.task.bucket_step
        ways.append([{"task.resolution": edge} for by in (0.75, 0.5) if (edge := int(spec.task.resolution * by) // step * step) >= step])
        ways.append([{"compute.quantize": "8bit"}, {"compute.quantize": "4bit"}] if on_gpu and spec.compute.quantize == "none" and not spec.compute.block_swap else [])
    else:
        ways.append([{"compute.quantize": "4bit"}] if spec.compute.quantize == "none" and importlib.util.find_spec("bitsandbytes") else [])
        ways.append([{"task.max_length": length} for by in (2, 4, 8) if (length := spec.task.max_length // by) >= 32])
        ways.append([{"compute.packing": True}] if not (spec.compute.packing or methods.is_padded(spec.method)) else [])
    # Without those beside which the spec would refuse another setting, as a method that needs the base's own numbers.
    return [[values for values in way if not any(is_idle(changed(spec, values)) for _, is_idle, _ in NO_EFFECT)] for way in ways]


def changed(spec: TrainSpec, values: dict[str, object]) -> TrainSpec:
    """The spec with other values at some paths."""
    for path, value in values.items():
        group, name = path.split(".")
        spec = spec.model_copy(update={group: getattr(spec, group).model_copy(update={name: value})})
    return spec
