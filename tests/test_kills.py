"""The short form of the campaign of kills: SIGKILL in the middle, twice, and the resumed run ends on the same bytes."""

import random

import pytest

from lora_studio import studio
from lora_studio.spec import parse
from tests import tiny_image
from tests.campaigns import kills


@pytest.mark.parametrize("seed", [1])
def test_a_run_killed_at_any_instant_resumes_to_the_identical_adapter(workspace, base, chat_rows, seed):
    spec = parse(kills.settings(base, chat_rows, steps=40))
    whole = studio.start(workspace, spec)
    expected, told = kills.finish(workspace, whole), kills.history(workspace, whole)
    id, found, at = kills.trial(workspace, spec, random.Random(seed), longest=0.4)
    assert at, "the run was over before it could be killed"
    assert found == expected
    assert kills.history(workspace, id) == told


def test_an_image_run_killed_at_any_instant_resumes_to_the_identical_adapter(workspace, tmp_path):
    base, rows = tiny_image.write_pipeline(tmp_path / "base"), tiny_image.write_pictures(tmp_path / "pictures", size=(40, 32))
    spec = parse(kills.image_settings(base, rows, steps=40))
    whole = studio.start(workspace, spec)
    expected, told = kills.finish(workspace, whole), kills.history(workspace, whole)
    id, found, at = kills.trial(workspace, spec, random.Random(1), longest=0.4)
    assert at, "the run was over before it could be killed"
    assert found == expected and kills.history(workspace, id) == told


@pytest.mark.slow
def test_ten_kills(tmp_path, monkeypatch):
    import argparse

    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    assert kills.campaign(tmp_path, argparse.Namespace(kills=10, steps=60, seed=3)) == 0
