"""The model card of an adapter or a blend: README.md, written from what is known, and its loss curve as a picture.

Text from outside is escaped: it cannot end the front matter, open a heading or a link, or break a table or a code block.
"""

import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lora_studio import bases
from lora_studio import spec as specs
from lora_studio.errors import StudioError
from lora_studio.spec import Base
from lora_studio.weights import Weight, in_words

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LANGUAGE = re.compile(r"[a-z]{2,3}")
# The names of licenses that the Hub takes as they are; any other becomes `other` with its own name beside it.
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m
    bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
    other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
CURVE = "loss.png"
SETTINGS = ("optim", "schedule", "compute", "validation")
POINTS = 400
OTHER_KINDS = {"prompt": "tuned prompt", "prefix": "tuned prefix"}  # kinds of method that are no adapter on layers


@dataclass(frozen=True)
class Parent:
    """An adapter that went into a blend: its name, its weight, the hash of its weights, and its Hub id if it has one."""

    name: str
    weight: Weight
    sha256: str = ""
    hub_id: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt, the adapter's answer, and the base's answer to it."""

    prompt: str
    answer: str
    base_answer: str | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter. What is empty is left out of the card."""

    name: str
    base: str
    base_revision: str | None = None
    license: str | None = None
    notes: str = ""
    trigger: str = ""
    chat: bool = True
    languages: Sequence[str] = ()
    tags: Sequence[str] = ()
    data: Sequence[Mapping[str, object]] = ()
    """One mapping for each source: name, and what is known beside it (rows, split, fingerprint)."""
    method: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)
    curve: str = ""
    """The name of the picture of the loss beside the card, such as loss.png."""
    parents: Sequence[Parent] = ()
    recipe: str = ""
    """A blend's recipe as it can be run again, such as YAML."""
    samples: Sequence[Sample] = ()
    pipeline_file: str = ""
    """The name of the file that diffusers reads, where the adapter is one of an image model."""
    pictures: Sequence[tuple[str, str]] = ()
    """Sample pictures beside the card, each a prompt and the name of its file."""


def facts_of(spec: specs.TrainSpec, **more) -> Facts:
    """The facts that a run's spec holds; `more` adds the fields of Facts that only the run knows (metrics, samples, ...)."""
    tree = specs.to_tree(spec)
    data = [
        {"name": row["path"], **{key: row[key] for key in ("subset", "split", "revision", "weight", "cap") if row[key] is not None}} for row in tree["data"]
    ]
    known = {
        "name": spec.name,
        "base": spec.base.id,
        "base_revision": spec.base.revision,
        "chat": spec.task.kind == "chat",
        "data": data,
        "method": {"task": spec.task.kind, **tree["method"]},
        "settings": {f"{part}.{name}": value for part in SETTINGS if isinstance(tree.get(part), dict) for name, value in tree[part].items()},
    }
    return Facts(**{**known, **more})


def is_hub_id(id: str) -> bool:
    """Whether a base or data set is one of the Hub, and not a folder here that looks like one."""
    return bool(HUB_ID.fullmatch(id)) and "--" not in id and ".." not in id and not Path(id).exists()


def shown(id: str) -> str:
    """How a base or data set is called in public: its Hub id, else only the last part of its path."""
    if is_hub_id(id) or id.startswith("demo-"):
        return id
    return re.split(r"[/\\]", id.rstrip("/\\"))[-1] or "a local folder"


def write(facts: Facts, *, repo_id: str | None = None, folder: str = "") -> str:
    """The card as Markdown with front matter that the Hub accepts. `repo_id` is where it will be published, `folder` the subfolder there."""
    kind = "blend of LoRA adapters" if facts.parents else OTHER_KINDS.get(str(facts.method.get("kind")), "LoRA adapter")
    base = f"[{escape(facts.base)}](https://huggingface.co/{facts.base})" if is_hub_id(facts.base) else f"`{_code(shown(facts.base))}`"
    parts = [
        f"---\n{front_matter(facts)}---\n",
        f"# {escape(facts.name)}\n",
        f"A {kind} for {base}, made with LoRA Studio.\n",
        "\n".join(f"{escape(line)}\n" for line in facts.notes.splitlines() if line.strip()),
        f"Its trigger is `{_code(facts.trigger)}`.\n" if facts.trigger else "",
        _section("How to load it", fence(_loading(facts, repo_id, folder), "python")),
        _parents(facts),
        _section("Sample pictures", "\n".join(f"![{escape(prompt)}]({name})\n" for prompt, name in facts.pictures)),
        _section("Sample answers", "\n".join(_sample(sample) for sample in facts.samples)),
        _section("Measured", table(["what", "value"], _rows(facts.metrics))),
        _section("Loss", f"![The loss by step]({facts.curve})\n" if re.fullmatch(r"[\w-]+\.(?:png|svg)", facts.curve) else ""),
        _section("Data", _data(facts.data)),
        _section("Method", table(["setting", "value"], _rows(facts.method))),
        _section("Settings", table(["setting", "value"], _rows(facts.settings))),
    ]
    return "\n".join(part for part in parts if part)


