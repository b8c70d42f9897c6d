"""One click on a demo: its whole process, and what the adapter says to questions nobody trained on."""

import time

import pytest

from lora_studio import studio
from lora_studio.home import demo_base


def answers(adapter=None):
    """Replies of demo-text, bare or with an adapter, to 232 held-out questions (8 of each kind), and the questions."""
    import peft
    import torch
    import transformers

    from lora_studio.demo import score, world

    base = demo_base("demo-text")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    exam = world.exam(8, seed=77)
    return exam, score.replies(model, transformers.AutoTokenizer.from_pretrained(base), [question.text for question in exam])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["pirate", "capitals"])
def test_a_demo_learns_its_style_and_keeps_what_the_base_knows(workspace, style):
    from lora_studio.demo import score

    exam, plain = answers()
    before = score.style_score(style, exam, plain)
    began = time.monotonic()
    id = studio.start(workspace, studio.compose(f"demo/{style}"))
    status = studio.wait_until_ended(workspace, id, seconds=400)
    seconds = time.monotonic() - began
    assert status.state == "done", studio.log(workspace, id)
    after = score.style_score(style, *answers(studio.adapter_folder(workspace, id)))
    print(f"\n{style}: {seconds:.0f} s from click to adapter; style {before.style:.1%} to {after.style:.1%}, with the right content {after.joint:.1%} of {len(exam)}")
    assert len(exam) >= 200 and before.style < 0.05
    assert after.style > 0.95 and after.joint >= 0.85
