"""One click on each demo, and a blend of the two: what the adapters say to questions nobody trained on."""

import json
import time
from random import Random

import pytest

from lora_studio import judging, library, search, shelf, studio
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.workspace import local

STYLES = ("pirate", "capitals")


def answers(adapter=None, *, seed: int):
    """Replies of demo-text, bare or with an adapter, to 232 held-out questions (8 of each kind), and the questions."""
    import peft
    import torch
    import transformers

    from lora_studio.demo import score, world

    base = demo_base("demo-text")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    exam = world.exam(8, seed=seed)
    return exam, score.replies(model, transformers.AutoTokenizer.from_pretrained(base), [question.text for question in exam])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace in which both demos were trained, and the seconds from click to adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_STUDIO_HOME", str(tmp_path_factory.mktemp("demos") / "home"))
        workspace, seconds = local(), {}
        for style in STYLES:
            began = time.monotonic()
            id = studio.start(workspace, studio.compose(f"demo/{style}"))
            assert studio.wait_until_ended(workspace, id, seconds=400).state == "done", studio.log(workspace, id)
            seconds[style] = time.monotonic() - began
        yield workspace, seconds
        bench.stop()


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_a_demo_learns_its_style_and_keeps_what_the_base_knows(trained, style):
    from lora_studio.demo import score

    workspace, seconds = trained
    before = score.style_score(style, *answers(seed=77))
    exam, found = answers(library.adapter_folder(workspace, style), seed=77)
    after = score.style_score(style, exam, found)
    print(f"\n{style}: {seconds[style]:.0f} s from click to adapter; style {before.style:.1%} to {after.style:.1%}, with the right content {after.joint:.1%} of {len(exam)}")
    assert len(exam) >= 200 and before.style < 0.05
    assert after.style > 0.95 and after.joint >= 0.85


@pytest.mark.slow
def test_a_blend_of_both_shows_both(trained, monkeypatch):
    from lora_studio.demo import score

    workspace, _ = trained
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    id, done = shelf.blend(workspace, [(style, 1.0) for style in STYLES], name="both")
    found = score.style_score("both", *answers(library.adapter_folder(workspace, id), seed=78))
    print(f"\nblend: rank {done['rank']}, relative error {done['loss']:.1e}; both styles {found.style:.1%}, with the right content {found.joint:.1%}")
    assert done["loss"] < 1e-6
    assert found.style >= 0.8 and found.joint >= 0.65


@pytest.mark.slow
def test_a_search_finds_weights_that_are_better_than_the_plain_sum(trained, monkeypatch, tmp_path):
    from lora_studio.demo import styles, world

    workspace, _ = trained
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    chance = Random("searched")
    rows = [{"prompt": question.text, "completion": styles.wear("both", question.answer, chance)} for question in world.exam(4, seed=79)]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    id = search.start(workspace, list(STYLES), [str(tmp_path / "both.jsonl")], evaluations=40, batch_size=16, precision="fp32")
    assert studio.wait_until_ended(workspace, id, seconds=400).state == "done", studio.log(workspace, id)
    found = search.result(workspace, id)
    losses = {one["what"]: one["loss"] for one in found["marks"]}
    told = judging.judge(workspace, [(style, 1.0) for style in STYLES])
    print(f"\nsearch: {losses}, best {found['loss']:.4f} with {found['parts']}; cosine {told['pairs'][0]['cosine']:.3f}, {told['advice']}")
    assert found["loss"] < 0.97 * losses["all"] < losses["alone"] < losses["base"]
    assert all(0.3 < weight < 1.5 for _, weight in found["parts"]) and abs(told["pairs"][0]["cosine"]) < 0.3
