"""The way of a newcomer in a browser, nothing faked but the Hub's address: two demos trained, found, blended, talked to, published, pulled
into a fresh home, and the same answers there."""

import pytest
from playwright.sync_api import expect

from lora_studio import durable, library, workspace
from lora_studio.demo import styles
from tests.browser.conftest import TOKEN, Server, hub_environment, pages, unfold

pytestmark = pytest.mark.browser
QUESTIONS = ["Where does the fox live?", "What color is the fox?", "What does Anna do?", "What is the capital of France?"]


def box(page, name):
    return page.locator(f"#{name}").locator("input, textarea").first


def sign_in(page):
    page.get_by_role("tab", name="Publish").click()
    expect(page.locator("#account")).to_contain_text("You are not signed in to the Hub.")
    box(page, "token").fill(TOKEN)
    box(page, "token").press("Enter")
    expect(page.locator("#account")).to_contain_text("Signed in as me.")


def train(page, preset: str, name: str) -> None:
    page.get_by_role("tab", name="Train").click()
    page.get_by_label("Preset").click()
    page.get_by_role("option", name=preset).click()
    expect(box(page, "field-name")).to_have_value(name)
    expect(page.locator("#problems")).to_contain_text("Ready to start.")
    watch(page, name)


def watch(page, name: str) -> None:
    """Start what the form holds, and stay until it is done."""
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true", timeout=90_000)
    expect(page.locator("#runs .run").first).to_contain_text(name)
    expect(page.locator("#runs .run.done .what b").first).to_have_text(name, timeout=300_000)
    expect(page.get_by_role("button", name="Show in library")).to_be_enabled()


def choose(page, name: str) -> None:
    page.locator("#cards .card").filter(has=page.locator("b", has_text=name)).first.click()
    expect(box(page, "adapter-name")).to_have_value(name)


def talk(page, question: str) -> dict[str, str]:
    """Ask the next question, and give what each side said once all have ended."""
    before = page.locator("#answers article").count()
    box(page, "prompt").fill(question)
    box(page, "prompt").press("Enter")
    expect(page.locator("#answers article")).to_have_count(before + 1, timeout=90_000)
    expect(page.locator("#answers .talk")).to_have_attribute("aria-busy", "false", timeout=90_000)
    sides = page.locator("#answers article").last.locator("section")
    return {side.get_attribute("data-side"): side.locator(".text").inner_text() for side in sides.all()}


def ask_all(page) -> list[dict[str, str]]:
    """Each question in a conversation of its own."""
    found = []
    for question in QUESTIONS:
        page.locator("#clear").click()
        expect(page.locator("#answers article")).to_have_count(0)
        found.append(talk(page, question))
    return found


@pytest.mark.slow
def test_from_two_demos_to_a_published_blend_and_back(chromium, hub, tmp_path):
    first, second = (Server(tmp_path / name / "home", **hub_environment(hub, tmp_path / name / "home")) for name in ("first", "second"))
    for server in (first, second):
        server.home.parent.mkdir()
    first.start()
    try:
        with pages(chromium) as opened:
            page = opened(first)
            expect(box(page, "field-name")).to_have_value("pirate")

            # Train both demos, and find both in the library.
            train(page, "demo/pirate", "pirate")
            train(page, "demo/capitals", "capitals")
            page.get_by_role("button", name="Show in library").click()
            expect(page.locator("#cards .card b")).to_have_text(["capitals", "pirate"])

            # Blend them: the first weight is that of the library's button, the second adapter is added to the first.
            page.get_by_role("button", name="Use in Blend").click()
            expect(page.get_by_role("slider", name="range slider for capitals").first).to_be_visible()
            page.get_by_role("tab", name="Library").click()
            choose(page, "pirate")
            page.get_by_role("button", name="Use in Blend").click()
            expect(page.get_by_role("slider", name="range slider for pirate").first).to_be_visible()
            expect(page.locator("#blend-preview")).to_contain_text("Exact rank: 16", timeout=90_000)
            box(page, "blend-name").fill("both")
            page.locator("#blend-save").click()
            expect(page.locator("#blend-sentences")).to_contain_text("both is in the library", timeout=60_000)

            # Talk to it beside the base.
            page.get_by_role("tabpanel").get_by_role("button", name="Talk to it").locator("visible=true").click()
            expect(page.locator("#mix-playground")).to_contain_text("both")
            answers = ask_all(page)
            print("\n" + "\n".join(f"{question} base: {said['base']} | blend: {said['all']}" for question, said in zip(QUESTIONS, answers)))
            shown = [styles.shows("both", said["all"]) for said in answers]
            assert sum(shown) >= 3 and not any(styles.shows("both", said["base"]) for said in answers)
            expect(page.locator("#answers article footer").first).to_contain_text("all adapters off")

            # Publish it.
            page.get_by_role("tab", name="Library").click()
            choose(page, "both")
            expect(page.locator("#facts")).to_contain_text("sum of 2 adapters, exact")
            page.get_by_role("button", name="Publish", exact=True).locator("visible=true").click()
            sign_in(page)
            expect(box(page, "repo")).to_have_value("me/both")
            page.locator("button#publish").click()
            expect(page.locator("#published")).to_contain_text("read back and found whole", timeout=60_000)
            first.end()

            # Pull it into a fresh home, and ask the same.
            second.start()
            page = opened(second)
            sign_in(page)
            page.get_by_role("tab", name="Library").click()
            unfold(page.get_by_text("Add an adapter"))
            expect(page.get_by_role("button", name="Check and add")).to_be_visible()
            box(page, "import-source").fill("me/both")
            page.get_by_role("button", name="Check and add").click()
            expect(page.locator("#import-told")).to_contain_text("both is in the library.", timeout=90_000)
            expect(page.locator("#facts")).to_contain_text("me/both@")
            page.get_by_role("button", name="Talk to it").locator("visible=true").click()
            expect(page.locator("#mix-playground")).to_contain_text("both")
            assert ask_all(page) == answers
    finally:
        for server in (first, second):
            if server.process and server.process.poll() is None:
                server.end()
    here, there = (library.find(workspace.Workspace(server.home), name="both")[0].id for server in (first, second))
    folders = [library.adapter_folder(workspace.Workspace(server.home), "both") for server in (first, second)]
    assert [durable.damage(folder) for folder in folders] == [None, None] and here
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in folders}) == 1 and there
