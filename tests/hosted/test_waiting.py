"""A visitor's run that has to fetch its base: with a token that was revoked it waits, says so, and starts once its owner has signed in again."""

import time

import pytest

from lora_studio import fence, runs, studio, visits, workspace
from lora_studio.fence import Limits
from lora_studio.home import demo_base
from lora_studio.jobs import local, queue, tokens
from lora_studio.spec import parse
from tests.hub.server import Hub

LIMITS = Limits(bases=("demo-text", "team/*"))
NEW, REVOKED = "hf_" + "n" * 30, "hf_" + "r" * 30
SIGN_IN = "Sign in again, and it starts by itself."


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A small Hub with a private base that only ana's new token opens; the workers speak to it."""
    found = Hub()
    found.account("team", token=NEW)
    found.repo("team/tiny", {path.name: path.read_bytes() for path in demo_base("demo-text").iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}, private=True)
    for name, value in {"HF_ENDPOINT": found.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


def until(true, folder, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (folder / "log.txt").read_text()[-2000:]
        time.sleep(0.1)


def test_a_run_with_a_revoked_token_waits_and_starts_after_signing_in_again(hub, home):
    ana = workspace.of_visitor("id-of-ana", "ana", LIMITS)
    spec = parse({"base": {"id": "team/tiny"}, "data": [{"path": "demo/pirate"}], "schedule": {"steps": 2, "batch_size": 2}, "method": {"rank": 2}})
    fence.watch(lambda: ana)
    needs = visits.needs_token(ana, spec)
    fence.watch(lambda: None)
    folder = runs.create(ana, spec)
    runs.set_card(folder, needs_token=needs)
    queue.add(ana, folder, device="cpu")
    try:
        assert needs and queue.pump() == [] and SIGN_IN in studio.show(ana, folder.name).reason  # nobody is signed in
        assert not hub.seen

        tokens.lend(ana.root, REVOKED, until=time.time() + 600)
        assert queue.pump() == [folder.name]
        until(lambda: not local.processes(folder) and runs.is_waiting(folder), folder)
        assert any(request.authorized for request in hub.seen) and SIGN_IN in studio.show(ana, folder.name).reason
        assert studio.show(ana, folder.name).state == "queued" and not (folder / "adapter").exists()

        tokens.lend(ana.root, REVOKED, until=time.time() + 600)  # every request lends it: the refused one is not tried again
        assert queue.pump() == []

        tokens.lend(ana.root, NEW, until=time.time() + 600)
        assert queue.pump() == [folder.name]
        until(lambda: runs.ended(folder) is not None, folder, 300)
        assert studio.show(ana, folder.name).state == "done" and (folder / "adapter").is_dir()
    finally:
        tokens.take_back(ana.root)
        local.end(folder)
    for path in home.parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert REVOKED.encode() not in content and NEW.encode() not in content, path


def test_who_signs_out_takes_their_token_from_what_waits(home):
    ana = workspace.of_visitor("id-of-ana", "ana", LIMITS)
    folder = ana.runs / "20260101-000000-abcd"
    tokens.lend(ana.root, NEW, until=time.time() + 600)
    assert tokens.of(folder) == NEW and tokens.of(folder, after=time.time() + 1) is None
    tokens.take_back(ana.root)
    assert tokens.of(folder) is None
    tokens.lend(ana.root, NEW, until=time.time() - 1)
    assert tokens.of(folder) is None
