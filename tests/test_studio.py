"""The verbs: what can be said before a run starts, and what comes out of it."""

import json
import zipfile

import pytest

from lora_studio import durable, preflight, presets, runs, studio
from lora_studio.errors import DataError, RunError
from lora_studio.spec import parse
from tests import tiny


def test_preflight_tells_all_problems_at_once_with_their_fields(workspace, base, chat_rows, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": 1}\n{"mess\n')
    tree = tiny.tree(base, broken, method={"rank": 4, "targets": ["q_prj"]}, compute={"device": "cuda:9"})
    report = studio.preflight(workspace, parse({**tree, "data": [{"path": str(broken)}, {"path": "nope.jsonl"}]}))
    assert [problem.path for problem in report.problems] == ["method.targets", "data.0", "data.1", "compute.device", "optim.lr"]
    assert not report.can_start and "broken.jsonl, line 2" in report.problems[1].sentence


def test_preflight_shows_numbers_rows_and_resolved_targets(workspace, base, chat_rows):
    report = studio.preflight(workspace, parse(tiny.tree(base, chat_rows)), deep=True)
    assert report.can_start and report.problems == []
    assert report.facts["targets"][0] == "q_proj" and len(report.facts["targets"]) == 7
    assert (report.facts["rows_train"], report.facts["rows_validation"], report.facts["steps"]) == (52, 8, 12)
    assert len(report.preview) == 5 and report.facts["rates"] == {"A": 2e-3, "B": 3.2e-2}


def test_trainable_parameters_are_counted_as_peft_counts_them(workspace, base, chat_rows):
    import peft

    report = studio.preflight(workspace, parse(tiny.tree(base, chat_rows)))
    config = peft.LoraConfig(r=4, target_modules=report.facts["targets"])
    assert report.facts["trainable"] == sum(p.numel() for p in peft.get_peft_model(tiny.model(), config).parameters() if p.requires_grad)


def test_rows_left_out_are_a_warning_with_their_number(workspace, base, chat_rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(chat_rows.read_text() + '{"messages": []}\n')
    report = studio.preflight(workspace, parse(tiny.tree(base, path)))
    assert report.can_start and "1 whose conversation is empty" in report.problems[0].sentence


def test_a_hub_base_is_named_as_one_that_will_be_fetched(workspace, chat_rows):
    report = studio.preflight(workspace, parse(tiny.tree("Qwen/Qwen3-0.6B", chat_rows)))
    assert report.can_start and "will be fetched from the Hub (about 1.2 GB)" in report.problems[0].sentence


def test_no_disk_is_said_before_the_start(workspace, base, chat_rows, monkeypatch):
    usage = preflight.shutil.disk_usage(workspace.root)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    report = studio.preflight(workspace, parse(tiny.tree(base, chat_rows)))
    assert not report.can_start and "has 10 MB free, and this needs about" in report.problems[-1].sentence


def test_lora_plus_with_a_high_base_rate_gets_a_suggestion(workspace, base, chat_rows):
    report = studio.preflight(workspace, parse(tiny.tree(base, chat_rows, optim={"lr": 0.01, "lora_plus_ratio": 16})))
    assert "Try optim.lr 0.0013" in report.problems[0].sentence
    assert studio.suggest_lr(2e-4) == 2.5e-5


@pytest.mark.parametrize("deep", [False, True])
def test_rows_longer_than_the_base_reads_are_a_warning_that_knows_the_room(workspace, base, tmp_path, deep):
    """tiny-llama reads 512 tokens. Virtual tokens take of that room."""
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "red fox?"}, {"role": "assistant", "content": "red fox " * 800}]}) + "\n" for _ in range(8)))

    def told(most: int, **method) -> list:
        tree = {**tiny.tree(base, path), "task": {"kind": "chat", "max_length": most}, "optim": {"lr": 0.02}, "validation": {"size": 0}}
        report = studio.preflight(workspace, parse({**tree, **({"method": method} if method else {})}), deep=deep)
        return [problem.sentence for problem in report.problems if problem.path == "task.max_length" and "at once" in problem.sentence]

    (longer,), (with_virtual,) = told(768), told(512, kind="prompt", tokens=20)
    assert told(512) == [] and "Set task.max_length to 512." in longer
    assert "532 tokens" in with_virtual and "Set task.max_length to 492." in with_virtual
    assert told(492, kind="prompt", tokens=20) == []


def test_lora_plus_on_pictures_suggests_a_smaller_ratio_and_a_rate_half_as_high(workspace):
    assert [studio.suggest_ratio(kind) for kind in ("chat", "text", "prompt_completion", "image")] == [16, 16, 16, 4]
    assert studio.suggest_lr(1e-4, "image") == 5e-5
    spec = parse({"base": {"id": "demo-image"}, "task": {"kind": "image", "resolution": 64}, "data": [{"path": "demo/stripes"}], "optim": {"lr": 0.01, "lora_plus_ratio": 16}})
    (told,) = (problem.sentence for problem in studio.preflight(workspace, spec).problems if problem.path == "optim.lr")
    assert "Try optim.lr 0.005, and the ratio 4 that is usual here." in told


def test_every_preset_survives_the_form():
    for preset in presets.available():
        values = studio.form_values(preset.name)
        values["data"] = values["data"] or [{"path": "x"}]
        spec = studio.spec_of_values(values)
        assert spec == parse({"data": [{"path": "x"}], **preset.tree()})
        assert studio.values_of(spec)["method.rank"] == values["method.rank"]


def test_a_setting_of_another_kind_is_left_out_of_the_form():
    values = studio.form_values("demo/pirate") | {"task.kind": "text", "task.overlength": "split"}
    assert studio.spec_of_values(values).task.kind == "text"


def test_uploads_are_kept_under_safe_names_and_never_overwritten(workspace, tmp_path):
    for name, content in (("rows.jsonl", "{}"), ("rows.jsonl", "[]"), ("../../evil name.jsonl", "{}"), ("rows.jsonl", "{}")):
        file = tmp_path / "upload"
        file.write_text(content)
        studio.upload(workspace, file, name)
    assert sorted(path.name for path in workspace.data.iterdir()) == ["evil-name.jsonl", "rows-2.jsonl", "rows.jsonl"]
    with pytest.raises(DataError, match="Convert it"):
        studio.upload(workspace, file, "weights.bin")


def test_the_archive_holds_the_adapter_and_nothing_else(workspace, tmp_path):
    folder = runs.create(workspace, parse({"name": "x/../y", "data": [{"path": "x"}]}))
    with pytest.raises(RunError, match="has no adapter yet"):
        studio.adapter_archive(workspace, folder.name, tmp_path)
    durable.publish_folder(folder / "adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    archive = studio.adapter_archive(workspace, folder.name, tmp_path)
    assert archive.parent == tmp_path
    assert zipfile.ZipFile(archive).namelist() == ["x-..-y/adapter_config.json", "x-..-y/adapter_model.safetensors"]


def test_relative_paths_are_found_wherever_the_worker_runs(base, chat_rows, monkeypatch):
    monkeypatch.chdir(chat_rows.parent)
    spec = studio.pinned(parse(tiny.tree("tiny", chat_rows.name)))
    assert spec.data[0].path == str(chat_rows)
    assert studio.pinned(studio.compose("demo/pirate")).data[0].path == "demo/pirate"
