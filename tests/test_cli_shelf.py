"""Adapters on the command line: the whole way from two runs to a published blend and back, and a sentence for what cannot be."""

import json
import os
import subprocess
import sys

import pytest

from lora_studio import library
from lora_studio.errors import SpecError
from lora_studio.workspace import Workspace
from tests import tiny
from tests.hub.server import Hub

pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture
def hub():
    found = Hub()
    found.account("me", token="hf_me")
    yield found
    found.close()


def command(*words, code=0, give="", **environment) -> subprocess.CompletedProcess:
    found = subprocess.run(
        [sys.executable, "-m", "lora_studio", *map(str, words)], input=give, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **environment},
    )  # fmt: skip
    assert found.returncode == code, (words, found.returncode, found.stdout, found.stderr)
    return found


def said(*words, **options) -> dict:
    return json.loads(command(*words, "--json", **options).stdout)


def train(base, rows, name, **changes):
    changed = [word for path, value in changes.items() for word in (f"--{path.replace('__', '.')}", str(value))]
    return said("train", "--name", name, "--base.id", base, "--data", rows, "--schedule.steps", 4, "--compute.precision", "fp32",
                "--validation.size", 0, "--method.rank", 2, *changed)  # fmt: skip


def test_from_two_runs_to_a_published_blend_and_back(workspace, home, hub, base, chat_rows, tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        train(base, chat_rows, name, compute__seed=seed)
    listed = said("library")
    assert [item["name"] for item in listed] == ["second", "first"] and said("library", "first")[0]["name"] == "first"

    both = said("blend", "first=1", "second=-0.5", "--name", "both")
    assert both["rank"] == 4 and both["loss"] < 1e-6
    small = said("blend", "first=1", "second=1", "--name", "small", "--rank", 1)
    assert small["rank"] == 1 and 0 < small["loss"] < 1
    card = said("inspect", "both")
    assert [(parent["name"], parent["weight"]) for parent in card["parents"]] == [("first", 1.0), ("second", -0.5)]

    alone = said("generate", base, "red fox?", "--longest", 6)["answer"]
    blended = said("generate", base, "red fox?", "--longest", 6, "--with", "both=1")["answer"]
    assert blended == said("generate", base, "red fox?", "--longest", 6, "--with", "first=1", "--with", "second=-0.5")["answer"]
    assert alone == said("generate", base, "red fox?", "--longest", 6, "--with", "both=0")["answer"]

    command("export", "both", tmp_path / "out")
    assert "rank: 4" in command("inspect", tmp_path / "out").stdout
    command("remove", "both")
    assert "both" not in command("library").stdout
    command("remove", both["id"], "--undo")
    assert said("import", tmp_path / "out", "--name", "once more")["id"] == both["id"], "the same content is the same item"

    said("publish", "first", "me/first", "--token-stdin", give="hf_me\n", HF_ENDPOINT=hub.url)
    assert {"README.md", "loss.png", "adapter_config.json", "adapter_model.safetensors"} <= set(hub.repos["me/first"].at("main")[1])
    done = said("publish", "both", "me/both", "--license", "apache-2.0", "--token-stdin", give="hf_me\n", HF_ENDPOINT=hub.url)
    assert done["private"] and done["url"].endswith("me/both")
    fresh = {"LORA_STUDIO_HOME": str(tmp_path / "fresh")}
    pulled = said("pull", "me/both", "--token-stdin", give="hf_me\n", HF_ENDPOINT=hub.url, **fresh)
    assert pulled["source"].startswith("me/both@" + done["commit"])
    there = library.adapter_folder(Workspace(tmp_path / "fresh"), pulled["id"])
    here = library.adapter_folder(workspace, "both")
    assert (there / "adapter_model.safetensors").read_bytes() == (here / "adapter_model.safetensors").read_bytes()
    again = said("generate", base, "red fox?", "--longest", 6, "--with", f"{pulled['name']}=1", **fresh)["answer"]
    assert again == blended
    subprocess.run([sys.executable, "-c", "from lora_studio.jobs import bench; bench.stop()"], env={**os.environ, **fresh}, check=True)
    assert not any(b"hf_me" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_layers_are_weighted_on_the_command_line_and_the_blend_answers_as_its_parts(workspace, base, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        library.add(workspace, tiny.adapter_files(base, seed=seed), {"name": name, "base": str(base)})
    layers = ["--layers", "one:model.layers.0=-0.5", "--layers", "one:mlp=0", "--layers", "two:layers.0-1=0.25"]
    both = said("blend", "one=0.8", "two", *layers, "--name", "both")
    card = said("inspect", "both")
    wanted = [{"": 0.8, "model.layers.0": -0.5, "mlp": 0.0}, {"": 1.0, "layers.0-1": 0.25}]
    assert [parent["weight"] for parent in card["parents"]] == [row["weight"] for row in card["recipe"]["sum"]] == wanted
    assert "one × 0.8, mlp 0, model.layers.0 -0.5" in command("inspect", both["id"]).stdout
    live = said("generate", base, "red fox?", "--longest", 6, "--with", "one=0.8", "--with", "two", *layers)
    assert live["answer"] == said("generate", base, "red fox?", "--longest", 6, "--with", "both")["answer"]
    assert live["adapters"] == [["one", wanted[0]], ["two", wanted[1]]]
    assert said("bake", "one=0", "--layers", "one:layers.1.mlp=1", "--plan")["changed"] == 1
    assert said("merge", "one", "two", "--how", "ties", "--rank", 4, *layers, "--name", "voted")["rank"] == 4
    assert "the same, byte for byte" in command("blend", "--again", "voted").stdout
    found = command("blend", "one", "two", "--layers", "one:layers.9=1", "--name", "x", code=1)
    assert "Name one of its blocks: model.layers.0, model.layers.1." in found.stderr and "Traceback" not in found.stderr
    assert {item["name"] for item in said("library")} == {"one", "two", "both", "voted"}


def test_parts_of_a_mix_and_the_layers_of_each_are_read():
    from lora_studio.cli_shelf import weighted

    assert weighted(["a=0.5", "b", "c: d=-2"], ["c: d:mlp=1e-1"]) == [("a", 0.5), ("b", 1.0), ("c: d", {"": -2.0, "mlp": 0.1})]
    assert weighted(["a", "a=2"], ["a:0-3=0", "a:0-3=1"]) == [("a", {"": 1.0, "0-3": 1.0}), ("a", 2.0)]
    for text in ("a:mlp", "a:=1", "b:mlp=1", "mlp=1", "a:mlp=x"):
        with pytest.raises(SpecError, match="Write for example"):
            weighted(["a=1"], [text])


@pytest.mark.parametrize(
    ("words", "said_"),
    [
        (["inspect", "nope"], "nope"),
        (["export", "nope", "x"], "nope"),
        (["remove", "nope"], "nope"),
        (["blend", "nope=1", "--name", "x"], "nope"),
        (["blend", "a=b", "--name", "x"], "is not of the form"),
        (["import", "/no/such/folder"], "is not there"),
        (["publish", "nope", "me/x"], "nope"),
    ],
)
def test_what_cannot_be_is_one_sentence(workspace, words, said_):
    found = command(*words, code=1)
    assert said_ in found.stderr and "Traceback" not in found.stderr


def test_a_pickle_and_a_foreign_base_are_refused_and_the_library_stays_as_it_was(workspace, base, chat_rows, tmp_path):
    made = train(base, chat_rows, "first")
    before = said("library")
    evil = tmp_path / "evil.safetensors"
    evil.write_bytes(b"\x80\x04\x95pickled")
    assert "pickle" in command("import", evil, code=1).stderr
    other = tiny.write_base(tmp_path / "wide", hidden_size=64, head_dim=16)
    assert "It was made for" in command("import", made["adapter"], "--base", other, code=1).stderr
    assert said("library") == before
