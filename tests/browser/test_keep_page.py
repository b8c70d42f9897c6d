"""Keeping work, as a visitor does it: they say so on the page, the server is killed and its disk is lost, they sign in again and all is there.
Nobody else sees it, and the token is in no file."""

import shutil

import pytest
from playwright.sync_api import expect

from lora_studio import keeping, library
from tests.browser import made
from tests.browser.test_visitors import enter, own, studio
from tests.hosted.issuer import Issuer
from tests.hub.server import Hub

pytestmark = [pytest.mark.browser]
PEOPLE, PATIENCE = ("ana", "ben"), 60_000
TOKENS = {name: f"hf_{name}canaryM4vK8tQ2xZ7pLr9" for name in PEOPLE}


@pytest.fixture
def place(chromium, tmp_path):
    """A studio for visitors with a Hub: (server, hub)."""
    issuer, hub = Issuer(), Hub()
    for name, token in TOKENS.items():
        issuer.account(name, token=token)
        hub.account(name, token=token)
    (tmp_path / "served").mkdir()
    server = studio("visitors", issuer, tmp_path / "served" / "home", hub)
    yield server, hub
    server.end()
    hub.close(), issuer.close()


def test_a_visitor_keeps_their_work_and_finds_it_again_when_the_disk_was_lost(chromium, place, tmp_path):
    server, hub = place
    id = made.adapter(own(server, "ana").root, "a pirate", seed=1)
    page = enter(chromium, server, "ana")
    expect(page.locator("#whoami")).to_contain_text("files go when this Space sleeps or restarts. Keep your work (below)")
    page.get_by_role("button", name="Keep my work in a private repository of mine").click()
    expect(page.locator("#keep")).to_contain_text(keeping.NAME)
    assert not hub.repos, "nothing is sent before they say so"
    page.locator("#keep-work").click()
    expect(page.locator("#kept")).to_contain_text(f"Kept in ana/{keeping.NAME}, which only you see", timeout=PATIENCE)
    expect(page.locator("#whoami")).not_to_contain_text("files go")
    assert hub.repos[f"ana/{keeping.NAME}"].private and list(hub.repos) == [f"ana/{keeping.NAME}"]
    assert not page.wrong, page.wrong
    page.context.close()
    server.kill()
    shutil.rmtree(server.home)
    server.start()
    stranger = enter(chromium, server, "ben", "/?tab=library")
    expect(stranger.locator("#whoami")).to_contain_text("ben")
    expect(stranger.locator("#kept")).not_to_contain_text("Looking")
    page = enter(chromium, server, "ana")
    expect(page.locator("#kept")).to_contain_text(f"files were brought back from ana/{keeping.NAME}.", timeout=PATIENCE)
    with made.at(server.home):
        assert library.card(own(server, "ana"), id)["name"] == "a pirate"
    page.get_by_role("link", name="Show what came back").click()
    page.get_by_role("tab", name="Library").click()
    expect(page.locator("#cards")).to_contain_text("a pirate")
    stranger.reload()
    stranger.get_by_role("tab", name="Library").click()
    expect(stranger.locator("#cards")).not_to_contain_text("a pirate")
    assert not own(server, "ben").run_folders() and not list((own(server, "ben").root / "library").glob("*/card.json"))
    page.bring_to_front()
    page.goto(server.url)
    page.get_by_role("button", name="Keep my work in a private repository of mine").click()
    page.locator("#keep-stop").click()
    expect(page.locator("#kept")).to_contain_text("Nothing is sent from now on.")
    assert not page.wrong and not stranger.wrong
    for one in (page, stranger):
        one.context.close()
    found = [path for path in tmp_path.rglob("*") if path.is_file() and any(token.encode() in path.read_bytes() for token in TOKENS.values())]
    assert not found
