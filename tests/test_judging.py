"""Judging through the bench: the figures are those of the files, as weighed, and what cannot be compared gets a sentence."""

import json

import pytest

from lora_studio import adapters, blend, judging, library
from lora_studio.errors import BlendError, StudioError
from lora_studio.jobs import bench
from tests import tiny


@pytest.fixture
def shelved(workspace, base, tmp_path):
    """Two adapters of a tiny base in the library: the second also changes other layers."""
    ends = (("q_proj", "down_proj"), ("q_proj", "v_proj"))
    yield [
        library.add(workspace, tiny.write_adapter(tmp_path / name, base, seed=seed, ends=ends[seed]), {"name": name})
        for seed, name in enumerate(("one", "two"))
    ]
    bench.stop()


def test_a_judgement_is_of_the_adapters_as_they_are_weighed(workspace, shelved):
    found = judging.judge(workspace, [(shelved[0], 1.0), (shelved[1], -0.5)])
    one, two = (adapters.read(library.adapter_folder(workspace, id)).modules for id in shelved)
    assert [each["name"] for each in found["adapters"]] == ["one", "two"] and found["pairs"][0]["shared"] == 2
    assert found["adapters"][1]["norm"] == pytest.approx(0.5 * sum(blend.norm(module) ** 2 for module in two.values()) ** 0.5, rel=1e-5)
    assert found["pairs"][0]["cosine"] == pytest.approx(-blend.cosines([one, two])[0][1], abs=1e-5)
    assert found["blocks"] == ["model.layers.0", "model.layers.1"] and len(found["layers"]) == len(found["by_layer"]["cosine"]) == 6
    assert len(found["advice"]) in (1, 2) and len(json.dumps(found)) < 10_000
    again = judging.judge(workspace, [(shelved[0], {"": 1.0, "mlp": 0.0}), (shelved[1], 1.0)])
    assert [name for name, row in zip(again["layers"], again["by_layer"]["norm"]) if row[0]] == [name for name in one if "q_proj" in name]


def test_what_cannot_be_compared_gets_a_sentence(workspace, base, tmp_path, shelved):
    wide = tiny.write_base(tmp_path / "wide", hidden_size=48)
    other = library.add(workspace, tiny.write_adapter(tmp_path / "other", wide, seed=3, name=str(base)), {"name": "other"})
    with pytest.raises(BlendError, match="The layer model.layers.0"):
        judging.judge(workspace, [(shelved[0], 1.0), (other, 1.0)])
    with pytest.raises(StudioError, match="at least one"):
        judging.judge(workspace, [])
