"""Reading rows: every format, and a sentence with the line for every broken file."""

import json

import pytest

from lora_studio import data, rows
from lora_studio.errors import DataError
from lora_studio.spec import Source, parse

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def read(path, **options) -> data.Table:
    return data.read(Source(path=str(path), **options))


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    wanted = [{"prompt": "a", "completion": "b"}, {"prompt": "c, d", "completion": "e\nf"}]
    files = [
        write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, wanted)) + "\n\n"),
        write(tmp_path, "b.json", json.dumps(wanted, indent=1)),
        write(tmp_path, "c.json", json.dumps({"data": wanted})),
        write(tmp_path, "d.json", "\n".join(map(json.dumps, wanted))),
        write(tmp_path, "e.csv", 'prompt,completion\r\na,b\r\n"c, d","e\nf"\r\n'),
        write(tmp_path, "f.csv", 'prompt;completion\na;b\n"c, d";"e\nf"\n'),
        write(tmp_path, "g.tsv", 'prompt\tcompletion\na\tb\nc, d\t"e\nf"\n'),
        write(tmp_path, "h.jsonl", b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, wanted)).encode()),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), tmp_path / "i.parquet")
    for file in [*files, tmp_path / "i.parquet"]:
        assert read(file).rows == wanted, file.name
    assert len(read(tmp_path).rows) == 2 * 9
    assert len(read(tmp_path, cap=5).rows) == 5


def test_csv_fields_stay_text(tmp_path):
    table = read(write(tmp_path, "a.csv", "prompt,completion\n001,NA\n1e5,None\n"))
    assert table.rows == [{"prompt": "001", "completion": "NA"}, {"prompt": "1e5", "completion": "None"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2}\n{"a" 3}\n{"a": 4}\n', ["a.jsonl, line 3", "column 6", "Correct it"]),
        ("b.jsonl", '{"a": 1}\n{"a": "cut of', ["line 2 is cut off", "Upload the file again"]),
        ("c.jsonl", '{"a": 1}\n[1, 2]\n', ["row 2 is a list"]),
        ("d.jsonl", '{"a": 1, "a": 2}\n', ["row 1 has the key a twice"]),
        ("e.jsonl", '{"a": NaN}\n', ["line 1", "NaN is not JSON"]),
        ("f.jsonl", "", ["f.jsonl has no rows"]),
        ("g.jsonl", "\n \n", ["g.jsonl has no rows"]),
        ("h.csv", "prompt,completion\n", ["has no rows"]),
        ("i.csv", "prompt,completion\na,b,c\n", ["row 1 has 3 fields", "header has 2"]),
        ("j.json", '[{"a": 1},\n{"a": 2}', ["j.json, line 2"]),
        ("k.jsonl", b'{"a": "\xff"}\n', ["not UTF-8", "byte 7"]),
        ("l.parquet", b"not parquet", ["cannot be read as Parquet"]),
        ("m.docx", b"x", [".docx", ".jsonl"]),
        ("n.json", "[" * 100_000, ["nested too deeply"]),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_the_way_out(tmp_path, name, content, words):
    said = refused(write(tmp_path, name, content))
    assert all(word in said for word in words), said


def test_missing_files_and_empty_folders_are_named(tmp_path):
    assert "is not there" in refused(tmp_path / "nope.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds none of" in refused(tmp_path / "empty")


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (ROW, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "sharegpt"),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Ho"}, "prompt_completion"),
        ({"question": "Hi", "answer": "Ho"}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]}, "prompt_completion"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Ho"}]}, "messages"),
    ],
)
def test_every_known_shape_becomes_the_same_conversation(row, shape, tmp_path):
    found = rows.collect(parse({"data": [{"path": str(write(tmp_path, "a.jsonl", json.dumps(row)))}]}))[0]
    assert (found.shape, found.items) == (shape, [ROW])


def test_an_alpaca_input_follows_its_instruction(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"instruction": "Add", "input": "1 2", "output": "3"}))
    found = rows.collect(parse({"data": [{"path": str(path)}], "task": {"kind": "prompt_completion"}}))[0]
    assert found.items == [{"prompt": "Add\n\n1 2", "completion": "3"}]


def test_unusual_columns_are_mapped_and_wrong_maps_are_refused(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"frage": "Hi", "antwort": "Ho"}))

    def collect(columns):
        return rows.collect(parse({"data": [{"path": str(path), "columns": columns}]}))[0].items

    assert collect({"prompt": "frage", "completion": "antwort"}) == [ROW]
    for columns, words in (({}, "its columns (frage, antwort)"), ({"prompt": "nope"}, "has no column nope"), ({"pompt": "frage"}, "not a part")):
        with pytest.raises(DataError) as caught:
            collect(columns)
        assert words in str(caught.value)


def test_every_row_left_out_is_counted_with_its_reason(tmp_path):
    bad = [
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "wizard", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "   "}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a\u0000b"}]},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [ROW, *bad])))
    found = rows.collect(parse({"data": [{"path": str(path)}]}))[0]
    assert found.items == [ROW] and sum(map(len, found.skipped.values())) == len(bad)
    assert "a.jsonl, row 2" in found.skipped_in_words()


def test_null_is_never_trained_on_as_a_word(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": null}\n{"text": "None"}\n')
    found = rows.collect(parse({"data": [{"path": str(path)}], "task": {"kind": "text"}}))[0]
    assert found.items == [{"text": "None"}] and list(found.skipped) == ["without text"]


def test_a_source_without_a_usable_row_is_an_error(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": ""}\n')
    with pytest.raises(DataError, match="No row of"):
        rows.collect(parse({"data": [{"path": str(path)}], "task": {"kind": "text"}}))


def test_the_demo_data_is_found_by_name():
    assert data.locate("demo/pirate").name == "pirate.jsonl"
