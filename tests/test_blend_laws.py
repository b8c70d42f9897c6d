"""The laws of the exact blend, from PEFT files to the written sum, against a dense reference in fp64 that shares no code with it:
scales by r and alpha patterns and rank stabilisation, weights by number and by layer pattern, every kind of layer, overlapping targets."""

import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lora_studio import adapters, blend

LAYERS = {
    "model.embed_tokens": ("embedding", 12, 20), "model.layers.0.self_attn.q_proj": ("linear", 24, 16), "model.layers.1.self_attn.q_proj": ("linear", 24, 16),
    "model.layers.1.mlp.up_proj": ("linear", 8, 16), "model.layers.10.self_attn.q_proj": ("linear", 5, 7), "down_blocks.1.resnets.0.conv1": ("conv", 8, 6),
    "mid_block.attentions.0.proj_in": ("conv", 6, 8),
}  # fmt: skip
KERNELS = {"down_blocks.1.resnets.0.conv1": 3, "mid_block.attentions.0.proj_in": 1}
PATTERNS = [
    "layers.1", "layers.0-1", "model.layers.1-10", "mlp", "*.mlp", "self_attn.q_proj", "embed_tokens", "model", "down_blocks.1", "mid_block", "*.resnets.0",
    "model.layers.10.self_attn.q_proj", "layers.*.self_attn", "0", "conv1",
]  # fmt: skip
laws = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
numbers = st.sampled_from([1.0, -1.0, 0.0, 0.3, -0.75, 2.5, 1e-3, 40.0])


class Drawn:
    """A PEFT adapter as files, and the same as dense fp64 updates by PEFT's documented rules: alpha/r, or alpha/√r with rslora, each by
    the layer's pattern."""

    def __init__(self, draw):
        seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, unique=True))
        rank, alpha, rslora = draw(st.integers(1, 7)), draw(st.sampled_from([1, 4, 16, 33.3, 0.25])), draw(st.booleans())
        ranks = {name: draw(st.integers(1, 9)) for name in names if draw(st.booleans())}
        alphas = {name: draw(st.sampled_from([2, 0.5, 24])) for name in names if draw(st.booleans())}
        size, tensors, self.dense = draw(st.sampled_from([1.0, 1e-3, 1e-6])), {}, {}
        for name in names:
            kind, out, into = LAYERS[name]
            r, a = ranks.get(name, rank), alphas.get(name, alpha)
            kernel = [KERNELS[name]] * 2 if kind == "conv" else []
            A = torch.randn(r, into, *kernel, generator=seed)
            B = torch.randn(out, r, *[1] * len(kernel), generator=seed) * size
            ends = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"base_model.model.{name}.{end}": tensor for end, tensor in zip(ends, (A, B))}
            update = a / (math.sqrt(r) if rslora else r) * torch.einsum("or,ri->oi", B.double().flatten(1), A.double().flatten(1))
            self.dense[name] = update.T if kind == "embedding" else update.reshape(out, into, *kernel)
        config = {
            "peft_type": "LORA", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks,
            "alpha_pattern": alphas, "target_modules": names,
        }  # fmt: skip
        self.modules = adapters.read({adapters.WEIGHTS: save(tensors, {"format": "pt"}), adapters.CONFIG: json.dumps(config).encode()}).modules


def regex(pattern: str) -> str:
    words = [
        "[^.]+" if word == "*" else f"(?:{'|'.join(map(str, range(*(int(end) + at for at, end in enumerate(word.split('-'))))))})" if re.fullmatch(r"\d+-\d+", word) else re.escape(word)
        for word in pattern.split(".")
    ]  # fmt: skip
    return r"(?:.*\.)?" + r"\.".join(words) + r"(?=\.|$)"


def weight_of(weight, name: str) -> float:
    """The rule of weights by layer pattern, by regular expressions."""
    if not isinstance(weight, dict):
        return weight
    found = []
    for pattern in weight:
        match = re.match(regex(pattern), name) if pattern else None
        if match:
            words = pattern.split(".")
            ranges = [word.split("-") for word in words if re.fullmatch(r"\d+-\d+", word)]
            found.append((len(match[0]), len(words), -words.count("*"), -len(ranges), -sum(int(high) - int(low) for low, high in ranges), pattern))
    return weight[max(found)[-1]] if found else weight.get("", 1.0)


def draw_weight(draw, names):
    """A number, or numbers for patterns that mean some of these layers."""
    if draw(st.booleans()):
        return draw(numbers)
    fitting = [pattern for pattern in PATTERNS if any(re.match(regex(pattern), name) for name in names)]
    chosen = draw(st.lists(st.sampled_from(fitting), unique=True, max_size=4)) if fitting else []
    return {pattern: draw(numbers) for pattern in draw(st.sampled_from([[], [""]])) + chosen}


@st.composite
def parts(draw, least: int = 1, most: int = 4):
    """Adapters with their weights."""
    found = [Drawn(draw) for _ in range(draw(st.integers(least, most)))]
    return [(one, draw_weight(draw, one.dense)) for one in found]


def dense_sum(drawn) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for one, weight in drawn:
        for name, update in one.dense.items():
            total[name] = total.get(name, 0) + weight_of(weight, name) * update
    return total


