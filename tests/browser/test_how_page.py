"""The page How it works: every number on it is what numpy computes in fp64 of the numbers in its fields, whatever the knobs say."""

import itertools
import math

import numpy
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

LAYOUT = [(1280, "light"), (390, "dark")]


@pytest.fixture
def page(open_page):
    found = open_page("/?tab=how")
    expect(found.locator("#how [data-matrix=exact]")).to_be_visible()
    return found


def matrix(page, name, *, typed=True):
    """The numbers of a matrix: as they stand in its fields, or as they were computed."""
    cells = page.locator(f"#how [data-matrix={name}] > *").evaluate_all(
        "all => all.map(one => [one.dataset.at, one.value ?? one.dataset.value, one.dataset.value, one.textContent])"
    )
    places = [[int(number) for number in cell[0].split(",")] for cell in cells]
    found = numpy.zeros((max(row for row, _ in places) + 1, max(column for _, column in places) + 1))
    for (row, column), (_, value, computed, shown) in zip(places, cells):
        found[row, column] = float(value if typed else computed)
        if shown:
            assert abs(float(shown) - float(computed)) <= 5e-4 + 1e-9
    return found


def number(page, name):
    """A figure of the page, after what is shown of it was found to be it, rounded."""
    figure = page.locator(f"#how [data-out={name}]")
    value, shown = float(figure.get_attribute("data-value")), figure.text_content()
    assert abs(float(shown.removesuffix(" %").replace(",", "")) - value) <= 5e-4 + 1e-9
    return value


def knob(page, id):
    return page.locator(f'#how [data-knob="{id}"]')


def scale(page, name):
    rank, alpha = float(knob(page, f"{name}.rank").input_value()), float(knob(page, f"{name}.alpha").input_value())
    return alpha / (math.sqrt(rank) if knob(page, f"{name}.stable").is_checked() else rank)


def check(page):
    """Compare all that the page shows with numpy's."""
    W0, x = matrix(page, "W0"), matrix(page, "x")
    A, B = (matrix(page, "A1"), matrix(page, "A2")), (matrix(page, "B1"), matrix(page, "B2"))
    factors = [scale(page, name) for name in ("one", "two")]
    assert (
        [one.shape[0] for one in A]
        == [int(knob(page, f"{name}.rank").input_value()) for name in ("one", "two")]
        == [one.shape[1] for one in B]
    )
    assert [number(page, f"scale-{name}") for name in ("one", "two")] == pytest.approx(factors, rel=1e-12)
    updates = [factor * b @ a for factor, b, a in zip(factors, B, A)]
    weights = [float(knob(page, f"{name}.weight").input_value()) for name in ("one", "two")]
    total = weights[0] * updates[0] + weights[1] * updates[1]
    # The smaller rank is filled up with zeros; a negative weight stands on B's side.
    wide, tall, sizes = numpy.zeros((4, 4)), numpy.zeros((4, 4)), [weight * factor for weight, factor in zip(weights, factors)]
    for size, a, b in zip(sizes, A, B):
        wide[:, : b.shape[1]] += math.copysign(math.sqrt(abs(size)), size) * b
        tall[: a.shape[0]] += math.sqrt(abs(size)) * a
    apart = wide @ tall
    wanted = {
        "merged": W0 + updates[0], "delta": updates[0], "delta2": updates[1], "exact": W0 + total, "apart": W0 + apart,
        "beside": W0 @ x + factors[0] * B[0] @ (A[0] @ x), "inside": (W0 + updates[0]) @ x,
    }  # fmt: skip
    for name, value in wanted.items():
        numpy.testing.assert_allclose(matrix(page, name, typed=False), value, rtol=1e-12, atol=1e-12, err_msg=name)
    rank, norm = A[0].shape[0], numpy.linalg.norm
    figures = {
        "rank-delta": numpy.linalg.matrix_rank(updates[0], tol=1e-10), "norm-delta": norm(updates[0]), "norm-base": norm(W0), "learnt": A[0].size + B[0].size, "full": W0.size,
        "work-base": 16, "work-beside": 16 + A[0].size + B[0].size, "work-merged": 16, "rank-sum": numpy.linalg.matrix_rank(total, tol=1e-10), "norm-sum": norm(total),
        "error": 100 * norm(apart - total) / norm(total) if norm(total) else norm(apart),
    }  # fmt: skip
    for name, value in figures.items():
        assert number(page, name) == pytest.approx(float(value), rel=1e-11, abs=1e-11), name
    help = page.locator('#how [data-help="one.rank"]').text_content()
    assert f"would learn {rank * 8192:,} in place of 16,777,216 ({100 * rank * 8192 / 4096**2:.2g} %)" in help


def test_every_number_is_the_one_numpy_computes_whatever_the_knobs_say(page):
    check(page)
    for rank in (2, 3, 4):
        knob(page, "one.rank").press("ArrowRight")
        expect(page.locator("#how [data-matrix=A1] > *")).to_have_count(4 * rank)
        check(page)
    knob(page, "one.alpha").fill("3")
    knob(page, "one.stable").check()
    check(page)
    knob(page, "two.rank").press("End")
    knob(page, "two.rank").press("ArrowLeft")
    knob(page, "two.alpha").press("ArrowUp")
    check(page)
    for one, two in (("2", "-1"), ("0", "1"), ("0", "0"), ("0.35", "0.8")):
        knob(page, "one.weight").fill(one)
        knob(page, "two.weight").fill(two)
        check(page)


def test_a_cell_takes_the_keys_and_its_matrices_follow(page):
    for name, key in itertools.product(("W0", "B1", "A1", "B2", "A2", "x"), ("ArrowUp", "ArrowDown", "7.25")):
        cell = page.locator(f"#how [data-matrix={name}] > input").first
        before = float(cell.input_value())
        cell.press(key) if key.startswith("Arrow") else cell.fill(key)
        wanted = {"ArrowUp": before + 0.1, "ArrowDown": before - 0.1}.get(key)
        assert float(cell.input_value()) == pytest.approx(7.25 if wanted is None else wanted)
        check(page)
    cell.fill("")
    expect(cell).to_have_class("bad")  # what is no number changes nothing
    assert matrix(page, "x", typed=False)[0, 0] == 7.25
    cell.fill("1")
    expect(cell).not_to_have_class("bad")


def test_a_fresh_adapter_changes_nothing_and_one_adapter_alone_has_no_error(page):
    knob(page, "two.weight").fill("0")
    assert number(page, "error") == pytest.approx(0, abs=1e-9) and number(page, "norm-sum") > 0
    page.get_by_role("button", name="Set B to 0").click()
    check(page)
    assert number(page, "rank-delta") == 0 and number(page, "norm-delta") == 0
    numpy.testing.assert_array_equal(matrix(page, "merged", typed=False), matrix(page, "W0"))


@pytest.mark.parametrize(("width", "scheme"), LAYOUT)
def test_the_page_fits_light_and_dark_and_on_a_phone(open_page, tmp_path, width, scheme):
    page = open_page(f"/?tab=how&__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 900})
    expect(page.locator("#how [data-matrix=exact]")).to_be_visible()
    knob(page, "one.rank").press("End")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    boxes = page.locator("#how .matrix, #how input, #how section").evaluate_all(
        "all => all.map(one => [one.getBoundingClientRect().left, one.getBoundingClientRect().right])"
    )
    assert len(boxes) > 60 and all(0 <= left < right <= width for left, right in boxes)
    assert page.locator("#how input:not([aria-label])").count() == 0
    page.screenshot(path=tmp_path / "how.png", full_page=True)
