"""The fast paths: each equal to the plain one, reversible, and out of the way where it does not fit."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from lora_studio.training import fused, packed
from tests import tiny
from tests.benchmarks import text as benchmark
from tests.training.test_packed import (
    DOCUMENTS,
    adapted,
    assert_same_training,
    gemma,
    gradients,
    packed_loss,
    padded_loss,
    stir,
)

FAMILIES = {
    "llama": dict(kind="llama"),
    "qwen3": dict(kind="qwen3"),
    "mistral": dict(kind="mistral", sliding_window=4),
    "llama with biases": dict(kind="llama", attention_bias=True, mlp_bias=True),
}


class Largest(TorchDispatchMode):
    """Remembers the most elements any result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


# The loss


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 64, None])
def test_linear_cross_entropy_is_cross_entropy(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(37, 12, dtype=torch.float64), torch.randint(0, 37, (50,))
    fast = fused.linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    plain = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=0)
    (found,), (expected,) = torch.autograd.grad(fast * 0.3, hidden), torch.autograd.grad(plain * 0.3, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_linear_cross_entropy_is_close_in_every_precision(dtype, tolerance):
    torch.manual_seed(0)
    hidden = torch.randn(40, 16).to(dtype).requires_grad_()
    weight, labels = torch.randn(300, 16).to(dtype), torch.randint(0, 300, (40,))
    exact = hidden.detach().double().requires_grad_()
    plain = F.cross_entropy(exact @ weight.double().t(), labels, reduction="sum")
    fast = fused.linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert fast.dtype == torch.float32
    assert abs(fast.item() - plain.item()) <= tolerance * plain.item()
    (found,), (expected,) = torch.autograd.grad(fast, hidden), torch.autograd.grad(plain, exact)
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_a_hopeless_label_costs_a_finite_loss():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[200.0], [-200.0]])
    assert fused.linear_cross_entropy(hidden, weight, torch.tensor([1])).item() == pytest.approx(400)


def test_no_tensor_holds_all_logits():
    hidden, weight = torch.randn(96, 8, requires_grad=True), torch.randn(1000, 8)
    with Largest() as largest:
        fused.linear_cross_entropy(hidden, weight, torch.randint(0, 1000, (96,)), chunk=16).backward()
    assert largest.elements == 16 * 1000


def test_a_bias_or_a_trained_head_is_refused_by_name():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(packed.Unsupported, match="bias"):
        fused.linear_cross_entropy(hidden, weight, labels, bias=torch.zeros(9))
    with pytest.raises(packed.Unsupported, match="trained"):
        fused.linear_cross_entropy(hidden, weight.requires_grad_(), labels)


def test_an_adapted_or_softcapped_head_is_refused_by_name():
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(packed.Unsupported, match="head is a Linear|head is a"):
        fused.head_weight(get_peft_model(tiny.model(tie_word_embeddings=False), config))
    with pytest.raises(packed.Unsupported, match="final_logit_softcapping"):
        fused.head_weight(gemma("gemma2"))


