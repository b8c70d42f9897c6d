"""The Playground: one prompt, answered side by side by the base and by adapters with the weights of the moment."""

import secrets
from collections.abc import Iterator

import gradio as gr

from lora_studio import families, library, shelf
from lora_studio.errors import BenchError, StudioError
from lora_studio.ui import answers, forms, theme
from lora_studio.ui.events import LIVE, QUIET, when
from lora_studio.ui.grid import Grid
from lora_studio.ui.mix import Mix, Parts, tab_of, whole
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

STATE = """<div class="state"><p aria-live="polite">{{value.bench}}</p>{{#if value.timing}}<p class="timing">{{value.timing}}</p>{{/if}}</div>"""
STATE_CSS = """
.state{display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 14px;font-size:12.5px;color:var(--body-text-color-subdued)}
.state p{margin:0;overflow-wrap:anywhere}
"""
MOST_SIDES, HEIGHT = 4, 460
NONE = "Write something below. All sides get the same prompt and the same seed."


class Playground(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.mix, self.grid = workspace, Mix(workspace, "mix-playground"), Grid(workspace)
        self.stops: set[str] = set()

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Playground\nTalk to a base model and to adapters on it, side by side. Weights act on the next answer; nothing is loaded again.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._left()
            with gr.Column(scale=4, min_width=320):
                self._right()
        self.talk, self.token = gr.State([]), gr.State("")
        self._wire()

    def _left(self) -> None:
        self.mix.build()
        self.base = gr.Dropdown(
            families.known_bases(), value="demo-text", allow_custom_value=True, label="Base model", interactive=True, elem_id="playground-base",
            info="Filled in from the adapters. A folder or a Hub id works too.",
        )  # fmt: skip
        self.sides = gr.Dropdown(
            self.sides_of([]), value=["base"], multiselect=True, max_choices=MOST_SIDES, label="Sides to show", interactive=True,
            info=f"At most {MOST_SIDES}, next to each other.", elem_id="playground-sides",
        )  # fmt: skip
        with gr.Accordion("How answers are drawn", open=False) as self.words:
            with gr.Row():
                self.seed = gr.Number(0, label="Seed", info="The same seed gives the same answer.", interactive=True, min_width=110)
                self.longest = gr.Number(128, label="Longest answer", info="In tokens.", interactive=True, min_width=110)
            self.temperature = forms.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 takes the likeliest word each time.", interactive=True)
            self.top_p = forms.Slider(0.05, 1, value=1, step=0.05, label="Top p", info="Draw only from the likeliest words that together have this share.", interactive=True)
            self.chatml = gr.Checkbox(False, label="Use the ChatML template", info="For bases that have no chat template of their own.", interactive=True)
        with gr.Accordion("How pictures are drawn", open=True, visible=False, elem_id="brush") as self.brush:
            with gr.Row():
                self.picture_seed = gr.Number(0, label="Seed", info="The same seed gives the same picture.", interactive=True, min_width=110)
                self.steps = gr.Number(20, label="Steps", info="More is finer and slower.", interactive=True, min_width=110)
            self.guidance = forms.Slider(1, 15, value=5, step=0.5, label="Guidance", info="How closely the prompt is followed; 1 is not at all.", interactive=True)
            with gr.Row():
                self.width = gr.Number(512, label="Width", info="In pixels, a multiple of 8.", interactive=True, min_width=110)
                self.height = gr.Number(512, label="Height", info="In pixels, a multiple of 8.", interactive=True, min_width=110)
            self.source = gr.Image(type="filepath", format="png", label="Picture to edit", sources=["upload", "clipboard"], visible=False, height=200, elem_id="playground-source")
        self.to_blend = gr.Button("Save this mix as a blend", size="md", elem_id="to-blend")

    def _right(self) -> None:
        self.state = theme.Shown({"bench": "", "timing": ""}, html_template=STATE, css_template=STATE_CSS, elem_classes="flush", elem_id="bench-state")
        self.answers = theme.Shown(
            answers.shown([], busy=False, none=NONE), html_template=answers.ANSWERS, css_template=answers.ANSWERS_CSS, container=True, padding=True, autoscroll=True,
            min_height=HEIGHT, max_height=HEIGHT, elem_id="answers",  # of one height, so that Stop does not move away under the pointer
        )  # fmt: skip
        self.told = theme.sentences(elem_id="playground-sentences")
        self.prompt = gr.Textbox("", label="Prompt", lines=1, max_lines=8, placeholder="Enter sends, Shift+Enter begins a new line.", interactive=True, elem_id="prompt")
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", size="lg", min_width=90, elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", size="lg", min_width=90, interactive=False, elem_id="stop-answer")
            self.clear = gr.Button("Clear", size="lg", min_width=90, elem_id="clear")
        self.grid.build()

    # ---- wiring

    @property
    def opened(self) -> list:
        """What showing other parts fills."""
        return [*self.mix.opened, self.base, self.sides, self.state, self.told]

    @property
    def inputs(self) -> set:
        """What an answer depends on."""
        settings = {self.seed, self.temperature, self.top_p, self.longest, self.chatml, *self.brushes.values()}
        return {self.prompt, self.talk, self.base, self.sides, self.source, *settings, *self.mix.inputs}

    @property
    def brushes(self) -> dict[str, gr.components.Component]:
        """What a picture depends on, by the names the bench knows."""
        return {"seed": self.picture_seed, "steps": self.steps, "guidance": self.guidance, "width": self.width, "height": self.height}

    @property
    def spoken(self) -> list:
        """What an answer fills."""
        return [self.answers, self.talk, self.token, self.prompt, self.told, self.state, self.send, self.stop, self.clear]

    def _wire(self) -> None:
        self.base.change(self.suit, self.base, [self.words, self.brush, self.grid.box, self.width, self.height, self.guidance, self.source], **LIVE)
        when(self.mix.turn.change, self.follow, [self.base, self.sides, *self.mix.inputs], [self.base, self.sides], **LIVE)
        gr.on([self.send.click, self.prompt.submit], self.speak, self.inputs, self.spoken, trigger_mode="once", concurrency_limit=None, **QUIET)
        self.stop.click(self.stops.add, self.token, None, queue=False, **QUIET)
        self.grid.connect(self)
        self.clear.click(lambda: [_shown([], busy=False), [], [], self.held()], None, [self.answers, self.talk, self.told, self.state], **QUIET)

    def connect(self, tabs, blend) -> None:
        """Let the button lead to the Blend page, and what the bench holds be looked up when the page is opened."""
        tab = tab_of(self.prompt)
        tab.select(lambda pick: [self.mix.fresh(pick), self.held()], self.mix.pick, [self.mix.pick, self.state], concurrency_limit=None, **QUIET)
        self.to_blend.click(lambda *given: self.jump(blend, *given), self.mix.inputs, [tabs, *blend.opened], **QUIET)

    # ---- the mix, the base and the sides

    def open(self, parts: Parts) -> list:
        """Updates for `opened` that show other parts, the base they are for, and the base beside all of them."""
        shown = self.mix.open(parts)
        held = shown[1]
        sides = gr.update(choices=self.sides_of(held), value=["base", "all"] if held else ["base"])
        return [*shown, self._base_of(held), sides, self.held(), []]

    def follow(self, base, sides, pick, held, *weights) -> list:
        """The base and the sides after the pick has changed; sides that still are there stay."""
        choices = self.sides_of(held)
        known = {side for _, side in choices}
        stay = [side for side in sides or [] if side in known]
        if held and stay in ([], ["base"]) and not any(side not in ("base", "all") for side in sides or []):
            stay = ["base", "all"]
        return [self._base_of(held), gr.update(choices=choices, value=stay or ["base"])]

    def sides_of(self, held: list[str]) -> list[tuple[str, str]]:
        """The sides there can be, as (label, key): the base, all adapters together, and each alone."""
        alone = [(f"{self.mix.label(id)} alone", id) for id in held]
        return [("Base", "base"), *([("All together", "all")] if held else []), *alone]

    def _base_of(self, held: list[str]):
        return next((card["base"] for id in held if (card := library.card(self.workspace, id))["base"]), gr.skip())

    def asked(self, sides: list[str] | None, parts: Parts) -> dict[str, Parts]:
        """The sides as {key: parts}. Raises BenchError when none is left."""
        possible = {"base": [], **({"all": parts} if parts else {}), **{part[0]: [part] for part in parts}}
        found = {side: possible[side] for side in sides or [] if side in possible}
        if not found or len(found) > MOST_SIDES:
            raise BenchError("playground.sides", count=len(found), most=MOST_SIDES)
        return found

    def jump(self, blend, *given) -> list:
        """Updates that lead to the Blend page with these parts."""
        try:
            return [gr.Tabs(selected="blend"), *blend.open(self.mix.parts(*given))]
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * (1 + len(blend.opened))

    def held(self, timing: str = "") -> dict:
        """What the bench does, in words. Starts nothing."""
        return {"bench": bench_in_words(shelf.bench_status()), "timing": timing}

    def suit(self, base) -> list:
        """The settings that fit a base: of words, or of pictures in the size its family was trained at."""
        edge = shelf.picture_edge(_text(base))
        sizes = [gr.update(value=edge), gr.update(value=edge)] if edge else [gr.skip(), gr.skip()]
        family = shelf.image_family(_text(base)) if edge else None
        guidance = families.guidance(_text(base), family.pipeline if family else "")
        edits = gr.update(visible=bool(family and family.edits))
        return [gr.update(visible=not edge), *(gr.update(visible=bool(edge)) for _ in range(2)), *sizes, gr.update(value=guidance), edits]

    # ---- answers

    def speak(self, given: dict) -> Iterator[dict]:
        """Answer a prompt, all sides at once. When it cannot be done, the prompt and what was said before stay."""
        talk, prompt, token, turn = given[self.talk] or [], given[self.prompt] or "", secrets.token_hex(8), None
        try:
            if not prompt.strip():
                raise BenchError("bench.nothing_asked")
            asked = self.asked(given[self.sides], self.mix.parts(*(given[component] for component in self.mix.inputs)))
            labels = {side: label for label, side in self.sides_of(list(asked.keys() - {"base", "all"}))} | {"all": "All together"}
            turn = answers.begun(prompt, {side: labels[side] for side in asked})
            said = [*talk, turn]
            busy = {self.send: gr.update(interactive=False), self.stop: gr.update(interactive=True), self.clear: gr.update(interactive=False)}
            first = "Starting the bench…" if shelf.bench_status()["state"] in ("off", "starting") else "Asking the bench…"
            yield {self.answers: _shown(said), self.token: token, self.prompt: "", self.told: [], self.state: {"bench": first, "timing": ""}, **busy}
            events = self._asked_of(_text(given[self.base]), prompt, talk, asked, given)
            names = answers.names_of(self.workspace, {id for parts in asked.values() for id, _ in parts})
            for heard in answers.listen(events, turn, names, lambda: token in self.stops):
                if not heard.is_over:
                    yield {self.answers: _shown(said), self.told: heard.told, self.state: {"bench": heard.doing, "timing": ""}}
            timing = f"Weights applied in {heard.ended['apply_ms']:.2f} ms, first word after {heard.ended['first_ms']:.0f} ms." if "apply_ms" in heard.ended else ""
            yield {**self._settled(said), self.told: heard.told, self.state: self.held(timing)}
        except StudioError as error:
            yield self._broken(talk, turn, prompt, error)
        finally:
            self.stops.discard(token)

    def _asked_of(self, base: str, prompt: str, talk: list, asked: dict[str, Parts], given: dict) -> Iterator[dict]:
        """The events of what a base is asked: pictures of an image model, else words that go on with what each side has said."""
        if shelf.picture_edge(base):
            family = shelf.image_family(base)
            source = {"source": given[self.source]} if given.get(self.source) and family and family.edits else {}
            return shelf.draw(self.workspace, base, prompt, asked, **{name: whole(given[component]) for name, component in self.brushes.items()}, **source)
        messages = {side: [*history(talk, side), {"role": "user", "content": prompt}] for side in asked}
        return shelf.chat(self.workspace, base, messages, asked, **self._manner(given))

    def _manner(self, given: dict) -> dict:
        template = "chatml" if given[self.chatml] else "auto"
        numbers = {"temperature": given[self.temperature], "top_p": given[self.top_p]}
        return {"seed": whole(given[self.seed]), "longest": whole(given[self.longest]), "template": template, **numbers}

    def _settled(self, said: list) -> dict:
        """The page at rest, with what was said."""
        buttons = {self.send: gr.update(interactive=True), self.stop: gr.update(interactive=False), self.clear: gr.update(interactive=True)}
        return {self.answers: _shown(said, busy=False), self.talk: said, self.token: "", **buttons}

    def _broken(self, talk: list, turn: dict | None, prompt: str, error: StudioError) -> dict:
        """The page after an error: the prompt is back, and what had been said of the answer stays to be read."""
        kept = turn is not None and answers.broken(turn)
        told = [theme.said("error", str(error))]
        return {**self._settled([*talk, turn] if kept else talk), self.prompt: prompt, self.told: told, self.state: self.held()}


# ---- words


def history(talk: list[dict], side: str) -> list[dict]:
    """What a side has heard and said so far, as messages. Answers that broke off are left out."""
    found = []
    for turn in talk:
        for answer in turn["answers"]:
            if answer["side"] == side and answer["text"] and not answer["lost"]:
                found += [{"role": "user", "content": turn["prompt"]}, {"role": "assistant", "content": answer["text"]}]
    return found


def bench_in_words(status: dict) -> str:
    """What the bench does and holds."""
    if status.get("note"):
        return status["note"]
    if status["state"] in ("off", "starting"):
        return "The bench is off; the first answer starts it." if status["state"] == "off" else "The bench is starting."
    if status["state"] != "loaded":
        return f"The bench is loading {status['base']}." if status["state"] == "loading" else "The bench holds no model; the next answer loads one."
    count = status["adapters"]
    return f"The bench holds {status['base']} on {status['device']}, with {count} adapter{'' if count == 1 else 's'} at hand."


def _text(given) -> str:
    return str(given or "").strip()


def _shown(said: list[dict], *, busy: bool = True) -> dict:
    return answers.shown(said, busy=busy, none=NONE)
