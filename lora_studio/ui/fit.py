"""The memory of a run on the Train page: what each part takes, a badge that says whether it fits, and the settings that make it fit."""

import gradio as gr

from lora_studio import studio
from lora_studio.numbers import megabytes
from lora_studio.ui import forms, theme
from lora_studio.ui.events import QUIET

# The settings that memory may be saved with; each has its widget in the form.
PATHS = (
    "schedule.batch_size", "schedule.accumulate", "compute.checkpointing", "compute.precision", "compute.packing", "compute.quantize", "task.max_length",
    "task.resolution",
)  # fmt: skip
BADGES = {"fits": "ok", "tight": "warning", "too big": "error", "unknown": "note"}
EMPTY = {"badge": "", "words": "", "parts": []}
MEMORY = """{{#if value.badge}}<div class="memory"><p><b class="badge {{value.level}}">{{value.badge}}</b> {{value.words}}</p>
<dl>{{#each value.parts}}<dt>{{label}}</dt><dd><i style="width:{{share}}%" class="{{when}}"></i><span>{{size}}</span></dd>{{/each}}</dl></div>{{/if}}"""
CSS = """
.memory{border:1px solid var(--border-color-primary);border-radius:10px;padding:8px 12px;background:var(--background-fill-primary);color:var(--body-text-color);font-size:13px}
.memory p{margin:0 0 6px;line-height:1.45}
.badge{font-size:12px;padding:1px 9px;border-radius:99px;border:1px solid var(--border-color-primary)}
.badge.ok{color:var(--studio-ok)}.badge.warning{color:var(--studio-warn);border-color:var(--studio-warn-edge);background:var(--studio-warn-soft)}
.badge.error{color:var(--studio-bad);border-color:var(--studio-bad-edge);background:var(--studio-bad-soft)}
.memory dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 10px;margin:0;align-items:center}
.memory dt{font-size:12px;color:var(--body-text-color-subdued);font-weight:400;margin:0}
.memory dd{margin:0;display:flex;align-items:center;gap:7px;min-width:0}
.memory i{display:block;height:7px;border-radius:4px;background:var(--color-accent);flex-shrink:1}
.memory i.other{background:transparent;border:1px solid var(--color-accent)}.memory span{font-size:12px;white-space:nowrap}
"""


class Fit:
    """A part of the Train page."""

    def build(self) -> None:
        """Lay it out inside the current column."""
        self.memory = theme.Shown(EMPTY, html_template=MEMORY, css_template=CSS, elem_classes="flush", elem_id="memory")
        self.button = gr.Button("", size="md", visible=False, elem_id="make-it-fit")
        self.values = gr.State({})

    @property
    def shown(self) -> list:
        """What an assessment fills."""
        return [self.memory, self.button, self.values]

    def connect(self, form: forms.Form) -> None:
        """Let the button put the values into the form."""
        self.button.click(lambda values: self.put(form, values), self.values, [form[path] for path in PATHS], **QUIET)

    def put(self, form: forms.Form, values: dict) -> list:
        """Updates of the settings that save memory; the others stay."""
        return [forms.show(forms.leaf(path), values[path]) if path in values else gr.skip() for path in PATHS]

    def show(self, facts: dict) -> list:
        """Updates for `shown` from the facts of a report; without an estimate there is nothing to see."""
        if not facts.get("memory_peak"):
            return [EMPTY, gr.update(visible=False), {}]
        changes = facts.get("memory_changes") or []
        values = changes[0]["values"] if changes else {}
        label = "Make it fit: " + ", ".join(f"{path.partition('.')[2].replace('_', ' ')} {forms.show(forms.leaf(path), value)}" for path, value in values.items())
        return [memory_of(facts), gr.update(value=label.replace(" True", " on"), visible=bool(values)), values]


def memory_of(facts: dict) -> dict:
    """An estimate as it is shown."""
    badge, free = facts["memory_badge"], facts.get("memory_free")
    beside = f", {studio.gigabytes(free)} free on {facts['device']}" if free is not None else ""
    least = "at least " if badge == "unknown" else "about "
    words = f"{least}{studio.gigabytes(facts['memory'])} at its worst, while {facts['memory_phase']}{beside}."
    most = max(facts["memory_parts"].values(), default=0) or 1
    parts = [
        {"label": name, "size": megabytes(size), "share": round(60 * size / most, 1), "when": "now" if name in facts["memory_together"] else "other"}
        for name, size in facts["memory_parts"].items() if size
    ]  # fmt: skip
    return {"badge": "not known yet" if badge == "unknown" else badge, "level": BADGES[badge], "words": words, "parts": parts}


def outgrown() -> list:
    """Updates for `shown` where there is no spec to judge."""
    return [EMPTY, gr.update(visible=False), {}]
