"""Recommended settings for a base, its rows and a machine, each with its reason in words. Loads nothing but headers and presets.

The numbers are those of the presets: of the base itself, else of the nearest size in its family, else of the nearest size. What the rows and
the memory change is said. That a step takes 8 rows or more and a language model sees its rows one to three times is what the guides of
Unsloth, axolotl and TRL agree on.
"""

import math
import re
from dataclasses import dataclass, field

from lora_studio import families, memory, presets, settings
from lora_studio.bases import BaseInfo
from lora_studio.presets import Preset
from lora_studio.spec import TrainSpec, methods, parse
from lora_studio.spec.idle import foreign, needs_gpu

PATHS = (
    "task.max_length", "task.resolution", "task.more_resolutions", "task.caption_dropout", "task.weighting", "method.rank", "method.alpha",
    "method.targets", "optim.kind", "optim.lr", "optim.lora_plus_ratio", "schedule.kind", "schedule.epochs", "schedule.steps", "schedule.warmup",
    "schedule.batch_size", "schedule.accumulate", "compute.precision", "compute.quantize", "compute.checkpointing", "compute.encoders",
    "compute.block_swap",
)  # fmt: skip
# (rows from which on, how often they are seen): few rows are seen three times, many are enough in one round.
EPOCHS = ((10_000, 1.0), (1_000, 2.0), (0, 3.0))
FEWEST_ROWS, FEWEST_STEPS = 8, 100
CARD = re.compile(r"GPU of (\d+) GB")
ROOM = 1.1  # a card of 24 GB has a little less free


@dataclass(frozen=True)
class Situation:
    """What is known before settings are chosen: the base by its headers, how many rows (0: unknown) and how long, the device, the bytes
    free on it (None: unknown), and whether bitsandbytes is there."""

    base: BaseInfo
    rows: int = 0
    texts: memory.Rows = field(default_factory=memory.Rows)
    device: str = "cpu"
    free: int | None = None
    has_bitsandbytes: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Advice:
    """One setting: its path, the value, and why."""

    path: str
    value: object
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """Settings with their reasons, the preset they come from, and what else is worth a word."""

    preset: str
    advices: tuple[Advice, ...]
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, object]:
        """The settings by path."""
        return {advice.path: advice.value for advice in self.advices}


def recommend(spec: TrainSpec, found: Situation) -> Recommendation:
    """What to set for a run. Of `spec` its base, its rows, and its kinds of task and of adapter are taken; another kind of adapter than
    lora keeps its own rank."""
    preset, how = nearest(found, spec.task.kind == "image")
    tree, values, reasons, notes = preset.tree(), {}, {}, []
    for leaf in settings.leaves():
        if leaf.path in PATHS and _applies(leaf, spec):
            said = _at(tree, leaf.path, leaf.default)
            values[leaf.path] = said
            reasons[leaf.path] = f"As in preset {preset.name}." if said != leaf.default else "The usual value."
    if "method.rank" in values:
        reasons["method.rank"] = f"{how} Rank, alpha and rate belong together."
        reasons["method.alpha"] = f"Goes with rank {values['method.rank']} in preset {preset.name}."
        reasons["optim.lr"] = f"Goes with that rank and alpha in preset {preset.name}."
    else:
        reasons["optim.lr"] = f"{how} It was chosen for LoRA; {spec.method.kind} may want another."
    if spec.method.kind in methods.VIRTUAL:
        values["optim.lr"], reasons["optim.lr"] = 0.02, "Usual for virtual tokens, which learn at about a hundred times the rates of LoRA."
    _suit_machine(spec, found, values, reasons)
    if spec.task.kind != "image":
        _suit_rows(found, values, reasons, notes)
    elif found.rows:
        _tell_views(found, values, reasons)
    _fit(spec, found, values, reasons, notes)
    return Recommendation(preset.name, tuple(Advice(path, values[path], reasons[path]) for path in values), tuple(notes))


