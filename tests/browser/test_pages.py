"""The pages: usable soon, small, the same in light and dark and on a phone, and deaf to what strangers write into them."""

import json
import re
import time

import pytest
from PIL import Image
from playwright.sync_api import expect

from lora_studio import durable, runs, workspace
from lora_studio.pictures import samples
from lora_studio.spec import parse
from tests import tiny
from tests.browser.conftest import LAYOUTS, comes_to_rest, unfold

pytestmark = pytest.mark.browser
HOSTILE = '<img src=x onerror="window.hacked=1"> **b** ${document.body.classList.add(location.protocol)} {{value}} `${1}` C:\\users\\x \\'


@pytest.fixture
def field():
    return lambda page, path: page.locator(f"#field-{path.replace('.', '-')}").locator("input, textarea").first


def problems(page):
    return page.locator("#problems")


def test_the_form_is_usable_soon_in_a_small_process_without_torch(server, open_page, field):
    began = time.monotonic()
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    seconds, memory = server.started_in + time.monotonic() - began, server.memory() / 1e6
    print(f"\nform usable after {seconds:.1f} s; the server takes {memory:.0f} MB")
    assert memory < 250 and not server.has_torch()
    assert seconds < 60  # 8 s is the promise on an idle machine; a time decides no test


def test_a_bad_value_gets_its_sentence_and_nothing_is_lost(open_page, field):
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    field(page, "method.rank").fill("many")
    field(page, "optim.lr").fill("0")
    expect(problems(page)).to_contain_text("method.rank is 'many'; it must be a whole number.")
    expect(problems(page)).to_contain_text("optim.lr is '0'; it must be above 0.")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text("It cannot start yet").first).to_be_visible()
    expect(field(page, "method.rank")).to_have_value("many")
    field(page, "method.rank").fill("4")
    field(page, "optim.lr").fill("2e-4")
    expect(problems(page)).not_to_contain_text("method.rank")
    expect(page.locator("#command")).to_contain_text("--method.rank 4")


def test_switching_lora_plus_on_lowers_the_base_rate_and_shows_both(open_page, field):
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    box = page.get_by_role("checkbox", name="LoRA+")
    expect(box).to_be_checked()
    before = float(field(page, "optim.lr").input_value())
    box.uncheck()
    expect(field(page, "optim.lora_plus_ratio")).to_have_value("")
    expect(page.locator("#rates")).to_contain_text(re.compile(r"A learns at ([\d.e-]+), B at \1;"))
    box.check()
    expect(field(page, "optim.lora_plus_ratio")).to_have_value("16")
    assert float(field(page, "optim.lr").input_value()) == pytest.approx(before)
    expect(page.locator("#rates")).to_contain_text("A learns at")


def test_the_rows_and_the_sources_follow_each_other_typed_pasted_or_picked(open_page, field):
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    picked = page.locator(".block", has=page.get_by_label("Rows to train on")).last
    unfold(page.get_by_text("Advanced: every other setting"))
    unfold(page.get_by_text("Sources", exact=True))
    sources = field(page, "data")
    sources.select_text()
    page.keyboard.insert_text("- path: demo/capitals")  # as a paste does: one event, no key
    sources.press("Tab")
    expect(picked).to_contain_text("demo: capitals")
    expect(picked).not_to_contain_text("demo: pirate")
    sources.select_text()
    page.keyboard.type("- path: demo/pirate")
    expect(picked).to_contain_text("demo: pirate")
    page.get_by_label("Rows to train on").click()
    page.get_by_role("option", name="demo: capitals").click()
    expect(sources).to_have_value("- path: demo/pirate\n- path: demo/capitals")
    page.get_by_label("Rows to train on").press_sequentially("nowhere.jsonl")
    page.get_by_label("Rows to train on").press("Enter")
    expect(sources).to_have_value("- path: demo/pirate\n- path: demo/capitals\n- path: nowhere.jsonl")
    expect(problems(page)).to_contain_text("nowhere.jsonl is not there")
    page.wait_for_timeout(1500)  # nothing that was set comes back as an echo
    expect(sources).to_have_value("- path: demo/pirate\n- path: demo/capitals\n- path: nowhere.jsonl")
    expect(picked).to_contain_text("nowhere.jsonl")


