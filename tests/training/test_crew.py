"""Adapters of a sweep on several threads of a CPU: each is, bit for bit, what it is when one thread takes it through the model alone."""

import threading
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lora_studio import runs
from lora_studio.training import crew, loop, many
from tests import tiny
from tests.training import test_job
from tests.training.test_many import (
    APART,
    KINDS,
    adapter_bytes,
    image_base,
    image_tree,
    kill,
    made,
    pictures,
    poison,
    text_tree,
    told,
    train,
)

__all__ = ["image_base", "pictures"]  # pytest finds fixtures by their names here
# Seven adapters, so that a thread that is done earlier takes one of another shape than the others are at.
SEVEN = [*APART, *({**one, "compute.seed": 11 + number, "method.rank": 3 + number} for number, one in enumerate([*APART, APART[0]]))]


def on(tree: dict, threads: int) -> dict:
    return {**tree, "compute": {**tree["compute"], "threads": threads}}


@pytest.fixture
def seen(monkeypatch):
    """The threads that went through the model, and how many were at it at the same time at most."""
    found = {"names": set(), "most": 0, "now": 0}
    lock, go_through = threading.Lock(), many.Team._go_through

    def watched(self, *given, **more):
        with lock:
            found["names"].add(threading.current_thread().name)
            found["now"] += 1
            found["most"] = max(found["most"], found["now"])
        try:
            return go_through(self, *given, **more)
        finally:
            with lock:
                found["now"] -= 1

    monkeypatch.setattr(many.Team, "_go_through", watched)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_is_bit_for_bit_what_one_thread_makes(workspace, base, image_base, chat_rows, pictures, seen, kind):
    what, changes = KINDS[kind]
    tree = text_tree(base, chat_rows, **changes) if what == "text" else image_tree(image_base, pictures, **changes)
    single = made(workspace, on(tree, 1), SEVEN, keep="all", together=1)
    several = made(workspace, on(tree, 3), SEVEN, keep="all", together=3)  # a core and a bit for each: they do get into each other's way
    train(single)
    assert seen["most"] == 1 and seen["names"] == {"MainThread"}
    train(several)
    assert 1 < seen["most"] <= 3 and len(seen["names"]) == 4
    assert adapter_bytes(several) == adapter_bytes(single) and len(adapter_bytes(single)) == 7
    assert told(runs.read_all(several)) == told(runs.read_all(single))


def test_with_more_adapters_than_threads_each_thread_takes_several_in_one_pass(workspace, base, chat_rows, seen):
    folder = made(workspace, on(text_tree(base, chat_rows), 2), SEVEN[:4], keep="all")
    taken = []
    watched = many.Team._go_through

    def counting(self, lanes, **more):
        taken.append(len(lanes))
        return watched(self, lanes, **more)

    many.Team._go_through = counting
    try:
        train(folder)
    finally:
        many.Team._go_through = watched
    assert set(taken) == {2} and seen["most"] <= 2


@pytest.mark.parametrize("kind", ["packed", "pictures"])
def test_an_adapter_that_breaks_leaves_those_of_other_threads_bit_for_bit(workspace, base, image_base, chat_rows, pictures, monkeypatch, kind):
    tree = on(image_tree(image_base, pictures) if kind == "pictures" else text_tree(base, chat_rows), 2)
    whole, broken = made(workspace, tree, keep="all", together=2), made(workspace, tree, keep="all", together=2)
    train(whole)
    poison(monkeypatch, variant=1, step=2)
    assert "1 broke off" in train(broken)[-1]["reason"]
    assert adapter_bytes(broken) == {name: value for name, value in adapter_bytes(whole).items() if name != "1"}


def test_a_cut_sweep_goes_on_to_the_same_bytes_on_several_threads(workspace, base, chat_rows):
    tree = on(text_tree(base, chat_rows, schedule={"steps": 8, "batch_size": 4}), 2)
    variants = [APART[0], {**APART[1], "schedule.steps": 5}, {**APART[2], "optim.kind": "sgd"}]
    whole, cut = (made(workspace, tree, variants, keep="all", together=2) for _ in range(2))
    expected = train(whole)
    for kind, step in (("step", 4), ("eval", 6)):
        kill(cut, kind, step)
    assert train(cut)[-1]["kind"] == "done"
    assert adapter_bytes(cut) == adapter_bytes(whole) and told(runs.read_all(cut)) == told(expected)


def test_what_breaks_on_a_thread_is_raised_when_all_are_done():
    done = []

    def work(number: int) -> int:
        if number == 1:
            raise ValueError("the second")
        time.sleep(0.05 * (number > 1))
        done.append(number)
        return number

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with crew.Crew(2) as made_up:
            assert torch.get_num_threads() == 2 and made_up.each(lambda _: torch.get_num_threads(), range(4)) == [2] * 4
            with pytest.raises(ValueError, match="the second"):
                made_up.each(work, [0, 1, 2, 3])
            assert sorted(done) == [0, 2, 3]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_each_thread_takes_no_more_than_it_is_said_to():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        for hands, most, own in ((2, None, 3), (2, 1, 1), (2, 5, 3), (1, None, 6), (1, 4, 4), (1, 8, 6)):
            with crew.Crew(hands, most) as made_up:
                assert torch.get_num_threads() == own and made_up.each(lambda _: torch.get_num_threads(), range(2)) == [own] * 2
            assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "worth", "taken"), [(None, 10_000_000, 1), (None, 10_000, 3), (None, 5_000, 4), (2, 10_000_000, 2)])
def test_a_run_takes_no_more_threads_than_its_model_is_worth_unless_asked(workspace, base, chat_rows, monkeypatch, asked, worth, taken):
    """The tiny base has 26,944 parameters."""
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(crew, "WORTH", worth)
    monkeypatch.setattr("lora_studio.allotment.cores", lambda: 4)
    monkeypatch.setattr(loop.Trainer, "_step", lambda self, *given, own=loop.Trainer._step, **more: (seen.append(torch.get_num_threads()), own(self, *given, **more))[1])
    tree = {**tiny.tree(base, chat_rows), "schedule": {"steps": 2, "batch_size": 2}, "validation": {"size": 0}, "output": {}}
    try:
        test_job.train(test_job.run_of(workspace, {**tree, "compute": {"device": "cpu", "threads": asked}}))
    finally:
        torch.set_num_threads(before)
    assert seen == [taken] * 2


def test_a_base_that_draws_at_random_and_a_single_core_stay_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [crew.hands(tiny.model(), at_once) for at_once in (1, 2, 8)] == [1, 2, 3]
        settings = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32}
        assert crew.hands(GPT2LMHeadModel(GPT2Config(**settings)), 2) == 1  # its configuration asks for 0.1
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
        assert crew.hands(GPT2LMHeadModel(GPT2Config(**settings, **still)), 2) == 2
        drawing = tiny.model()
        drawing.config.attention_dropout = 0.1  # asked of a function, there is no layer for it
        assert isinstance(drawing, LlamaForCausalLM) and crew.hands(drawing, 2) == 1
        torch.set_num_threads(1)
        assert crew.hands(tiny.model(), 8) == 1
    finally:
        torch.set_num_threads(before)


