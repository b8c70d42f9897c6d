"""Answers on a page: the newest question's is shown, whichever is ready last."""

import threading
from types import SimpleNamespace

import gradio as gr
import pytest

from lora_studio.ui import events

OUTPUTS = ["one", "two"]
SKIPPED = [gr.skip(), gr.skip()]


class Slow:
    """A way of looking that answers when it is let go."""

    def __init__(self):
        self.began, self.go = threading.Event(), threading.Event()

    def look(self, *given):
        self.began.set()
        assert self.go.wait(20)
        return list(given)


def page(name):
    return SimpleNamespace(session_hash=name)


def asked(fn, request, *given):
    """Ask in a thread; a function that waits for the answer."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(fn(request, *given)), daemon=True)
    thread.start()

    def answer():
        thread.join(20)
        return answers[0]

    return answer


@pytest.fixture
def newest():
    return events.Newest()


def test_an_older_answer_that_is_ready_later_is_not_shown(newest):
    slow, quick = Slow(), newest(lambda *given: list(given), OUTPUTS)
    old = asked(newest(slow.look, OUTPUTS), page("a"), 1, 2)
    assert slow.began.wait(20)
    assert quick(page("a"), 3, 4) == [3, 4]
    slow.go.set()
    assert old() == SKIPPED


def test_an_answer_that_nothing_newer_was_asked_after_is_shown(newest):
    slow, quick = Slow(), newest(lambda *given: list(given), OUTPUTS)
    assert quick(page("a"), 1, 2) == [1, 2]
    last = asked(newest(slow.look, OUTPUTS), page("a"), 3, 4)
    slow.go.set()
    assert last() == [3, 4]


def test_another_page_and_another_form_do_not_matter(newest):
    slow = Slow()
    mine = asked(newest(slow.look, OUTPUTS), page("a"), 1, 2)
    assert slow.began.wait(20)
    newest(lambda: [0, 0], OUTPUTS)(page("b"))
    events.Newest()(lambda: [0, 0], OUTPUTS)(page("a"))
    slow.go.set()
    assert mine() == [1, 2]


def test_one_output_is_left_as_it_is(newest):
    slow = Slow()
    old = asked(newest(slow.look, "one"), page("a"))
    assert slow.began.wait(20)
    newest(lambda: 1, "one")(page("a"))
    slow.go.set()
    assert old() == gr.skip()


def test_pages_that_were_closed_are_forgotten(newest, monkeypatch):
    monkeypatch.setattr(events, "SESSIONS", 3)
    quick = newest(lambda given: given, "one")
    assert [quick(page(str(number)), number) for number in range(9)] == list(range(9))
    assert len(newest._last) == 3


def test_gradio_gives_it_the_page_and_the_inputs(newest):
    """Both ways of naming inputs: one by one, and as a set."""
    with gr.Blocks() as app:
        left, right, shown = gr.Textbox("a"), gr.Textbox("b"), gr.Textbox()
        left.change(newest(lambda *given: " ".join(given), shown), [left, right], shown)
        right.change(newest(lambda given: given[right] + given[left], shown), {left, right}, shown)
    for number, text in ((0, "a b"), (1, "ba")):
        fn = app.fns[number]
        from gradio.helpers import special_args

        values = ["a", "b"] if not fn.inputs_as_dict else [{block: block.value for block in fn.inputs}]
        given, *_ = special_args(fn.fn, values, page("a"))
        assert fn.fn(*given) == text
