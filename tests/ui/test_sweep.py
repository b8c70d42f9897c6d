"""Several at once on the Train page: what is asked becomes that very sweep, and what cannot be is a sentence with nothing lost."""

import shlex

import gradio as gr
import pytest

from lora_studio import cli, cli_sweep, library, runs, studio, sweeps
from lora_studio.jobs import checks
from lora_studio.spec import parse
from lora_studio.ui import forms, sweep, variants
from lora_studio.ui.train import Train
from tests import tiny


@pytest.fixture
def page(workspace):
    found = Train(workspace)
    with gr.Blocks():
        found.build()
    return found


@pytest.fixture
def given(page, base, chat_rows):
    """What the page's parts hold: a run of a dozen steps, and nothing that varies."""
    spec = parse({**tiny.tree(base, chat_rows), "output": {"sample_prompts": []}})
    part = page.sweep
    empty = {**dict.fromkeys(part.values, ""), part.folds: "", part.together: "", part.keep: "best"}
    return {**forms.fill(page.form, studio.values_of(spec)), **dict(zip(part.paths, [*sweep.FIRST, None, None])), **empty}


def vary(page, given, *asked: tuple[str, str]) -> dict:
    """The same with settings that vary."""
    part = page.sweep
    return given | {component: text for (path, values), *parts in zip(asked, part.paths, part.values) for component, text in zip(parts, (path, values))}


def told(page, given) -> str:
    return " ".join(one["sentence"] for one in page.sweep.look(given)[2])


def test_every_setting_on_offer_may_vary(page, given):
    paths = sweep.may_vary()
    assert set(sweep.USUAL) < set(paths) and len(set(paths)) == len(paths) and "method.kind" not in paths and "task.max_length" not in paths
    assert "data" in paths and not any("cannot vary" in told(page, vary(page, given, (path, "1, 2"))) for path in paths)


def test_four_values_are_four_adapters_and_the_memory_of_all(page, given):
    assert sweep.ASK in told(page, given)
    tiles, memory, _, command = page.sweep.look(vary(page, given, ("optim.lr", "1e-4, 1e-3"), ("method.rank", "2, 4")))
    assert {tile["label"]: tile["value"] for tile in tiles} == {"variants": "4", "adapters to train": "4", "at the same time": "4", "into the library": "the best"}
    assert memory["badge"] == "fits" and {"base", sweeps.ADAPTERS, "activations"} <= {part["label"] for part in memory["parts"]}
    assert "sweep" in command and "--over 'method.rank=2, 4'" in command
    folds = page.sweep.look(vary(page, given, ("method.rank", "2, 4")) | {page.sweep.folds: "3", page.sweep.together: "2"})
    assert [tile["value"] for tile in folds[0]] == ["2", "8", "2", "the best"] and "Ready to start" in folds[2][-1]["sentence"]


