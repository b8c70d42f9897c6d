"""How events are answered: without a sign of progress, the last of several again, and never an older answer over a newer one."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable

import gradio as gr

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# While one event is answered the next ones would be dropped, so the last is asked for again.
TYPED = {**QUIET, "trigger_mode": "always_last"}
LIVE = {**TYPED, "concurrency_limit": None}
SESSIONS = 1000


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
