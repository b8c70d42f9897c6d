"""Publishing and pulling with the real huggingface_hub client over HTTP: whole or a sentence, never a hang, never a leak."""

import base64
import contextlib
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from lora_studio import durable
from lora_studio import hub as studio_hub
from lora_studio.errors import HubError, MachineError, StudioError
from lora_studio.hub import client
from tests.hub import Hub

CARD = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-0.6B\n---\n# An adapter\n"
LAID = {"README.md": CARD}
# (route, which request of that route): every step of a publish into a new repository, in order.
STEPS = [("whoami", 1), ("validate", 1), ("info", 1), ("create", 1), ("info", 2), ("tree", 1), ("preupload", 1), ("batch", 1),
         ("put", 1), ("put", 2), ("verify", 1), ("validate", 2), ("commit", 1), ("info", 3), ("tree", 2)]  # fmt: skip
PASSING = [500, 503, (429, 1), "cut", "half", "lost", "silent", "html502"]
LASTING = [401, 403, 404, 409, 412, 507, (429, 3600), "flip", "html"]

PULL_FAULTS = [(503, 1), ("cut", 1), ("silent", 1), ("short", 1), ("flip", 1),
               (503, 99), ("cut", 99), ("silent", 99), ("short", 99), ("html", 99), (403, 99), (429, 99), ("flip", 99)]  # fmt: skip


def weights(size: int, metadata: dict | None = None) -> bytes:
    header = json.dumps({"__metadata__": metadata or {"format": "pt"}}).encode()
    return struct.pack("<Q", len(header)) + header + os.urandom(size)


@pytest.fixture
def adapter(tmp_path):
    """A folder like that of an adapter: two files of weights and its settings."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights(300_000))
    (folder / "more.safetensors").write_bytes(weights(100_000))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "Qwen/Qwen3-0.6B"}))
    (folder / durable.MARKER).write_text("{}")
    return folder


@pytest.fixture
def slept(monkeypatch, tmp_path):
    """The client in this process: no login, no Xet, short limits; what it would have slept."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(client, "SILENT_SECONDS", 5.0)
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01))
    waits = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=waits.append, time=time.time))
    return waits


@pytest.fixture
def served(slept, monkeypatch):
    """A fresh small Hub, spoken to by the client of this process."""
    found = Hub()
    found.account("me", token="hf_me", organizations=["team"])
    found.account("other", token="hf_other")
    found.account("me", token="hf_read", role="read")
    found.account("me", token="hf_old", expired=True)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
    yield found
    found.close()


def publish(folder, id="me/pirate", **more):
    return studio_hub.publish(folder, id, **{"token": "hf_me", "files": LAID, **more})


def local(folder) -> dict[str, bytes]:
    return {**{path.name: path.read_bytes() for path in folder.iterdir() if path.name != durable.MARKER}, "README.md": CARD.encode()}


def test_a_publish_is_one_commit_of_exactly_these_files_private_unless_asked(served, adapter):
    told = []
    done = publish(adapter, "pirate", report=told.append)
    repo = served.repos["me/pirate"]
    assert served.files("me/pirate") == local(adapter) and len(repo.commits) == 2 and repo.private and done.private
    assert done.url == f"{served.url}/me/pirate" and done.commit == repo.commits[-1][0] and len(done.sent) == 4
    assert told[0] == "signing in" and told[-1] == "reading the repository back"
    assert studio_hub.publish(adapter, "team/open", private=False, token="hf_me").private is False


def test_publishing_again_sends_nothing_and_a_change_sends_that_file_only(served, adapter):
    publish(adapter)
    served.calm()
    assert publish(adapter).sent == () and not served.received("put", "commit") and len(served.repos["me/pirate"].commits) == 2
    (adapter / "more.safetensors").write_bytes(weights(50_000))
    assert publish(adapter).sent == ("more.safetensors",)
    assert served.received("put") == (adapter / "more.safetensors").stat().st_size


@contextlib.contextmanager
def impatient(kind):
    """Short time limits where silence is what is tried."""
    before, client.SILENT_SECONDS = client.SILENT_SECONDS, 0.12 if kind == "silent" else client.SILENT_SECONDS
    try:
        yield
    finally:
        client.SILENT_SECONDS = before


