"""LoRA against LoRA+: what is compared is what each would be alone, a cut comparison goes on to the same numbers, and the words say what is so."""

import pytest

from lora_studio import cli_compare, comparisons, durable, runs
from lora_studio.errors import RunError, SpecError, TrainingError
from lora_studio.spec import compare, parse
from lora_studio.training import comparing
from tests import tiny
from tests.training.test_job import run_of, train


def spec_of(base, rows, **changes) -> compare.CompareSpec:
    tree = {
        **tiny.tree(base, rows),
        "schedule": {"steps": 6, "batch_size": 4},
        "validation": {"size": 8, "every": 2, "patience": 1},
        **changes.pop("run", {}),
    }
    wanted = {"rates": [2e-3, 2e-2], "plus_rates": [2e-4, 2e-3], "full_rates": [1e-3, 1e-2], "seeds": 2, **changes}
    return comparisons.compose(parse(tree), **wanted)


def measure(folder, **how):
    return train(folder, work=comparing.run, **how)


def numbers(told: dict) -> dict:
    """What was found, without the clock."""
    return {name: {key: value for key, value in one.items() if key != "seconds"} for name, one in told["methods"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, chat_rows):
    """A comparison that ran to its end, with its spec and workspace."""
    from lora_studio.workspace import Workspace

    place = Workspace(tmp_path_factory.mktemp("home"))
    spec = spec_of(base, chat_rows)
    folder = runs.create(place, spec)
    events = measure(folder)
    return place, spec, folder, events


def test_each_method_is_at_its_best_rate_and_its_losses_are_those_of_the_run_alone(whole, workspace):
    place, spec, folder, events = whole
    assert events[-1]["kind"] == "done"
    told = comparisons.result(place, folder.name)
    alone = {}

    def final(trial):
        if trial not in alone:
            history = train(run_of(workspace, settings(compare.run_of(spec, trial))))
            alone[trial] = [event["loss"] for event in history if event["kind"] == "eval"]
        return alone[trial]

    for method, rates in (("lora", spec.rates), ("lora_plus", spec.plus_rates), ("full", spec.full_rates)):
        one = told["methods"][method]
        losses = {rate: final(compare.Trial(method, rate))[-1] for rate in rates}
        assert one["tried"] == [[rate, pytest.approx(loss, rel=1e-4)] for rate, loss in losses.items()]
        assert one["rate"] == min(losses, key=losses.get)
        seeds = [final(compare.Trial(method, one["rate"], seed)) for seed in range(2)]
        assert seeds[0] != seeds[1]
        assert one["final"] == pytest.approx(sum(curve[-1] for curve in seeds) / 2, rel=1e-4)
        assert one["spread"] == pytest.approx([min(curve[-1] for curve in seeds), max(curve[-1] for curve in seeds)], rel=1e-4)
        assert [step for step, *_ in one["curve"]] == [0, 2, 4, 6] and one["seeds"] == 2 and one["seconds"] > 0
        assert [mean for _, mean, *_ in one["curve"]] == pytest.approx([sum(pair) / 2 for pair in zip(*seeds)], rel=1e-4)


def settings(run):
    from lora_studio.spec import to_tree

    return to_tree(run)


def test_at_the_same_rate_of_a_the_steps_are_compared_too(whole):
    place, spec, folder, events = whole
    [[rate, times]] = comparisons.result(place, folder.name)["same"]
    lora, plus = (
        {
            event["at"]: event["loss"]
            for event in events
            if event["kind"] == "eval" and event["part"] == "tuning" and event["variant"] == number
        }
        for number in (0, 3)
    )
    assert rate == 2e-3 == spec.rates[0] == spec.plus_rates[1]
    after = min(step for step, loss in plus.items() if loss <= lora[6])
    before = after - 2
    assert times == pytest.approx(6 / (before + 2 * (plus[before] - lora[6]) / (plus[before] - plus[after])))


def test_nothing_but_method_rate_and_seed_differs_and_nothing_stops_early(base, chat_rows):
    spec = spec_of(base, chat_rows)
    lora, plus, full = (compare.run_of(spec, compare.Trial(method, 0.5, 1)) for method in compare.NAMES)
    assert (lora.optim.lora_plus_ratio, plus.optim.lora_plus_ratio) == (None, 16)
    same = {"optim": plus.optim.model_copy(update={"lora_plus_ratio": None})}
    assert plus.model_copy(update=same) == lora and full.model_copy(update={"method": lora.method}) == lora
    assert lora.compute.seed == spec.run.compute.seed + 1 and lora.validation.patience is None and not lora.validation.keep_best
    assert lora.schedule == spec.run.schedule and lora.data == spec.run.data


@pytest.mark.parametrize("step", [3, 15, 33, *(pytest.param(step, marks=pytest.mark.slow) for step in (6, 9, 20, 41))])
def test_a_stopped_comparison_goes_on_to_the_same_numbers(whole, workspace, step):
    place, spec, folder, events = whole
    cut = runs.create(workspace, spec)
    history = measure(cut, stop_at=step)
    assert history[-1]["kind"] == "stopped" and history[-1]["step"] < events[-1]["step"]
    assert measure(cut)[-1]["kind"] == "done"
    assert numbers(comparisons.result(workspace, cut.name)) == numbers(comparisons.result(place, folder.name))


class Killed(BaseException):
    """The process is gone."""


LATER = [pytest.param(at, marks=pytest.mark.slow) for at in (("saved", 2), ("measured", 3), ("measured", 6))]


@pytest.mark.parametrize("at", [("eval", 0), ("measured", 1), ("step", 20), *LATER])
def test_a_killed_comparison_measures_no_part_twice_and_gives_the_same_numbers(whole, workspace, at):
    place, spec, folder, _ = whole
    cut, (kind, number) = runs.create(workspace, spec), at

    def dying(folder, desk):
        emit, seen = desk.emit, [0]

        def last_words(event, **fields):
            emit(event, **fields)
            seen[0] += event == kind
            if seen[0] > number:
                raise Killed

        desk.emit = last_words
        comparing.run(folder, desk)

    with pytest.raises(Killed):
        train(cut, work=dying)
    measured = [event["part"] for event in runs.read_all(cut) if event["kind"] == "measured"]
    events = measure(cut)
    again = [event["part"] for event in events if event["kind"] == "measured"]
    assert again == compare.parts(spec) and again[: len(measured)] == measured
    assert numbers(comparisons.result(workspace, cut.name)) == numbers(comparisons.result(place, folder.name))
    assert not list((cut / "checkpoints").iterdir())


def test_a_rate_at_which_it_breaks_off_is_told_and_not_taken(workspace, base, chat_rows):
    wild = {"optim": {"lr": 1e-3, "weight_decay": 0.99, "clip": None}}
    folder = runs.create(workspace, spec_of(base, chat_rows, rates=[2e-3, 100.0], full_rates=[100.0, 1e-3], seeds=1, run=wild))
    assert measure(folder)[-1]["kind"] == "done"
    told = comparisons.result(workspace, folder.name)
    assert told["methods"]["lora"]["tried"][1] == [100.0, None] and told["methods"]["lora"]["rate"] == 2e-3
    assert told["methods"]["full"]["tried"][0] == [100.0, None] and told["methods"]["full"]["rate"] == 1e-3
    assert "LoRA broke off at 1e+02." in told["words"]
    alone = spec_of(base, chat_rows, rates=[100.0], seeds=1, run=wild)
    with pytest.raises(TrainingError, match="LoRA broke off at every rate"):
        measure(runs.create(workspace, alone))


def test_rates_are_tried_around_the_runs_own(base, chat_rows):
    plain = comparisons.compose(parse({**tiny.tree(base, chat_rows), "optim": {"lr": 1e-3}}))
    assert plain.rates == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3] and not plain.full_rates
    assert plain.plus_rates == pytest.approx([one / 8 for one in plain.rates], rel=0.05)
    plus = comparisons.compose(parse({**tiny.tree(base, chat_rows), "optim": {"lr": 1e-4, "lora_plus_ratio": 8}}), full=True)
    assert plus.ratio == 8 and plus.rates[2] == 4e-4 and plus.plus_rates[2] == 1e-4 and len(plus.full_rates) == 3
    assert comparisons.rates_of("5e-4,1e-3") == [5e-4, 1e-3]
    with pytest.raises(SpecError, match="no list of rates"):
        comparisons.rates_of("fast")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"validation": {"size": 0}}}, "held-out rows"),
        ({"run": {"method": {"rank": 4, "dora": True}}}, "DoRA"),
        ({"rates": [1e-3, 1e-3]}, "twice"),
        ({"rates": [-1.0]}, "rates"),
        ({"run": {"method": {"rank": 4, "freeze_a": True}}}, "learn slower"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, chat_rows, changes, words):
    with pytest.raises(SpecError, match=words):
        spec_of(base, chat_rows, **changes)


