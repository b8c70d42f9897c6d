"""Model cards: what is known is there, what the Hub refuses is not, and no text breaks out of its place."""

import ast
import io
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from lora_studio import card, spec
from tests.hub.rules import card_errors

MARKDOWN = MarkdownIt("commonmark").enable("table")
RUN = {"name": "Pirate", "base": {"id": "Qwen/Qwen3-0.6B", "revision": "abc"}, "data": [{"path": "me/talk"}, {"path": "/home/anna/secret/rows.jsonl"}]}
NASTY = [
    "---\nlicense: evil\n---", "</td><script>alert(1)</script>", "```\n# Out\n```", "a | b | c", "# Heading", "[x](javascript:alert(1))", "![x](http://evil/x.png)",
    "{{ x }} ${y} %s {0}", "`` ` ``", "<!-- x", "* a\n* b", "a\u202eb\u0000c\u200b", "1. x", "&amp; &lt;", "key: [", "'\"", "\\", "***", "===", "\r\n\r\n    code", "> quote",
]  # fmt: skip


def facts(**more) -> card.Facts:
    known = dict(name="Pirate", base="Qwen/Qwen3-0.6B", license="apache-2.0", data=[{"name": "me/talk", "rows": 320}], method={"kind": "lora", "rank": 8},
                 metrics={"validation loss": 0.123456}, samples=[card.Sample("Hi", "Arr", "Hello")], curve=card.CURVE)  # fmt: skip
    return card.Facts(**{**known, **more})


def head(text: str) -> dict:
    return yaml.safe_load(text[4:].split("\n---\n", 1)[0])


def body(text: str) -> list:
    return MARKDOWN.parse(text[4:].split("\n---\n", 1)[1])


def titles(text: str) -> list[tuple[str, str]]:
    tokens = body(text)
    return [(token.tag, after.content) for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]


def inner(tokens) -> set[str]:
    """The kinds of everything on the page."""
    return {kind for token in tokens for kind in ({token.type} | {child.type for child in token.children or ()})}


def test_a_card_tells_what_is_known_and_leaves_out_what_is_not():
    text = card.write(facts(notes="Talks like a pirate.", trigger="arr"), repo_id="me/pirate")
    assert head(text) == {"license": "apache-2.0", "base_model": "Qwen/Qwen3-0.6B", "base_model_relation": "adapter", "library_name": "peft",
                          "pipeline_tag": "text-generation", "datasets": ["me/talk"], "tags": ["lora", "lora-studio"]}  # fmt: skip
    assert [title for _, title in titles(text)] == ["Pirate", "How to load it", "Sample answers", "Measured", "Loss", "Data", "Method"]
    for words in ("Talks like a pirate", "`arr`", '"me/pirate"', "0.1235", "| rank | 8 |", "Arr", "Hello", "(loss.png)", "| me/talk | 320 |"):
        assert words in text, words
    assert [title for _, title in titles(card.write(card.Facts("A", "demo-text")))] == ["A", "How to load it"]
    assert not card_errors(text)


def test_a_blend_tells_its_parents_and_its_recipe():
    parents = [card.Parent("pirate", 1.0, "ab" * 32, "me/pirate"), card.Parent("capitals", -0.5, "cd" * 32)]
    text = card.write(facts(parents=parents, recipe="weights: [1, -0.5]\n"))
    assert "| me/pirate | 1 | abababababababab |" in text and "| capitals | \\-0.5 | cdcdcdcdcdcdcdcd |" in text
    assert "```yaml\nweights: [1, -0.5]" in text and "merge" in head(text)["tags"] and "blend of LoRA adapters" in text and not card_errors(text)


def test_the_facts_of_a_run_come_from_its_spec_and_hold_no_local_path():
    known = card.facts_of(spec.parse(RUN), metrics={"loss": 0.5})
    text = card.write(known)
    assert known.base == "Qwen/Qwen3-0.6B" and known.method["rank"] == 16 and known.settings["optim.lr"] == 2e-4
    assert "rows.jsonl" in text and "/home" not in text and "anna" not in text and head(text)["datasets"] == ["me/talk"]
    assert 'revision="abc"' in text and not card_errors(text)


