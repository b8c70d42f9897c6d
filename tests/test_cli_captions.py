"""Albums on the command line: the whole way of a caption and back, and a sentence for what cannot be."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lora_studio import cli
from lora_studio.errors import DataError
from tests.pictures import draw


def said(*words) -> dict:
    """What a command answers, in this process: a process a command would take a second each."""
    found = CliRunner().invoke(cli.app, ["captions", *map(str, words), "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def captions() -> list[str]:
    return list(said("list", "mine")["captions"].values())


def test_from_pictures_to_captions_and_back(workspace, tmp_path):
    files = [draw(tmp_path / f"{index}.png") for index in range(2)]
    (tmp_path / "0.txt").write_text("a cat, sun")
    made = said("make", *files, tmp_path / "0.txt", "--name", "mine")
    assert made["taken"] == 2 and made["refused"] == [] and said("list") == [{"album": "mine", "pictures": 2}]
    assert said("set", "mine", "1.png", "a dog, Sun") == {"album": "mine", "changed": 1}
    assert said("replace", "mine", "A ", "one ", "--ignore-case")["changed"] == 2
    assert said("remove-tag", "mine", "sun", "--only", "1.png")["changed"] == 1
    assert said("trigger", "mine", "sks")["changed"] == 2 and said("trigger", "mine", "sks")["changed"] == 0
    assert said("suffix", "mine", ", at night")["changed"] == 2 and said("prefix", "mine", "photo:")["changed"] == 2
    assert said("add-tag", "mine", "sharp", "--only", "0.png")["changed"] == 1
    assert captions() == ["photo: sks, one cat, sun, at night, sharp", "photo: sks, one dog, at night"]
    assert said("remove", "mine", "1.png")["removed"] == 1
    assert said("undo", "mine")["undone"] == "remove 1.png" and said("undo", "mine")["undone"] == "add the tag “sharp” to 1 caption"
    assert said("redo", "mine")["done"].startswith("add the tag")
    assert said("add", "mine", draw(tmp_path / "new.png"))["taken"] == 1
    told = said("statistics", "mine", "--resolution", 64)
    assert told["pictures"] == 3 and told["buckets"] == {"64×64": 3} and told["missing"]["names"] == ["new.png"] and len(told["copies"][0]) == 3


def test_a_demo_is_copied(workspace):
    assert said("make", "demo/stripes")["taken"] == 24


@pytest.mark.parametrize("words", [("list", "nothing"), ("undo", "nothing"), ("make", "/nowhere"), ("replace", "nothing", "x")])
def test_what_cannot_be_gets_a_sentence(workspace, words):
    with pytest.raises(DataError):
        CliRunner().invoke(cli.app, ["captions", *words], catch_exceptions=False)


def test_the_process_says_one_sentence_and_ends_with_one(workspace):
    found = subprocess.run([sys.executable, "-m", "lora_studio", "captions", "list", "nothing", "--json"], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert found.returncode == 1 and json.loads(found.stdout)["error"] == found.stderr.strip() == "There is no album nothing here. Known: none yet. Drop pictures to make one."
