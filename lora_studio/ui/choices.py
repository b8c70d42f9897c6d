"""Choices that make no sense for the base, the machine or the other choices, on the Train page: greyed out with the reason, and not taken."""

import gradio as gr

from lora_studio import options
from lora_studio.ui import forms
from lora_studio.ui.events import LIVE, QUIET, TYPED, Gathered, when

CROSS = "✗ "  # options of a list cannot be switched off in Gradio; theme.CSS greys those that begin with it


class Choices:
    """A part of the Train page; `page` is that page."""

    def __init__(self, page):
        self.page = page

    def build(self) -> None:
        """Lay out what is remembered; nothing of it is seen. `known` is what was found, `reasons` the same reasons alone, and `drawn` those
        that the lists show."""
        self.known, self.reasons, self.drawn = gr.State({"reasons": {}, "values": {}}), gr.State({}), gr.State({})

    @property
    def fields(self) -> dict[str, gr.components.Component]:
        """The parts of the form that are choices."""
        return {leaf.path: self.page.form[leaf.path] for leaf in options.choosable() if leaf.path in self.page.form}

    def connect(self) -> None:
        """Let the parts follow each other. A list that is an output tells of a change even where it is left as it is, if it does not show what
        it was built with; so what looks has no list among its outputs, and lists are drawn only when the reasons are others."""
        fields, form = self.fields, self.page.form
        gathered = Gathered({*fields.values(), form["base.id"], form["base.revision"]})
        # After the page has looked, and not at a change itself: several events at the changes of one list make each other happen without end.
        gathered.when(self.page.looked, gathered.reads(self.look, self.known), [self.known, self.reasons], more=[self.known], **LIVE)
        seen = [self.reasons, self.drawn]
        gathered.when(self.reasons.change, gathered.reads(self.draw, *seen), [*fields.values(), self.drawn], more=seen, **TYPED)
        for path, part in fields.items():
            if forms.leaf(path).choices:
                when(part.input, lambda chosen, known, path=path: self.take(path, chosen, known), [part, self.known], part, **QUIET)

    def look(self, given: dict) -> list:
        """What cannot be chosen now."""
        fields, before = self.fields, given[self.known]
        values = {path: forms.read(forms.leaf(path), given[part]) for path, part in fields.items()}
        base = {path: (given[self.page.form[path]] or "").strip() for path in ("base.id", "base.revision")}
        found = options.impossible({**values, **base})
        # A choice that is not taken is answered by `take`, which may come after this: it has to find the reason then.
        for path, value in values.items() if options.clash({**values, **base}) else ():
            if value in before["reasons"].get(path, {}):
                found.setdefault(path, {})[value] = before["reasons"][path][value]
        accepted = {path: value for path, value in values.items() if value not in before["reasons"].get(path, {}) or path not in before["values"]}
        return [{"reasons": found, "values": {**before["values"], **accepted}}, found]

    def draw(self, given: dict) -> list:
        """The lists and switches whose reasons are others than those they show."""
        reasons, before = given[self.reasons], given[self.drawn]
        updates = [
            drawn(path, reasons.get(path, {}), forms.read(forms.leaf(path), given[part])) if reasons.get(path, {}) != before.get(path, {}) else gr.skip()
            for path, part in self.fields.items()
        ]
        return [*updates, reasons]

    def take(self, path: str, chosen, known: dict):
        """A choice of a person: taken, or with the reason put back where it was."""
        reason = known["reasons"].get(path, {}).get(chosen)
        if reason is None:
            return gr.skip()
        gr.Warning(reason)
        return known["values"].get(path, forms.leaf(path).default)

    def refuses(self, path: str, chosen, known: dict) -> bool:
        """Whether a choice is one that is not taken."""
        return chosen in known["reasons"].get(path, {})


def drawn(path: str, reasons: dict, value) -> dict:
    """The update that shows which values of a setting cannot be chosen, and why."""
    leaf = forms.leaf(path)
    if leaf.choices:
        return gr.update(choices=[(CROSS + f"{option}: {short(path, option, reasons[option])}" if option in reasons else str(option), option) for option in leaf.choices])
    # A switch that is on can always be switched off.
    reason = reasons.get(True) if not value else None
    return gr.update(interactive=reason is None, info=f"{CROSS}{reason}" if reason else leaf.help)


def short(path: str, option: str, sentence: str) -> str:
    """The reason without the words that stand before it already, and without the way out."""
    return sentence.removeprefix(f"{path} {option} ").partition(". ")[0].rstrip(".")
