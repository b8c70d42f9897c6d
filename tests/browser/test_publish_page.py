"""The Publish page against a small Hub: what would be sent, every refusal a sentence, and the token found nowhere."""

import base64
import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lora_studio import library, workspace
from tests.browser import made
from tests.browser.conftest import TOKEN, Server, hub_environment, pages, unfold

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(chromium, hub, tmp_path_factory):
    """A studio that speaks to the small Hub."""
    home = tmp_path_factory.mktemp("publishing") / "home"
    found = Server(home, **hub_environment(hub, home), GRADIO_DEBUG="1", HF_DEBUG="1")
    found.start()
    yield found
    found.end()


@pytest.fixture(scope="module")
def adapter(server):
    return made.adapter(server.home, "pirate", seed=1)


@pytest.fixture
def page(open_page, adapter, hub):
    hub.calm()
    return open_page("/?tab=publish")


def told(page):
    return page.locator("#publish-told")


def box(page, name):
    return page.locator(f"#{name}").locator("input, textarea").first


def sign_in(page, token=TOKEN):
    expect(page.locator("#account")).to_contain_text("You are not signed in to the Hub.")
    box(page, "token").fill(token)
    box(page, "token").press("Enter")


def signed_in(page):
    sign_in(page)
    expect(page.locator("#account")).to_contain_text("Signed in as me.")
    expect(box(page, "repo")).to_have_value("me/pirate")


def publish(page):
    page.locator("button#publish").click()


def test_what_would_be_sent_is_seen_before_and_published_is_said_after_reading_back(page, hub, server, adapter):
    expect(page.locator("#files")).to_contain_text("adapter_model.safetensors")
    expect(page.locator("#readme")).to_contain_text("library_name: peft")
    assert not hub.repos and not [seen for seen in hub.seen if seen.method not in ("GET", "HEAD")]
    signed_in(page)
    box(page, "license").click()
    page.get_by_role("option", name="apache-2.0", exact=True).click()
    expect(page.locator("#readme")).to_contain_text("license: apache-2.0")
    publish(page)
    expect(page.locator("#published")).to_contain_text("read back and found whole", timeout=60_000)
    expect(page.locator("#published a")).to_have_attribute("href", f"{hub.url}/me/pirate")
    assert hub.repos["me/pirate"].private and {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("me/pirate"))
    assert b"license: apache-2.0" in hub.files("me/pirate")["README.md"]
    (record,) = library.card(workspace.Workspace(server.home), adapter)["publications"]
    assert record["repo"] == "me/pirate" and record["private"]
    # Once more sends nothing; asked for public, a private one stays what it is and says so.
    publish(page)
    expect(page.locator("#published")).to_contain_text("everything was there already", timeout=60_000)


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("other/pirate", "You cannot publish as other"),
        ("me/what a name", "cannot be the name of a repository"),
        ("/etc/passwd", "cannot be the name of a repository"),
    ],
)
def test_a_repository_of_someone_else_and_a_bad_name_are_refused_with_the_next_step(page, hub, repo, words):
    signed_in(page)
    before = set(hub.repos)
    box(page, "repo").fill(repo)
    publish(page)
    expect(told(page)).to_contain_text(words, timeout=60_000)
    expect(box(page, "repo")).to_have_value(repo)
    expect(page.locator("button#publish")).to_be_enabled()
    assert set(hub.repos) == before


def test_a_name_that_is_taken_and_public_is_not_used_for_what_should_be_private(page, hub):
    hub.repo("me/taken", private=False)
    signed_in(page)
    box(page, "repo").fill("me/taken")
    publish(page)
    expect(told(page)).to_contain_text("is there already and is public, and you asked for private", timeout=60_000)


