"""Events of the pages: the newest question's answer is shown, whichever is ready last, and none makes others happen without end."""

import collections
import json
import threading
from types import SimpleNamespace

import gradio as gr
import pytest

from lora_studio import ui
from lora_studio.ui import events
from lora_studio.workspace import Workspace

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


# ---- all pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return ui.build(Workspace(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def wired(pages):
    """What the browser is told of every event of the studio."""
    return [found for found in pages.get_config_file()["dependencies"] if found["backend_fn"]]


def test_whatever_is_asked_again_later_has_its_trigger_to_itself(wired):
    """Gradio 6 asks again by raising the trigger: with two that listen to one and are asked again, a quick key never came to rest."""
    by_trigger = collections.defaultdict(list)
    for found in wired:
        for trigger in found["targets"]:
            by_trigger[tuple(trigger)].append(found)
    shared = [
        (trigger, [found["id"] for found in several])
        for trigger, several in by_trigger.items()
        if trigger[1] != "then" and len(several) > 1 and any(found["trigger_mode"] == "always_last" for found in several)
    ]
    assert sum(found["trigger_mode"] == "always_last" for found in wired) > 50 and not shared


def test_progress_that_nobody_sees_is_told_to_no_component(wired):
    """And what is seen, to one: every component that was ever told is told again at every step of every event."""
    assert not [found["id"] for found in wired if (found["show_progress"] == "hidden") != (found["show_progress_on"] == [])]
    assert all(len(found["show_progress_on"]) <= 1 for found in wired)


def test_no_event_has_a_whole_form_for_its_inputs(wired):
    assert max(len(found["inputs"]) for found in wired) <= 26


def test_gathered_values_are_those_that_gradio_would_give():
    with gr.Blocks() as app:
        name, kinds, memory = gr.Textbox("a"), gr.Dropdown(["x", "y"], multiselect=True), gr.State({"seen": 1})
        press, shown = gr.Button(), gr.Textbox()
        gathered = events.Gathered({kinds, name})
        gathered.when(press.click, gathered.reads(lambda given: (given[name], given[kinds], given[memory]), memory), shown, more=[memory])
        again = gathered.when(name.change, gathered.reads(lambda given: given[name]), shown)
        gathered.when(again, gathered.reads(lambda given: given[name]), shown)
    packs = [fn for fn in app.fns.values() if fn.fn is None]
    assert all(fn.inputs == [name, kinds] and fn.outputs == [gathered.box] and "JSON" in fn.js for fn in packs) and len(packs) == 3
    read = next(fn for fn in app.fns.values() if fn.fn is not None and memory in fn.inputs)
    assert read.inputs == [gathered.box, memory] and read.targets == [(None, "then")]
    assert read.fn(json.dumps(["b", ["y"]]), {"seen": 2}) == ("b", ["y"], {"seen": 2})
    with pytest.raises(gr.Error):
        read.fn(json.dumps(["b", ["z"]]), {})


@pytest.mark.parametrize("text", ["", "rows.jsonl", "null", "{}", "[]", '["a"]', '["a", "b", "c"]', "[" * 100_000, None, 5])
def test_what_no_page_can_have_sent_is_a_sentence(text):
    with gr.Blocks():
        gathered = events.Gathered({gr.Textbox("a"), gr.Textbox("b")})
    with pytest.raises(gr.Error, match="could not be read, so nothing was done") as told:
        gathered.reads(lambda given: given)(text)
    assert not told.value.print_exception


def test_files_are_not_gathered():
    """Gradio looks at the path of each file that it is told of; inside a text it would see none."""
    with gr.Blocks():
        for part in (gr.File(), gr.UploadButton(), gr.Image(), gr.Gallery()):
            with pytest.raises(ValueError, match="not to be gathered"):
                events.Gathered({gr.Textbox("a"), part})


def test_no_number_is_judged_by_gradio(pages):
    """Its sentence would not say which number, and an empty box of a slider is a traceback."""
    numbers = [block for block in pages.blocks.values() if isinstance(block, gr.Slider | gr.Number)]
    assert len(numbers) > 20 and all(block.preprocess(wrong) == wrong for block in numbers for wrong in (-1_000_000, 1_000_000, None))
