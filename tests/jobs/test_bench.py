"""The bench: one process for all, started on first use; it answers in turn, gives way to runs, and its death is a sentence."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import psutil
import pytest

from lora_studio import adapters, blend, durable, runs
from lora_studio.errors import AdapterError, BaseModelError, BenchError, BlendError
from lora_studio.home import demo_base
from lora_studio.jobs import bench, queue
from lora_studio.spec import parse
from lora_studio.workspace import local
from tests import tiny
from tests.browser import made
from tests.tiny import write_adapter

ASK = [{"role": "user", "content": "red fox?"}]
LONG = {"messages": ASK, "temperature": 3.0, "longest": 480, "seed": 5}


def wait_for(what, seconds=30.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def is_gone(pid):
    bench.status()
    return not psutil.pid_exists(pid)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home whose bench serves many tests."""
    folder = tmp_path_factory.mktemp("bench")
    yield folder
    with made.at(folder / "home"):
        bench.stop()


@pytest.fixture
def shared(place, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(place / "home"))


@pytest.fixture
def own(home):
    """The test's own home, whose bench is ended with it."""
    yield home
    bench.stop()


@pytest.fixture(scope="module")
def pair(place, base):
    return [write_adapter(place / "first", base, seed=1), write_adapter(place / "second", base, seed=2, rank=5, ends=("q_proj", "v_proj"))]


def said(base, **request):
    """The last event of an answer, its pieces put together and compared with what the bench says it said."""
    events = list(bench.stream("answer", base=str(base), device="cpu", **{"precision": "fp32", "messages": ASK, "longest": 24, "temperature": 1.0, **request}))
    done = events[-1]
    for side, told in done["sides"].items():
        assert "".join(event["text"] for event in events if event["event"] == "piece" and event["side"] == side) == told["text"]
    return done


def test_it_starts_on_first_use_and_only_once(shared, place):
    assert bench.status()["state"] == "off"
    pids, threads = [], [threading.Thread(target=lambda: pids.append(bench.ask("ping")["pid"])) for _ in range(3)]
    code = "from lora_studio.jobs import bench; import sys; print(bench.ask('ping')['pid'], 'torch' in sys.modules)"
    others = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [other.communicate(timeout=90)[0].split() for other in others]
    assert {*pids, *(int(pid) for pid, _ in answers)} == {pids[0]} and [loaded for _, loaded in answers] == ["False", "False"]
    folder = place / "home" / "bench"
    address = json.loads((folder / "socket.json").read_text())["socket"]
    assert stat.S_IMODE(os.stat(address).st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "log.txt").stat().st_mode) == 0o600 and os.getsid(pids[0]) == pids[0]


def test_base_adapter_and_blend_side_by_side_with_the_same_seed(shared, base, pair):
    sides = {"base": [], "adapter": [[pair[0], 1.0]], "blend": [[pair[0], 0.5], [pair[1], -1.0]]}
    done = said(base, sides=sides, seed=3, temperature=0.9)
    assert done["sides"]["base"]["active"] == [] and done["sides"]["blend"]["active"] == sides["blend"]
    for side, parts in sides.items():
        assert said(base, parts=parts, seed=3, temperature=0.9)["sides"]["answer"]["text"] == done["sides"][side]["text"]
    assert len({told["text"] for told in done["sides"].values()}) == 3
    assert said(base, parts=[[pair[0], 0.0]], seed=3, temperature=0.9)["sides"]["answer"] == {**done["sides"]["base"], "active": []}


def test_each_side_may_have_a_conversation_of_its_own(shared, base, pair):
    other = [*ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "green owl?"}]
    sides = {"base": [], "adapter": [[pair[0], 1.0]]}
    done = said(base, sides=sides, messages={"base": ASK, "adapter": other}, seed=3, temperature=0.9)
    assert done["sides"]["base"]["text"] == said(base, parts=[], messages=ASK, seed=3, temperature=0.9)["sides"]["answer"]["text"]
    assert done["sides"]["adapter"]["text"] == said(base, parts=sides["adapter"], messages=other, seed=3, temperature=0.9)["sides"]["answer"]["text"]
    for messages in ({"base": ASK}, {"base": ASK, "adapter": other, "third": ASK}, {}):
        with pytest.raises(BenchError, match="the sides are base, adapter"):
            said(base, sides=sides, messages=messages)
    with pytest.raises(BenchError, match="Write a message"):
        said(base, sides=sides, messages={"base": ASK, "adapter": []})


