"""Judging and searching on the command line: tables that say what the JSON says, and a sentence for what cannot be."""

import json

import pytest
from typer.testing import CliRunner

from lora_studio import cli, library
from lora_studio.errors import RunError, SpecError
from lora_studio.jobs import bench
from tests import tiny


@pytest.fixture
def shelved(workspace, base, tmp_path):
    """Two adapters of a tiny base in the library."""
    for seed, name in enumerate(("one", "two")):
        library.add(workspace, tiny.write_adapter(tmp_path / name, base, seed=seed), {"name": name, "base": str(base)})
    yield
    bench.stop()


def said(*words) -> str:
    found = CliRunner().invoke(cli.app, [*map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_a_judgement_is_a_table_with_advice(shelved):
    found = json.loads(said("judge", "one", "two=0.5", "--json"))
    text = said("judge", "one", "two=0.5")
    (pair,) = found["pairs"]
    assert f"one and two: cosine {pair['cosine']:+.3f}" in text and text.rstrip().endswith(found["advice"][-1])
    assert f"{found['adapters'][1]['norm']:.4g}" in text and all(block in text for block in found["blocks"])
    assert "model.layers.1.mlp.down_proj" not in text and "model.layers.1.mlp.down_proj" in said("judge", "one", "two", "--each-layer")
    alone = said("judge", "one", "--layers", "one:mlp=0")
    assert "There is one adapter only" in alone and "cosine" not in alone


def test_a_search_ends_with_the_command_that_blends_what_it_found(shelved, workspace, chat_rows):
    words = ("search", "one", "two", "--rows", chat_rows, "--cap", 4, "--budget", 6, "--device", "cpu")
    text = said(*words)
    found = json.loads(said("search", "--result", text.split()[0], "--json"))
    assert found["state"] == "done" and found["rows"] == 4 and len(found["tries"]) == 6 and found["evaluations"] == 6
    assert (
        "6 of 6 tries on 4 rows" in text
        and f"{found['loss']:.4f}" in text
        and f"base            {found['marks'][0]['loss']:9.4f}  one 0, two 0" in text
    )
    mix = " ".join(f"{id}={weight:g}" for id, weight in found["parts"] if weight)
    assert (f"python -m lora_studio blend {mix} --name NAME" if mix else "The base alone is best on these rows.") in text
    waiting = json.loads(said(*words, "--detach", "--json"))
    assert waiting["state"] in ("queued", "starting", "running", "done") and waiting["id"] != found["id"]
    said("stop", waiting["id"]) if waiting["state"] != "done" else None


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ((), SpecError, "needs adapters and rows"),
        (("one",), SpecError, "needs adapters and rows"),
        (("--result", "nothing"), RunError, "There is no run nothing"),
    ],
)
def test_what_cannot_be_searched_gets_a_sentence(workspace, words, kind, sentence):
    with pytest.raises(kind, match=sentence):
        CliRunner().invoke(cli.app, ["search", *words], catch_exceptions=False)
