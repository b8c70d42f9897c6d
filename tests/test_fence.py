"""What a visitor may name: their own, what comes along, and what the owner allows; nothing else of the machine."""

import pytest

from lora_studio import bases, data, fence, library, runs, shelf, studio, visits, workspace
from lora_studio.errors import BaseModelError, DataError, HostError, StudioError
from lora_studio.fence import Limits
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.preflight import preflight
from lora_studio.spec import Base, parse

LIMITS = Limits(bases=("demo-text", "Qwen/*"), data=("good/*",), disk=2_000_000, upload=500_000, runs=2, steps=50)
PLACES = ["/etc", "/etc/passwd", "~", "..", "../..", ".", "/proc/self/environ", "file:///etc/passwd", "http://169.254.169.254/latest", "//etc/passwd"]


@pytest.fixture
def ana(home):
    """A visitor's workspace, with its owner being served."""
    found = workspace.of_visitor("id-of-ana", "ana", LIMITS)
    fence.watch(lambda: found)
    yield found
    fence.watch(lambda: None)


def test_a_folder_is_made_of_who_somebody_is_and_not_of_their_name(home):
    first, renamed, other = (workspace.of_visitor(subject, name, LIMITS) for subject, name in (("1", "../../etc"), ("1", "ana"), ("2", "ana")))
    assert first.root == renamed.root != other.root
    assert first.root.parent == home / "users" and first.root.name.isalnum()


@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_the_machine_is_a_base_or_rows(ana, place):
    with pytest.raises(BaseModelError):
        bases.inspect(Base(id=place))
    with pytest.raises(DataError) as caught:
        data.locate(place)
    assert caught.value.key == "data.missing"
    assert not preflight(ana, parse({"base": {"id": place}, "data": [{"path": "demo/pirate"}]})).can_start
    assert not preflight(ana, parse({"data": [{"path": place}]})).can_start


@pytest.mark.parametrize("place", [*PLACES, "lora_studio/demo"])
def test_no_place_of_the_machine_is_imported_or_gone_on_from(ana, place, monkeypatch):
    monkeypatch.setattr("lora_studio.shelf.pull", lambda *given, **more: (_ for _ in ()).throw(HostError("host.sign_in")))
    with pytest.raises(StudioError):
        shelf.import_adapter(ana, place)
    report = preflight(ana, parse({"data": [{"path": "demo/pirate"}], "method": {"start": place}, "schedule": {"steps": 1}}))
    assert any(problem.path == "method.start" for problem in report.problems if problem.level == "error")


def test_a_link_out_of_the_workspace_leads_nowhere(ana, tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "hidden"}\n')
    (ana.data / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError):
        data.locate(str(ana.data / "link.jsonl"))


def test_own_rows_and_what_comes_along_are_read(ana, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "mine"}\n')
    path = studio.upload(ana, tmp_path / "rows.jsonl", "rows.jsonl")
    assert data.locate(path).parent == ana.data
    assert preflight(ana, parse({"data": [{"path": "demo/pirate"}], "schedule": {"steps": 5}})).can_start


def test_bases_and_data_sets_are_those_the_owner_allows(ana):
    assert bases.locate(Base(id="demo-text")) and bases.locate(Base(id="Qwen/Qwen3-0.6B")) is None
    for id in ("demo-image", "someone/else"):
        with pytest.raises(BaseModelError) as caught:
            bases.locate(Base(id=id))
        assert caught.value.key == "base.not_allowed" and "Qwen/*" in str(caught.value)
    assert data.locate("good/rows") == "good/rows"
    with pytest.raises(DataError) as caught:
        data.locate("other/rows")
    assert caught.value.key == "data.not_allowed"


