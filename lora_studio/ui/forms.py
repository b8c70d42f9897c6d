"""The form of a spec: one widget for every setting, made from the spec's own fields, handed over as one dict."""

from collections.abc import Iterable
from typing import get_origin

import gradio as gr
import yaml

from lora_studio import families, settings
from lora_studio.settings import Leaf
from lora_studio.spec import methods
from lora_studio.spec.idle import OF_B, OF_LANGUAGE, OF_PICTURES, foreign

# What a newcomer needs stands in front; all else is behind "Advanced", by group.
BASIC = (
    "name", "base.id", "task.kind", "method.kind", "method.rank", "method.alpha", "optim.lr", "optim.lora_plus_ratio", "schedule.epochs",
    "schedule.steps", "schedule.batch_size", "output.sample_prompts",
)  # fmt: skip
GROUPS = {
    "base": "Base model",
    "task": "Rows and chat template",
    "data": "Sources",
    "validation": "Validation",
    "method": "Adapter",
    "optim": "Optimizer",
    "schedule": "Schedule",
    "compute": "Compute",
    "output": "Checkpoints and samples",
}
LABELS = {
    "base.id": "Base model", "task.kind": "Rows are", "optim.lr": "Learning rate", "optim.lora_plus_ratio": "LoRA+ ratio",
    "method.alpha": "Alpha", "method.kind": "Kind of adapter", "method.dora": "DoRA", "method.start": "Go on from", "output.sample_prompts": "Sample prompts (one a line)", "method.rslora": "Rank-stabilised (rsLoRA)",
    "method.freeze_a": "A frozen (LoRA-FA)", "method.experts": "Experts of a mixture too",
    "data": "Sources as YAML",
}  # fmt: skip

Form = dict[str, gr.components.Component]


class Slider(gr.Slider):
    """A slider that hands on whatever was typed into its number box, or that nothing is left there: who takes it says by name what is wrong."""

    def get_block_name(self) -> str:
        """The component of the page that shows it."""
        return "slider"

    def preprocess(self, payload):
        """The number as it came."""
        return payload


def leaf(path: str) -> Leaf:
    """The setting of that path."""
    return next(found for found in settings.leaves() if found.path == path)


def label(found: Leaf) -> str:
    """What stands above a widget."""
    return LABELS.get(found.path) or found.label.capitalize()


def widget(path: str) -> gr.components.Component:
    """The widget of a setting, holding its default."""
    found = leaf(path)
    common = {"label": label(found), "info": found.help, "interactive": True, "elem_id": "field-" + path.replace(".", "-")}
    common["visible"] = fits(found, leaf("task.kind").default, leaf("method.kind").default)
    value = show(found, found.default)
    if path == "base.id":
        return gr.Dropdown(families.known_bases(), value=value, allow_custom_value=True, **common)
    if path == "data":
        return gr.Textbox(value, lines=3, max_lines=12, elem_classes="mono", **common)
    if found.choices:
        return gr.Dropdown(list(found.choices), value=value, **common) if len(found.choices) > 1 else gr.Textbox(value, **{**common, "interactive": False})
    if found.type is bool:
        return gr.Checkbox(value, **common)
    if found.type == list[str]:
        return gr.Textbox(value, lines=2, max_lines=8, **common)
    hint = "automatic" if found.optional and "null" in found.help else ("none" if found.optional else None)
    return gr.Textbox(value, placeholder=hint, max_lines=1, **common)


def fits(found: Leaf, kind: str, method: str) -> bool:
    """Whether a setting is one of a kind of task and of a kind of adapter; settings of other groups are, but for a few."""
    own = {"task": kind, "method": method}.get(found.group)
    return found.path not in foreign(kind, method) and (own is None or not found.kinds or own in found.kinds)


def adapt(form: Form, kind: str, method: str) -> dict:
    """Updates that show the settings of a kind of task and of adapter, and hide those of the others."""
    told = {path for path in form if leaf(path).kinds and leaf(path).group in ("task", "method")} | set(OF_LANGUAGE + OF_PICTURES + OF_B)
    return {component: gr.update(visible=fits(leaf(path), kind, method)) for path, component in form.items() if path in told}


def start_afresh(form: Form, kind: str) -> dict:
    """Updates that put the settings of a kind of adapter where they are when nothing is said; the layers that were named stay."""
    values = methods.defaults(kind)
    return fill(form, values, only=[path for path in values if path not in ("method.kind", "method.targets")])


def show(found: Leaf, value):
    """A setting's value as its widget shows it. Numbers are text, so that `2e-4` can be typed and nothing is rounded."""
    if found.path == "data":
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip() if value else ""
    if found.type is bool or found.choices:
        return value
    if isinstance(value, list):
        return "\n".join(value) if found.type == list[str] else ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "" if value is None else str(value)


def read(found: Leaf, shown):
    """What a widget holds as a setting's value; the spec judges it."""
    if found.path == "data":
        return settings.read_yaml(shown, "Sources") if (shown or "").strip() else []
    if found.type is bool or found.choices:
        return shown
    text = (shown or "").strip() if isinstance(shown, str | None) else str(shown)
    if found.type == list[str]:
        return [line.strip() for line in text.splitlines() if line.strip()]
    if found.default in ("auto", "all") and text in ("", found.default):
        return found.default
    if found.path in ("method.targets", "method.layers") or get_origin(found.type) is list:
        return [name.strip() for name in text.strip("[]").split(",") if name.strip()]
    if found.path == "name":
        return shown or ""
    return None if text == "" and (found.optional or found.type is not str) else text


def collect(form: Form, given: dict) -> dict[str, object]:
    """The settings that a form's widgets hold, by path. Raises SpecError when the sources are not YAML."""
    return {path: read(leaf(path), given[component]) for path, component in form.items()}


def fill(form: Form, values: dict[str, object], *, only: Iterable[str] | None = None) -> dict:
    """Updates that put settings into a form's widgets."""
    wanted = set(values if only is None else only)
    return {component: show(leaf(path), values[path]) for path, component in form.items() if path in wanted}


def advanced() -> Form:
    """The widgets of every setting that is not basic, in one closed accordion a group."""
    form: Form = {}
    for group, title in GROUPS.items():
        paths = [found.path for found in settings.leaves() if found.group == group and found.path not in BASIC]
        if not paths:
            continue
        with gr.Accordion(title, open=False):
            for start in range(0, len(paths), 2):
                with gr.Row():
                    for path in paths[start : start + 2]:
                        form[path] = widget(path)
    return form
