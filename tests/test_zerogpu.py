"""Where a GPU is lent to calls only: the same requests have the same answers, an error is a sentence, and nothing is left loaded."""

import subprocess
import sys
import textwrap

import pytest

from lora_studio import errors, zerogpu
from lora_studio.home import demo_base
from lora_studio.jobs import bench, devices
from tests import tiny

ASK = [{"role": "user", "content": "What is a lighthouse?"}]
REQUEST = {"base": "demo-text", "messages": ASK, "sides": {"base": []}, "seed": 3, "longest": 24, "temperature": 1.0}


def events(verb: str, **arguments) -> list[dict]:
    return list(zerogpu.events(verb, arguments, devices.device_lock("cuda:0")))


@pytest.fixture
def adapter(home, tmp_path):
    """A folder with an adapter of the bundled base that changes what it says."""
    home.mkdir(exist_ok=True)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in tiny.adapter_files(
        demo_base("demo-text"), seed=4, rank=2, size=0.3, ends=("q_proj", "v_proj"), name="demo-text"
    ).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def resident(home):
    """The bench's process, ended afterwards."""
    yield bench
    bench.stop()


def test_an_answer_is_that_of_the_bench(adapter, resident):
    """Greedy or drawn, with an adapter or without: the same text, in the same pieces."""
    for wish in ({"sides": {"base": [], "tuned": [[str(adapter), 1.0]]}}, {"temperature": 0.0}):
        request = {**REQUEST, **wish}
        lent = events("answer", **request)
        told = list(resident.stream("answer", device="cpu", lock=str(devices.device_lock("cpu")), **request))
        assert lent[-1]["event"] == told[-1]["event"] == "done"
        for side in request["sides"]:
            assert lent[-1]["sides"][side] == told[-1]["sides"][side]
            assert "".join(one["text"] for one in lent if one["event"] == "piece" and one["side"] == side).strip()
        assert [one for one in lent if one["event"] == "piece"] == [one for one in told if one["event"] == "piece"]
    texts = lent[-1]["sides"]
    assert all(one["tokens"] for one in texts.values())


@pytest.mark.parametrize(
    ("verb", "changes", "key", "words"),
    [
        ("answer", {"base": "demo-none"}, "", "demo-none"),
        ("answer", {"sides": {"tuned": [["/nowhere", 1.0]]}}, "", "nowhere"),
        ("answer", {"template": "strange"}, "bench.setting", "template"),
        ("draw", {"prompt": "a red circle", "target": "/tmp/x", "messages": None}, "", ""),
    ],
)
def test_an_error_is_a_sentence(home, verb, changes, key, words):
    """As the bench tells it: what, where, what next, and never a traceback."""
    home.mkdir(exist_ok=True)
    request = {name: value for name, value in {**REQUEST, **changes}.items() if value is not None}
    told = events(verb, **request)
    assert [one["event"] for one in told][-1] == "error" and sum(one["event"] == "error" for one in told) == 1
    assert words in told[-1]["sentence"] and told[-1]["sentence"].endswith(".") and "Traceback" not in told[-1]["sentence"]
    assert not key or told[-1]["error"] == key
    assert issubclass(getattr(errors, told[-1]["kind"]), errors.StudioError)


def test_the_device_is_free_after_a_call(home):
    from lora_studio import durable

    home.mkdir(exist_ok=True)
    events("answer", **REQUEST)
    events("answer", **{**REQUEST, "base": "demo-none"})
    assert not durable.is_locked(devices.device_lock("cuda:0"))


def test_carried_verbs_go_there_and_others_to_the_bench(home):
    """In a process of its own, as the server: `spaces` marks the function, carried verbs run in it, and no bench is started for them."""
    home.mkdir(exist_ok=True)
    code = """
        import types
        from lora_studio import zerogpu
        from lora_studio.errors import StudioError
        from lora_studio.jobs import bench, devices
        marked = []
        def GPU(duration):
            def mark(function):
                marked.append((function.__name__, duration))
                return function
            return mark
        bench.carry(zerogpu.VERBS, zerogpu.serve(types.SimpleNamespace(GPU=GPU), devices.device_lock("cuda:0")))
        asked = dict(base="demo-text", messages=[{"role": "user", "content": "hi"}], sides={"base": []}, longest=4, device="auto", lock="x")
        done = list(bench.stream("answer", **asked))[-1]
        assert done["event"] == "done" and done["sides"]["base"]["tokens"], done
        try:
            bench.ask("answer", **{**asked, "base": "demo-none"})
        except StudioError as error:
            assert "demo-none" in str(error), error
        else:
            raise AssertionError("an unknown base was answered")
        assert marked == [("on_gpu", zerogpu.SECONDS)] and not bench.is_running()
        assert set(zerogpu.VERBS) == {"answer", "draw", "preview"}
        print("fine")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout.strip().endswith("fine"), done.stdout + done.stderr