@pytest.mark.parametrize("base", ["/data/models/llama", "models/llama", "C:\\models\\llama", "~/llama", "./llama", "demo-text", "../../x", "a/b/c"])
def test_a_base_that_is_not_on_the_hub_is_no_base_model(tmp_path, monkeypatch, base):
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card.write(facts(base=base, license=None))
    assert "base_model" not in head(text) and "license" not in head(text) and not card_errors(text)
    assert "/data/models" not in text and "~/" not in text


def test_what_the_hub_does_not_know_is_given_in_a_form_it_takes():
    text = card.write(facts(license="My Own License!", languages=["en", "English", "deu"], tags=["a\nb", ""]))
    assert head(text)["license"] == "other" and head(text)["license_name"] == "my-own-license" and head(text)["language"] == ["en", "deu"]
    assert head(text)["tags"] == ["lora", "lora-studio", "a b"] and not card_errors(text)


def test_the_code_to_load_it_is_python():
    for base, chat in (("Qwen/Qwen3-0.6B", True), ("demo-text", True), ("/x/it's \"so\"", False)):
        text = card.write(facts(base=base, chat=chat, base_revision='a"b', samples=[card.Sample('He said "hi"\n', "x")]))
        code = next(token.content for token in body(text) if token.type == "fence" and token.info == "python")
        ast.parse(code)
        assert ("apply_chat_template" in code) == chat and ("demo_base" in code) == (base == "demo-text")


def everywhere(text: str) -> card.Facts:
    return facts(name=text, base="/x/" + text, license=text, notes=text, trigger=text, tags=[text], languages=[text], data=[{"name": text, text: text}],
                 method={text: text}, settings={text: [text, 1.5, True]}, metrics={text: text}, curve=text, recipe=text,
                 parents=[card.Parent(text, 1, text, text)], samples=[card.Sample(text, text, text)])  # fmt: skip


def stays_in_place(text: str) -> None:
    page = card.write(everywhere(text), repo_id="me/x")
    assert head(page)["tags"][0] == "lora" and not card_errors(page)
    wanted = ["How to load it", "Parents", "Sample answers", "Measured", "Data", "Method", "Settings"]
    assert [title for tag, title in titles(page) if tag == "h2"] == wanted and len(titles(page)) <= len(wanted) + 1
    kinds = inner(body(page))
    assert not kinds & {"html_block", "html_inline", "image", "link_open", "bullet_list_open", "ordered_list_open", "blockquote_open", "hr", "code_block"}
    assert sum(token.type == "fence" for token in body(page)) == 5 and sum(token.type == "table_open" for token in body(page)) == 5
    assert "\u202e" not in page and "\u0000" not in page


@pytest.mark.parametrize("text", NASTY)
def test_no_text_breaks_out_of_its_place(text):
    stays_in_place(text)


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("-`|#*_<>[](){}!\\&:'\"=+~ \n\r\tab1.\u202e\x00\u2028"), min_size=1, max_size=40))
def test_no_drawn_text_breaks_out_of_its_place(text):
    stays_in_place(text)


def test_a_loss_curve_is_a_picture_and_too_little_is_none():
    steps = [(step, math.exp(-step / 300) + 0.1) for step in range(5000)]
    data = card.loss_curve(steps, [(0, 1.2), (2500, 0.3), (4999, math.nan)])
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.size == (800, 360) and len(data) < 60_000
    colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert (37, 99, 235) in colors and (194, 65, 12) in colors
    assert card.loss_curve([]) is None and card.loss_curve([(1, 2.0)]) is None and card.loss_curve([(1, math.nan), (2, math.inf)]) is None
    assert card.loss_curve([(1, 2.0), (2, 2.0)])


@pytest.mark.parametrize("span", [(0, 1), (0.1, 0.1003), (-5, 12345), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(span):
    found = card.ticks(*span)
    assert 2 <= len(found) <= 11 and all(span[0] - 1e-12 <= tick <= span[1] + 1e-12 for tick in found)
