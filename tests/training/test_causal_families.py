"""Language models of every build that transformers has: each is trained with the settings' defaults on a tiny model of its own classes. The number
of learnt parameters is the one told before Start, PEFT gives the trained model's logits with what was saved, and the Playground PEFT's words."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_studio import adapters, runs
from lora_studio.errors import BaseModelError
from lora_studio.inference.text import Manner, Shelf
from lora_studio.preflight import preflight
from lora_studio.spec import Base, parse, sweep
from lora_studio.training import fused, job, loop
from tests import tiny
from tests.training import test_many
from tests.training.test_job import run_of, train

COMMON = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
HEAD, EXPERTS = {"head_dim": 8}, {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], **HEAD}
# Each is built in a way of its own: layers under other names, transposed, in one piece, with a recurrent state; experts and their routers.
SHORT = {
    "bloom": {"n_head": 4, "n_layer": 2}, "deepseek_v3": {**ROUTED, **LATENT}, "glm4_moe": ROUTED, "gpt2": {}, "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, **HEAD}, "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2}, "mamba": {"state_size": 4},
    "mixtral": {"num_local_experts": 4}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS, **LINEAR},
}  # fmt: skip
MORE = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]}, "cohere2": HEAD, "deepseek_v2": {**ROUTED, **LATENT}, "ernie4_5": HEAD,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}, "exaone4": {}, "falcon": {}, "falcon_h1": {},
    "gemma2": HEAD, "gemma3_text": HEAD, "gemma4_text": HEAD, "glm": HEAD, "glm4": HEAD, "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    "granite": {}, "helium": HEAD, "hunyuan_v1_dense": HEAD, "jamba": {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {}, "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, **HEAD}, "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, **HEAD},
    "ministral3": HEAD, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "nemotron": {}, "olmo2": {}, "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "phi": {}, "phi3": {}, "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS}, "qwen3_5_text": LINEAR, "qwen3_moe": {"num_experts": 4, **EXPERTS, **HEAD},
    "seed_oss": HEAD, "smollm3": {}, "stablelm": {}, "starcoder2": {},
}  # fmt: skip
IDS = torch.tensor([[5, 9, 31, 77, 120, 44]])


def write(folder, kind: str, **more):
    """A tiny model of that type with random weights, and a tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **(SHORT | MORE)[kind], **more})).float().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def tree_of(base, rows, **method) -> dict:
    found = {**tiny.tree(base, rows), "schedule": {"steps": 2, "batch_size": 2}, "validation": {"size": 0}, "output": {}}
    return {**found, "method": {**found["method"], **method}, "optim": {"lr": 1e-2}}


def word_by_word(model, ids: list[int], most: int, ends: set[int]) -> list[int]:
    """The likeliest tokens, each from the whole text before it, without a cache."""
    found = []
    with torch.no_grad():
        while len(found) < most and (token := int(model(torch.tensor([[*ids, *found]]), use_cache=False).logits[0, -1].argmax())) not in ends:
            found.append(token)
    return found


@pytest.mark.parametrize("kind", [*SHORT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def test_it_is_trained_as_told_and_loads_in_peft(workspace, chat_rows, tmp_path, monkeypatch, kind):
    base, kept = write(tmp_path / kind, kind), {}
    tree = tree_of(base, chat_rows)
    report = preflight(workspace, parse(tree))
    assert report.can_start, [problem.sentence for problem in report.problems]

    class Keeping(loop.Trainer):
        def _finish(self, reason):
            outcome = super()._finish(reason)
            kept["model"] = self.model.eval()
            return outcome

    monkeypatch.setattr(job.loop, "Trainer", Keeping)
    folder = run_of(workspace, tree)
    (started,) = [event for event in train(folder) if event["kind"] == "started"]
    assert report.facts["trainable"] == started["trainable"] > 0 and report.facts["targets"] == started["targets"]
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad(), fused.removed(kept["model"]):
        plain = fresh(IDS, use_cache=False).logits
        theirs = peft.PeftModel.from_pretrained(fresh, str(folder / "adapter")).eval()
        loaded = theirs(IDS, use_cache=False).logits
        assert torch.allclose(loaded, kept["model"](IDS, use_cache=False).logits, atol=1e-5) and not torch.allclose(loaded, plain, atol=1e-5)
    shelf = Shelf(Base(id=str(base)), precision="fp32")
    shelf.put("mine", adapters.read(folder / "adapter").modules)
    assert torch.allclose(shelf.logits(IDS[0].tolist(), weights={"mine": 1.0}), loaded[0], atol=1e-5)
    answer = shelf.answer("red fox", weights={"mine": 1.0}, manner=Manner(longest=4, temperature=0.0))
    "".join(answer)
    assert answer.tokens == word_by_word(theirs, shelf.prompt("red fox")[0], 4, shelf.prompt("red fox")[1])


@pytest.mark.parametrize("targets", [["q_a_proj", "gate_proj", "up_proj", "down_proj"], ["gate_proj"]])
def test_layers_that_peft_takes_for_experts_are_refused_before_step_1(workspace, chat_rows, tmp_path, targets):
    """The first block is dense; PEFT would leave its layers out, and put an adapter on the experts of the others instead."""
    tree = tree_of(write(tmp_path / "base", "deepseek_v3"), chat_rows, targets=targets)
    folder = run_of(workspace, tree)
    with pytest.raises(BaseModelError, match="method.targets"):
        train(folder)
    assert not [event for event in runs.read_all(folder) if event["kind"] == "step"]


def test_experts_alone_and_what_mamba_reads_past_its_layer_are_told_before_start(workspace, chat_rows, tmp_path):
    mixture = write(tmp_path / "moe", "qwen3_moe")
    told = [problem.sentence for problem in preflight(workspace, parse(tree_of(mixture, chat_rows))).problems if problem.level == "note"]
    assert any("is a mixture of experts: the adapter goes on k_proj, o_proj, q_proj, v_proj," in sentence for sentence in told)
    report = preflight(workspace, parse(tree_of(mixture, chat_rows, targets=["gate_proj"])))
    assert not report.can_start and any("No layer of" in problem.sentence for problem in report.problems)
    with pytest.raises(BaseModelError, match=r"PEFT puts no adapter on out_proj of .*Mamba"):
        train(run_of(workspace, tree_of(write(tmp_path / "mamba", "mamba"), chat_rows, targets=["out_proj"])))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "gpt2"])
def test_several_at_once_learn_what_each_learns_alone(workspace, chat_rows, tmp_path, kind):
    """Packed, padded, and on weights that lie transposed; dropout would draw otherwise, so there is none."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    tree = test_many.text_tree(write(tmp_path / kind, kind, **still), chat_rows)
    whole = test_many.made(workspace, tree, [{"compute.seed": 0}, {"compute.seed": 1, "method.rank": 3}], keep="all")
    test_many.train(whole)
    for number, one in enumerate(sweep.variants(sweep.parse(runs.settings.read_tree(whole / "spec.yaml")))):
        own = load_file(test_many.alone(workspace, one.spec) / "adapter" / adapters.WEIGHTS)
        (found,) = [load_file(path) for path in sorted(whole.glob("adapters/*/adapter_model.safetensors"))[number : number + 1]]
        assert own.keys() == found.keys() and all(torch.allclose(own[name], found[name], atol=1e-4) for name in own)
