"""Every cell of the table of methods: what is said to work is run, what is said not to is refused."""

import contextlib

import diffusers
import peft
import pytest
import torch
import transformers

from lora_studio import adapters, blend, checkpoints, sweeps
from lora_studio.errors import BlendError, SpecError
from lora_studio.inference.baking import BAKED
from lora_studio.inference.desk import TRIED
from lora_studio.inference.draw import Easel
from lora_studio.inference.text import Shelf
from lora_studio.spec import Base, parse
from lora_studio.spec.abilities import ABILITIES, CROSSES, METHODS
from tests import tiny, tiny_image
from tests.training import test_full, test_image, test_many, test_methods, test_mixture_experts, test_quantized, test_virtual
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


@pytest.fixture
def of_row(base, tmp_path):
    """The base that a row is tried on: with experts where they learn."""
    return lambda name: tiny.write_base(tmp_path / "mixture", "qwen3_moe") if METHODS[name]["method"].get("experts") else base


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures")


def test_the_table_is_whole_and_its_crosses_are_of_it():
    assert all(name in METHODS and ability in ABILITIES and len(sentence) > 10 for (name, ability), sentence in CROSSES.items())
    kinds = {tree["method"].get("kind", "lora") for tree in METHODS.values()}
    from lora_studio.training.methods import METHODS as rows

    assert kinds == set(rows)


