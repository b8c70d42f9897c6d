"""Two visitors of a Space side by side: each signs in, trains, blends and publishes to their own account, and every limit is a sentence on the page."""

import re

import pytest
from playwright.sync_api import expect

from lora_studio import fence, workspace
from tests.browser import made
from tests.browser.conftest import Server, hub_environment
from tests.hosted.issuer import Issuer

pytestmark = [pytest.mark.browser]
PEOPLE, PATIENCE = ("ana", "ben"), 240_000


@pytest.fixture(scope="module")
def issuer(hub):
    """A provider whose tokens are accounts of the small Hub."""
    found = Issuer()
    for name in PEOPLE:
        token = "hf_" + name * 10
        found.account(name, token=token)
        hub.account(name, token=token)
    yield found
    found.close()


def studio(kind: str, issuer, home, hub, **more) -> Server:
    """`app.py` as a Space starts it."""
    found = Server(home, **hub_environment(hub, home), **more)
    found.environment |= issuer.environment(f"127.0.0.1:{found.port}") | {"LORA_STUDIO_OPEN": kind, "LORA_STUDIO_RUNS": "1", "LORA_STUDIO_STEPS": "30", "LORA_STUDIO_UPLOAD_GB": "0.001"}
    found.start()
    return found


@pytest.fixture(scope="module")
def server(chromium, hub, issuer, tmp_path_factory):
    found = studio("visitors", issuer, tmp_path_factory.mktemp("visited") / "home", hub)
    yield found
    found.end()


def enter(chromium, server, name: str, path: str = "/", **options):
    """A page of somebody who signed in through the provider, in a browser of their own."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(server.url)
    page.get_by_role("link", name="Sign in with Hugging Face").click()
    page.get_by_role("link", name=name, exact=True).click()
    if path != "/":
        page.goto(server.url + path)
    return page


def own(server, name: str) -> workspace.Workspace:
    with made.at(server.home):
        return workspace.of_visitor(f"id-of-{name}", name, fence.Limits())


def field(page, path: str):
    return page.locator(f"#field-{path.replace('.', '-')}").locator("input, textarea").first


def start(page, name: str, steps: int) -> None:
    expect(field(page, "name")).to_have_value("pirate")
    field(page, "name").fill(name)
    field(page, "schedule.steps").fill(str(steps))
    field(page, "schedule.steps").press("Tab")


@pytest.mark.slow
def test_two_visitors_train_blend_and_publish_each_to_their_own_account(chromium, server, hub):
    pages = {name: enter(chromium, server, name) for name in PEOPLE}
    for name, page in pages.items():
        page.bring_to_front()  # Gradio shows what came only as frames are drawn, and a page behind another draws none
        expect(page.locator("#whoami")).to_contain_text(name)
        start(page, f"{name}s own", 2)
        expect(page.locator("#problems")).to_contain_text("Ready to start.")
        page.get_by_role("button", name="Start training").click()
    for name, page in pages.items():
        other = next(one for one in PEOPLE if one != name)
        page.bring_to_front()
        expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true", timeout=PATIENCE)
        expect(page.locator("#run-tiles")).to_contain_text("done", timeout=PATIENCE)
        expect(page.locator("body")).to_contain_text(f"{name}s own")
        expect(page.locator("body")).not_to_contain_text(f"{other}s own")
        assert len(own(server, name).run_folders()) == 1
    for name, page in pages.items():
        page.bring_to_front()
        made_of(server, name)
        blend(page, server, name)
        publish(page, server, name)
    assert {id.partition("/")[0] for id in hub.repos} == set(PEOPLE)
    for page in pages.values():
        assert not page.wrong, page.wrong
        page.context.close()


def made_of(server, name: str) -> None:
    """Two adapters in a visitor's library, besides the one that they trained."""
    for number, what in enumerate(("one", "two")):
        made.adapter(own(server, name).root, f"{name} {what}", seed=number + 1)


def blend(page, server, name: str) -> None:
    """Blend two of their own; another's are not to be chosen."""
    page.goto(server.url + "/?tab=blend")
    for what in ("one", "two"):
        page.get_by_label("Adapters", exact=True).first.click()
        expect(page.get_by_role("option", name=re.compile("ana|ben"))).to_have_count(page.get_by_role("option", name=re.compile(name)).count())
        page.get_by_role("option", name=re.compile(f"{name} {what}")).first.click()
    page.keyboard.press("Escape")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 8.", timeout=PATIENCE)
    page.locator("#blend-name").locator("input, textarea").first.fill(f"{name} both")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-sentences")).to_contain_text(f"{name} both is in the library", timeout=PATIENCE)


def publish(page, server, name: str) -> None:
    """Push the newest adapter; the repository is suggested in their account, and no token is asked for."""
    page.goto(server.url + "/?tab=publish")
    expect(page.locator("#account")).to_contain_text(f"Signed in as {name}.", timeout=PATIENCE)
    box = page.locator("#repo").locator("input, textarea").first
    expect(box).to_have_value(re.compile(f"^{name}/"), timeout=PATIENCE)
    page.locator("button#publish").click()
    expect(page.locator("#published")).to_contain_text(f"/{name}/", timeout=PATIENCE)


def test_every_limit_is_a_sentence_on_the_page(chromium, server, tmp_path):
    page = enter(chromium, server, "ana")
    start(page, "too long", 31)
    expect(page.locator("#problems")).to_contain_text("This run would take 31 steps, and 30 is the most here.")
    rows = tmp_path / "large.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 60_000)
    page.locator("input[type=file]").first.set_input_files(str(rows))
    expect(page.locator("body")).to_contain_text("The upload has more than 1 MB, so it was not kept.")
    page.context.close()


def test_who_signs_out_is_out_and_nobody_sees_the_pages_without_signing_in(chromium, server):
    page = enter(chromium, server, "ben")
    page.locator("#whoami").get_by_role("link", name="Sign out").click()
    expect(page.get_by_role("link", name="Sign in with Hugging Face")).to_be_visible()
    page.goto(server.url + "/?tab=runs")
    expect(page.get_by_role("link", name="Sign in with Hugging Face")).to_be_visible()
    expect(page.get_by_role("tab")).to_have_count(0)
    page.context.close()


def test_a_stranger_in_the_owners_studio_is_told_so(chromium, hub, issuer, tmp_path):
    server = studio("owner", issuer, tmp_path / "home", hub, LORA_STUDIO_OWNERS="ana")
    try:
        page = enter(chromium, server, "ben")
        expect(page.locator("body")).to_contain_text("You are signed in as ben, who does not own it.")
        expect(page.get_by_role("link", name="Duplicate this Space")).to_be_visible()
        page.context.close()
        page = enter(chromium, server, "ana")
        expect(page.get_by_role("tab", name="Train")).to_be_visible()
        page.context.close()
    finally:
        server.end()