@pytest.mark.parametrize(
    ("asked", "more", "words"),
    [
        ([("optim.lr", "1e-4, x")], {}, "lr"),
        ([("optim.lr", "[1e-4")], {}, "not readable as YAML"),
        ([("optim.lr", "1e-4, 1e-4")], {}, "alike"),
        ([("method.rank", "2, 400")], {}, "rank 400: method.rank is 400, but no layer has a rank above 32"),
        ([("method.rank", "2, 4"), ("method.rank", "8")], {}, "given twice"),
        ([(None, "2, 4")], {}, "Choose the setting"),
        ([("compute.seed", ",".join(map(str, range(65))))], {}, "65 adapters"),
        ([], {"folds": "1"}, "folds"),
        ([], {"folds": "many"}, "folds"),
        ([("optim.lr", "1, 2")], {"together": "0"}, "together"),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_starts(page, given, workspace, asked, more, words, monkeypatch):
    monkeypatch.setattr(gr, "Warning", lambda text: None)
    filled = vary(page, given, *asked) | {getattr(page.sweep, name): text for name, text in more.items()}
    assert words in told(page, filled)
    begun = page.sweep.begin(filled)
    assert begun[-1] is None and words in " ".join(one["sentence"] for one in begun[2]) and not studio.list_runs(workspace)


def test_what_cannot_be_swept_is_said_beside_its_field(page, given):
    said = page.sweep.look(vary(page, given | {page.form["method.kind"]: "vera"}, ("compute.seed", "0, 1")))[2]
    assert any(one["path"] == "method.kind" or one["sentence"].startswith("A sweep trains") for one in said)


def test_a_sweep_too_large_for_the_machine_is_told_before_it_starts(page, given, monkeypatch):
    monkeypatch.setattr(checks, "free_memory", lambda device: 10**6)
    _, memory, said, _ = page.sweep.look(vary(page, given, ("compute.seed", "0, 1")))
    assert memory["badge"] == "too big" and any("The sweep needs about" in one["sentence"] and one["level"] == "error" for one in said)


def test_a_sweep_that_is_tight_says_what_would_be_safe_and_can_start(page, given, workspace, monkeypatch):
    filled = vary(page, given, ("compute.seed", "0, 1, 2, 3"))
    facts = sweeps.check(workspace, page.sweep.spec(filled)).facts
    monkeypatch.setattr(checks, "free_memory", lambda device: int(facts["memory"] * 1.1))
    _, memory, said, _ = page.sweep.look(filled)
    assert memory["badge"] == "tight" and [one["level"] for one in said if "The sweep needs about" in one["sentence"]] == ["note"]
    assert said[-1]["level"] == "ok"


def test_the_command_that_is_shown_makes_the_same_sweep(page, given, monkeypatch):
    filled = vary(page, given, ("method.targets", "[q_proj, v_proj], [q_proj], auto"), ("optim.lr", "1e-4, 3e-4")) | {page.sweep.folds: "2", page.sweep.keep: "all"}
    wanted, heard = page.sweep.spec(filled), []
    assert wanted.over["method.targets"] == [["q_proj", "v_proj"], ["q_proj"], "auto"]

    def compose(spec, say, *, as_json, detach, over, variants, folds, together, keep):
        heard.append(sweeps.compose(spec, list(over), folds=folds, together=together, keep=keep))

    monkeypatch.setattr(cli_sweep, "run", compose)
    cli.command()(shlex.split(sweeps.command(wanted).replace("\\\n", " "))[3:], prog_name="x", standalone_mode=False)
    assert heard == [wanted]


def test_settings_of_a_sweep_come_back_into_the_form(page, given):
    filled = vary(page, given, ("method.targets", "[q_proj], [v_proj]"), ("compute.seed", "0, 1"), ("optim.lr", "1e-4")) | {page.sweep.folds: "2"}
    wanted = page.sweep.spec(filled)
    updates = dict(zip(page.sweep.own, page.sweep.put(wanted)))
    assert page.sweep.spec(given | {part: update for part, update in updates.items() if part in given}) == wanted
    assert [update["visible"] for update in (updates[row] for row in page.sweep.rows)] == [True, True, True, False]
    assert set(page.sweep.put(None)[0]) == set(gr.skip())


def test_the_best_stands_first_and_leads_to_its_adapter(page, given, workspace):
    from lora_studio.ui.runs import Runs

    id = page.sweep.begin(vary(page, given, ("optim.lr", "1e-7, 5e-3"), ("method.rank", "2, 4")))[-1]
    studio.wait_until_ended(workspace, id, seconds=120)
    shown = Runs(workspace)
    with gr.Blocks():
        shown.build()
    opened = dict(zip(map(id_of, shown.opened), shown.open(id)))
    rows = opened[id_of(shown.variants)]["rows"]
    assert len(rows) == 4 and rows[0]["mark"] == "kept" and rows[0]["words"].startswith("lr 0.005") and not any(row["mark"] for row in rows[1:])
    assert [float(row["validation"]) for row in rows] == sorted(float(row["validation"]) for row in rows)
    assert [item.id for item in library.find(workspace)] == [rows[0]["library"]] and all(row["step"] == "12 / 12" for row in rows)
    tiles = {tile["label"]: tile["value"] for tile in opened[id_of(shown.tiles)]}
    assert tiles["variants at their end"] == "4 of 4" and tiles["best"] == rows[0]["words"] and tiles["best validation"] == rows[0]["validation"]
    assert "--over" in opened[id_of(shown.command)] and sweeps.sweep.parse(runs.settings.as_tree(opened[id_of(shown.yaml)])) == sweeps.read(workspace.run_folder(id))[0]


def id_of(component) -> int:
    return component._id


def test_while_it_runs_the_best_so_far_is_marked_and_a_broken_one_says_why():
    def one(number, **told):
        return {"number": number, "words": f"lr {number}", "validation": None, "loss": None, "step": 0, "steps": 0, "state": "waiting", "reason": "", "folds": [], "library": None, **told}

    found = {"kept": None, "best": 1, "folds": 2, "variants": [one(0), one(1, validation=0.5, state="running", folds=[0.4, 0.6]), one(2, state="failed", reason="It broke.", validation=0.1)]}
    rows = variants.shown(found)["rows"]
    assert [(row["words"], row["mark"]) for row in rows] == [("lr 1", "best so far"), ("lr 0", ""), ("lr 2", "")]
    assert rows[0]["more"] == "parts: 0.4000, 0.6000" and rows[2]["more"] == "It broke." and rows[1]["validation"] == "–"
