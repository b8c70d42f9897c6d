"""Rows as tokens: what is learnt, what is held out, and every row cut or left out is counted."""

import json

import pytest

from lora_studio import rows
from lora_studio.errors import DataError
from lora_studio.spec import parse
from lora_studio.training import check, encode
from tests import tiny


def spec_of(base, path, **changes):
    return parse({**tiny.tree(base, path), **changes})


def encoded_of(spec):
    tokenizer = tiny.tokenizer()
    return encode.encode_all(spec, encode.Encoder(tokenizer, spec), rows.collect(spec))


def write(tmp_path, *found):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_the_same_rows_are_held_out_every_time_and_never_trained_on(base, chat_rows):
    spec = spec_of(base, chat_rows)
    first, again = encoded_of(spec), encoded_of(spec)
    assert first.print == again.print and len(first.held_out) == 8
    assert not set(first.held_out) & {example for source in first.train for example in source}
    other = encoded_of(spec_of(base, chat_rows, compute={"seed": 7, "device": "cpu"}))
    assert set(other.held_out) != set(first.held_out)


def test_a_double_of_a_held_out_row_is_not_trained_on(base, tmp_path):
    talks = tiny.conversations(10)
    encoded = encoded_of(spec_of(base, write(tmp_path, *talks, *talks), validation={"size": 5}))
    assert not set(encoded.held_out) & set(encoded.train[0])


@pytest.mark.parametrize(
    ("task", "row", "learnt"),
    [
        ("prompt_completion", {"prompt": "ab", "completion": "cd"}, [False, False, True, True, True]),
        ("text", {"text": "abcd"}, [True] * 5),
        ("chat", {"prompt": "ab", "completion": "cd"}, [False, False, False, False, False, True, True, True]),
    ],
)
def test_each_task_learns_what_it_should(base, tmp_path, task, row, learnt):
    spec = spec_of(base, write(tmp_path, row), task={"kind": task}, validation={"size": 0})
    assert list(encoded_of(spec).train[0][0].learnt) == learnt


def test_long_rows_are_cut_dropped_or_split_and_counted(base, tmp_path):
    path = write(tmp_path, {"text": "a" * 20}, {"text": "b" * 5})

    def facts(overlength):
        spec = spec_of(base, path, task={"kind": "text", "max_length": 8, "overlength": overlength}, validation={"size": 0})
        encoded = encoded_of(spec)
        return [len(example.ids) for example in encoded.train[0]], encode.losses_in_words(encoded)

    assert facts("cut")[0] == [8, 6] and "1 rows are cut to the length limit; the worst loses 62%." in facts("cut")[1]
    assert facts("drop")[0] == [6] and "longer than 8 tokens" in facts("drop")[1][0]
    assert facts("split")[0] == [8, 8, 5, 6] and "split" in facts("split")[1][0]


def test_a_row_cut_before_its_answer_is_left_out_and_counted(base, tmp_path):
    path = write(tmp_path, {"prompt": "a" * 50, "completion": "b"}, {"prompt": "a", "completion": "b"})
    encoded = encoded_of(spec_of(base, path, task={"kind": "chat", "max_length": 16}, validation={"size": 0}))
    assert len(encoded.train[0]) == 1 and encoded.left_out == {"cut before the answer begins": 1}


def test_nothing_left_to_learn_is_an_error(base, tmp_path):
    path = write(tmp_path, {"prompt": "a" * 50, "completion": "b"})
    with pytest.raises(DataError, match="cut before the answer begins"):
        encoded_of(spec_of(base, path, task={"kind": "chat", "max_length": 16}, validation={"size": 0}))
    with pytest.raises(DataError, match="1 row is too few"):
        encoded_of(spec_of(base, path))


def test_a_template_that_marks_nothing_is_named(base, tmp_path):
    tokenizer = tiny.tokenizer(tiny.TEMPLATE.replace("message['role'] == 'assistant'", "message['role'] == 'nobody'"))
    spec = spec_of(base, write(tmp_path, *tiny.conversations(3)), validation={"size": 0})
    with pytest.raises(DataError, match="No token of any row would be learnt"):
        encode.encode_all(spec, encode.Encoder(tokenizer, spec), rows.collect(spec))


def test_the_check_before_start_tells_numbers_and_problems(base, chat_rows, tmp_path):
    answer = check.check(spec_of(base, chat_rows))
    assert answer["problems"] == [] and answer["facts"]["rows_train"] == 52 and answer["facts"]["steps"] == 12
    assert answer["facts"]["template"] == "the tokenizer's own" and "q_proj" in answer["facts"]["targets"]
    bad = check.check(spec_of(base, write(tmp_path, {"prompt": "a" * 99, "completion": "b"})))
    assert [problem["level"] for problem in bad["problems"]] == ["error"]