def front_matter(facts: Facts) -> str:
    """The YAML at the top: only values that the Hub accepts, and nothing that is not known."""
    head: dict[str, object] = {}
    if facts.license:
        given = facts.license.strip().lower()
        head["license"] = given if given in LICENSES else "other"
        name = re.sub(r"[^a-z0-9.]+", "-", given).strip("-.")[:80]
        if given not in LICENSES and name:
            head["license_name"] = name
    languages = [code for code in facts.languages if LANGUAGE.fullmatch(code)]
    if languages:
        head["language"] = languages
    if is_hub_id(facts.base):
        head |= {"base_model": facts.base, "base_model_relation": "adapter"}
    if facts.pipeline_file:
        head |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
        head |= {"instance_prompt": plain(facts.trigger)} if facts.trigger else {}
        head |= {"widget": [{"text": plain(prompt), "output": {"url": name}} for prompt, name in facts.pictures]} if facts.pictures else {}
    else:
        head |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    datasets = [name for row in facts.data if is_hub_id(name := str(row.get("name", ""))) and not name.startswith("demo/")]
    if datasets:
        head["datasets"] = list(dict.fromkeys(datasets))
    own = [] if facts.method.get("kind") in OTHER_KINDS else ["lora"]
    tags = [*own, "lora-studio", *(["diffusers", "text-to-image"] if facts.pipeline_file else []), *(["merge"] if facts.parents else []), *(plain(tag)[:50] for tag in facts.tags)]
    head["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=False, width=1 << 20)


def _place(repo_id: str | None, folder: str) -> str:
    """Where an adapter is loaded from, as arguments."""
    return json.dumps(repo_id or "owner/name") + (f", subfolder={json.dumps(folder)}" if folder else "")


def _loading_pictures(facts: Facts, repo_id: str | None, folder: str) -> str:
    name = json.dumps(shown(facts.base))
    revision = f", revision={json.dumps(facts.base_revision)}" if facts.base_revision and is_hub_id(facts.base) else ""
    demo = facts.base.startswith("demo-")
    base = f"demo_base({name})" if demo else name
    prompt = json.dumps(facts.pictures[0][0] if facts.pictures else facts.trigger or "a picture")
    pipeline, load = "DiffusionPipeline", "from_pretrained"
    if facts.base.endswith(".safetensors"):
        pipeline, load = _pipeline_of_file(facts.base), "from_single_file"
    return "\n".join([
        *(["from lora_studio.home import demo_base  # comes with LoRA Studio"] if demo else []),
        f"from diffusers import {pipeline}",
        "",
        f"pipeline = {pipeline}.{load}({base}{revision})" + ("" if demo or is_hub_id(facts.base) else "  # a local model: give its path"),
        f"pipeline.load_lora_weights({_place(repo_id, folder)}, weight_name={json.dumps(facts.pipeline_file)})",
        f"pipeline({prompt}).images[0].save(\"picture.png\")",
    ])  # fmt: skip


def _pipeline_of_file(path: str) -> str:
    """The pipeline of a model in one file, while it is here."""
    try:
        return bases.inspect(Base(id=path)).pipeline
    except StudioError:
        return "StableDiffusionPipeline"


def _loading(facts: Facts, repo_id: str | None, folder: str) -> str:
    if facts.pipeline_file:
        return _loading_pictures(facts, repo_id, folder)
    demo = facts.base.startswith("demo-")
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if demo:
        lines.insert(0, "from lora_studio.home import demo_base")
        lines += [f"base = demo_base({json.dumps(facts.base)})  # comes with LoRA Studio"]
    else:
        lines += [f"base = {json.dumps(shown(facts.base))}" + ("" if is_hub_id(facts.base) else "  # a local model: give its folder")]
    revision = f", revision={json.dumps(facts.base_revision)}" if facts.base_revision and is_hub_id(facts.base) else ""
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
        f"model = AutoModelForCausalLM.from_pretrained(base{revision})",
        f"model = PeftModel.from_pretrained(model, {_place(repo_id, folder)})",
        "",
    ]
    prompt = json.dumps(facts.samples[0].prompt if facts.samples else "Hello!")
    if facts.chat:
        lines += [
            f'messages = [{{"role": "user", "content": {prompt}}}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        ]
    else:
        lines += [f'inputs = tokenizer({prompt}, return_tensors="pt")']
    lines += ["answer = model.generate(**inputs, max_new_tokens=100)", "print(tokenizer.decode(answer[0], skip_special_tokens=True))"]
    return "\n".join(lines)


def _parents(facts: Facts) -> str:
    if not facts.parents:
        return ""
    rows = [[parent.hub_id if is_hub_id(parent.hub_id) else parent.name, in_words(parent.weight), parent.sha256[:16]] for parent in facts.parents]
    formula = "Each layer is `W = W0 + sum of weight * scale * B @ A` over these adapters:\n\n"
    recipe = "\nThe recipe, to make it again:\n\n" + fence(facts.recipe, "yaml") if facts.recipe else ""
    return _section("Parents", formula + table(["adapter", "weight", "sha256"], rows) + recipe)


def _sample(sample: Sample) -> str:
    base = f"\nThe base alone answers:\n\n{fence(sample.base_answer)}" if sample.base_answer is not None else ""
    return f"Asked:\n\n{fence(sample.prompt)}\nIt answers:\n\n{fence(sample.answer)}{base}"


def _data(data: Sequence[Mapping[str, object]]) -> str:
    if not data:
        return ""
    names = list(dict.fromkeys(key for row in data for key in row))
    return table(names, [[shown(str(row[key])) if key == "name" and key in row else _value(row.get(key, "")) for key in names] for row in data])


def _rows(values: Mapping[str, object]) -> list[list[str]]:
    return [[name, _value(value)] for name, value in values.items() if value is not None]


def _value(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(one) for one in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def plain(text) -> str:
    """Text on one line, without control characters and the marks that reverse or hide what is read."""
    line = " ".join(str(text).split())
    return "".join(letter for letter in line if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co"))


def escape(text) -> str:
    """Text on one line that Markdown and HTML show as it is, in a paragraph, a heading or a table."""
    line = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+!|~$^=:-])", r"\\\1", line)
    return re.sub(r"^(\d+)\.(?= |$)", r"\1\\.", line)


def _code(text) -> str:
    """Text for between single backticks."""
    return plain(text).replace("`", "'") or " "


def fence(text: str, language: str = "") -> str:
    """A code block that no text inside can end: its fence is longer than any run of backticks in it."""
    kept = "".join(letter for letter in str(text) if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co"))
    longest = max((len(run) for run in re.findall(r"`+", kept)), default=0)
    bar = "`" * max(3, longest + 1)
    return f"{bar}{language}\n{kept}\n{bar}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty when there are no rows."""
    lines = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(escape(name) for name in head) + " |", "|" + "---|" * len(head), *lines]) + "\n"