def test_a_comparison_is_checked_as_the_runs_it_is_made_of(workspace, base, chat_rows):
    report = comparisons.check(workspace, spec_of(base, chat_rows))
    assert report.can_start and report.facts["adapters"] == 4 and report.facts["parts"] == 7 and report.facts["memory_of_full"] > 0
    wrong = comparisons.check(workspace, spec_of(base, chat_rows, run={"method": {"rank": 4, "targets": ["nowhere"]}}))
    assert not wrong.can_start
    other = runs.create(workspace, parse(tiny.tree(base, chat_rows)))
    with pytest.raises(RunError, match="no comparison"):
        comparisons.result(workspace, other.name)
    assert durable.read_json(other / "card.json")["name"] == "tiny"


# ---- what follows from the losses


def test_a_loss_is_reached_on_the_line_between_two_validations():
    curve = [[0, 4.0, 4, 4], [10, 2.0, 2, 2], [20, 1.0, 1, 1]]
    assert comparisons.reach(curve, 3.0) == pytest.approx(5.0)
    assert comparisons.reach(curve, 1.5) == pytest.approx(15.0)
    assert comparisons.reach(curve, 1.0) == pytest.approx(20.0)
    assert comparisons.reach(curve, 5.0) == 0.0
    assert comparisons.reach(curve, 0.9) is None and comparisons.reach(curve, None) is None and comparisons.reach([], 1.0) is None


