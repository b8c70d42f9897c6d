"""How events are answered: without a sign of progress, the last of several again, and never an older answer over a newer one."""

import functools
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable

import gradio as gr

# On no component at all, where hidden alone would do for the eye: at every step of every event Gradio 6 tells the state of each component
# that any event so far could have shown progress on, and looks each of them up in the tree of all pages.
QUIET = {"show_progress": "hidden", "show_progress_on": [], "api_visibility": "private"}
# While one event is answered the next ones would be dropped, so the last is asked for again.
TYPED = {**QUIET, "trigger_mode": "always_last"}
LIVE = {**TYPED, "concurrency_limit": None}
SESSIONS = 1000
UNREADABLE = "The page sent something that could not be read, so nothing was done. Reload the page, and do it again."


def busy(on: gr.components.Component, how: str = "minimal") -> dict:
    """The options of an event that has to be waited for: its progress is shown on one component, "minimal" or "full"."""
    return {**QUIET, "show_progress": how, "show_progress_on": on}


def when(triggers, fn: Callable, inputs=None, outputs=None, **options) -> gr.events.Dependency:
    """Let a function follow triggers that others follow too. Gradio 6 asks again for a deferred event ("always_last") by raising its trigger
    once more, for everybody who listens to it: two that listen to one trigger, both deferred, raise it for each other without end. Here each
    has an event of the page alone in between, and what follows an event is asked again by itself."""
    return gr.on(triggers, None, None, None, js="() => []", **QUIET).then(fn, inputs, outputs, **options)


class Gathered:
    """The values of many parts of a form, brought together on the page and sent as one. Gradio 6 tells the state of every component that any
    event ever had for an input at every step of every later one: a form of a hundred would be told of a thousand times for each key.
    Make it inside the page; only for parts whose value is text, numbers or lists of them, since Gradio looks through no file that it is not
    told of. Raises ValueError for others."""

    def __init__(self, parts):
        self.parts = sorted(parts, key=lambda part: part._id)
        if others := [part for part in self.parts if part.data_model is not None]:
            raise ValueError(f"not to be gathered: {others}")
        self.box = gr.Textbox("[]", visible=False)

    def when(self, triggers, fn: Callable, outputs, *, more=(), **options) -> gr.events.Dependency:
        """As `when` above, or after an event that is given in place of triggers. `fn` is one of `reads`, and `more` are the inputs that
        cannot be gathered, such as states."""
        listen = triggers.then if isinstance(triggers, gr.events.Dependency) else functools.partial(gr.on, triggers)
        packed = listen(None, self.parts, self.box, js="(...given) => [JSON.stringify(given)]", **QUIET)
        return packed.then(fn, [self.box, *more], outputs, **options)

    def reads(self, fn: Callable, *more: gr.components.Component) -> Callable:
        """`fn(given: {part: value})` as a function of what `when` sends."""

        def read(text: str, *others):
            return fn(self._values(text) | dict(zip(more, others, strict=True)))

        return read

    def _values(self, text: str) -> dict:
        """The value of each part. Raises gr.Error with a sentence when no page of ours can have sent that."""
        try:
            sent = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            sent = None
        if not isinstance(sent, list) or len(sent) != len(self.parts):
            raise gr.Error(UNREADABLE, print_exception=False)
        return {part: part.preprocess(value) for part, value in zip(self.parts, sent, strict=True)}


class Newest:
    """Several events that fill the same part of a page. Gradio keeps the answers of one event in order, but not those of two: whichever is
    ready last is shown, though it may be to the older question. Of the functions wrapped by the same object, an answer that is ready
    after something newer was asked on that page is not shown. Only for functions that change nothing but what they return."""

    def __init__(self):
        self._numbers, self._guard = itertools.count(), threading.Lock()
        self._last: OrderedDict[str | None, int] = OrderedDict()

    def __call__(self, look: Callable, outputs) -> Callable:
        """The function with its answers left out where they come too late. `outputs` are the components that it fills, one or a list."""
        nothing = [gr.skip()] * len(outputs) if isinstance(outputs, list) else gr.skip()

        def asked(request: gr.Request, *given):
            page = request.session_hash
            number = self._enter(page)
            found = look(*given)
            return found if self._last.get(page, number) == number else nothing

        return asked

    def _enter(self, page: str | None) -> int:
        with self._guard:
            number = self._last[page] = next(self._numbers)
            self._last.move_to_end(page)
            if len(self._last) > SESSIONS:
                self._last.popitem(last=False)
        return number