def test_a_validation_before_the_first_step_lies_within_the_axes(server, open_page):
    folder = runs.create(workspace.Workspace(server.home), parse({"name": "judged", "data": [{"path": "x"}]}))
    with runs.Events(folder) as events:
        events.emit("eval", step=0, loss=5.0)
        for step in range(1, 21):
            events.emit("step", step=step, steps=20, loss=1 / step, lr_A=1e-4, lr_B=1e-3, grad_norm=1.0, tokens_per_second=1.0, memory=1, seconds_left=9.0)
        events.emit("eval", step=24, loss=0.1)
    page = open_page(f"/?tab=runs&run={folder.name}")
    expect(page.locator("[data-axis='0 24']")).to_be_attached()


def test_a_preset_fills_the_form(open_page, field):
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="qwen3/4b").click()
    expect(field(page, "method.rank")).to_have_value("32")
    expect(problems(page)).to_contain_text("Qwen/Qwen3-4B will be fetched from the Hub (about 8.0 GB)")


def test_uploaded_rows_are_previewed_and_broken_ones_named(open_page, tmp_path):
    page = open_page()
    good, bad = tiny.write_rows(tmp_path / "mine.jsonl", count=20), tmp_path / "broken.jsonl"
    bad.write_text('{"messages": []}\n{oh no}\n')
    page.locator("input[type=file]").first.set_input_files([str(good), str(bad)])
    expect(problems(page)).to_contain_text("broken.jsonl, line 2, column 2")
    expect(page.get_by_text("mine.jsonl").first).to_be_visible()


