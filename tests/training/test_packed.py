"""Packed rows: the same loss and gradients as padded batches, and no document sees another."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_studio.training import fused, packed
from tests import tiny

DOCUMENTS = [[5, 9, 31, 7, 88, 12, 40], [3, 4], [60, 61, 17, 18, 19, 90, 91, 33, 5, 6, 7], [8, 20, 21]]
FAMILIES = {
    "llama": dict(kind="llama"),
    "llama without grouping": dict(kind="llama", num_key_value_heads=4, tie_word_embeddings=False),
    "qwen3": dict(kind="qwen3"),
    "mistral, window of 4": dict(kind="mistral", sliding_window=4),
    "mistral, wide window": dict(kind="mistral", sliding_window=64),
}


def adapted(kind: str = "llama", *, dropout: float = 0.0, **changes):
    """A tiny adapted model in float32 whose B is not zero."""
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model(kind, **changes), config)
    return stir(model)


def gemma(kind: str, **changes):
    """A tiny adapted Gemma."""
    config_class, model_class = {
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    inner = model_class(
        config_class(
            vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, **changes,
        )
    )  # fmt: skip
    return stir(get_peft_model(inner, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")))


def stir(model):
    """Give every adapter parameter a value of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def packed_loss(model, documents=DOCUMENTS) -> torch.Tensor:
    """Mean loss of the next token, the fast way."""
    batch = packed.concatenate(documents, device="cpu")
    labelled = batch.position_ids[0] > 0
    with packed.attention(model):
        states = packed.hidden(model, batch)[labelled.roll(-1)]
    total = fused.linear_cross_entropy(states, fused.head_weight(model), batch.input_ids[0][labelled])
    return total / labelled.sum()


def padded_loss(model, documents=DOCUMENTS) -> torch.Tensor:
    """Mean loss of the next token as PEFT and transformers compute it on a padded batch."""
    longest = max(map(len, documents))
    ids = torch.tensor([list(document) + [0] * (longest - len(document)) for document in documents])
    mask = torch.tensor([[1] * len(document) + [0] * (longest - len(document)) for document in documents])
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """Gradients of the trained parameters, by name; none are left in the model."""
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return found