def run_with_fault(served, adapter, step, kind, times):
    """A publish with a fault, then one without: what is promised of both."""
    route, nth = step
    kind, wait = kind if isinstance(kind, tuple) else (kind, None)
    served.fault(route, kind, times=times, nth=nth, wait=wait)
    begun, said = time.monotonic(), "published"
    try:
        with impatient(kind):
            done = publish(adapter)
        assert served.files("me/pirate") == local(adapter) and done.commit == served.repos["me/pirate"].commits[-1][0]
    except HubError as error:
        said = str(error)
        assert said.endswith(".") and "hf_me" not in said and "\n" not in said, said
    assert time.monotonic() - begun < 8
    repo = served.repos.get("me/pirate")
    assert repo is None or (repo.private and len(repo.commits) <= 2 and repo.commits[-1][2].keys() >= repo.commits[0][2].keys())
    there = served.objects.keys()
    missing = [item for item in studio_hub.plan(adapter) if item.path.endswith(".safetensors") and item.sha256 not in there]
    served.calm()
    assert publish(adapter).commit and served.files("me/pirate") == local(adapter)
    assert served.received("put") <= 1.05 * sum(item.size for item in missing)
    assert len(served.repos["me/pirate"].commits) == 2 and not any(note.authorized for note in served.seen if note.server == "storage")
    return said


@pytest.mark.parametrize("step", STEPS)
def test_a_passing_fault_at_any_step_is_survived(served, adapter, step):
    for kind in ("cut", "lost", "silent", 503):
        assert run_with_fault(served, adapter, step, kind, times=1) == "published", kind
        served.repos.clear(), served.objects.clear(), served.calm()


@pytest.mark.parametrize("step", STEPS)
def test_a_lasting_fault_at_any_step_is_a_sentence_and_the_next_attempt_sends_the_rest(served, adapter, step):
    words = {"cut": ("connection broke",), "silent": ("no sign",), 503: ("failed while",), 403: ("not allow", "may not write", "answered 403"), (429, 3600): ("60 minutes",)}
    for kind, expected in words.items():
        said = run_with_fault(served, adapter, step, kind, times=99)
        # With the bytes in the storage, the next round needs no verifying.
        assert any(word in said for word in expected) or (step[0] == "verify" and said == "published"), said
        served.repos.clear(), served.objects.clear(), served.calm()


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize("step", STEPS)
def test_every_fault_at_every_step_ends_in_success_or_a_sentence(served, adapter, step, times):
    for kind in PASSING + LASTING:
        said = run_with_fault(served, adapter, step, kind, times=times)
        assert said == "published" or times == 99 or kind in LASTING, (kind, said)
        served.repos.clear(), served.objects.clear(), served.calm()


def test_a_lost_answer_to_the_commit_is_noticed_by_looking(served, adapter):
    served.fault("commit", "lost")
    done = publish(adapter)
    assert len(served.repos["me/pirate"].commits) == 2 and sum(note.route == "commit" for note in served.seen) == 1
    assert done.commit == served.repos["me/pirate"].commits[-1][0]


def test_when_looking_fails_too_nobody_says_that_it_failed(served, adapter):
    served.fault("commit", "lost")
    served.fault("info", "cut", nth=3, times=99)
    with pytest.raises(HubError, match="may be published or not"):
        publish(adapter)


def test_a_file_the_hub_leaves_out_is_never_called_published(served, adapter):
    served.repo("me/pirate", private=True).ignored.add("adapter_config.json")
    with pytest.raises(HubError, match=r"adapter_config.json of me/pirate is not there.*\.gitignore"):
        publish(adapter)


def test_another_commit_at_the_same_moment_is_kept(served, adapter):
    repo, commit = served.repo("me/pirate", private=True), studio_hub.push._commit

    def after_someone(talk, additions, message, parent):
        if len(repo.commits) == 1:
            repo.commit("theirs", {**repo.commits[-1][2], "notes.md": b"theirs"})
        return commit(talk, additions, message, parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio_hub.push, "_commit", after_someone)
        publish(adapter)
    assert served.files("me/pirate") == {**local(adapter), "notes.md": b"theirs"} and len(repo.commits) == 3


def test_a_long_wait_is_said_at_once_and_a_short_one_is_kept(served, adapter, slept):
    served.fault("put", 429, wait=3600, times=99)
    begun = time.monotonic()
    with pytest.raises(HubError, match="about 60 minutes"):
        publish(adapter)
    assert time.monotonic() - begun < 3 and not slept
    served.calm()
    served.fault("create", 503, wait=1)
    begun = time.monotonic()
    publish(adapter, "me/second")
    assert 1 <= time.monotonic() - begun < 4


