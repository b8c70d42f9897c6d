"""Every cell of the table of methods: what is said to work is run, what is said not to is refused."""

import peft
import pytest
import torch
import transformers

from lora_studio import adapters, blend, checkpoints
from lora_studio.errors import BlendError, SpecError
from lora_studio.spec import parse
from lora_studio.spec.abilities import ABILITIES, CROSSES, METHODS
from tests import tiny, tiny_image
from tests.training import test_full, test_image, test_methods, test_quantized
from tests.training.test_job import VARIANTS, run_of, train

wide = test_quantized.wide
CPU = {"device": "cpu", "precision": "fp32", "threads": 1}


def yes(ability: str) -> list[str]:
    return [name for name in METHODS if (name, ability) not in CROSSES]


def short(ability: str, always: tuple[str, ...]) -> list:
    """Every row that can, of which all but a few are run by name."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in yes(ability)]


def no(ability: str) -> list[str]:
    return [name for name in METHODS if (name, ability) in CROSSES]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures")


def test_the_table_is_whole_and_its_crosses_are_of_it():
    assert all(name in METHODS and ability in ABILITIES and len(sentence) > 10 for (name, ability), sentence in CROSSES.items())
    kinds = {tree["method"].get("kind", "lora") for tree in METHODS.values()}
    from lora_studio.training.methods import METHODS as rows

    assert kinds == set(rows)


def test_text_and_resume_are_run_with_every_kind():
    """By test_methods.py and test_job.py, whose variants hold every row."""
    tried = [*test_methods.VARIANTS.values(), *test_full.VARIANTS.values(), *(one.get("method", {"rank": 4, "alpha": 8}) for one in VARIANTS.values())]
    for name, tree in METHODS.items():
        own = {key: value for key, value in tree["method"].items() if key not in ("rank", "alpha", "first_rank", "every")}
        assert any(own.items() <= one.items() for one in tried), name
    assert yes("text") == yes("resume") == list(METHODS)


@pytest.mark.parametrize("name", short("image", ("LoRA", "DoRA", "AdaLoRA", "VeRA")))
def test_pictures_are_learnt_and_the_file_is_for_every_loader(workspace, pipeline, pictures, name):
    tree = test_image.tree(pipeline, pictures, schedule={"steps": 2, "batch_size": 2}, output={"sample_prompts": []}, optim={"lr": 1e-2}, validation={"size": 0})
    run = run_of(workspace, {**tree, **METHODS[name], "optim": METHODS[name].get("optim", {"lr": 1e-2})})
    assert train(run)[-1]["kind"] == "done"
    card = adapters.inspect(run / "adapter")
    assert card.method == ("dora" if name == "DoRA" else "lora") and card.config["auto_mapping"]["base_model_class"] == "UNet2DConditionModel"
    assert not [problem for problem in adapters.check(card, adapters.base_shapes(pipeline)) if problem.level == "error"]
    assert any(bool(module.delta().any()) for module in adapters.read(run / "adapter").modules.values())


@pytest.mark.parametrize("name", short("4-bit base", ("LoRA", "DoRA")))
def test_a_base_in_4_bits_is_learnt_on(workspace, wide, chat_rows, name):
    tree = {**tiny.tree(wide, chat_rows), "schedule": {"steps": 3, "batch_size": 2}, "compute": {**CPU, "precision": "bf16", "quantize": "4bit"}, "optim": {"lr": 1e-2}}
    run = run_of(workspace, {**tree, **METHODS[name], "compute": tree["compute"]})
    told = train(run)
    assert told[-1]["kind"] == "done" and all(event["grad_norm"] > 0 for event in told if event["kind"] == "step")


@pytest.mark.parametrize("name", short("bake", ("LoRA+", "PiSSA", "DyLoRA", "VeRA")))
def test_it_is_blended_and_baked_as_peft_computes_it(workspace, base, chat_rows, tmp_path, name):
    tree = {**tiny.tree(base, chat_rows), "schedule": {"steps": 3, "batch_size": 2}, "validation": {"size": 0}, "optim": {"lr": 2e-2}, "output": {"sample_prompts": []}}
    run = run_of(workspace, {**tree, **METHODS[name]})
    train(run)
    adapter = adapters.read(run / "adapter")
    adapters.refuse_blend({name: adapter.card})
    checkpoints.apply(checkpoints.plan(base, [(adapter, 1.0)]), tmp_path / "baked")
    halves = blend.stack([adapter.modules, adapter.modules], [0.75, 0.25])
    for file, data in adapters.write(adapters.with_modules(adapter.card, halves)).items():
        (tmp_path / "blend").mkdir(exist_ok=True)
        (tmp_path / "blend" / file).write_bytes(data)

    def model(*folder):
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return test_methods.logits(peft.PeftModel.from_pretrained(plain, *folder) if folder else plain)

    meant = model(run / "adapter")
    assert float((meant - model()).abs().max()) > 1e-4
    assert torch.allclose(model(tmp_path / "blend"), meant, atol=2e-5)
    assert torch.allclose(test_methods.logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked")), meant, atol=2e-5)


@pytest.mark.parametrize("name", no("4-bit base"))
def test_what_does_not_go_on_4_bits_is_refused_before_anything_is_loaded(name):
    with pytest.raises(SpecError, match="quantis|4 bits"):
        parse({"data": [{"path": "x"}], **METHODS[name], "compute": {"quantize": "4bit"}})


@pytest.mark.parametrize("name", no("image"))
def test_what_does_not_learn_pictures_is_refused_before_anything_is_loaded(name):
    with pytest.raises(SpecError, match="language models only"):
        parse({"data": [{"path": "x"}], **METHODS[name], "task": {"kind": "image"}})


@pytest.mark.parametrize("name", no("bake"))
def test_what_is_no_sum_is_refused_by_name(workspace, base, chat_rows, name):
    run = run_of(workspace, {**tiny.tree(base, chat_rows), "schedule": {"steps": 1, "batch_size": 2}, "optim": {"lr": 1e-3}, **METHODS[name]})
    train(run)
    assert no("bake") == no("Playground and blend")
    with pytest.raises(BlendError, match="mine"):
        adapters.refuse_blend({"mine": adapters.inspect(run / "adapter")})