def test_text_and_resume_are_run_with_every_kind():
    """By test_methods.py, test_full.py, test_virtual.py, test_mixture_experts.py and test_job.py, whose variants hold every row."""
    tried = [*test_methods.VARIANTS.values(), *test_full.VARIANTS.values(), *test_virtual.VARIANTS.values(), *test_mixture_experts.VARIANTS.values(), *(one.get("method", {"rank": 4, "alpha": 8}) for one in VARIANTS.values())]
    for name, tree in METHODS.items():
        own = {key: value for key, value in tree["method"].items() if key not in ("rank", "alpha", "first_rank", "every", "tokens")}
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
    modules = adapters.read(run / "adapter").modules
    assert any(bool(getattr(module, "product", module).delta().any()) for module in modules.values())
    easel, given = Easel(Base(id=str(pipeline)), precision="fp32"), {"sample": torch.ones(1, 4, 16, 16), "timestep": 7, "encoder_hidden_states": torch.ones(1, 6, 16)}
    easel.put("mine", modules)
    wrapped = peft.PeftModel.from_pretrained(diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet"), run / "adapter").eval()
    with torch.no_grad():
        bare = easel.pipeline.unet(**given).sample
        with easel.using({"mine": 1.0}):
            found = easel.pipeline.unet(**given).sample
        assert torch.allclose(found, wrapped(**given).sample, rtol=0, atol=1e-5) and float((found - bare).abs().max()) > 1e-4


@pytest.mark.parametrize("name", short("4-bit base", ("LoRA", "DoRA")))
def test_a_base_in_4_bits_is_learnt_on(workspace, wide, chat_rows, name):
    tree = {**tiny.tree(wide, chat_rows), "schedule": {"steps": 3, "batch_size": 2}, "compute": {**CPU, "precision": "bf16", "quantize": "4bit"}, "optim": {"lr": 1e-2}}
    run = run_of(workspace, {**tree, **METHODS[name], "compute": tree["compute"]})
    told = train(run)
    assert told[-1]["kind"] == "done" and all(event["grad_norm"] > 0 for event in told if event["kind"] == "step")


@pytest.mark.parametrize("name", short("bake", ("LoRA+", "LoRA on experts", "DoRA", "PiSSA", "DyLoRA", "VeRA", "OFT", "IA3")))
def test_it_is_tried_blended_and_baked_as_peft_computes_it(workspace, of_row, chat_rows, tmp_path, name):
    base = of_row(name)
    tree = {**tiny.tree(base, chat_rows), "schedule": {"steps": 3, "batch_size": 2}, "validation": {"size": 0}, "optim": {"lr": 2e-2}, "output": {"sample_prompts": []}}
    run = run_of(workspace, {**tree, **METHODS[name]})
    train(run)
    adapter = adapters.read(run / "adapter")
    adapters.refuse_blend({name: adapter.card}, takes=() if name in yes("blend") else BAKED)
    checkpoints.apply(checkpoints.plan(base, [(adapter, 1.0)]), tmp_path / "baked")
    if name in yes("blend"):
        halves = blend.stack([adapter.modules, adapter.modules], [0.75, 0.25])
        for file, data in adapters.write(adapters.with_modules(adapter.card, halves)).items():
            (tmp_path / "blend").mkdir(exist_ok=True)
            (tmp_path / "blend" / file).write_bytes(data)

    def model(*folder):
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return test_methods.logits(peft.PeftModel.from_pretrained(plain, *folder) if folder else plain)

    meant = model(run / "adapter")
    assert float((meant - model()).abs().max()) > 1e-4
    assert name in no("blend") or torch.allclose(model(tmp_path / "blend"), meant, atol=2e-5)
    shelf = Shelf(Base(id=str(base)), precision="fp32")
    shelf.put("mine", adapter.modules)
    assert torch.allclose(shelf.logits(test_methods.IDS[0].tolist(), weights={"mine": 1.0}), meant[0], atol=2e-5)
    assert torch.allclose(test_methods.logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked")), meant, atol=2e-5)


@pytest.mark.parametrize("name", short("parallel", ("LoRA", "LoRA-FA", "orthogonal start")))
def test_side_by_side_each_learns_what_it_learns_alone(workspace, base, chat_rows, name):
    tree = {**tiny.tree(base, chat_rows), "schedule": {"steps": 3, "batch_size": 2}, "validation": {"size": 0}, "optim": {"lr": 1e-2}, "output": {"sample_prompts": []}}
    tree |= METHODS[name]
    whole = test_many.made(workspace, tree, [{"compute.seed": 0}, {"compute.seed": 1}], keep="all")
    test_many.train(whole)
    for number in (0, 1):
        alone = run_of(workspace, {**tree, "compute": {**tree["compute"], "seed": number}})
        train(alone)
        one, other = (adapters.read(folder).modules for folder in (whole / "adapters" / str(number), alone / "adapter"))
        assert one.keys() == other.keys() and any(bool(module.delta().any()) for module in one.values())
        for layer, module in one.items():
            assert float((module.delta() - other[layer].delta()).norm()) <= 1e-5 * float(other[layer].delta().norm()), layer


@pytest.mark.parametrize("name", no("parallel"))
def test_what_does_not_go_side_by_side_is_refused_before_anything_is_loaded(base, chat_rows, name):
    tree = {**tiny.tree(base, chat_rows), "optim": {"lr": 1e-3}, **METHODS[name]}
    with pytest.raises(SpecError, match="A sweep trains adapters of kind lora|which all adapters of a sweep share|A sweep cannot have"):
        sweeps.compose(parse(tree), ["compute.seed=1,2"], keep="all")


@pytest.mark.parametrize("name", no("4-bit base"))
def test_what_does_not_go_on_4_bits_is_refused_before_anything_is_loaded(name):
    with pytest.raises(SpecError, match="quantis|4 bits"):
        parse({"data": [{"path": "x"}], **METHODS[name], "compute": {"quantize": "4bit"}})


@pytest.mark.parametrize("name", no("image"))
def test_what_does_not_learn_pictures_is_refused_before_anything_is_loaded(name):
    with pytest.raises(SpecError, match="language models only|image models, which have none"):
        parse({"data": [{"path": "x"}], **METHODS[name], "task": {"kind": "image"}})


@pytest.mark.parametrize("name", no("blend"))
def test_what_is_no_sum_is_refused_by_name(workspace, base, chat_rows, name):
    run = run_of(workspace, {**tiny.tree(base, chat_rows), "schedule": {"steps": 1, "batch_size": 2}, "optim": {"lr": 1e-3}, **METHODS[name]})
    train(run)
    card = adapters.inspect(run / "adapter")
    for ability, takes in (("blend", ()), ("bake", BAKED), ("Playground", TRIED)):
        with pytest.raises(BlendError, match="mine") if name in no(ability) else contextlib.nullcontext():
            adapters.refuse_blend({"mine": card}, takes=takes)