def test_a_band_goes_from_the_lowest_to_the_highest_seed():
    assert comparisons.band([{0: 3.0, 2: 1.0, 4: 9.0}, {0: 5.0, 2: 2.0}]) == [[0, 4.0, 3.0, 5.0], [2, 1.5, 1.0, 2.0]]
    assert comparisons.band([]) == []


def told_of(lora, plus, *, reach=(None, None), speedup=None, tried=((1e-3, 1.0), (2e-3, 0.5), (4e-3, 0.9))):
    def one(name, losses, at):
        mean = sum(losses) / len(losses)
        return {
            "name": name,
            "rate": 2e-3,
            "tried": [list(row) for row in tried],
            "steps": 100,
            "final": mean,
            "spread": [min(losses), max(losses)],
            "seconds": 3.0,
            "reach": at,
        }

    return {
        "ratio": 16,
        "seeds": len(lora),
        "speedup": speedup,
        "same": [[1e-3, 3.5]],
        "methods": {"lora": one("LoRA", lora, reach[0]), "lora_plus": one("LoRA+", plus, reach[1])},
    }


def test_the_words_say_what_was_found_and_when_it_may_be_chance():
    better = " ".join(comparisons.sentences(told_of([1.0, 1.1], [0.8, 0.9], reach=(None, 50.0), speedup=2.0)))
    assert "after 50 of 100 steps: 2.00 times as fast" in better and "LoRA did not reach the final loss of LoRA+" in better
    assert "3.50 times as fast at 0.001" in better
    assert "19.0% lower with LoRA+" in better and "chance" not in better and "tried" not in better
    close = " ".join(comparisons.sentences(told_of([1.0, 1.1], [1.05, 1.12], reach=(90.0, None))))
    assert "did not reach LoRA's final loss" in close and "may be chance" in close
    edge = " ".join(comparisons.sentences(told_of([1.0], [0.5], reach=(None, 50.0), speedup=2.0, tried=((1e-3, 1.0), (2e-3, 0.5)))))
    assert "is the highest that was tried: a higher one may be better" in edge


def test_while_it_goes_on_only_what_is_known_is_told(workspace, base, chat_rows):
    folder = runs.create(workspace, spec_of(base, chat_rows))
    assert comparisons.result(workspace, folder.name)["words"] == []
    measure(folder, stop_at=9)
    told = comparisons.result(workspace, folder.name)
    assert told["methods"]["lora"]["rate"] and told["methods"]["lora"]["final"] is None and told["speedup"] is None
    assert told["state"] == "stopped" and "LoRA+" in cli_compare.table(told)


def test_the_table_has_a_line_for_each_method_and_the_claim(whole):
    place, _, folder, _ = whole
    text = cli_compare.table(comparisons.result(place, folder.name))
    assert all(f"\n{name} " in text for name in ("LoRA", "LoRA+", "full fine-tuning")) and "2402.12354" in text