def test_the_owner_is_not_fenced_in(home, workspace, tmp_path):
    fence.watch(lambda: workspace)
    try:
        (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
        assert data.locate(str(tmp_path / "rows.jsonl")) == tmp_path / "rows.jsonl"
        assert bases.locate(Base(id="demo-image"))
    finally:
        fence.watch(lambda: None)


@pytest.mark.parametrize(("schedule", "path"), [({"steps": 51}, "schedule.steps"), ({"epochs": 100}, "schedule.epochs")])
def test_a_run_that_is_too_long_is_refused_before_it_starts(ana, schedule, path):
    report = preflight(ana, parse({"data": [{"path": "demo/pirate"}], "schedule": schedule}))
    assert [problem.path for problem in report.problems if "the most here" in problem.sentence] == [path]


def test_no_more_runs_wait_than_may(ana):
    spec = parse({"data": [{"path": "demo/pirate"}], "schedule": {"steps": 5}})
    for _ in range(LIMITS.runs):
        runs.note(runs.create(ana, spec), "queued")
    with pytest.raises(HostError) as caught:
        runs.create(ana, spec)
    assert caught.value.key == "host.runs" and not preflight(ana, spec).can_start


def test_a_full_workspace_takes_nothing_more(ana, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    (ana.data / "large.jsonl").write_bytes(b"\n" * (LIMITS.disk - 10))
    for take in (lambda: studio.upload(ana, tmp_path / "rows.jsonl", "more.jsonl"), lambda: runs.create(ana, parse({"data": [{"path": "demo/pirate"}]}))):
        (ana.data / "large.jsonl").write_bytes(b"\n" * (LIMITS.disk + 10))
        with pytest.raises(HostError) as caught:
            take()
        assert caught.value.key == "host.disk"
    assert not (ana.data / "more.jsonl").exists() and not ana.run_folders()


def test_an_overlong_run_is_asked_to_stop_and_save(ana):
    from lora_studio import durable

    folder = runs.create(ana, parse({"data": [{"path": "demo/pirate"}], "schedule": {"steps": 5}}))
    runs.note(folder, "launched", device="cpu")
    with durable.Lock(folder / "run.lock"):
        visits.end_overlong(LIMITS)
        assert runs.asked(folder, "stop") is None
        visits.end_overlong(Limits(seconds=-1))
        assert runs.asked(folder, "stop")["save"] is True


def test_the_machines_own_login_is_never_a_visitors(ana, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_" + "owner" * 6)
    with pytest.raises(StudioError) as caught:
        shelf.hub.who(shelf.own_token(ana, None))
    assert caught.value.key == "hub.no_token"


def test_a_pattern_of_bundled_bases_opens_no_folder_beside_them(home, monkeypatch, tmp_path):
    """The owner may allow demo-*; a visitor's demo-../.. is none of them."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text('{"model_type": "llama"}')
    found = workspace.of_visitor("id-of-ana", "ana", Limits(bases=("demo-*",)))
    monkeypatch.setattr(fence._watch, "asks", lambda: found)
    with pytest.raises(BaseModelError):
        bases.locate(Base(id=f"demo-{'../' * 20}{str(tmp_path)[1:]}/secret"))
    assert bases.locate(Base(id="demo-text")).is_dir()


@pytest.mark.parametrize("text", ["x/" * 3000, "a" * 300, "~no-such-person/rows.jsonl", "rows\0.jsonl", "\0", "9" * 5000])
def test_a_text_that_no_file_system_could_hold_is_a_sentence(home, workspace, text):
    """For the owner too, in every field that may name a place."""
    from lora_studio.adapters import assistant

    assert fence.place(text) is None
    for path, tree in (("data.0", {"data": [{"path": text}]}), ("base.id", {"base": {"id": text}}), ("method.start", {"method": {"start": text}})):
        report = preflight(workspace, parse({"data": [{"path": "demo/pirate"}], **tree}))
        assert any(problem.path.startswith(path.split(".")[0]) for problem in report.problems), path
    for act in (shelf.import_adapter, lambda workspace, text: assistant.locate(text, workspace)):
        with pytest.raises(StudioError):
            act(workspace, text)
    assert not bench.is_running(), "nobody has to wait for a process to be told that"


def test_a_run_goes_on_from_no_adapter_of_another(ana, tmp_path):
    """Not even a fact of its headers is told: what lies elsewhere is not there."""
    from lora_studio import continuing, durable
    from tests import tiny

    durable.publish_folder(tmp_path / "theirs", tiny.adapter_files(demo_base("demo-text"), seed=1, rank=64, size=0.05, ends=("q_proj",), name="demo-text"))
    told = continuing.problems(ana, parse({"data": [{"path": "demo/pirate"}], "method": {"start": str(tmp_path / "theirs"), "rank": 4}}), None)
    assert len(told) == 1 and "64" not in told[0].sentence.replace(str(tmp_path), "")


def test_whoever_works_for_a_visitor_is_fenced_in_as_they_are_and_only_then(ana, base):
    import threading

    told, theirs = fence.asker(), Base(id=str(base))
    assert told == {"root": str(ana.root), "bases": list(LIMITS.bases)}
    fence.watch(lambda: None)
    assert fence.asker() is None and bases.locate(theirs) == base
    elsewhere = []
    with fence.working_for(told):
        with pytest.raises(BaseModelError):
            bases.locate(theirs)
        assert fence.place(str(base)) is None and fence.place(str(ana.root)) == ana.root and bases.locate(Base(id="demo-text")).is_dir()
        thread = threading.Thread(target=lambda: elsewhere.append(bases.locate(theirs)))
        thread.start()
        thread.join()
    with fence.working_for(None):
        assert bases.locate(theirs) == base
    assert elsewhere == [base] and bases.locate(theirs) == base


@pytest.mark.parametrize("peft_type", ["LORA", "IA3"])
def test_the_base_that_an_uploaded_adapter_names_opens_no_folder_of_another(ana, with_bench, base, tmp_path, peft_type):
    """Its configuration is a visitor's word as much as what they type: no shape of that base is told, and none is taken from it."""
    from tests import tiny
    from tests.test_adapter_sides import CONFIGS, saved

    folder = tmp_path / "it"
    if peft_type == "IA3":
        saved(base, folder, CONFIGS["ia3"]())
    else:
        tiny.write_adapter(folder, demo_base("demo-text"), seed=1, name=str(base))
    if peft_type == "IA3":
        with pytest.raises(StudioError, match="does not say how wide its layers are"):
            shelf.import_files(ana, sorted(folder.iterdir()))
    else:
        assert library.card(ana, shelf.import_files(ana, sorted(folder.iterdir())))["base"] == str(base)
    fence.watch(lambda: None)  # the owner of the machine is told, and helped
    owner = workspace.local()
    if peft_type == "IA3":
        assert library.card(owner, shelf.import_files(owner, sorted(folder.iterdir())))["method"] == "ia3"
    else:
        with pytest.raises(StudioError, match="not that|shape|layers"):
            shelf.import_files(owner, sorted(folder.iterdir()))