def test_a_hub_that_is_always_busy_with_another_repository_ends_in_a_sentence(served, adapter, monkeypatch):
    # huggingface_hub itself repeats this one for ever.
    from tests.hub.server import Handler, Refusal

    def busy(self, body):
        raise Refusal(409, "Cannot create repo: another conflicting operation is in progress")

    monkeypatch.setattr(Handler, "on_create", busy)
    with pytest.raises(HubError, match="failed while making the repository"):
        publish(adapter)
    assert sum(note.route == "create" for note in served.seen) == 3


@pytest.mark.parametrize(
    ("id", "more", "key", "words"),
    [
        ("other/theirs", {}, "hub.namespace", "me, team.*Publish as me/theirs"),
        ("team/x", {"token": "hf_read"}, "hub.namespace", "Publish as me/x"),
        ("me/x", {"token": "hf_read"}, "hub.read_token", "may only read"),
        ("me/x", {"token": "hf_old"}, "hub.bad_token", "expired"),
        ("me/x", {"token": "hf_nobody"}, "hub.bad_token", "hf auth login"),
        ("me/x", {"token": None}, "hub.no_token", "hf auth login"),
        ("me/x", {"files": {"README.md": "---\nlicense: null\n---\n"}}, "hub.card", "license"),
        ("me/x", {"files": {"README.md": "---\nbase_model: /data/llama\n---\n"}}, "hub.card", "base_model"),
        ("me/x", {"files": {"README.md": "---\na: [\n---\n"}}, "hub.card", "Invalid YAML"),
        ("me/public", {"private": True}, "hub.public", "you asked for private"),
        ("team/locked", {}, "hub.foreign", "may not write"),
        ("team/taken", {}, "hub.foreign", "Choose another name"),
    ],
)
def test_what_is_not_allowed_is_said_before_anything_is_there(served, adapter, monkeypatch, id, more, key, words):
    from tests.hub.server import Handler, Refusal

    served.repo("other/theirs")
    served.repo("me/public")
    served.repo("team/locked")
    find, create = Handler.find, Handler.on_create

    def locked(self, id, *, write=False, files=False):
        if id == "team/locked" and write:
            raise Refusal(403, "You need the write role in team")
        return find(self, id, write=write, files=files)

    def taken(self, body):
        if json.loads(body)["name"] == "taken":
            raise Refusal(409, "The name is taken", url="x")
        return create(self, body)

    monkeypatch.setattr(Handler, "find", locked)
    monkeypatch.setattr(Handler, "on_create", taken)
    before = {name: len(repo.commits) for name, repo in served.repos.items()}
    with pytest.raises(HubError, match=words) as caught:
        publish(adapter, id, **more)
    assert caught.value.key == key and {name: len(repo.commits) for name, repo in served.repos.items()} == before
    assert not served.objects and not served.repos["me/public"].private


def test_a_private_repository_stays_private_and_a_foreign_commit_stays(served, adapter):
    served.repo("me/x", {"notes.md": b"mine"}, private=True)
    assert publish(adapter, "me/x", private=False).private and served.repos["me/x"].private
    assert served.files("me/x")["notes.md"] == b"mine"


