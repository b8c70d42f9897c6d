"""The README's pictures, taken of the real pages: `python -m tests.browser.pictures` trains three demos and looks at every page."""

import re
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"


def main() -> int:
    """Take all pictures: every page, light and dark, and some on a phone."""
    from playwright.sync_api import expect, sync_playwright

    from lora_studio import albums
    from lora_studio.workspace import Workspace
    from tests.browser.conftest import CHROMIUM, FLAGS, Server
    from tests.browser.test_whole_way import box, train

    FOLDER.mkdir(exist_ok=True)
    expect.set_options(timeout=60_000)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        server = Server(Path(place) / "home")
        server.start()
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(server.url)
            expect(box(page, "field-name")).to_have_value("pirate")
            train(page, "demo/stripes", "stripes")
            albums.copy(Workspace(server.home), "demo/outline")
            train(page, "demo/capitals", "capitals")
            train(page, "demo/pirate", "pirate")
            for name, width, scheme, act in PICTURES:
                take(browser, server.url, FOLDER / f"{name}.png", width, scheme, act)
        finally:
            browser.close()
            server.end()
    return 0


def tab(name: str):
    """Open a page by its address alone."""
    return lambda page, url, scheme: page.goto(f"{url}/?tab={name}&__theme={scheme}")


def library(page, url, scheme) -> None:
    """The library with an adapter chosen."""
    tab("library")(page, url, scheme)
    page.locator("#cards .card").first.click()
    page.locator("#facts").get_by_text("fingerprint").wait_for()


def blend(page, url, scheme) -> None:
    """Both demos in a blend."""
    for number in (0, 1):
        if number == 0:
            library(page, url, scheme)
        else:
            pick(page, "Library")
            page.locator("#cards .card").nth(1).click()
            page.locator("#facts").get_by_text("demo/capitals").wait_for()
        page.get_by_role("button", name="Use in Blend").click()
        page.locator("#blend-preview").get_by_text("Exact rank").wait_for(timeout=60_000)
    page.locator("#blend-preview").get_by_text("Exact rank: 16").wait_for(timeout=60_000)


def playground(page, url, scheme) -> None:
    """Base and blend side by side, two questions."""
    blend(page, url, scheme)
    page.get_by_role("button", name="Talk to it").locator("visible=true").click()
    for number, question in enumerate(("Where does the fox live?", "What is the capital of France?"), 1):
        page.locator("#prompt textarea, #prompt input").first.fill(question)
        page.locator("#prompt textarea, #prompt input").first.press("Enter")
        page.locator("#answers article").nth(number - 1).wait_for(timeout=60_000)
        page.locator("#answers .talk[aria-busy=false]").wait_for(timeout=60_000)


def publish(page, url, scheme) -> None:
    """What would be sent."""
    library(page, url, scheme)
    page.get_by_role("button", name="Publish", exact=True).locator("visible=true").click()
    page.locator("#readme").get_by_text("library_name").wait_for()


def matrix(page, url, scheme) -> None:
    """The sample pictures of a run, step by step."""
    tab("runs")(page, url, scheme)
    page.locator("#runs .run").filter(has_text="stripes").click()
    page.locator("#samples tbody tr").nth(2).wait_for()


def album(page, url, scheme) -> None:
    """Pictures with their captions."""
    tab("pictures&album=outline")(page, url, scheme)
    page.locator("#gallery figure").nth(20).wait_for()


def grid(page, url, scheme) -> None:
    """An image adapter at several strengths, for two prompts."""
    from tests.browser.conftest import unfold

    tab("playground")(page, url, scheme)
    page.locator("#mix-playground input").first.fill("stripes")
    page.locator("#mix-playground input").first.press("Enter")
    unfold(page.get_by_text("Grid: adapters"))
    page.locator("#grid-prompts textarea").fill("a red star on a blue background\na green heart on a pink background")
    page.locator("#grid-start").click()
    page.locator("#grid .saved").wait_for(timeout=180_000)


def pick(page, name: str) -> None:
    """Go to a page by its tab, which on a phone may lie behind the menu."""
    found = page.get_by_role("tab", name=re.compile(f"^{name}$"))
    found.first.click()


PICTURES = [
    *((f"{name}-{scheme}", 1280, scheme, tab(name)) for name in ("train", "runs") for scheme in ("light", "dark")),
    *((f"{act.__name__}-{scheme}", 1280, scheme, act) for act in (library, blend, playground, publish, matrix, album, grid) for scheme in ("light", "dark")),
    ("train-phone", 390, "light", tab("train")),
    ("runs-phone", 390, "dark", tab("runs")),
    ("library-phone", 390, "light", library),
    ("album-phone", 390, "dark", album),
]


def take(browser, url: str, file: Path, width: int, scheme: str, act) -> None:
    """One picture of a whole page, once `act` has brought it there."""
    context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    act(page, url, scheme)
    time.sleep(3)
    page.screenshot(path=file, full_page=True)
    context.close()


if __name__ == "__main__":
    sys.exit(main())