def assert_same_training(model, fast, plain):
    """Losses to 1e-6 and every gradient to 1e-5, relative."""
    assert abs(fast.item() - plain.item()) <= 1e-6 * plain.item()
    ours, theirs = gradients(model, fast), gradients(model, plain)
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        assert expected.norm() > 0, name
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_positions_restart_and_boundaries_accumulate():
    batch = packed.concatenate([[4, 5, 6], torch.tensor([7]), [8, 9]], device="cpu")
    assert batch.input_ids.tolist() == [[4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.lengths == (3, 1, 2) and batch.longest == 3
    assert batch.boundaries.tolist() == [0, 3, 4, 6] and batch.boundaries.dtype == torch.int32


@pytest.mark.parametrize("documents", [[], [[1, 2], []]])
def test_an_empty_document_is_an_error(documents):
    with pytest.raises(ValueError, match="at least one token"):
        packed.concatenate(documents, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_equals_padded_training(family):
    model = adapted(**FAMILIES[family])
    assert_same_training(model, packed_loss(model), padded_loss(model))


@pytest.mark.parametrize(("kind", "changes"), [("gemma", {}), ("gemma3", {"sliding_window": 4})])
def test_gemma_trains_the_same_packed(kind, changes):
    model = gemma(kind, **changes)
    assert_same_training(model, packed_loss(model), padded_loss(model))


def test_attention_softcap_is_refused_by_name():
    model = gemma("gemma2", final_logit_softcapping=None)
    with pytest.raises(packed.Unsupported, match="softcap"):
        packed_loss(model)


def test_attention_dropout_is_refused_in_training_only():
    model = adapted(attention_dropout=0.1)
    with pytest.raises(packed.Unsupported, match="attention dropout"):
        packed_loss(model)
    model.eval()
    assert packed_loss(model).item() == pytest.approx(padded_loss(model).item(), rel=1e-6)


def test_a_recurrent_model_is_refused_by_name():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(packed.Unsupported, match="Mamba"):
        packed.refuse(transformers.MambaForCausalLM(config))


def test_an_unknown_attention_option_is_refused_by_name():
    mask = packed.DocumentMask(packed.concatenate([[1, 2]], device="cpu"))
    heads = torch.zeros(1, 1, 2, 4)
    with pytest.raises(packed.Unsupported, match="s_aux"):
        packed._attend(torch.nn.Identity(), heads, heads, heads, mask, s_aux=torch.zeros(1))


@pytest.mark.parametrize("family", ["llama", "mistral, window of 4"])
def test_no_document_sees_another(family):
    model = adapted(**FAMILIES[family]).eval()
    first, second = packed.concatenate(DOCUMENTS, device="cpu"), packed.concatenate([[70] * 7, *DOCUMENTS[1:]], device="cpu")
    with torch.no_grad(), packed.attention(model):
        before, after = packed.hidden(model, first), packed.hidden(model, second)
    assert not torch.allclose(before[:7], after[:7])
    torch.testing.assert_close(before[7:], after[7:], rtol=1e-6, atol=1e-6)


def test_no_document_sees_its_own_future():
    model = adapted().eval()
    first, second = packed.concatenate([[5, 6, 7, 8]], device="cpu"), packed.concatenate([[5, 6, 7, 99]], device="cpu")
    with torch.no_grad(), packed.attention(model):
        torch.testing.assert_close(packed.hidden(model, first)[:3], packed.hidden(model, second)[:3])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral, window of 4"])
def test_checkpointing_changes_no_gradient_though_backward_runs_outside(family, reentrant):
    model = adapted(**FAMILIES[family])
    expected = gradients(model, packed_loss(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, packed_loss(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def test_leaving_restores_the_attention_of_the_model():
    model = adapted()
    before = model.config._attn_implementation
    expected = padded_loss(model).item()
    with packed.attention(model):
        assert model.config._attn_implementation == packed.NAME
    assert model.config._attn_implementation == before
    assert padded_loss(model).item() == expected


def test_an_error_inside_restores_the_attention_too():
    model = adapted()
    before = model.config._attn_implementation
    with pytest.raises(KeyError), packed.attention(model):
        raise KeyError
    assert model.config._attn_implementation == before


def test_a_plain_forward_inside_is_refused_rather_than_mixed():
    model = adapted()
    with packed.attention(model), pytest.raises(packed.Unsupported, match=r"packed\.hidden"):
        padded_loss(model)


def test_hidden_states_are_those_of_each_document_alone():
    model = adapted().eval()
    batch = packed.concatenate(DOCUMENTS, device="cpu")
    with torch.no_grad():
        alone = [packed.backbone(model)(torch.tensor([document])).last_hidden_state[0] for document in DOCUMENTS]
        torch.testing.assert_close(packed.hidden(model, batch), torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_explicit_attention_is_as_close_as_the_kernel_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    mask = packed.DocumentMask(packed.concatenate([[0] * 70, [0] * 5, [0] * 130], device="cpu"))
    exact = [torch.randn(1, 4, 205, 16, generator=generator, requires_grad=True) for _ in range(3)]
    towards = torch.randn(1, 205, 4, 16, generator=generator)

    def run(tensors):
        output = packed.by_document(*tensors, mask, None)
        return [output, *torch.autograd.grad(output, tensors, towards.to(output.dtype))]

    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    for wide, narrow in zip(run(exact), run(rounded), strict=True):
        assert (wide - narrow.float()).norm() <= 0.01 * wide.norm()


def test_explicit_attention_has_the_gradients_of_the_definition():
    query, key, value = (torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *qkv: packed._Explicit.apply(*qkv, 0.7), (query, key, value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.7)
    torch.testing.assert_close(packed._Explicit.apply(query, key, value, 0.7), expected)


def test_every_signature_of_the_varlen_kernel_is_served(monkeypatch):
    """The options this torch lacks are made up for: grouped heads repeated, the scale folded into the queries."""
    batch = packed.concatenate(DOCUMENTS, device="cpu")
    tokens = sum(batch.lengths)
    query, key, value = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)
    mask = packed.DocumentMask(batch, 4)
    expected = packed.by_document(query, key, value, mask, 0.3)
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def stand_in(q, k, v, ends, _ends, longest, _longest, *, window_size, scale=None, enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        assert longest == max(batch.lengths) and ends.tolist() == batch.boundaries.tolist()
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return packed.by_document(q, k, v, packed.DocumentMask(batch, window_size[0] + 1), scale)[0]

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    for has in ({"window_size"}, {"window_size", "scale"}, {"window_size", "scale", "enable_gqa"}):
        monkeypatch.setattr(packed, "_varlen_parameters", lambda has=has: frozenset(has))
        found = packed._torch_varlen(query, key, value, mask, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS = {
    "phi3": {}, "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "smollm3": {},
    "olmo2": {}, "starcoder2": {"sliding_window": 4}, "gpt_neox": {}, "mixtral": {"num_local_experts": 4}, "glm4": {},
}  # fmt: skip
REFUSED = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of kind conv"), "gpt2": ({}, "attention dropout"),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "s_aux"), "cohere": ({}, "logit_scale"),
    "qwen3_next": ({"num_experts": 4, "layer_types": ["linear_attention", "full_attention"]}, "recurrent state"),
}  # fmt: skip


def other(kind: str, changes: dict):
    """A tiny adapted model of another family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    targets = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_config(config).float(), targets).train()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_pass_the_check(kind):
    model = other(kind, OTHERS[kind])
    assert fused.install(model)["linear"] >= 8
    assert fused.self_check(model, DOCUMENTS[:2]) <= 1e-6


@pytest.mark.parametrize("kind", REFUSED)
def test_families_that_cannot_are_refused_by_name(kind):
    changes, reason = REFUSED[kind]
    model = other(kind, changes)
    fused.install(model)
    with pytest.raises(packed.Unsupported, match=reason):
        fused.self_check(model, DOCUMENTS[:2])
