"""What has no factors is baked in its full rank: TIES, DARE and the others, on every kind of layer."""

import json

import peft
import pytest
import torch
import transformers

from lora_studio import adapters, baking, checkpoints, library, merging
from lora_studio.checkpoints.whole import Whole
from lora_studio.errors import BlendError
from lora_studio.jobs import bench
from tests import tiny
from tests.test_cli import command
from tests.test_experts import trained

WEIGHTS = [0.8, -0.6]


def gpt2(folder):
    """A tiny GPT-2, whose linear layers lie transposed."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=90, n_embd=80, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def random_adapter(base, folder, seed, **settings):
    torch.manual_seed(seed)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=3, lora_alpha=5, **settings))
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return adapters.read(folder)


def baked(base, parts, target, recipe):
    """The bake of a merge, and what the merge itself says of each layer."""
    merged = merging.entrywise([part.modules for part in parts], WEIGHTS, recipe)
    adapter = adapters.Adapter({name: Whole(one) for name, one in merged.items()}, {}, parts[0].card)
    plan = checkpoints.plan(base, [(adapter, 1.0)])
    checkpoints.apply(plan, target)
    return plan, {name: one.rows(0, one.shape[0]).double() for name, one in merged.items()}


@pytest.mark.parametrize("how", merging.METHODS)
def test_a_merge_is_baked_entry_by_entry(tmp_path, base, how):
    parts = [random_adapter(base, tmp_path / str(seed), seed, target_modules=["q_proj", "down_proj"]) for seed in (1, 2)]
    plan, meant = baked(base, parts, tmp_path / "out", merging.Recipe(how, density=0.4, seed=3))
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "out"))
    for name, update in meant.items():
        moved = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert float((moved - update).norm() / update.norm()) < 1e-6
        assert int(torch.linalg.matrix_rank(update)) > 6  # more than both adapters have together
    assert checkpoints.loss(plan).overall < 1e-5


def test_a_merge_is_baked_into_layers_that_lie_transposed(tmp_path):
    base = gpt2(tmp_path / "base")
    parts = [random_adapter(base, tmp_path / str(seed), seed, target_modules=["c_attn", "wte"], fan_in_fan_out=True) for seed in (1, 2)]
    plan, meant = baked(base, parts, tmp_path / "out", merging.Recipe("ties", density=0.4))
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "out"))
    assert set(meant) == {"transformer.h.0.attn.c_attn", "transformer.wte"}
    for name, update in meant.items():
        moved = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert float((moved.T - update).norm() / update.norm()) < 1e-6
    assert checkpoints.loss(plan).overall < 1e-5


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny mixture with a matrix for each expert, and one with its experts stacked and transposed."""
    from tests.test_experts import CONFIGS

    found = {}
    for name in ("qwen3_moe", "gpt_oss"):
        found[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_merge_is_baked_into_experts(tmp_path, mixture, name):
    base = mixture[name]
    parts = [adapters.read(trained(base, tmp_path / str(seed), seed)) for seed in (1, 2)]
    _, meant = baked(base, parts, tmp_path / "out", merging.Recipe("magnitude", density=0.4))
    before, after = (dict(transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters()) for folder in (base, tmp_path / "out"))
    seen = 0
    for layer, update in meant.items():
        stack, _, number = layer.rpartition(".")
        if stack in before:
            moved = (after[stack] - before[stack]).detach().double()[int(number)]
            update = update if moved.shape == update.shape else update.T
            assert float((moved - update).norm() / update.norm()) < 1e-6
            seen += 1
    assert seen == 2 * 2 * 4


@pytest.fixture
def two(workspace, base):
    yield [[library.add(workspace, tiny.adapter_files(base, name=str(base), seed=seed, size=0.5), {"name": f"n{seed}", "base": str(base)}), 1.0] for seed in (1, 2)]
    bench.stop()


def test_the_verb_bakes_a_merge_with_its_recipe(workspace, base, tmp_path, two):
    told = baking.preview(workspace, two, merge={"how": "ties", "density": 0.3})
    list(baking.bake(workspace, two, tmp_path / "out", merge={"how": "ties", "density": 0.3}))
    assert told["changed"] > 0 and json.loads((tmp_path / "out" / baking.RECIPE).read_text())["merge"] == {"how": "ties", "density": 0.3}
    assert "put together by ties (density 0.3)" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(BlendError, match="no way to merge"):
        baking.preview(workspace, two, merge={"how": "tiez"})


def test_the_command_bakes_a_merge(workspace, base, tmp_path, two):
    command("bake", "n1", "n2=0.5", "--how", "dare", "--seed", "4", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = command("bake", "n1", "n2=0.5", "--seed", "4", "--out", tmp_path / "more", code=1)
    assert "have no effect on a plain sum" in done.stderr and not (tmp_path / "more").exists()
