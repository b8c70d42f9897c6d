"""An adapter to go on from that does not fit is a sentence before anything is loaded."""

import pytest

from lora_studio import studio
from lora_studio.errors import SpecError
from lora_studio.spec import parse
from tests import tiny


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter of rank 3 on q_proj and down_proj of the tiny base."""
    return tiny.write_adapter(tmp_path_factory.mktemp("adapters") / "first", base, seed=1)


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """Another base, twice as wide."""
    return tiny.write_base(tmp_path_factory.mktemp("bases") / "wider", hidden_size=64)


def said(workspace, base, rows, **method) -> dict[str, str]:
    """The errors of a run that goes on from an adapter, by field."""
    spec = parse({**tiny.tree(base, rows), "method": method})
    return {problem.path: problem.sentence for problem in studio.preflight(workspace, spec).problems if problem.level == "error"}


def test_one_that_fits_is_no_problem(workspace, base, chat_rows, adapter):
    assert said(workspace, base, chat_rows, rank=3, alpha=6, start=adapter) == {}
    assert said(workspace, base, chat_rows, rank=8, alpha=6, targets=["q_proj", "down_proj"], start=adapter) == {}
    assert said(workspace, base, chat_rows, rank=3, alpha=6) == {}


def test_one_of_another_base_is_refused_and_nothing_starts(workspace, wider, chat_rows, adapter):
    found = said(workspace, wider, chat_rows, rank=4, alpha=8, start=adapter)
    assert "is for a weight of shape" in found["method.start"] and str(wider) in found["method.start"]
    with pytest.raises(SpecError, match="is for a weight of shape"):
        studio.start(workspace, parse({**tiny.tree(wider, chat_rows), "method": {"rank": 4, "start": adapter}}))
    assert not studio.list_runs(workspace)


def test_layers_that_the_run_does_not_train_and_a_rank_above_its_own_are_named(workspace, base, chat_rows, adapter):
    found = said(workspace, base, chat_rows, rank=2, alpha=4, targets=["q_proj"], start=adapter)
    assert "changes 2 layers that this run does not train" in found["method.start"] and "down_proj" in found["method.start"]
    assert "has rank 3 in" in found["method.rank"] and "method.rank is 2" in found["method.rank"]


def test_one_that_is_not_there_or_broken_is_a_sentence(workspace, base, chat_rows, adapter, tmp_path):
    assert "method.start" in said(workspace, base, chat_rows, rank=4, start="0123456789abcdef")
    assert "method.start" in said(workspace, base, chat_rows, rank=4, start=str(tmp_path))


def test_a_rank_above_every_layer_is_a_sentence(workspace, base, chat_rows):
    assert "no layer has a rank above" in said(workspace, base, chat_rows, rank=500, alpha=8)["method.rank"]


def test_the_rank_is_judged_by_the_layers_that_are_trained(workspace, base, chat_rows):
    found = said(workspace, base, chat_rows, rank=20, alpha=8, targets=["k_proj"])
    assert "method.rank is 20, but no layer has a rank above 16" in found["method.rank"]
    assert said(workspace, base, chat_rows, rank=20, alpha=8, targets=["k_proj", "q_proj"]) == {}
