"""Experts of a mixture: read, written, blended and baked like PEFT's own, whether a checkpoint keeps them stacked or apart."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from lora_studio import adapters, blend, checkpoints
from lora_studio.adapters import experts
from lora_studio.errors import AdapterError, BlendError

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8),
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(**COMMON, intermediate_size=48, num_local_experts=4, head_dim=8),
    "gpt_oss, square": lambda: GptOssConfig(**COMMON, intermediate_size=32, num_local_experts=4, head_dim=8),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory):
    """A tiny mixture on disk."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32).save_pretrained(folder)
    return folder


def trained(base, folder, seed=0, parameters=BOTH, **settings):
    """A PEFT folder with an adapter of the experts, none of whose factors is zero."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": parameters, **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def merged(base, *folders):
    """What PEFT makes of the base and adapters, one after another."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}}])
def test_experts_baked_are_those_that_peft_merges(base, tmp_path, settings):
    folder = trained(base, tmp_path / "adapter", **settings)
    adapter = adapters.read(folder)
    plan = checkpoints.plan(base, [(adapter, 1.0)])
    checkpoints.apply(plan, tmp_path / "baked")
    meant = merged(base, folder)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    for (name, left), right in zip(got.named_parameters(), meant.parameters()):
        assert torch.allclose(left, right, atol=2e-7, rtol=1e-6), name
    assert float((logits(got) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1e-3
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "baked" / "model.safetensors")
    assert list(before) == list(after)
    expected = {name for name in before if ("q_proj" in name or "experts" in name) and not name.endswith("bias")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    assert checkpoints.loss(plan).overall < 1e-5


@pytest.mark.parametrize("settings", [{}, {"r": 3, "lora_alpha": 5, "use_rslora": True}])
def test_targets_by_the_names_of_an_older_transformers_which_peft_takes_for_experts(tmp_path, settings):
    """PEFT then writes parameters without a module before them, and a pattern with the rank of gate and up together."""
    for kind, names in (("mixtral", ["w1", "w2", "w3"]), ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"])):
        torch.manual_seed(3)
        base = tmp_path / kind
        AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).save_pretrained(base)
        folder = trained(base, tmp_path / f"{kind} adapter", parameters=None, target_modules=["q_proj", *names], **settings)
        assert set(json.loads((folder / "adapter_config.json").read_text())["target_parameters"]) == {"gate_up_proj", "down_proj"}
        adapter = adapters.read(folder)
        assert {name.rsplit(".", 2)[1] for name in adapter.modules if "experts" in name} == {"gate_up_proj", "down_proj"}
        checkpoints.apply(checkpoints.plan(base, [(adapter, 1.0)]), tmp_path / f"{kind} baked")
        got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind} baked"))
        assert torch.allclose(got, logits(merged(base, folder)), atol=1e-5) and not torch.allclose(got, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-4)


def test_one_parameter_alone_is_read_by_its_name(base, tmp_path):
    for parameter in BOTH:
        folder = trained(base, tmp_path / parameter, parameters=[parameter])
        names = {name.rsplit(".", 2)[1] for name in adapters.read(folder).modules if "experts" in name}
        assert names == {parameter.rpartition(".")[2]}
        checkpoints.apply(checkpoints.plan(base, [(adapters.read(folder), 1.0)]), tmp_path / f"baked-{parameter}")
        got = AutoModelForCausalLM.from_pretrained(tmp_path / f"baked-{parameter}")
        assert torch.allclose(logits(got), logits(merged(base, folder)), atol=1e-5)


def test_a_written_adapter_of_experts_is_the_same_in_peft(base, tmp_path):
    folder = trained(base, tmp_path / "adapter", use_rslora=True, rank_pattern={"experts.down_proj": 2})
    adapter = adapters.read(folder)
    for even in (True, False):
        (tmp_path / f"written {even}").mkdir()
        for name, data in adapters.write(adapters.with_modules(adapter.card, adapter.modules), even=even).items():
            (tmp_path / f"written {even}" / name).write_bytes(data)
        assert torch.allclose(logits(merged(base, tmp_path / f"written {even}")), logits(merged(base, folder)), atol=1e-5)


def test_a_blend_of_experts_is_their_weighted_sum(base, tmp_path):
    left, right = trained(base, tmp_path / "left", 1), trained(base, tmp_path / "right", 2, r=2, parameters=["experts.down_proj"])
    read = [adapters.read(folder) for folder in (left, right)]
    mixed = blend.stack([adapter.modules for adapter in read], [1.0, 1.0])
    (tmp_path / "blend").mkdir()
    for name, data in adapters.write(adapters.with_modules(read[0].card, mixed)).items():
        (tmp_path / "blend" / name).write_bytes(data)
    assert torch.allclose(logits(merged(base, tmp_path / "blend")), logits(merged(base, left, right)), atol=1e-5)


def test_the_check_knows_an_expert_and_names_a_stranger(base, tmp_path):
    folder = trained(base, tmp_path / "adapter")
    shapes = adapters.base_shapes(base)
    assert not [problem for problem in adapters.check(adapters.inspect(folder), shapes) if problem.level == "error"]
    fewer = {name: shape for name, shape in shapes.items() if "layers.1." not in name}
    (problem,) = [problem for problem in adapters.check(adapters.inspect(folder), fewer) if problem.level == "error"]
    assert "layers.1." in problem.sentence


def test_parameters_that_are_no_experts_are_refused_by_name(base, tmp_path):
    folder = trained(base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["experts.gate_up_proj"]}))
    card = adapters.inspect(folder)
    assert card.variants == ("adapted parameters (target_parameters)",)
    with pytest.raises(BlendError, match="target_parameters"):
        adapters.refuse_blend({"mine": card})


def test_an_expert_more_than_the_base_has_is_refused(base, tmp_path):
    adapter = adapters.read(trained(base, tmp_path / "adapter"))
    name = next(name for name in adapter.modules if experts.SLOT.match(name))
    strange = {**adapter.modules, name.rsplit(".", 1)[0] + ".9": adapter.modules[name]}
    with pytest.raises(AdapterError, match=r"\.9"):
        checkpoints.plan(base, [(adapters.with_modules(adapter.card, strange), 1.0)])
