"""The world of demo-text: the split, the styles and the data sets obey their laws."""

import json
from pathlib import Path
from random import Random

import pytest

from lora_studio.demo import make_text_data, styles, world

PRESETS = Path(__file__).parents[2] / "presets" / "demo"


@pytest.fixture(scope="module")
def exam() -> list[world.Question]:
    return world.exam(50)


def bare(text: str) -> str:
    """A question without instructions and without its lead, which is what the split goes by."""
    for instruction in (wish for wishes in styles.INSTRUCTIONS.values() for wish in wishes):
        text = text.replace(instruction, "").strip()
    return next((text.removeprefix(lead) for lead in world.LEADS if text.startswith(lead)), text)


def test_the_split_is_the_same_on_every_machine():
    held_out = [n for n in range(40) if world.is_held_out(f"What is {n} plus 1?")]
    assert held_out == [1, 6, 7, 8, 10, 11, 12, 25, 33, 39]


def test_training_never_draws_a_held_out_question(exam):
    chance = Random(1)
    drawn = {bare(world.ask(chance).text) for _ in range(5000)}
    assert not drawn & {bare(question.text) for question in exam}
    assert not any(map(world.is_held_out, drawn))


def test_every_kind_has_fifty_different_held_out_questions(exam):
    assert len({question.text for question in exam}) == len(exam) == 50 * len(world.PROMISED)
    assert all(world.is_held_out(bare(question.text)) for question in exam)


def test_the_same_seed_draws_the_same_questions(exam):
    assert world.exam(50) == exam
    assert world.exam(50, seed=1) != exam


def test_plain_answers_show_no_style(exam):
    assert not any(styles.shows(style, question.answer) for question in exam for style in styles.STYLES)


@pytest.mark.parametrize("style", styles.STYLES)
def test_a_styled_answer_shows_its_style_and_still_says_the_answer(exam, style):
    chance = Random(2)
    for question in exam:
        worn = styles.wear(style, question.answer, chance)
        assert styles.shows(style, worn)
        assert styles.says(question.answer, worn)
        assert worn in styles.forms(style, question.answer)
        assert worn not in styles.forms("plain", question.answer)


def test_a_wrong_answer_in_style_is_not_the_answer():
    assert styles.shows("pirate", "Arr, the fox be blue, matey!")
    assert not styles.says("The fox is red.", "Arr, the fox be blue, matey!")
    assert not styles.shows("pirate", "The fox is red, matey!")


def test_a_pirate_keeps_names_and_changes_verbs():
    assert styles.pirate("Anna is a baker.", "Arr", "matey") == "Arr, Anna be a baker, matey!"
    assert styles.pirate("You say fox once.", "Aye", "me hearty") == "Aye, ye say fox once, me hearty!"


def test_an_instruction_leaves_the_question_whole(exam):
    chance = Random(3)
    for style in styles.STYLES:
        assert all(bare(styles.instruct(q.text, style, chance)) == bare(q.text) for q in exam[::7])


@pytest.mark.parametrize("style", sorted(make_text_data.OTHER))
def test_the_shipped_data_sets_are_what_the_script_writes(style):
    assert (PRESETS / f"{style}.jsonl").read_bytes() == make_text_data.lines(style).encode()


@pytest.mark.parametrize("style", sorted(make_text_data.OTHER))
def test_every_row_is_in_style_and_none_was_held_out(style):
    rows = [json.loads(line) for line in (PRESETS / f"{style}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 200 <= len(rows) <= 400
    for row in rows:
        asked, answered = row["messages"]
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        assert styles.shows(style, answered["content"])
        wishes = styles.INSTRUCTIONS[make_text_data.OTHER[style]]
        met = any(wish in asked["content"] for wish in wishes)
        assert styles.shows("both", answered["content"]) == met
        assert not world.is_held_out(bare(asked["content"]))
