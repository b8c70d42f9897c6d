"""The README's pictures, taken of the real pages: `python -m tests.browser.pictures` trains the first demo and looks at it."""

import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"


def main() -> int:
    """Take all pictures: both pages, light and dark, and one on a phone."""
    from playwright.sync_api import sync_playwright

    from lora_studio import runs, workspace
    from tests.browser.conftest import CHROMIUM, FLAGS, Server

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as driver:
        server = Server(Path(place) / "home")
        server.start()
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(server.url)
            page.locator("#problems").get_by_text("Ready to start.").wait_for()
            page.get_by_role("button", name="Start training").click()
            page.locator("#run-tiles").get_by_text("done", exact=True).wait_for(timeout=300_000)
            folder = workspace.Workspace(server.home).run_folders()[0]
            assert runs.ended(folder) == "done"
            for name, width, scheme, path in PICTURES:
                take(browser, server.url + path, FOLDER / f"{name}.png", width, scheme)
        finally:
            browser.close()
            server.process.terminate()
            server.process.wait(20)
    return 0


PICTURES = [
    ("train-light", 1280, "light", "/?tab=train"),
    ("train-dark", 1280, "dark", "/?tab=train"),
    ("runs-light", 1280, "light", "/?tab=runs"),
    ("runs-dark", 1280, "dark", "/?tab=runs"),
    ("train-phone", 390, "light", "/?tab=train"),
    ("runs-phone", 390, "dark", "/?tab=runs"),
]


def take(browser, url: str, file: Path, width: int, scheme: str) -> None:
    """One picture of a whole page."""
    context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{url}&__theme={scheme}")
    page.get_by_role("tab", name="Train").wait_for()
    time.sleep(3)
    page.screenshot(path=file, full_page=True)
    context.close()


if __name__ == "__main__":
    sys.exit(main())