def test_an_adapter_of_another_base_of_the_same_shape_is_noted(shared, pair, tmp_path):
    other = tiny.write_base(tmp_path / "other", seed=9)
    events = list(bench.stream("answer", base=str(other), device="cpu", precision="fp32", messages=ASK, longest=2, parts=[[pair[0], 1.0]]))
    assert [event["sentence"] for event in events if event["event"] == "note"][1].startswith("first says it was made for")


def test_weights_change_the_next_answer_without_a_reload(shared, base, pair):
    before = said(base, parts=[[pair[0], 1.0]])
    after = said(base, parts=[[pair[0], -1.0]])
    print(f"tiny: weights applied in {after['apply_ms']:.2f} ms, first piece after {after['first_ms']:.1f} ms")
    assert after["loads"] == before["loads"] and after["apply_ms"] < 100
    assert after["sides"]["answer"]["text"] != before["sides"]["answer"]["text"]


def test_the_blend_that_is_written_answers_like_the_parts(shared, base, pair, tmp_path):
    parts = [[pair[0], 0.8], [pair[1], -0.6]]
    seen = bench.ask("preview", parts=parts)
    assert seen["rank"] == 8 and seen["losses"][-1] == 0 and len(seen["norms"]) == 2 and abs(seen["cosines"][0][1]) < 1
    started = time.perf_counter()
    other = bench.ask("preview", parts=[[pair[0], 0.1], [pair[1], 2.0]])
    print(f"preview of other weights in {1000 * (time.perf_counter() - started):.1f} ms")
    assert other["norms"] == seen["norms"] and other["losses"] != seen["losses"]
    exact = bench.ask("blend", parts=parts, rank=None, target=str(tmp_path / "exact"), files={"recipe.json": "{}"})
    assert exact["loss"] < 1e-6 and exact["rank"] == 8 and (tmp_path / "exact" / "recipe.json").read_text() == "{}"
    assert durable.damage(tmp_path / "exact") is None and [len(parent["sha256"]) for parent in exact["parents"]] == [64, 64]
    small = bench.ask("blend", parts=parts, rank=2, target=str(tmp_path / "small"))
    assert small["rank"] == 2 and small["loss"] == pytest.approx(seen["losses"][2], rel=1e-4)
    read = [adapters.read(path).modules for path in pair]
    meant = blend.stack(read, [0.8, -0.6])
    assert seen["cosines"][0][1] == pytest.approx(blend.cosines(read)[0][1], abs=1e-9) and seen["cosines"][1][1] == 1
    norm = sum(blend.norm(module) ** 2 for module in meant.values()) ** 0.5
    assert seen["norm"] == pytest.approx(norm, rel=1e-6)
    assert blend.difference(adapters.read(tmp_path / "small").modules, meant).overall == pytest.approx(small["loss"], rel=1e-4)
    live, written = (said(base, parts=rows)["sides"]["answer"]["text"] for rows in (parts, [[str(tmp_path / "exact"), 1.0]]))
    assert live == written
    with pytest.raises(BenchError, match="is there already"):
        bench.ask("blend", parts=parts, target=str(tmp_path / "small"))
    bench.ask("blend", parts=parts[:1], target=str(tmp_path / "small"), replace=True)
    assert adapters.inspect(tmp_path / "small").rank == 3


def test_check_names_what_is_wrong(shared, base, pair, tmp_path):
    right = bench.ask("check", path=pair[0], base=str(base))
    assert right["usable"] and right["problems"] == [] and right["card"]["rank"] == 3
    zero = tmp_path / "zero"
    write_adapter(zero, base, seed=1, size=0.0)
    assert "changes nothing" in bench.ask("check", path=str(zero))["problems"][0]["sentence"]
    other = tiny.write_base(tmp_path / "wide", hidden_size=64)
    wrong = bench.ask("check", path=pair[0], base=str(other))
    assert not wrong["usable"] and "but in" in wrong["problems"][0]["sentence"]
    assert "is not there" in bench.ask("check", path=str(tmp_path / "nothing"))["problems"][0]["sentence"]
    assert bench.ask("check", path=pair[0], base="owner/model")["problems"][0]["level"] == "note"