def nearest(found: Situation, is_image: bool) -> tuple[Preset, str]:
    """The preset to go by, and in words why that one."""
    info, known = found.base, [(preset, preset.tree()) for preset in presets.available()]
    fitting = [(preset, tree["base"]["id"]) for preset, tree in known if (tree.get("task", {}).get("kind") == "image") == is_image]
    own = [preset for preset, base in fitting if base == info.id]
    if own:
        return _by_card(own, found.free), f"Preset {_by_card(own, found.free).name} is made for {info.id}."
    real = [(preset, base) for preset, base in fitting if not base.startswith("demo-")]
    family = _family_of(info)
    kin = [(preset, base) for preset, base in real if family is not None and base in family.sizes]
    base = min((base for _, base in kin or real), key=lambda base: _apart(info.parameters, families.billions(base)))
    chosen = _by_card([preset for preset, other in kin or real if other == base], found.free)
    size = f", {families.billions(base):g} billion parameters" + (f" to {info.parameters / 1e9:.2g} here" if info.parameters else "")
    return chosen, f"Preset {chosen.name} is the nearest" + (f" in the family {family.name}" if kin else " in size") + f"{size}."


def _family_of(info: BaseInfo):
    """The family of a base: by its pipeline, by its id, or by its model type."""
    if info.pipeline:
        return families.of_pipeline(info.pipeline)
    named = next((family for family in (*families.FAMILIES, *families.IMAGE_FAMILIES) if info.id in family.sizes), None)
    return named or families.of_model_type(info.model_type)


def _apart(parameters: int | None, billions: float) -> float:
    """How far apart two sizes are, as the logarithm of their ratio."""
    return abs(math.log((parameters or 1e9) / (billions * 1e9)))


def _by_card(found: list[Preset], free: int | None) -> Preset:
    """Of a base's presets that for the largest card which is not larger than what is free; else that for the smallest."""

    def card(preset: Preset) -> int:
        told = CARD.search(preset.description)
        return int(told[1]) if told else 0

    order = sorted(found, key=lambda preset: (card(preset), preset.name != presets.FIRST))
    fitting = [preset for preset in order if free is not None and card(preset) * 1e9 <= ROOM * free]
    return next((preset for preset in order if fitting and card(preset) == card(fitting[-1])), order[0])


def _applies(leaf: settings.Leaf, spec: TrainSpec) -> bool:
    if leaf.group == "method":
        return spec.method.kind == "lora"
    if leaf.group == "task" and leaf.kinds and spec.task.kind not in leaf.kinds:
        return False
    return leaf.path not in foreign(spec.task.kind, spec.method.kind)


def _at(tree: dict, path: str, default):
    group, _, name = path.partition(".")
    return tree.get(group, {}).get(name, default)


def _suit_machine(spec: TrainSpec, found: Situation, values: dict, reasons: dict) -> None:
    """Take out what this device cannot do or has no use for."""
    if not found.on_gpu:
        for path in needs_gpu(_trial(spec, values)):
            values[path] = {"compute.quantize": "none", "compute.encoders": "auto", "compute.block_swap": 0}[path]
            reasons[path] = f"The preset's value needs an NVIDIA GPU, and this is {found.device}."
        if values.get("compute.encoders") == "cpu":
            values["compute.encoders"], reasons["compute.encoders"] = "auto", "The whole run is on the processor."
    if "8bit" in values["optim.kind"] and not found.has_bitsandbytes:
        values["optim.kind"], reasons["optim.kind"] = "adamw", "bitsandbytes is not installed, which the preset's optimizer needs."
    if spec.method.kind == "full":
        values["compute.quantize"] = "none"
        if "compute.block_swap" in values:
            values["compute.block_swap"] = 0
    if spec.method.kind == "prefix":
        values["compute.checkpointing"], reasons["compute.checkpointing"] = False, "It does not go with prefix tuning."
    reasons["compute.precision"] += " auto takes bf16 where the device computes in it." if values["compute.precision"] == "auto" else ""