def test_an_expired_token_and_one_that_may_only_read_are_sentences(page, hub):
    hub.account("late", token="hf_" + "L4t3" * 8, expired=True)
    hub.account("reader", token="hf_" + "R3d1" * 8, role="read")
    sign_in(page, "hf_" + "L4t3" * 8)
    expect(page.locator("#account")).to_contain_text("it is wrong or has expired")
    box(page, "token").fill("hf_" + "R3d1" * 8)
    box(page, "token").press("Enter")
    expect(page.locator("#account")).to_contain_text("This token may only read")


def more(page, **given):
    """Open More, and fill in what is given."""
    unfold(page.locator("#publish-more").get_by_text("More", exact=True))
    for name, text in given.items():
        box(page, name).fill(text)
        box(page, name).press("Tab")


def test_a_version_in_a_folder_gated_and_in_a_collection_is_published_and_refused_for_other_files(page, hub, server, adapter):
    signed_in(page)
    box(page, "repo").fill("me/several")
    more(page, tag="v1", folder="pirate", collection="Ships")
    page.locator("#gated").get_by_label("Whoever you let in").check()
    expect(page.locator("#readme")).to_contain_text('subfolder="pirate"')
    publish(page)
    expect(page.locator("#published")).to_contain_text("version v1", timeout=60_000)
    repo, ((_, ships),) = hub.repos["me/several"], hub.collections.items()
    assert repo.gated == "manual" and repo.tags == {"v1": repo.commits[-1][0]} and ships.items == ["me/several"]
    assert {"README.md", "pirate/README.md", "pirate/adapter_model.safetensors"} <= set(hub.files("me/several"))
    assert b"| [pirate](" in hub.files("me/several")["README.md"]
    record = library.card(workspace.Workspace(server.home), adapter)["publications"][-1]
    assert (record["repo"], record["tag"], record["folder"]) == ("me/several", "v1", "pirate") and record["collection"].endswith("/collections/" + next(iter(hub.collections)))
    library.note(workspace.Workspace(server.home), adapter, "other words")
    publish(page)
    expect(told(page)).to_contain_text("has the version v1 already", timeout=60_000)
    expect(told(page)).to_contain_text("such as v2")
    assert len(repo.commits) == 2
    library.note(workspace.Workspace(server.home), adapter, "")
    box(page, "tag").fill("no version")
    expect(told(page)).to_contain_text("cannot be the name of a version")


def test_a_pull_request_to_somebody_else_is_opened_from_the_page_and_leaves_their_files(page, hub):
    theirs = hub.repo("other/theirs", {"notes.md": b"theirs"})
    signed_in(page)
    box(page, "repo").fill("other/theirs")
    more(page)
    box(page, "asks").check()
    for _ in range(2):
        publish(page)
        expect(page.locator("#published")).to_contain_text("Pull request at", timeout=60_000)
        expect(page.locator("#published a")).to_have_attribute("href", f"{hub.url}/other/theirs/discussions/1")
        expect(page.locator("button#publish")).to_be_enabled()
    assert len(theirs.requests) == 1 and hub.files("other/theirs") == {"notes.md": b"theirs"}


def test_a_demo_space_is_made_beside_what_was_published_and_says_what_it_needs(page, hub, server, adapter):
    signed_in(page)
    box(page, "repo").fill("me/shown")
    more(page)
    box(page, "demo-space").check()
    publish(page)
    expect(page.locator("#published")).to_contain_text("Demo Space at", timeout=60_000)
    expect(page.locator("#published a").nth(1)).to_have_attribute("href", f"{hub.url}/spaces/me/shown-demo")
    expect(told(page)).to_contain_text("me/shown is private, so the Space needs a secret HF_TOKEN")
    record = library.card(workspace.Workspace(server.home), adapter)["publications"][-1]
    shown = json.loads(hub.files("me/shown-demo")["demo.json"])
    assert shown["adapter"] == {"repo": "me/shown", "revision": record["commit"]} and hub.repos["me/shown-demo"].private
    # One of that name which is no demo stays as it is; the adapter is published all the same, and both are said.
    hub.repo("me/other-demo", {"app.py": b"# mine"}, private=True)
    box(page, "repo").fill("me/other")
    publish(page)
    expect(told(page)).to_contain_text("The adapter is published, but its demo Space is not there: me/other-demo is a Space already", timeout=60_000)
    expect(page.locator("#published")).to_contain_text("read back and found whole")
    assert hub.files("me/other-demo") == {"app.py": b"# mine"} and "adapter_model.safetensors" in hub.files("me/other")
    # A pull request has no demo of its own.
    box(page, "asks").check()
    publish(page)
    expect(told(page)).to_contain_text("a demo Space is for whoever owns the repository")


