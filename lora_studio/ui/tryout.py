"""The try-out of the Blend page: one prompt, answered by the mix of the moment beside its base or one of its parts, and again as it changes."""

import contextlib
import time
from collections.abc import Iterator

import gradio as gr

from lora_studio import library, shelf, tryouts
from lora_studio.errors import StudioError
from lora_studio.ui import answers, theme
from lora_studio.ui.events import LIVE, TYPED, when
from lora_studio.ui.figures import percent, rank_of
from lora_studio.ui.mix import Mix, whole
from lora_studio.ui.seat import Seated
from lora_studio.workspace import Workspace

NONE = "Write a prompt and press Try: the mix of the moment answers here, before anything is saved."
REST_SECONDS = 0.35
STALE = theme.said("note", "The mix or the prompt has changed since. Press Try for the new answer.")


class Turn:
    """One visitor's try-out: what is wanted now, whose answer is being given, and what the shown answer was made of."""

    def __init__(self):
        self.wanted, self.owner, self.shown, self.last, self.told, self.follows = None, None, None, {}, [], False


class Tryout(Seated):
    """A part of the Blend page; the mix and the rank are the page's own."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    # ---- layout and wiring

    def build(self) -> None:
        """Lay it out inside the current column."""
        with gr.Accordion("Try it", open=True, elem_id="tryout"):
            self.prompt = gr.Textbox("", label="Prompt", lines=1, max_lines=6, placeholder="Enter tries, Shift+Enter begins a new line.", interactive=True, elem_id="tryout-prompt")
            with gr.Row():
                self.against = gr.Dropdown(self.choices([]), value=tryouts.BASE, label="Against", interactive=True, min_width=150, elem_id="tryout-against")
                self.seed = gr.Number(0, label="Seed", precision=0, interactive=True, min_width=80, elem_id="tryout-seed")
                self.longest = gr.Number(128, label="Longest answer", precision=0, interactive=True, min_width=100, elem_id="tryout-longest")
                self.steps = gr.Number(20, label="Steps", precision=0, interactive=True, visible=False, min_width=80, elem_id="tryout-steps")
            with gr.Row(equal_height=True):
                self.start = gr.Button("Try", variant="primary", min_width=90, elem_id="tryout-start")
                self.live = gr.Checkbox(False, label="Try again as I change the mix", container=False, interactive=True, min_width=180, elem_id="tryout-live")
            self.told = theme.sentences(elem_id="tryout-sentences")
            self.answers = theme.Shown(
                answers.shown([], busy=False, none=NONE), html_template=answers.ANSWERS, css_template=answers.ANSWERS_CSS, elem_classes="flush", elem_id="tryout-answers",
            )  # fmt: skip
        self.turn = gr.State(Turn())

    def connect(self, mix: Mix, rank) -> None:
        """Let the parts act, with the page's mix and rank."""
        self.mix, self.rank = mix, rank
        changes = [*(slider.input for slider in mix.sliders), mix.turn.change, rank.change]
        own = [self.prompt.input, self.against.change, self.seed.change, self.longest.change, self.steps.change]
        given = {self.turn, self.live, *self.asking}
        # Not queued: it makes what is being answered void at once.
        when([*changes, *own], self.want, given, self.told, queue=False, **TYPED)
        gr.on([self.start.click, self.prompt.submit], self.answer, given, [self.answers, self.told], **LIVE)
        when([*changes, self.against.change, self.live.change], self.follow, given, [self.answers, self.told], **LIVE)
        when(mix.turn.change, self.suit, [self.against, *mix.inputs], [self.against, self.longest, self.steps], **LIVE)

    @property
    def asking(self) -> list:
        """What an answer depends on."""
        return [self.prompt, self.against, self.seed, self.longest, self.steps, self.rank, *self.mix.inputs]

    # ---- what can be asked

    def choices(self, held: list[str]) -> list[tuple[str, str]]:
        """What the mix can be held against."""
        return [("The base", tryouts.BASE), *((f"{self.mix.label(id)} alone", id) for id in held), ("Nothing", "")]

    def suit(self, against, pick, held, *weights) -> list:
        """The choices and settings that fit the adapters that are picked; what is chosen stays where it can."""
        known = self.choices(held or [])
        draws = self._draws(held or [])
        kept = against if against in {key for _, key in known} else tryouts.BASE
        return [gr.update(choices=known, value=kept), gr.update(visible=not draws), gr.update(visible=draws)]

    def _draws(self, ids: list[str]) -> bool:
        """Whether the base of adapters is an image model."""
        base = next((found for id in ids if (found := library.card(self.workspace, id)["base"])), "")
        return bool(base and shelf.picture_edge(base))

    def want(self, given: dict):
        """Note what is wanted now; an answer to anything else is void from here on, and says so where it is not tried again."""
        turn = given[self.turn]
        turn.wanted, turn.follows = self._values(given), given[self.live]
        if given[self.live] or turn.shown is None:
            return gr.skip()
        return turn.told if turn.shown == turn.wanted else [STALE]

    # ---- answers

    def follow(self, given: dict) -> Iterator[dict]:
        """Answer again once the mix rests, where that is wished for."""
        turn, values = given[self.turn], self._values(given)
        yield self._as_it_is()  # without any update Gradio would empty the page
        if not given[self.live] or not (given[self.prompt] or "").strip() or not given[self.mix.pick] or turn.shown == values:
            return
        turn.wanted = values
        time.sleep(REST_SECONDS)
        if turn.wanted == values:
            yield from self.answer(given)

    def answer(self, given: dict) -> Iterator[dict]:
        """Answer with the mix as it is, beside what it is held against. Whoever asks later makes it void."""
        turn, values, owner = given[self.turn], self._values(given), object()
        turn.wanted, turn.owner, turn.shown, shown = values, owner, None, None

        def is_void() -> bool:
            return turn.owner is not owner or turn.wanted != values

        try:
            asked = self._asked(given)
            shown = self._begun(asked, turn.last)
            waits = shelf.bench_status()["state"] in ("off", "starting")
            yield {self.answers: answers.shown([shown]), self.told: [theme.said("note", "Starting the bench…")] if waits else []}
            yield from self._heard(asked, shown, turn, values, is_void)
        except StudioError as error:
            if turn.owner is not owner:
                yield self._as_it_is()
                return
            kept = [shown] if shown and answers.broken(shown) else []
            yield {self.answers: answers.shown(kept, busy=False, none=NONE), self.told: [theme.said("error", str(error))]}

    def _heard(self, asked: tryouts.Asked, shown: dict, turn: Turn, values: tuple, is_void) -> Iterator[dict]:
        """Updates as the sides answer."""
        ids = {id for id, _ in asked.parts} | ({asked.against} - {"", tryouts.BASE})
        names, made = answers.names_of(self.workspace, ids), {}
        events = self._noted(tryouts.answer(self.workspace, asked), names, made)
        with contextlib.closing(answers.listen(events, shown, names, is_void)) as listening:
            for heard in listening:
                if is_void():
                    if turn.wanted != values:  # nobody else answers yet
                        yield {self.answers: answers.shown([shown], busy=False), self.told: [] if turn.follows else [STALE]}
                    return
                if not heard.is_over:
                    yield {self.answers: answers.shown([shown]), self.told: [*heard.told, theme.said("note", heard.doing)]}
        turn.shown, turn.last = values, {answer["side"]: answer["picture"] for answer in shown["answers"]}
        turn.told = [*heard.told, exactness(made)]
        yield {self.answers: answers.shown([shown], busy=False), self.told: turn.told}

    def _as_it_is(self) -> dict:
        return {self.answers: gr.skip(), self.told: gr.skip()}

    @staticmethod
    def _noted(events: Iterator[dict], names: dict, made: dict) -> Iterator[dict]:
        """The events, and on the way what the mix was made into."""
        with contextlib.closing(events):
            for event in events:
                if event["event"] == "made":
                    made |= event
                    names[event["path"]] = f"the mix at rank {event['rank']}"
                yield event

    def _begun(self, asked: tryouts.Asked, last: dict[str, str]) -> dict:
        """A turn with its sides. Pictures of the answer before stay, faded, until the new ones are there."""
        labels = {tryouts.MIX: "The mix" if asked.rank is None else f"The mix at rank {asked.rank}"}
        labels |= {key: label for label, key in self.choices([id for id, _ in asked.parts]) if key and key == asked.against}
        shown = answers.begun(asked.prompt, labels)
        for answer in shown["answers"] if self._draws([id for id, _ in asked.parts]) else ():
            answer |= {"picture": last.get(answer["side"], ""), "old": True}
        return shown

    def _asked(self, given: dict) -> tryouts.Asked:
        """What is to be tried, as the page's values have it. Raises StudioError."""
        parts = self.mix.parts(*(given[component] for component in self.mix.inputs))
        numbers = {name: whole(given[component]) for name, component in (("seed", self.seed), ("longest", self.longest), ("steps", self.steps))}
        against = given[self.against] or ""
        return tryouts.Asked((given[self.prompt] or "").strip(), parts, rank_of(given[self.rank]), against if against in {"", tryouts.BASE, *dict(parts)} else tryouts.BASE, **numbers)

    def _values(self, given: dict) -> tuple:
        """Everything an answer depends on, to be compared."""
        return tuple(given[component] for component in self.asking)


def exactness(made: dict) -> dict:
    """A sentence about how what was tried stands to what would be saved."""
    if not made:
        return theme.said("ok", "This was the exact mix. Saved without a rank it is the same, up to rounding.")
    return theme.said("ok", f"This was the mix at rank {made['rank']}, true error {percent(made['loss'])}: the very numbers that Save writes.")