# The modules


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_paths_train_as_peft_does(family):
    model = adapted(**FAMILIES[family])
    plain, expected = padded_loss(model).item(), gradients(model, padded_loss(model))
    counts = fused.install(model)
    assert counts["linear"] == 14 and counts["shared input"] == 4 and counts["gated"] == 2 and counts["norm"] >= 5
    found = gradients(model, packed_loss(model))
    assert packed_loss(model).item() == pytest.approx(plain, rel=1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_gemma_keeps_its_own_norms_and_trains_the_same():
    model = gemma("gemma3", sliding_window=4)
    plain, expected = padded_loss(model).item(), gradients(model, padded_loss(model))
    assert fused.install(model) == {"linear": 14, "shared input": 4}
    found = gradients(model, packed_loss(model))
    assert packed_loss(model).item() == pytest.approx(plain, rel=1e-6)
    assert all((found[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in expected.items())


def test_fast_paths_alone_serve_padded_batches_too():
    model = adapted()
    plain = padded_loss(model)
    expected = gradients(model, plain)
    fused.install(model)
    found = gradients(model, padded_loss(model))
    assert padded_loss(model).item() == pytest.approx(plain.item(), rel=1e-6)
    assert all((found[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in expected.items())


def test_rank_stabilised_and_mixed_ranks_are_honoured():
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=True, rank_pattern={"k_proj": 2}, target_modules="all-linear")
    model = stir(get_peft_model(tiny.model(), config))
    plain = padded_loss(model)
    expected = gradients(model, plain)
    assert fused.install(model)["linear"] == 14
    found = gradients(model, packed_loss(model))
    assert all((found[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in expected.items())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"], ["k_proj", "down_proj"]])
def test_any_choice_of_targets_trains_the_same(targets):
    model = stir(get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=targets)))
    plain = padded_loss(model)
    expected = gradients(model, plain)
    assert fused.install(model)["linear"] == 2 * len(targets)
    found = gradients(model, packed_loss(model))
    assert all((found[name] - gradient).norm() <= 1e-5 * gradient.norm() for name, gradient in expected.items())


class Crossed(torch.nn.Module):
    """An attention-like parent whose projections do not share their input."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, other):
        if self.how == "another input":
            return self.q_proj(x) + self.k_proj(other) + self.v_proj(other)
        if self.how == "a changed input":
            x = x.clone()
            q = self.q_proj(x)
            x.mul_(2)
            return q + self.k_proj(x) + self.v_proj(x)
        if self.how == "only one":
            return self.q_proj(x)
        if self.how == "another grad mode":
            with torch.no_grad():
                q = self.q_proj(x)
            return q + self.k_proj(x) + self.v_proj(x)
        return self.v_proj(x) + self.q_proj(x) + self.k_proj(x)


@pytest.mark.parametrize("how", ["another input", "a changed input", "only one", "another grad mode", "another order"])
def test_projections_that_share_no_input_are_still_right(how):
    torch.manual_seed(0)
    model = stir(get_peft_model(Crossed(how), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])))
    x, other = torch.randn(5, 6), torch.randn(5, 6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run():
        with torch.set_grad_enabled(how != "a changed input"):  # autograd itself forbids that one
            output = model(x, other)
        slopes = torch.autograd.grad(output.sum(), trained, allow_unused=True) if output.requires_grad else []
        return [output, *(torch.zeros(()) if slope is None else slope for slope in slopes)]

    expected = run()
    assert fused.install(model) == {"linear": 3, "shared input": 1}
    for _ in range(3):
        for found, exact in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, exact.expand_as(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_fast_paths_changes_no_gradient(reentrant):
    model = adapted()
    fused.install(model)
    expected = gradients(model, packed_loss(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, packed_loss(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)
    groups = [module.forward.func for module in model.modules() if "forward" in module.__dict__]
    assert all(group.members and not group.turns for group in groups if isinstance(group, fused.Siblings))


def test_bfloat16_keeps_float32_masters_and_stays_near():
    model = adapted()
    exact = gradients(model, packed_loss(model))
    inner = packed.bare(model)
    for module in inner.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter.bfloat16(), requires_grad=False))
    fused.install(model)
    found = gradients(model, packed_loss(model))
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_install_then_remove_is_identity():
    model = adapted()
    before, keys = padded_loss(model).item(), list(model.state_dict())
    forwards = {name: dict(module.__dict__) for name, module in model.named_modules()}
    fused.install(model)
    assert list(model.state_dict()) == keys
    fused.remove(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == forwards
    assert padded_loss(model).item() == before


def test_installing_twice_changes_nothing():
    model = adapted()
    fused.install(model)
    once = packed_loss(model).item()
    assert fused.install(model) == {}
    assert packed_loss(model).item() == once


def test_a_disabled_adapter_gives_the_base():
    model = adapted().eval()
    batch = torch.tensor([DOCUMENTS[2]])
    with model.disable_adapter():
        expected = model(batch).logits
    fused.install(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(batch).logits, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(batch).logits, expected)


def test_merging_switching_and_adding_adapters_are_followed():
    model = adapted().eval()
    batch = torch.tensor([DOCUMENTS[2]])
    fused.install(model)
    one = model(batch).logits
    model.add_adapter("two", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    model.set_adapter("two")
    other = model(batch).logits
    fused.remove(model)
    torch.testing.assert_close(other, model(batch).logits, rtol=1e-5, atol=1e-5)
    fused.install(model)
    model.set_adapter("default")
    torch.testing.assert_close(model(batch).logits, one, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(batch).logits, one, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(batch).logits, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "bias": "none"}])
def test_what_does_not_fit_is_left_alone(settings):
    kind = {"attention_bias": True, "mlp_bias": True} if "lora_bias" in settings else {}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny.model(**kind), config)
    assert "linear" not in fused.install(model)


def test_a_trained_norm_is_left_alone():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = stir(get_peft_model(tiny.model(), config))
    plain = padded_loss(model)
    fused.install(model)
    assert_same_training(model, packed_loss(model), plain)


def test_autocast_is_left_to_peft():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = padded_loss(model).item()
        fused.install(model)
        assert padded_loss(model).item() == pytest.approx(expected, rel=1e-2)


def test_generation_is_unaffected():
    model = adapted().eval()
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    prompt = torch.tensor([DOCUMENTS[0]])
    expected = model.generate(input_ids=prompt, **options)
    fused.install(model)
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)


def test_saving_and_copying_are_unaffected(tmp_path):
    model = adapted()
    expected = get_peft_model_state_dict(model)
    fused.install(model)
    model.save_pretrained(tmp_path)
    assert get_peft_model_state_dict(model).keys() == expected.keys()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in twin.named_parameters() if "lora_B" in n).zero_()
    assert packed_loss(twin).item() != packed_loss(model).item()
    fused.remove(twin)
    assert fused.install(model) == {}


@pytest.mark.slow
def test_kept_memory_is_not_faulted_in_again():
    """In a process of its own, as a worker is: the request lasts. The heap settles over the first turns."""
    code = (
        "import resource, torch\nfrom lora_studio.training import fused\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "kept = fused.keep_memory()\n"
        "for turn in range(8):\n    before = faults()\n    [torch.zeros(2**21) for _ in range(8)]\n"
        "print(int(kept), faults() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    assert faults < 1000 if kept else not sys.platform.startswith("linux")


# The probe


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_finds_no_difference_and_leaves_no_trace(family):
    model = adapted(**FAMILIES[family])
    fused.install(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fused.self_check(model, DOCUMENTS[:2]) <= 1e-6
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_self_check_sees_a_wrong_adapter_path(monkeypatch):
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    fused.install(model)
    right = fused._linear_plan

    def wrong(module):
        (weight, bias, scale), down, up = right(module)
        return (weight, bias, 2 * scale), down, up

    monkeypatch.setattr(fused, "_linear_plan", wrong)
    assert fused.self_check(model, DOCUMENTS[:2]) > 1e-5


def test_a_model_that_looks_into_its_mask_is_refused(monkeypatch):
    model = adapted()
    monkeypatch.setattr(packed, "hidden", lambda model, batch: batch.mask)
    with pytest.raises(packed.Unsupported, match="cannot run a packed row"):
        fused.self_check(model, DOCUMENTS[:2])


def test_the_benchmark_measures_exact_work():
    exact = benchmark.exactness()
    assert exact["loss"] <= 1e-6 and exact["gradients"] <= 1e-5