def test_errors_travel_with_class_key_and_sentence(shared, base, pair, tmp_path):
    with pytest.raises(AdapterError, match="is not there") as caught:
        bench.ask("preview", parts=[[str(tmp_path / "none"), 1.0]])
    assert caught.value.key == "adapter.missing"
    with pytest.raises(BaseModelError, match="no base model"):
        bench.ask("load", base="nope", device="cpu")
    with pytest.raises(BlendError, match="not a number from"):
        bench.ask("preview", parts=[[pair[0], float("nan")]])
    for verb, arguments in (("nonsense", {}), ("check", {}), ("preview", {"parts": []}), ("preview", {"parts": [["x"]]}), ("blend", {"parts": []})):
        with pytest.raises(BenchError):
            bench.ask(verb, **arguments)
    for wrong in ({"sides": [1]}, {"sides": {}}, {"temprature": 1.0}, {"template": "x"}, {"precision": "fp8"}, {"messages": [1]}, {"seed": -1}):
        with pytest.raises(BenchError) as caught:
            said(base, **wrong)
        assert caught.value.key in ("bench.request", "bench.setting", "bench.messages")
    with pytest.raises(BenchError, match="The bench failed at check: .*log.txt"):
        bench.ask("check", path=pair[0], config=7)
    assert "Traceback" in (bench.home() / "bench" / "log.txt").read_text()
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(json.loads((bench.home() / "bench" / "socket.json").read_text())["socket"])
        rude.sendall(b"not json\n")
    assert said(base)["sides"]["answer"]["tokens"] > 0


def test_who_has_an_answer_is_not_told_that_the_bench_is_busy(shared, pair):
    for _ in range(20):
        bench.ask("preview", parts=[[pair[0], 1.0]])
        assert bench.status()["doing"] == ""


def test_closing_the_stream_cancels_and_the_next_one_is_served(shared, base, pair):
    events = bench.stream("answer", base=str(base), device="cpu", precision="fp32", **LONG)
    assert next(event for event in events if event["event"] == "piece")["text"]
    assert bench.status()["doing"] == "answering"
    events.close()
    wait_for(lambda: bench.status()["doing"] == "", 5)
    assert said(base)["sides"]["answer"]["tokens"] > 0


def test_two_clients_at_once_are_both_answered(shared, base, pair):
    said(base)
    found, first = {}, bench.stream("answer", base=str(base), device="cpu", precision="fp32", **LONG)
    next(event for event in first if event["event"] == "piece")

    def second():
        found["second"] = said(base, parts=[[pair[0], 1.0]])

    other = threading.Thread(target=second)
    other.start()
    *_, last = first
    other.join(60)
    assert last["event"] == "done" and last["sides"]["answer"]["tokens"] > 100 and found["second"]["sides"]["answer"]["active"]


def test_the_model_gives_way_to_a_run_and_comes_back_after_it(shared, base):
    said(base)
    assert durable.is_locked(queue.device_lock("cpu"))
    folder = runs.create(local(), parse(tiny.tree(base, base / "rows.jsonl")))
    events = bench.stream("answer", base=str(base), device="cpu", precision="fp32", **LONG)
    next(event for event in events if event["event"] == "piece")
    assert not bench.make_room(folder, device="cuda:0") or durable.is_locked(queue.device_lock("cpu"))
    started = time.perf_counter()
    assert bench.make_room(folder, device="cpu")
    print(f"room made while answering in {1000 * (time.perf_counter() - started):.0f} ms")
    with pytest.raises(BenchError, match=f"The run {folder.name} needs the device") as caught:
        list(events)
    place, run = durable.Lock(queue.device_lock("cpu")), durable.Lock(folder / "run.lock")
    assert bench.status()["note"] == str(caught.value) and bench.status()["state"] == "empty"
    with pytest.raises(BenchError, match="is loaded again when it ends"):
        said(base)  # the run has not even started
    assert place.take() and run.take()
    runs.note(folder, "started", device="cpu")
    with pytest.raises(BenchError, match="is loaded again when it ends"):
        said(base)
    runs.note(folder, "done")
    ending = threading.Timer(0.5, lambda: (run.release(), place.release()))  # its process ends a moment after its last word
    ending.start()
    assert bench.status()["note"] == "" and said(base)["sides"]["answer"]["text"]