def sizes_of(drawn) -> dict[str, float]:
    """What an error is relative to: the norm of the sum, or of its terms together where these cancel to less than a tenth."""
    terms: dict[str, float] = {}
    for one, weight in drawn:
        for name, update in one.dense.items():
            terms[name] = terms.get(name, 0.0) + abs(weight_of(weight, name)) * float(update.norm())
    return {name: float(total.norm()) if float(total.norm()) > 0.1 * terms[name] else terms[name] for name, total in dense_sum(drawn).items()}


def stacked(drawn) -> blend.Modules:
    return blend.stack([one.modules for one, _ in drawn], [weight for _, weight in drawn])


def assert_is(got: blend.Modules, drawn, tolerance: float = 1e-6) -> None:
    """The very numbers that a layer adds, in fp32, are those of the dense sum; and no layer is there that should not be."""
    sizes = sizes_of(drawn)
    assert got.keys() == {name for name, size in sizes.items() if size}
    for name, meant in dense_sum(drawn).items():
        if name in got:
            assert got[name].shape == tuple(meant.shape)
            assert float((got[name].delta().double() - meant).norm()) <= tolerance * sizes[name], name


@laws
@given(parts())
def test_a_blend_is_the_dense_sum_in_fp64_to_1e_6_and_ranks_add(drawn):
    got = stacked(drawn)
    assert_is(got, drawn)
    for name, module in got.items():
        assert module.rank == sum(one.modules[name].rank for one, weight in drawn if name in one.dense and weight_of(weight, name))


@laws
@given(parts())
def test_what_is_written_and_read_again_is_the_dense_sum(drawn):
    got = stacked(drawn)
    if got:
        files = adapters.write(adapters.with_modules(adapters.Card("peft", base="tiny"), got))
        assert_is(adapters.read(files).modules, drawn, 2e-6)


@laws
@given(parts(most=1), st.sampled_from([1.0, 1, {}, {"": 1.0}, {"": 1}]))
def test_one_adapter_at_weight_1_is_that_adapter_bit_for_bit(drawn, one):
    (parent, _), got = drawn[0], None
    got = blend.stack([parent.modules], [one])
    assert got.keys() == parent.modules.keys()
    for name, module in got.items():
        before = parent.modules[name]
        assert torch.equal(module.A, before.A) and torch.equal(module.B, before.B) and module.scale == before.scale


@laws
@given(parts(least=2), st.randoms(use_true_random=False))
def test_the_order_of_adapters_and_of_patterns_does_not_matter(drawn, shuffle):
    other = list(drawn)
    shuffle.shuffle(other)
    turned = []
    for one, weight in other:
        rows = list(weight.items()) if isinstance(weight, dict) else []
        shuffle.shuffle(rows)
        turned.append((one, dict(rows) if isinstance(weight, dict) else weight))
    assert_is(stacked(turned), drawn)


@laws
@given(parts(most=3), parts(most=2), numbers)
def test_a_blend_of_blends_is_the_blend(inner, more, weight):
    got = blend.stack([stacked(inner), *(one.modules for one, _ in more)], [weight, *(each for _, each in more)])
    whole = [(one, {name: weight * weight_of(each, name) for name in one.dense}) for one, each in inner]
    assert_is(got, [*whole, *more])


@laws
@given(parts(), numbers)
def test_a_uniform_weight_by_layer_is_the_number_bit_for_bit(drawn, number):
    modules = [one.modules for one, _ in drawn]
    plain = blend.stack(modules, [number] * len(drawn))
    for by_layer in ({"": number}, {"": number, "*": number}):
        got = blend.stack(modules, [by_layer] * len(drawn))
        assert got.keys() == plain.keys()
        for name, module in got.items():
            assert torch.equal(module.A, plain[name].A) and torch.equal(module.B, plain[name].B) and module.scale == plain[name].scale


@laws
@given(parts())
def test_the_preview_tells_the_norms_angles_and_losses_of_the_weighted_dense_updates(drawn):
    preview, given = blend.Preview([one.modules for one, _ in drawn]), [weight for _, weight in drawn]
    found, names = preview.weighted(preview.products(), given), list(LAYERS)
    weighted = [{name: weight_of(weight, name) * update for name, update in one.dense.items()} for one, weight in drawn]
    for row, left in enumerate(weighted):
        for column, right in enumerate(weighted):
            inner = sum(float((left[name] * right[name]).sum()) for name in names if name in left and name in right)
            size = math.sqrt(sum(float(update.square().sum()) for update in left.values()) * sum(float(update.square().sum()) for update in right.values()))
            assert abs(float(found[row, column]) - inner) <= 1e-9 * size
    curve, total = preview.curve(given), dense_sum(drawn)
    whole = math.sqrt(sum(float(update.square().sum()) for update in total.values()))
    assert curve.norm == pytest.approx(whole, rel=1e-6, abs=1e-9 * max(sizes_of(drawn).values()))
    meant = stacked(drawn)
    for rank in (1, 3):
        if meant and whole > 1e-3 * max(sizes_of(drawn).values()):
            assert curve.overall[min(rank, len(curve.overall) - 1)] == pytest.approx(blend.compress(meant, rank)[1].overall, rel=1e-4, abs=1e-5)