def test_no_script_of_a_stranger_runs(server, open_page, field, tmp_path):
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    for path in ("name", "base.id", "method.rank", "output.sample_prompts", "optim.lr"):
        field(page, path).fill(HOSTILE)
        field(page, path).press("Tab")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": HOSTILE, "completion": HOSTILE}) + "\n")
    page.locator("input[type=file]").first.set_input_files(str(rows))
    expect(problems(page)).to_contain_text("method.rank")
    for path, value in (("name", HOSTILE[:80]), ("method.rank", "4"), ("optim.lr", "1e-4"), ("base.id", "demo-text")):
        field(page, path).fill(value)
        field(page, path).press("Enter")
    expect(page.locator("#preview")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None and not page.evaluate("document.body.classList.contains('http:')")
    folder = runs.create(workspace.Workspace(server.home), parse({"name": HOSTILE[:80], "data": [{"path": HOSTILE}]}))
    with runs.Events(folder) as events:
        events.emit("note", text=HOSTILE)
        events.emit("sample", step=0, prompt=HOSTILE, answer=HOSTILE)
        events.emit("failed", reason=HOSTILE)
    (folder / "log.txt").write_text(HOSTILE)
    page = open_page(f"/?tab=runs&run={folder.name}")
    expect(page.locator("#notes")).to_contain_text("<img src=x")
    expect(page.locator("#samples")).to_contain_text("<img src=x")
    assert page.locator("#notes li").count() == 2
    assert page.evaluate("window.hacked") is None and not page.evaluate("document.body.classList.contains('http:')")


def test_sample_pictures_are_a_matrix_and_arrow_keys_move_while_new_rows_come(server, open_page):
    folder = runs.create(workspace.Workspace(server.home), parse({"name": "drawn", "data": [{"path": "x"}], "output": {"sample_prompts": ["a", "b"]}}))
    lock = durable.Lock(folder / "run.lock")
    assert lock.take()

    def row(events, step):
        for prompt in ("a", "b"):
            name = samples.save_sample(folder / "samples", Image.new("RGB", (8, 8), (step, ord(prompt), 0)), {"step": step, "prompt": prompt})
            events.emit("sample", step=step, prompt=prompt, answer=name)
        events.flush()

    with runs.Events(folder) as events:
        events.emit("started", steps=90, device="cpu", precision="float32", fast="x", targets=[])
        row(events, 0)
        row(events, 30)
        page = open_page(f"/?tab=runs&run={folder.name}")
        expect(page.locator("#samples tbody tr")).to_have_count(2)
        expect(page.locator("#samples tbody tr").first).to_contain_text("base")
        page.locator("#samples td button").first.click()
        said = page.locator("#samples figcaption")
        expect(said).to_have_text("step 0: a")
        for key, words in (("ArrowRight", "step 0: b"), ("ArrowDown", "step 30: b"), ("ArrowDown", "step 30: b"), ("ArrowLeft", "step 30: a")):
            page.keyboard.press(key)
            expect(said).to_have_text(words)
        row(events, 60)
        expect(page.locator("#samples tbody tr")).to_have_count(3)
        expect(said).to_be_visible()
        page.keyboard.press("ArrowDown")
        expect(said).to_have_text("step 60: a")
        page.keyboard.press("Escape")
        expect(said).to_be_hidden()
        for button, request in (("Save now", "save"), ("Sample now", "sample")):
            page.get_by_role("button", name=button).click()
            expect(page.get_by_text("after this step").first).to_be_visible()
            until = time.monotonic() + 30  # the words of the first button may still stand there
            while runs.asked(folder, request) is None and time.monotonic() < until:
                page.wait_for_timeout(100)
            assert runs.asked(folder, request) is not None
    lock.release()


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_nothing_sticks_out_in_light_dark_and_on_a_phone(open_page, scheme, width):
    for path in ("/?tab=train", "/?tab=runs", "/?tab=library", "/?tab=blend", "/?tab=playground", "/?tab=publish"):
        page = open_page(f"{path}&__theme={scheme}")
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_long_run_is_drawn_cheaply_and_a_second_browser_sees_it_too(server, open_page):
    folder = runs.create(workspace.Workspace(server.home), parse({"name": "long", "data": [{"path": "x"}]}))
    lock = durable.Lock(folder / "run.lock")
    assert lock.take()
    with runs.Events(folder) as events:
        events.emit("started", steps=20000, device="cpu", precision="float32", fast="x", targets=[])
        for step in range(1, 10_001):
            events.emit("step", step=step, steps=20000, loss=1 / step, lr_A=1e-4, lr_B=1e-3, grad_norm=1.0, tokens_per_second=1.0, memory=1, seconds_left=9.0)
        first, second = open_page(f"/?tab=runs&run={folder.name}"), open_page(f"/?tab=runs&run={folder.name}")
        for page in (first, second):
            expect(page.locator("#chart [data-points='10000'], #chart[data-points='10000'], [data-points='10000']").first).to_be_attached()
            expect(page.locator("#run-tiles")).to_contain_text("10000 / 20000")
        for step in range(10_001, 10_011):
            events.emit("step", step=step, steps=20000, loss=1.0, lr_A=1e-4, lr_B=1e-3, grad_norm=1.0, tokens_per_second=1.0, memory=1, seconds_left=9.0)
        events.flush()
        expect(first.locator("[data-points='10010']").first).to_be_attached()
    busy = first.evaluate("() => new Promise(done => { const t = performance.now(); let n = 0; const f = () => ++n < 30 ? requestAnimationFrame(f) : done((performance.now() - t) / 30); f(); })")
    print(f"\n{busy:.0f} ms a frame with 10,000 points")
    first.get_by_role("button", name="Learning rates").click()
    expect(first.locator("#chart")).to_contain_text("B 0.00100")
    lock.release()


def test_a_page_at_rest_asks_nothing(open_page):
    """A part of the form that is told of a change which was none would ask again, and again, for as long as the page is open."""
    page = open_page()
    expect(page.locator("#problems")).to_contain_text("Ready to start.")
    comes_to_rest(page)
    comes_to_rest(page)


def test_a_page_comes_to_rest_after_quick_typing_and_quick_choices(open_page, field):
    page = open_page()
    expect(page.locator("#problems")).to_contain_text("Ready to start.")
    field(page, "base.id").fill("someone/some-model")
    page.keyboard.press("Tab")
    field(page, "name").clear()
    field(page, "name").press_sequentially("quickly typed", delay=5)
    for kind in ("text", "chat"):
        field(page, "task.kind").click()
        page.get_by_role("option", name=kind, exact=True).click()
    for path, text in (("method.rank", "12"), ("optim.lr", "0.000123")):
        field(page, path).clear()
        field(page, path).press_sequentially(text, delay=5)
    comes_to_rest(page)
    expect(page.locator("#command")).to_contain_text("quickly typed")
    expect(page.locator("#command")).to_contain_text("0.000123")
