"""The Export part of the Library and of the Blend page: a form that fits the adapter, what the file will be, the file, and how it was checked."""

from collections.abc import Iterator

import gradio as gr

from lora_studio import exports
from lora_studio.errors import StudioError
from lora_studio.ui import theme
from lora_studio.ui.events import QUIET, TYPED, Newest
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

LABELS = {
    "peft": "PEFT: a folder, for PEFT, transformers, vLLM", "diffusers": "diffusers: one file, for diffusers and ComfyUI",
    "kohya": "kohya: one file, for AUTOMATIC1111, Forge, ComfyUI", "gguf": "GGUF: one file, for llama.cpp",
}  # fmt: skip


class Export(Seated):
    """A part of a page; what it exports is in a state of that page: an id, or {id, ...}."""

    def __init__(self, workspace: Workspace, name: str):
        self.workspace, self.name = workspace, name

    def build(self, *, visible: bool = True) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Export for other programs", open=False, visible=visible, elem_id=self.name) as self.box:
            with gr.Row():
                self.form = gr.Dropdown([], value=None, label="Form", interactive=True, scale=2, min_width=250, elem_id=f"{self.name}-form")
                self.dtype = gr.Dropdown(list(exports.DTYPES), value="float32", label="Precision", interactive=True, min_width=110, elem_id=f"{self.name}-dtype")
            self.outlook = theme.sentences(elem_id=f"{self.name}-outlook")
            with gr.Row():
                self.start = gr.Button("Export", variant="primary", size="md", min_width=110, elem_id=f"{self.name}-start")
                self.get = gr.Button("Download the file", size="md", min_width=110, visible=False, link_target="_self", elem_id=f"{self.name}-get")
            self.told = theme.sentences(elem_id=f"{self.name}-told")

    def connect(self, chosen: gr.State) -> None:
        """Let the parts act on the adapter in a state."""
        self.chosen = chosen
        asked, seen, newest = [chosen, self.form, self.dtype], [self.outlook, self.get, self.told], Newest()
        fitted = [self.box, self.form, *seen]
        chosen.change(newest(self.fit, fitted), asked, fitted, **TYPED)
        gr.on([self.form.input, self.dtype.input], newest(self.look, seen), asked, seen, **TYPED)
        self.start.click(self.make, [chosen, self.form, self.dtype], [self.told, self.get], trigger_mode="once", concurrency_limit=2, **QUIET)

    def fit(self, chosen, form: str, dtype: str) -> list:
        """The forms that fit the adapter, and why the others are left out."""
        try:
            id = _id(chosen)
            known = exports.forms(self.workspace, id) if id else []
        except StudioError:
            known = []
        if not known:
            return [gr.update(visible=False), gr.update(), [], gr.update(visible=False), []]
        fits = [one.name for one in known if not one.against]
        form = form if form in fits else next((name for name in fits if name != "peft"), fits[0])
        return [gr.update(visible=True), gr.update(choices=[(LABELS[name], name) for name in fits], value=form), *self.look(chosen, form, dtype)]

    def look(self, chosen, form: str, dtype: str) -> list:
        """What the export will be."""
        try:
            told = exports.outlook(self.workspace, _id(chosen), dtype)
            out = [theme.said("note", f"{one.name} is left out: {one.against}.") for one in exports.forms(self.workspace, _id(chosen)) if one.against]
        except StudioError as error:
            return [[theme.said("error", str(error))], gr.update(visible=False), []]
        rounded = f"each number is rounded by {100 * told['rounded']:.2g} % at most" if told["rounded"] else "nothing is rounded"
        words = f"It will have rank {told['rank']} in {told['layers']} layers and about {told['bytes'] / 1e6:.2f} MB; {rounded}."
        more = [theme.said("warning", "GGUF is written in float32 or float16. Choose one of these.")] if (form, dtype) == ("gguf", "bfloat16") else []
        return [[theme.said("note", words), *more, *out], gr.update(visible=False), []]

    def make(self, chosen, form: str, dtype: str) -> Iterator[list]:
        """Write the file, open it again with its own loader, and say what came of it."""
        yield [[theme.said("note", "It is being written, and opened again with its own loader…")], gr.update(visible=False)]
        try:
            told = exports.make(self.workspace, _id(chosen), form=form or "", dtype=dtype)
        except StudioError as error:
            yield [[theme.said("error", str(error))], gr.update(visible=False)]
            return
        link = f"/studio/export/{told['token']}/{told['name']}"
        yield [in_words(told), gr.update(visible=True, link=link, value=f"Download {told['name']}")]


def in_words(told: dict) -> list[dict]:
    """The report of an export in sentences."""
    words = f"{told['modules']} of {told['layers']} layers matched, read again by {told['by']}; the worst is {told['worst']:.1e} off. {told['name']} has {told['bytes'] / 1e6:.2f} MB."
    return [theme.said("ok", words), *(theme.said("note", f"Not carried: {text}.") for text in told["lost"])]


def _id(chosen) -> str:
    return str((chosen or {}).get("id", "") if isinstance(chosen, dict) else chosen or "")
