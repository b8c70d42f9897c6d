"""Recommended settings on the Train page: one press fills them in for this base, these rows and this machine, each with its reason, and one takes them back."""

import gradio as gr

from lora_studio import settings, studio
from lora_studio.advice import PATHS, Recommendation
from lora_studio.errors import StudioError
from lora_studio.ui import forms, theme
from lora_studio.ui.events import QUIET, Gathered, busy, when

REASONS = """{{#if value.rows}}<div class="reasons"><p>{{value.preset}}</p><dl>{{#each value.rows}}<dt><code>{{path}}</code> <b>{{shown}}</b></dt><dd>{{reason}}</dd>{{/each}}</dl></div>{{/if}}"""
CSS = """
.reasons{font-size:13px;color:var(--body-text-color)}.reasons p{margin:0 0 6px;color:var(--body-text-color-subdued)}
.reasons dl{display:grid;grid-template-columns:minmax(180px,2fr) 5fr;gap:3px 12px;margin:0}
.reasons dt{font-weight:400;margin:0;overflow-wrap:anywhere}.reasons dd{margin:0;color:var(--body-text-color-subdued);overflow-wrap:anywhere}
.reasons code{font-size:12px;padding:1px 5px;border-radius:5px;background:var(--background-fill-secondary)}
@media (max-width:640px){.reasons dl{grid-template-columns:1fr}.reasons dd{margin-bottom:5px}}
"""
# What a recommendation goes by: anything else that stands in the form may be wrong and does not matter.
ASKED = ("base.id", "base.revision", "data", "task.kind", "method.kind")


class Recommend:
    """A part of the Train page; `page` is that page."""

    def __init__(self, page):
        self.page = page

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Row():
            self.button = gr.Button("Recommended settings", size="sm", elem_id="recommend")
            self.undo = gr.Button("Take them back", size="sm", visible=False, elem_id="recommend-undo")
        with gr.Accordion("Why these settings", open=False, visible=False, elem_id="recommend-why") as self.why:
            self.reasons = theme.Shown({}, html_template=REASONS, css_template=CSS, elem_classes="flush", elem_id="reasons")
            self.notes = theme.sentences(elem_id="recommend-notes")
        self.before = gr.State({})

    @property
    def fields(self) -> list:
        """The parts of the form that a recommendation fills, and the switch of LoRA+."""
        return [*(self.page.form[path] for path in PATHS), self.page.plus]

    def connect(self) -> None:
        """Let the buttons act."""
        outputs = [*self.fields, self.undo, self.why, self.reasons, self.notes, self.before]
        gathered = Gathered(self.page.inputs | {self.page.plus})
        gathered.when(self.button.click, gathered.reads(self.fill, self.before), outputs, more=[self.before], **busy(self.button))
        self.undo.click(self.take_back, self.before, outputs, **QUIET)
        # A preset fills in settings of its own: what was there before is gone with it.
        when(self.page.preset.input, lambda: [gr.update(visible=False), gr.update(visible=False), {}, [], {}], None, outputs[len(self.fields) :], **QUIET)

    def fill(self, given: dict) -> list:
        """Updates that put the recommended settings in; the old ones are kept for `take_back`. A base that cannot be read is a sentence."""
        form = self.page.form
        try:
            tree = {path: forms.read(forms.leaf(path), given[form[path]]) for path in ASKED}
            # Rows are told of in the form's own sentences; without any there is still a base to go by.
            found = studio.recommend(self.page.workspace, studio.spec_of_values({**tree, "data": tree["data"] or [{"path": "?"}]}))
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * (len(self.fields) + 5)
        shown = [forms.show(forms.leaf(path), found.values[path]) if path in found.values else gr.skip() for path in PATHS]
        plus = found.values.get("optim.lora_plus_ratio") is not None if "optim.lora_plus_ratio" in found.values else gr.skip()
        before = {**{path: given[form[path]] for path in found.values}, "plus": given[self.page.plus]}
        # What was there before the first press is what comes back, not what that press filled in.
        return [*shown, plus, gr.update(visible=True), gr.update(visible=True), reasons_of(found), [theme.said("note", note) for note in found.notes], given[self.before] or before]

    def take_back(self, before: dict) -> list:
        """Updates that put back what was there."""
        shown = [before.get(path, gr.skip()) for path in PATHS]
        return [*shown, before.get("plus", gr.skip()), gr.update(visible=False), gr.update(visible=False), {}, [], {}]


def reasons_of(found: Recommendation) -> dict:
    """A recommendation as it is shown."""
    rows = [{"path": advice.path, "shown": settings.inline(advice.value), "reason": advice.reason} for advice in found.advices]
    return {"preset": f"From preset {found.preset}, suited to the rows and the memory there are.", "rows": rows}