def _suit_rows(found: Situation, values: dict, reasons: dict, notes: list) -> None:
    """How often rows are seen and how many make a step, by how many there are."""
    if values["schedule.steps"] is not None:
        reasons["schedule.epochs"] = "Idle: the number of steps is given."
    if values["schedule.steps"] is not None or not found.rows:
        return
    rows = max(1, round(found.rows * 0.9))  # a tenth is held out
    epochs = next(often for least, often in EPOCHS if rows >= least)
    values["schedule.epochs"] = epochs
    reasons["schedule.epochs"] = f"One to three rounds are usual for language models; {rows:,} rows to learn from are {'many' if epochs == 1 else 'few' if epochs == 3 else 'neither few nor many'}."
    batch, accumulate = values["schedule.batch_size"], values["schedule.accumulate"]
    before = batch * accumulate
    while batch * accumulate > FEWEST_ROWS and rows * epochs / (batch * accumulate) < FEWEST_STEPS:
        batch, accumulate = (batch, accumulate // 2) if accumulate > 1 else (batch // 2, 1)
    batch, accumulate = min(batch, rows), min(accumulate, -(-rows // min(batch, rows)))
    if batch * accumulate != before:
        steps = math.ceil(rows * epochs / (batch * accumulate))
        why = f"{rows:,} rows make too few steps of {before} rows each; {batch * accumulate} a step make {steps}."
        for path, value in (("schedule.batch_size", batch), ("schedule.accumulate", accumulate)):
            reasons[path] = why if values[path] != value else reasons[path]
            values[path] = value
    if found.rows < FEWEST_STEPS:
        notes.append(f"{found.rows} rows leave few to judge by. Compare settings by cross-validation under Several at once, or on the command line: sweep --folds 5.")


def _tell_views(found: Situation, values: dict, reasons: dict) -> None:
    """How often each picture is seen."""
    if values["schedule.steps"] is not None:
        reasons["schedule.epochs"] = "Idle: the number of steps is given."
        often = values["schedule.steps"] * values["schedule.batch_size"] * values["schedule.accumulate"] / found.rows
        reasons["schedule.steps"] += f" Each of the {found.rows:,} pictures is seen about {often:,.0f} times."


def _fit(spec: TrainSpec, found: Situation, values: dict, reasons: dict, notes: list) -> None:
    """Save memory where the settings so far need more than is free."""
    if found.free is None or found.base.parameters is None:
        return

    def peak(one: TrainSpec) -> int:
        info = found.base
        trainable = info.parameters if one.method.kind == "full" else info.trainable(info.targets(one.method.targets), one.method)
        return memory.estimate(one, info, found.texts, trainable=trainable, device=found.device).needed

    trial = _trial(spec, values)
    needed, limit = peak(trial), memory.TIGHT * found.free
    if needed <= limit:
        reasons["compute.checkpointing"] += f" About {_gigabytes(needed)} of {_gigabytes(found.free)} are needed." if "compute.checkpointing" in reasons else ""
        return
    changes = memory.lighter(trial, peak, limit, on_gpu=found.on_gpu)
    if not changes:
        notes.append(f"{found.base.id} needs about {_gigabytes(needed)}, and {found.device} has {_gigabytes(found.free)} free: nothing that is known makes it fit. Choose a smaller base.")
        return
    for path, value in changes[0].values.items():
        values[path] = value
        reasons[path] = f"Without it about {_gigabytes(needed)} are needed and {_gigabytes(found.free)} are free; so it is about {_gigabytes(changes[0].peak)}."


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _trial(spec: TrainSpec, values: dict) -> TrainSpec:
    """The run with these settings, all others at their defaults."""
    plain = {"base": spec.base.model_dump(), "data": [source.model_dump() for source in spec.data], "task": {"kind": spec.task.kind}, "method": {"kind": spec.method.kind}}
    for path, value in values.items():
        plain = settings.set_path(plain, path, value)
    return parse(plain)
