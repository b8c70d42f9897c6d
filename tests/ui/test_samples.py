"""Samples on the Runs page: a row for each step with the untouched base first, a column for each prompt."""

from lora_studio.ui import samples

NAMES = [f"{number:016x}.png" for number in range(400)]


def sample(step: int, prompt: str, answer: str) -> dict:
    return {"kind": "sample", "step": step, "prompt": prompt, "answer": answer}


def test_pictures_are_a_matrix_with_the_base_as_first_row():
    told = [sample(10, "b", NAMES[0]), sample(0, "a", NAMES[1]), sample(0, "b", NAMES[2]), sample(10, "a", NAMES[3])]
    shown = samples.shown([*told, {"kind": "note", "text": "x"}], "run")
    assert [column["prompt"] for column in shown["prompts"]] == ["b", "a"] and shown["texts"] == []
    assert [(row["step"], row["label"]) for row in shown["rows"]] == [(0, "base"), (10, "")]
    assert [cell["picture"] for cell in shown["rows"][0]["cells"]] == [f"/studio/sample/run/{NAMES[2]}", f"/studio/sample/run/{NAMES[1]}"]


def test_a_cell_without_a_picture_stays_empty_and_in_its_column():
    shown = samples.shown([sample(0, "a", NAMES[0]), sample(0, "b", NAMES[1]), sample(5, "b", NAMES[2])], "run")
    assert [cell["picture"] for cell in shown["rows"][1]["cells"]] == ["", f"/studio/sample/run/{NAMES[2]}"]


def test_words_stand_by_prompt_and_a_name_that_is_no_picture_is_words():
    shown = samples.shown([sample(0, "a", "hello"), sample(5, "a", ""), sample(5, "b", "../secret.png")], "run")
    assert shown["rows"] == [] and [len(text["answers"]) for text in shown["texts"]] == [2, 1]
    assert shown["texts"][0]["answers"][1]["answer"] == "(nothing)"


def test_of_very_many_rows_the_base_and_the_newest_stay():
    rows = samples.shown([sample(step, "a", NAMES[step]) for step in range(400)], "run")["rows"]
    assert len(rows) == samples.MOST_ROWS and rows[0]["step"] == 0 and rows[-1]["step"] == 399