@pytest.mark.parametrize(
    ("id", "rule", "suggestion"),
    [
        ("", "a name is needed", "me/my-adapter"), ("~/x", "path", "me/x"), ("C:\\x\\y", "path", "me/y"), ("./x", "path", "me/x"),
        ("http://169.254.169.254/x", "address", "me/x"), ("file:x", "address", "me/file-x"), ("a/b/c", "more than one slash", "me/c"),
        ("me/na--me", "-- and ..", "me/na-me"), ("me/..", "-- and ..", "me/my-adapter"), ("me/.git", "begin or end", "me/git"), ("me/x.git", ".git", "me/x"),
        ("me/Käse Brötchen", "letters", "me/Kase-Brotchen"), ("me/a\nb", "line break", "me/a-b"), ("me/" + "x" * 97, "96", "me/" + "x" * 93),
        ("me/😀", "letters", "me/my-adapter"), ("/x", "path", "me/x"), ("me/", "empty", "me/my-adapter"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_allowed_gets_its_rule_and_one_that_is(id, rule, suggestion):
    with pytest.raises(HubError, match=rule.replace(".", r"\.")) as caught:
        studio_hub.check_id(id, owner="me")
    offered = str(caught.value).split("Try ")[1].removesuffix(".")
    assert offered == suggestion
    huggingface_hub.utils.validate_repo_id(offered)
    assert studio_hub.check_id(offered) == offered


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("README.md", "see hf_" + "a" * 34, "README.md holds a Hugging Face token .line 1"),
        ("notes.txt", "x\nsk-ant-api03-" + "aB" * 20, "a key of OpenAI or Anthropic .line 2"),
        ("adapter_config.json", '{"key": "AKIAABCDEFGHIJKLMNOP"}', "a key of AWS"),
        ("notes.md", "-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("notes.md", "https://me:secret@example.org/x", "an address with a password"),
        ("adapter_config.json", '{"base_model_name_or_path": "/data/models/llama"}', "the local path /data/models/llama"),
        ("adapter_config.json", '{"a": "/home/anna/models"}', "the local path /home/anna"),
        ("adapter_config.json", '{"a": "C:\\\\Users\\\\anna\\\\x"}', "the local path C:"),
        ("README.md", "made in HOME/runs/1", "the local path"),
        ("notes.txt", "the token is hf_me", "holds the token you are signed in with"),
        ("other.safetensors", weights(10, {"source": "/Users/anna/x"}), "other.safetensors holds the local path /Users/anna"),
        ("other.safetensors", weights(1_048_560) + b"hf_me" + bytes(99), "holds the token you are signed in with"),
        ("training_args.bin", b"x", "may be a pickle"),
        ("optimizer.pt", b"x", "may be a pickle"),
        ("train.jsonl", b"{}", "no part of an adapter"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "bytes",  # random ones would have another name in every process
)
def test_secrets_paths_and_pickles_are_found_before_anything_is_sent(served, adapter, home, name, content, words):
    text = content.replace("HOME", str(home)) if isinstance(content, str) else content
    with pytest.raises(HubError, match=words) as caught:
        publish(adapter, files={name: text})
    assert "a" * 34 not in str(caught.value) and not served.seen


def test_a_path_in_an_answer_about_paths_is_no_secret(served, adapter):
    publish(adapter, files={"README.md": CARD + "Asked: where is my home? It is /home/anna on Linux. Use https://example.org/home/x."})
    assert "me/pirate" in served.repos


def test_a_link_is_not_followed_and_an_empty_or_missing_folder_is_said(served, adapter, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (adapter / "link.json").symlink_to(tmp_path / "secret.json")
    for folder, words in ((adapter, "link"), (tmp_path / "hf-cache", "cannot be used"), (tmp_path, "no part of|no .safetensors|link")):
        with pytest.raises(HubError, match=words):
            publish(folder)
    assert not served.seen


def test_a_file_that_changes_while_it_goes_out_is_said(served, adapter, monkeypatch):
    check = studio_hub.push._check_unchanged

    def late(items):
        os.utime(adapter / "more.safetensors", (1, 1))
        check(items)

    monkeypatch.setattr(studio_hub.push, "_check_unchanged", late)
    with pytest.raises(HubError, match=r"more.safetensors cannot be used: it changed"):
        publish(adapter)
    assert len(served.repos["me/pirate"].commits) == 1


def test_offline_is_a_sentence(served, adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for action in (lambda: publish(adapter), lambda: studio_hub.pull("me/x", tmp_path / "out"), lambda: studio_hub.who("hf_me")):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            action()


def test_who_says_name_organizations_and_rights(served):
    account = studio_hub.who("hf_me")
    assert account == studio_hub.Account("me", ("team",), "write") and account.writes and not studio_hub.who("hf_read").writes


def test_a_pull_is_one_commit_whole_and_checked(served, adapter, tmp_path):
    first = publish(adapter).commit
    (adapter / "adapter_config.json").write_text('{"r": 16}')
    publish(adapter)
    served.calm()
    pulled = studio_hub.pull("me/pirate", tmp_path / "new", revision=first, token="hf_me")
    assert pulled.commit == first and json.loads((tmp_path / "new/adapter_config.json").read_text())["r"] == 8
    assert durable.damage(tmp_path / "new") is None
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted([*local(adapter), durable.MARKER])
    assert not any(note.authorized for note in served.seen if note.server == "storage")
    assert all(first in note.path for note in served.seen if note.route in ("tree", "head", "get"))


def test_a_pull_takes_adapter_files_only_and_never_a_pickle(served, tmp_path):
    extra = {"training_args.bin": b"x", "run.py": b"x", "other.md": b"x", ".hidden.json": b"{}", "manifest.json": b"{}", "sub/a.safetensors": weights(10)}
    served.repo("other/a", {"a.safetensors": weights(10), "adapter_config.json": b"{}", "chat_template.jinja": b"", **extra})
    assert set(studio_hub.pull("other/a", tmp_path / "a").files) == {"a.safetensors", "adapter_config.json", "chat_template.jinja"}
    assert studio_hub.pull("other/a", tmp_path / "sub", subfolder="sub").files == ("a.safetensors",)
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["a.safetensors", durable.MARKER]


@pytest.mark.parametrize(
    ("id", "token", "more", "key"),
    [
        ("other/missing", "hf_me", {}, "hub.missing"),
        ("other/missing", None, {}, "hub.missing"),
        ("other/secret", "hf_me", {}, "hub.missing"),
        ("other/gated", "hf_me", {}, "hub.gated"),
        ("other/a", "hf_old", {}, "hub.bad_token"),
        ("other/a", "hf_me", {"revision": "nosuch"}, "hub.no_revision"),
        ("other/pickled", None, {}, "hub.pickle"),
        ("other/empty", None, {}, "hub.no_weights"),
        ("other/odd", None, {}, "hub.bad_name"),
        ("other", None, {}, "hub.id"),
        ("../etc/passwd", None, {}, "hub.id"),
    ],
)
def test_a_pull_that_cannot_be_is_a_sentence_and_leaves_nothing(served, tmp_path, id, token, more, key):
    served.repo("other/a", {"a.safetensors": weights(10)})
    served.repo("other/secret", private=True)
    served.repo("other/gated", {"a.safetensors": weights(10)}, gated=True)
    served.repo("other/pickled", {"pytorch_model.bin": b"x"})
    served.repo("other/empty")
    served.repo("other/odd", {"a.safetensors": weights(10), "..\\x.json": b"{}"})
    with pytest.raises(HubError) as caught:
        studio_hub.pull(id, tmp_path / "out/new", token=token, **more)
    assert caught.value.key == key and not list((tmp_path / "out").glob("*") if (tmp_path / "out").is_dir() else [])


@pytest.mark.parametrize("route", ["info", "tree", "head", "get", "cdn"])
def test_a_fault_while_pulling_is_survived_or_a_sentence_and_never_half_a_folder(served, tmp_path, route):
    files = {"adapter_model.safetensors": weights(100_000), "adapter_config.json": b'{"r": 8}' * 50}
    served.repo("other/a", files)
    for number, (kind, times) in enumerate(PULL_FAULTS):
        served.fault(route, kind, times=times, wait=3600 if kind == 429 else None)
        target, begun = tmp_path / f"out/{number}", time.monotonic()
        try:
            with impatient(kind):
                studio_hub.pull("other/a", target)
            assert {path.name: path.read_bytes() for path in target.iterdir() if path.name != durable.MARKER} == files
        except StudioError as error:
            assert not target.exists() and str(error).endswith("."), error
            assert times == 99 or kind == "flip", (kind, error)
        assert time.monotonic() - begun < 12
        assert not [path.name for path in (tmp_path / "out").glob(".*")] if (tmp_path / "out").exists() else True
        served.calm()


def test_a_flipped_byte_is_found(served, tmp_path):
    served.repo("other/a", {"adapter_model.safetensors": weights(1000)})
    served.fault("cdn", "flip")
    with pytest.raises(HubError, match="other bytes than the Hub lists"):
        studio_hub.pull("other/a", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pull_onto_something_and_a_full_disk_are_said(served, tmp_path, monkeypatch):
    served.repo("other/a", {"adapter_model.safetensors": weights(1000)})
    (tmp_path / "there").mkdir()
    with pytest.raises(HubError, match="is there already"):
        studio_hub.pull("other/a", tmp_path / "there")
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(MachineError, match="needs about"):
        studio_hub.pull("other/a", tmp_path / "new")
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_meanwhile_is_said(served, tmp_path, monkeypatch):
    served.repo("other/a", {"adapter_model.safetensors": weights(1000)})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(MachineError, match="needs about"):
        studio_hub.pull("other/a", tmp_path / "out/new")
    assert not list((tmp_path / "out").iterdir())


CANARY = "hf_canaryQ7xZ3kP9vLmT2wRb8sYd5nHc4"
CHILD = """
import faulthandler, logging, os, sys, time
faulthandler.enable()
logging.basicConfig(level=logging.DEBUG, filename=os.path.join(os.environ["HOME"], "debug.log"))
from huggingface_hub.utils import logging as hub_logging
hub_logging.set_verbosity_debug()
from lora_studio import hub
from lora_studio.errors import HubError
from lora_studio.hub import client
client.SILENT_SECONDS, client.WAITS = (60.0 if sys.argv[1] == "killed" else 0.3), (0.01, 0.01)
token = sys.stdin.readline().strip()
print("ready", flush=True)
try:
    print(hub.who(token))
    print(hub.publish(sys.argv[2], "me/" + sys.argv[1], token=token, files={"README.md": "# x"}, report=print))
    print(hub.pull("me/" + sys.argv[1], sys.argv[2] + "-back", token=token))
except HubError as error:
    print(error.key, error, repr(error), vars(error))
if sys.argv[1] == "crash":
    client.huggingface_hub.HfApi = None
    hub.who(token)
"""


def forms(token: str) -> list[bytes]:
    """The token as it is, and as it may hide: encoded, backwards, or without its beginning."""
    raw = token.encode()
    coded = [base64.b64encode(b"x" * shift + raw)[4:-4] for shift in range(3)]
    return [raw, raw[3:], raw[::-1], quote(token).encode(), raw.hex().encode(), raw[:18], *coded]


def test_the_token_is_found_nowhere(adapter, tmp_path):
    hub = Hub()
    hub.account("me", token=CANARY)
    place = tmp_path / "all"
    (place / "tmp").mkdir(parents=True)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HOME": str(place), "TMPDIR": str(place / "tmp"),
                   "HF_HOME": str(place / "hf"), "LORA_STUDIO_HOME": str(place / "studio"), "HF_DEBUG": "1", "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    environment.pop("HF_TOKEN", None)
    said, watched = b"", b""
    cases = {"success": None, "refused": ("preupload", 401), "forbidden": ("commit", 403), "silent": ("batch", "silent"), "page": ("put", "html"),
             "killed": ("put", "silent"), "crash": None}  # fmt: skip
    try:
        for case, fault in cases.items():
            hub.calm()
            hub.objects.clear()
            hub.texts = [f"you sent {CANARY}"]
            if fault:
                hub.fault(*fault, times=99)
            command = [sys.executable, "-c", CHILD, case, str(adapter)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=place)
            child.stdin.write(CANARY.encode() + b"\n")
            child.stdin.flush()
            end = time.monotonic() + 30
            while case == "killed" and time.monotonic() < end and not any(note.route == "put" for note in hub.seen):
                time.sleep(0.02)
            for name in ("cmdline", "environ"):
                watched += Path(f"/proc/{child.pid}/{name}").read_bytes() if child.poll() is None else b""
            if case == "killed":
                child.send_signal(signal.SIGKILL)
            said += case.encode() + b": " + child.communicate(timeout=60)[0]
            assert (child.returncode == 0) == (case not in ("killed", "crash")), said
            if (adapter.parent / "adapter-back").exists():
                (adapter.parent / "adapter-back").rename(place / f"back-{case}")
            assert not any(note.authorized for note in hub.seen if note.server == "storage")
    finally:
        hub.close()
    assert len(hub.repos["me/killed"].commits) == 1 and hub.files("me/success").keys() == hub.files("me/crash").keys() != hub.files("me/killed").keys()
    assert b"Published(" in said and b"hub.bad_token" in said and b"hub.denied" in said and b"hub.silent" in said and b"Traceback" in said
    files = {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert any(name.endswith("debug.log") and b"me/success" in data for name, data in files.items())
    pushed = {f"{id} {path}": data for id, repo in hub.repos.items() for _, title, tree in repo.commits for path, data in {**tree, "title": title.encode()}.items()}
    everything = {"output": said, "proc": watched, **files, **pushed, **{f"object {oid}": data for oid, data in hub.objects.items()}}
    assert watched and not [(name, form) for name, data in everything.items() for form in forms(CANARY) if form in data]