def loss_curve(training: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]] = ()) -> bytes | None:
    """The loss by step as a PNG of 800 × 360: training as a line, validation as a line with dots. None without two points."""
    series = [_thin([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]) for points in (training, validation)]
    points = [point for one in series for point in one]
    if len({x for x, _ in points}) < 2:
        return None
    from PIL import Image, ImageDraw, ImageFont

    zoom, width, height = 2, 800, 360
    left, top, right, bottom = 64, 36, width - 20, height - 36
    (low_x, high_x), (low_y, high_y) = (_range(value[axis] for value in points) for axis in (0, 1))
    place = lambda x, y: (  # noqa: E731
        zoom * (left + (right - left) * (x - low_x) / (high_x - low_x)),
        zoom * (bottom - (bottom - top) * (y - low_y) / (high_y - low_y)),
    )
    image = Image.new("RGB", (zoom * width, zoom * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12 * zoom)
    for tick in ticks(low_y, high_y):
        draw.line([place(low_x, tick), place(high_x, tick)], fill="#e5e7eb", width=zoom)
        draw.text((zoom * (left - 8), place(low_x, tick)[1]), f"{tick:g}", fill="#4b5563", font=font, anchor="rm")
    for tick in ticks(low_x, high_x):
        draw.text((place(tick, low_y)[0], zoom * (bottom + 8)), f"{tick:g}", fill="#4b5563", font=font, anchor="mt")
    draw.text((zoom * right, zoom * (height - 8)), "step", fill="#4b5563", font=font, anchor="rb")
    for index, (name, color, line) in enumerate((("training loss", "#2563eb", series[0]), ("validation loss", "#c2410c", series[1]))):
        if not line:
            continue
        draw.line([place(x, y) for x, y in line], fill=color, width=2 * zoom, joint="curve")
        for x, y in (place(*point) for point in (line if index else ())):
            draw.ellipse([x - 3 * zoom, y - 3 * zoom, x + 3 * zoom, y + 3 * zoom], fill=color)
        draw.text((zoom * (left + 140 * index), zoom * 12), name, fill=color, font=font, anchor="lt")
    out = io.BytesIO()
    image.resize((width, height), Image.LANCZOS).save(out, format="PNG", optimize=True)
    return out.getvalue()


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: the mean of each stretch."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _range(values: Iterable[float]) -> tuple[float, float]:
    low, high = (edge(kept) for kept in (list(values),) for edge in (min, max))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]
