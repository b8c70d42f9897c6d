"""A token that would be known anywhere goes through a visitor's studio: sign-in, publishing, every refusal, silence, and a crash in the middle
of a push, with every log as talkative as it gets. Afterwards it is looked for wherever something could be kept."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from lora_studio import hosting, library, workspace
from tests.browser import made
from tests.browser.conftest import Server, hub_environment, unfold
from tests.hosted.issuer import SCOPES, Issuer
from tests.hub import Hub
from tests.test_hub import forms

pytestmark = pytest.mark.browser

SIGNED, TYPED, SECRET = "hf_canaryM4vK8tQ2xZ7pLr9Wd5sYb3Nc", "hf_canaryT6nB1jH5fG9uEa2Rk7mVx4Cz", "canary-client-secret-83hd72hs"
# Python runs this first in every process of the studio: each library says all it can, and a request waits for a second only while
# there is a file called hurry.
TALKATIVE = """
import logging, os
logging.basicConfig(level=logging.DEBUG, filename=os.path.join(os.environ["CANARY_LOGS"], f"debug-{os.getpid()}.log"))
import httpx2
plain = httpx2.Client.build_request
def build_request(self, *given, **more):
    request = plain(self, *given, **more)
    if os.path.exists(os.path.join(os.environ["CANARY_LOGS"], "hurry")):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), 1.0)
    return request
httpx2.Client.build_request = build_request
"""


@pytest.fixture
def studio(chromium, tmp_path, monkeypatch):
    """A studio for visitors that speaks to a small Hub, with an adapter of one of them: (server, hub, logs, the visitor's workspace)."""
    hub, issuer, home, logs = Hub(), Issuer(secret=SECRET), tmp_path / "home", tmp_path / "logs"
    for token in (SIGNED, TYPED):
        hub.account("me", token=token)
    issuer.account("me", token=SIGNED, scopes=f"{SCOPES} write-collections")
    for folder in (logs, tmp_path / "tmp"):
        folder.mkdir()
    (logs / "sitecustomize.py").write_text(TALKATIVE)
    server = Server(home)
    server.environment.update(hub_environment(hub, home) | issuer.environment(f"127.0.0.1:{server.port}"))
    server.environment |= {
        "LORA_STUDIO_OPEN": "visitors", "GRADIO_DEBUG": "1", "HF_DEBUG": "1", "LOG_LEVEL": "debug", "PYTHONFAULTHANDLER": "1", "PYTHONASYNCIODEBUG": "1",
        "TMPDIR": str(tmp_path / "tmp"), "HOME": str(home.parent), "CANARY_LOGS": str(logs), "PYTHONPATH": str(logs),
    }  # fmt: skip
    monkeypatch.setenv("LORA_STUDIO_HOME", str(home))
    own = workspace.of_visitor("id-of-me", "me", hosting.of(server.environment, host="127.0.0.1").limits)
    made.adapter(own.root, "pirate", seed=1)
    server.start()
    yield server, hub, logs, own
    if server.process.poll() is None:
        server.end()
    with made.at(home) as bench:
        bench.stop()
    hub.close(), issuer.close()


@contextlib.contextmanager
def signed_in(chromium, server):
    """The page of somebody who signed in as `me`."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    page.get_by_text("Sign in with Hugging Face").click()
    page.get_by_role("link", name="me", exact=True).click()
    page.get_by_role("tab", name="Publish").click()
    try:
        yield page
    finally:
        context.close()


def publish(page, repo: str, words: str, *, where: str = "#publish-told") -> None:
    from playwright.sync_api import expect

    page.locator("#repo").locator("input, textarea").first.fill(repo)
    page.locator("button#publish").click()
    expect(page.locator(where)).to_contain_text(words, timeout=120_000)
    expect(page.locator("button#publish")).to_be_enabled()


def processes(place: Path) -> dict[str, bytes]:
    """The command line and the environment of every process of this studio: those that were told of its folder."""
    out = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            if str(place).encode() in environ and folder.name != str(os.getpid()):
                out[f"process {folder.name}"] = line + b"\n" + environ
    return out


def kept_in(page) -> str:
    """Everything that a browser keeps, and what stands on the page and in its configuration."""
    held = page.evaluate("""async () => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, await indexedDB.databases(), await caches.keys(),
        document.documentElement.outerHTML, await (await fetch('/config')).text()])""")
    return held + json.dumps(page.context.cookies())


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.slow
def test_a_visitors_token_is_found_nowhere(chromium, studio, tmp_path):
    server, hub, logs, own = studio
    from playwright.sync_api import expect

    hub.texts = [f"you sent {SIGNED} and {TYPED}"]
    places: dict[str, bytes] = {}
    with signed_in(chromium, server) as page:
        expect(page.locator("#account")).to_contain_text("Signed in as me.")
        publish(page, "me/signed", "read back and found whole", where="#published")
        for route, kind, words in (("whoami", 401, "wrong or has expired"), ("create", 403, "does not allow"), ("commit", 503, "not sent again"), ("validate", "html", "not the Hub")):
            hub.fault(route, kind, times=20)
            publish(page, f"me/canary-{route}", words)
            hub.calm()
        (logs / "hurry").touch()
        hub.fault("preupload", "silent", times=20)
        publish(page, "me/silent", "gave no sign")
        (logs / "hurry").unlink()
        hub.calm()
        unfold(page.get_by_text("Sign in", exact=True))
        page.locator("#token input").fill(TYPED)
        page.locator("#token input").press("Enter")
        publish(page, "me/typed", "read back and found whole", where="#published")
        page.get_by_role("tab", name="Library").click()
        unfold(page.get_by_text("Add an adapter"))
        page.locator("#import-source").locator("input, textarea").first.fill("me/signed")
        page.get_by_role("button", name="Check and add").click()
        expect(page.locator("#import-told")).to_contain_text("in the library", timeout=180_000)
        running = processes(tmp_path)
        assert len(running) >= 2, "the server and the bench"
        places |= running | {"the browser": kept_in(page).encode()}
        page.get_by_role("tab", name="Publish").click()
        hub.objects.clear()
        hub.fault("put", "silent", times=20)
        page.locator("#repo").locator("input, textarea").first.fill("me/crash")
        page.locator("button#publish").click()
        expect(page.locator("#publish-told")).to_contain_text("ploading")
        server.process.send_signal(signal.SIGABRT)
        server.process.wait(30)
    log = (tmp_path / "server.log").read_bytes()
    assert b"Fatal Python error: Aborted" in log
    places |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "sitecustomize.py"}
    places |= {f"{id} {name}": data for id, repo in hub.repos.items() for _, title, files in repo.commits for name, data in {**files, "title": title.encode()}.items()}
    places |= {f"object {oid}": data for oid, data in hub.objects.items()}
    told = b"".join(data for name, data in places.items() if "/logs/" in name)
    assert b"/oauth/token" in told and b"/api/whoami-v2" in told and len(library.find(own)) == 1 and "me/typed" in hub.repos
    wanted = [form for token in (SIGNED, TYPED) for form in forms(token)]
    # The studio's own secret stands in the environment that it was started with, and in no other place, nor in that of what it starts.
    found = [(name, form) for name, data in places.items() for form in wanted if form in data]
    found += [(name, SECRET) for name, data in places.items() if SECRET.encode() in data and name != f"process {server.process.pid}"]
    assert SECRET.encode() in places[f"process {server.process.pid}"], "looked for where it is"
    assert not found