def test_a_device_in_use_is_a_sentence_that_names_the_run(shared, base):
    bench.ask("unload")
    folder = runs.create(local(), parse(tiny.tree(base, base / "rows.jsonl")))
    runs.set_card(folder, device="cpu")
    with durable.Lock(queue.device_lock("cpu")), durable.Lock(folder / "run.lock"), pytest.raises(BenchError, match=f"The run {folder.name} works on cpu"):
        said(base)
    assert said(base)["sides"]["answer"]["text"]
    bench.ask("unload", reason="the page was closed")
    assert not durable.is_locked(queue.device_lock("cpu"))


def test_a_bench_that_is_killed_or_hangs_is_a_sentence_and_the_next_request_starts_another(own, base, monkeypatch):
    def answering():
        events = bench.stream("answer", base=str(base), device="cpu", precision="fp32", **LONG)
        next(event for event in events if event["event"] == "piece")
        return events, bench.status()["pid"]

    events, pid = answering()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BenchError, match="ended before it had answered. Its last log line: answering"):
        list(events)
    assert bench.status()["state"] == "off" and not durable.is_locked(queue.device_lock("cpu"))

    events, second = answering()
    monkeypatch.setattr(bench, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(bench, "GREETING_SECONDS", 0.5)
    os.kill(second, signal.SIGSTOP)
    assert bench.make_room("20260101-000000-abcd", device="cpu", seconds=0.5) is False
    with pytest.raises(BenchError, match="gave no sign for 2 seconds while .*, so it was ended"):
        list(events)

    third = bench.ask("ping")["pid"]
    os.kill(third, signal.SIGSTOP)
    monkeypatch.setattr(bench, "START_SECONDS", 1.0)
    with pytest.raises(BenchError, match="gave no sign for 1 seconds while starting"):
        bench.ask("ping")
    assert bench.stop() is False and len({pid, second, third}) == 3
    wait_for(lambda: all(is_gone(each) for each in (pid, second, third)))


def test_it_ends_when_idle_though_somebody_looks_at_it(own, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_BENCH_IDLE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    long = tmp_path / ("deep" * 30) / "home"
    monkeypatch.setenv("LORA_STUDIO_HOME", str(long))
    pid = bench.ask("ping")["pid"]
    address = json.loads((long / "bench" / "socket.json").read_text())["socket"]
    assert len(address) < 108 and stat.S_IMODE(os.stat(os.path.dirname(address)).st_mode) == 0o700
    assert "HF_TOKEN" not in psutil.Process(pid).environ()
    wait_for(lambda: bench.status()["state"] == "off", 10)
    assert "without a request" in runs.last_line(long / "bench") and not os.path.exists(os.path.dirname(address))
    assert bench.stop() is False


def test_a_bench_that_cannot_live_is_a_sentence(own, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_BENCH_IDLE", "soon")
    with pytest.raises(BenchError, match="could not be started. Its last log line: ValueError"):
        bench.ask("ping")


def test_the_demo_takes_other_weights_within_a_tenth_of_a_second(shared, tmp_path):
    folder = demo_base("demo-text")
    if folder is None:
        pytest.skip("the demo base is not here")
    path = write_adapter(tmp_path / "demo", folder, seed=1, rank=8, size=0.05, ends=("q_proj", "v_proj", "up_proj"))
    first = said("demo-text", parts=[[path, 1.0]])
    done = said("demo-text", parts=[[path, 0.7]])
    print(f"demo-text: weights applied in {done['apply_ms']:.2f} ms, first piece after {done['first_ms']:.1f} ms")
    assert done["loads"] == first["loads"] and done["apply_ms"] < 100
