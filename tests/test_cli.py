"""The command line: the same verbs as the pages, JSON on request, one sentence and a code on error."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_studio import studio
from lora_studio.workspace import local
from tests import tiny


def command(*words, code=0, **environment) -> subprocess.CompletedProcess:
    import os

    found = subprocess.run(
        [sys.executable, "-m", "lora_studio", *map(str, words)], capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert found.returncode == code, (found.returncode, found.stdout, found.stderr)
    return found


def write_spec(tmp_path, base, rows, **changes) -> Path:
    import yaml

    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**tiny.tree(base, rows), **changes}))
    return path


def test_a_run_from_start_to_adapter(tmp_path, home, base, chat_rows):
    spec = write_spec(tmp_path, base, chat_rows)
    checked = json.loads(command("preflight", spec, "--json").stdout)
    assert checked["can_start"] and checked["facts"]["rows_train"] == 52 and checked["facts"]["trainable"] > 0
    done = json.loads(command("train", spec, "--json", "--method.rank", 2).stdout)
    assert done["state"] == "done" and (Path(done["adapter"]) / "adapter_model.safetensors").is_file()
    assert json.loads((Path(done["adapter"]) / "adapter_config.json").read_text())["r"] == 2
    listed = json.loads(command("runs", "--json").stdout)
    assert [run["id"] for run in listed] == [done["id"]]
    shown = command("run", done["id"]).stdout
    assert "is done, step 12/12" in shown and "red fox?" in shown
    assert "is done; there is nothing to go on with" in command("resume", done["id"], code=1).stderr


def test_detach_stop_and_resume(tmp_path, home, base, chat_rows):
    spec = write_spec(tmp_path, base, chat_rows, schedule={"steps": 3000, "batch_size": 4}, validation={"size": 0})
    id = command("train", spec, "--detach").stdout.strip()
    for request, event in (("save", "saved"), ("sample", "sample")):
        before = len([one for one in studio.events(local(), id) if one["kind"] == event])
        assert "after this step" in command(request, id).stdout
        until = time.monotonic() + 60
        while len([one for one in studio.events(local(), id) if one["kind"] == event]) == before:
            assert time.monotonic() < until
            time.sleep(0.1)
    said = json.loads(command("stop", id, "--json").stdout)
    assert said["state"] == "stopped"
    assert "stopped" in command("save", id, code=1).stderr
    assert command("resume", id, "--detach").stdout.strip() == id
    shown = json.loads(command("stop", id, "--discard", "--json").stdout)
    assert shown["state"] == "stopped"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train"], 1, "data is missing. Set it."),
        (["train", "--data", "/no/such.jsonl"], 1, "/no/such.jsonl is not there"),
        (["train", "--preset", "nope"], 1, "There is no preset nope. Known: demo/pirate"),
        (["train", "--data", "x", "--set", "optim.lr=0", "--method.rank", "a"], 1, "method.rank is 'a'; it must be a whole number."),
        (["train", "--data", "x", "--set", "nonsense"], 1, "is not of the form path=value"),
        (["train", "--data", "{path: x, wait: 2}"], 1, "data.0.wait is not a setting. Did you mean"),
        (["train", "spec.nope"], 1, "There is no file spec.nope"),
        (["train", "--frobnicate"], 2, "--frobnicate"),
        (["run", "nope"], 1, "There is no run nope"),
        (["stop", "20260101-000000-abcd"], 1, "There is no run"),
    ],
)
def test_an_error_is_one_sentence_and_a_code(words, code, said):
    found = command(*words, code=code)
    assert said in found.stderr and "Traceback" not in found.stderr and not found.stdout
    if code == 1:
        assert said in json.loads(command(*words, "--json", code=1).stdout)["error"]


def test_schema_presets_and_show_spec_answer_in_both_forms():
    assert "optim.lora_plus_ratio" in command("schema").stdout
    assert json.loads(command("schema", "--json").stdout)["title"] == "TrainSpec"
    assert "demo/pirate" in command("presets").stdout
    assert json.loads(command("presets", "--json").stdout)[0]["name"] == "demo/pirate"
    shown = command("train", "--preset", "demo/pirate", "--optim.lr", "1e-3", "--show-spec").stdout
    assert "lr: 0.001" in shown and "demo-text" in shown


def test_the_doctor_names_what_is_wrong_with_the_line_that_mends_it(tmp_path, monkeypatch):
    told = json.loads(command("doctor", "--json").stdout)
    assert any("torch" in finding["sentence"] for finding in told["findings"])
    blocked = tmp_path / "file"
    blocked.write_text("")
    bad = command("doctor", code=1, LORA_STUDIO_HOME=str(blocked / "home"))
    assert "cannot be written" in bad.stdout and "export LORA_STUDIO_HOME" in bad.stdout


def test_the_doctor_sees_a_driver_without_a_cuda_build_and_a_foreign_torchvision(monkeypatch):
    from lora_studio import doctor
    from lora_studio.jobs import devices

    monkeypatch.setattr(doctor, "_driver", lambda: ("H200", "570.1", "12.8"))
    monkeypatch.setattr(devices, "torch_build", lambda: {"torch": "2.13.0+cpu", "cuda": None, "hip": None})
    finding = doctor._torch()[0]
    assert finding.level == "error" and "without CUDA" in finding.sentence and "cu128" in finding.remedy
    monkeypatch.setattr(devices, "torch_build", lambda: {"torch": "2.13.0+cu130", "cuda": "13.0", "hip": None})
    assert "supports up to 12.8" in doctor._torch()[0].sentence
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: versions[name])
    assert doctor._torchvision().remedy == "pip uninstall torchvision"


def test_serve_answers_its_own_page_and_no_stranger(home, free_port):
    import time
    import urllib.error
    import urllib.request

    process = subprocess.Popen([sys.executable, "-m", "lora_studio", "serve", "--port", str(free_port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url, until = f"http://127.0.0.1:{free_port}/", time.monotonic() + 60
    try:
        while True:
            try:
                assert urllib.request.urlopen(url, timeout=2).status == 200
                break
            except urllib.error.URLError:
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.2)
        for headers, method in (({"Host": "evil.com"}, "GET"), ({"Origin": "http://evil.com"}, "POST")):
            request = urllib.request.Request(url + "gradio_api/upload", headers=headers, method=method, data=b"" if method == "POST" else None)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=5)
            assert refused.value.code == 403
        with pytest.raises(urllib.error.HTTPError) as missing:
            urllib.request.urlopen(url + "studio/adapter/..%2f..%2fetc", timeout=5)
        assert missing.value.code == 404
    finally:
        process.terminate()
        process.wait(20)