def test_a_fault_is_a_sentence_and_the_next_attempt_sends_what_is_missing(page, hub):
    signed_in(page)
    box(page, "repo").fill("me/again")
    hub.fault("commit", 503, times=20)
    publish(page)
    expect(told(page)).to_contain_text("what the Hub has already is not sent again", timeout=90_000)
    expect(page.locator("#published")).not_to_contain_text("Published")
    hub.calm()
    publish(page)
    expect(page.locator("#published")).to_contain_text("read back and found whole", timeout=60_000)
    assert hub.received("put") == 0, "the weights were there already"


def test_a_secret_in_the_notes_is_named_before_and_not_sent(page, hub, server, adapter):
    space = workspace.Workspace(server.home)
    library.note(space, adapter, "the key is hf_" + "S3cr" * 8)
    page.reload()
    expect(told(page)).to_contain_text("README.md holds a Hugging Face token")
    signed_in(page)
    box(page, "repo").fill("me/secret")
    publish(page)
    expect(told(page)).to_contain_text("Nothing was sent, because of what would have become public", timeout=60_000)
    library.note(space, adapter, "")
    assert "me/secret" not in hub.repos


def test_the_token_is_found_nowhere(chromium, hub, tmp_path):
    """Sign-in, push, 401, 403, silence cut short, a crash of the server, and every log: no trace of the token in any of its usual forms."""
    home = tmp_path / "home"
    server = Server(home, **hub_environment(hub, home), GRADIO_DEBUG="1", HF_DEBUG="1", LOG_LEVEL="debug", PYTHONFAULTHANDLER="1", PYTHONASYNCIODEBUG="1")
    made.adapter(home, "pirate", seed=1)
    server.start()
    try:
        with pages(chromium) as opened:
            page = opened(server, "/?tab=publish")
            signed_in(page)
            for route, kind, words in (("whoami", 401, "expired"), ("create", 403, "does not allow"), ("commit", "cut", "not sent again")):
                box(page, "repo").fill(f"me/canary-{route}")
                hub.calm()
                hub.fault(route, kind, times=20)
                publish(page)
                expect(told(page)).to_contain_text(words, timeout=90_000)
            hub.calm()
            publish(page)
            expect(page.locator("#published")).to_contain_text("read back and found whole", timeout=60_000)
            stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
            commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _is_readable(path)]
            pulled = opened(server, "/?tab=library")
            unfold(pulled.get_by_text("Add an adapter"))
            pulled.locator("#import-source").locator("input, textarea").first.fill("me/canary-commit")
            pulled.get_by_role("button", name="Check and add").click()
            expect(pulled.locator("#import-told")).to_contain_text("your account may not see it", timeout=60_000)
            server.kill()
    finally:
        if server.process.poll() is None:
            server.end()
    forms = [TOKEN.encode(), base64.b64encode(TOKEN.encode()).rstrip(b"="), TOKEN[::-1].encode(), TOKEN.encode().hex().encode()]
    places = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places |= {"the browser": stored.encode(), "command lines": b"\n".join(commands)}
    places |= {f"{id}: {name}": data for id, repo in hub.repos.items() for _, _, files in repo.commits for name, data in files.items()}
    assert len(places) > 10 and any(path.endswith("server.log") for path in places)
    assert not [(place, form) for place, data in places.items() for form in forms if form in data]


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
