"""Blends against an fp64 dense sum: exact stacks, optimal compressions, true losses; and against PEFT where PEFT is right."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_studio import adapters, blend
from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank
from tests import tiny

LAYERS = {
    "a.q_proj": ("linear", 24, 16, 1), "a.k_proj": ("linear", 8, 16, 1), "b.q_proj": ("linear", 24, 16, 1),
    "conv": ("conv", 8, 6, 1), "grouped": ("conv", 8, 6, 2), "embed": ("embedding", 12, 20, 1),
}  # fmt: skip
fast = settings(max_examples=80, deadline=None, derandomize=True)


def draw_module(name: str, rank: int, scale: float, generator: torch.Generator, *, size: float = 1.0, dtype=torch.float32) -> LowRank:
    kind, out, into, groups = LAYERS[name]
    rank *= groups
    A = torch.randn((rank, into, 3, 3) if kind == "conv" else (rank, into), generator=generator)
    B = torch.randn((out, rank // groups, 1, 1) if kind == "conv" else (out, rank), generator=generator) * size
    return LowRank(A.to(dtype), B.to(dtype), scale, kind)


@st.composite
def adapter(draw, *, dtypes=(torch.float32,)):
    """An adapter on some of the layers: ranks and alphas of its own for every layer, rank-stabilised or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rslora, dtype = draw(st.booleans()), draw(st.sampled_from(dtypes))
    made = {}
    for name in draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, unique=True)):
        rank, alpha = draw(st.integers(1, 9)), draw(st.sampled_from([1, 4, 16, 33.3, 0.25]))
        size = draw(st.sampled_from([1.0, 1e-3, 1e-6]))
        made[name] = draw_module(name, rank, alpha / (math.sqrt(rank) if rslora else rank), generator, size=size, dtype=dtype)
    return made


weights_of = st.sampled_from([1.0, -1.0, 0.0, 0.3, -0.75, 2.5, 1e-3, 40.0])


def dense(modules, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """Updates as dense fp64 tensors, by einsum; grouped convolutions group by group."""
    made = {}
    for name, module in modules.items():
        groups = LAYERS[name][3] if name in LAYERS else 1
        A, B = module.A.double().flatten(1), module.B.double().flatten(1)
        made[name] = weight * module.scale * torch.cat([torch.einsum("or,ri->oi", b, a) for b, a in zip(B.chunk(groups), A.chunk(groups))])
    return made


def dense_sum(parents, weights) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for parent, weight in zip(parents, weights):
        for name, value in dense(parent, weight).items():
            total[name] = total.get(name, 0) + value
    return total


def sizes_of(parents, weights) -> dict[str, float]:
    """What an error is relative to: the norm of the sum, or of its terms together where these cancel to less than a tenth."""
    terms: dict[str, float] = {}
    for parent, weight in zip(parents, weights):
        for name, value in dense(parent, weight).items():
            terms[name] = terms.get(name, 0.0) + float(value.norm())
    sums = {name: float(value.norm()) for name, value in dense_sum(parents, weights).items()}
    return {name: sums[name] if sums[name] > 0.1 * term else term for name, term in terms.items()}


def assert_equal(got, wanted: dict[str, torch.Tensor], sizes: dict[str, float], tolerance: float) -> None:
    there = dense(got)
    for name, value in wanted.items():
        if name in there or float(value.norm()):
            assert float((there[name] - value).norm()) <= tolerance * sizes[name], name
    assert there.keys() <= wanted.keys()


parents_and_weights = st.lists(st.tuples(adapter(), weights_of), min_size=1, max_size=4)


@fast
@given(parents_and_weights)
def test_a_stack_is_the_dense_sum_to_1e_6(drawn):
    parents, weights = [parent for parent, _ in drawn], [weight for _, weight in drawn]
    got = blend.stack(parents, weights)
    assert_equal(got, dense_sum(parents, weights), sizes_of(parents, weights), 1e-6)
    for name, module in got.items():
        assert module.rank == sum(parent[name].rank for parent, weight in drawn if name in parent and weight), "ranks add"
    product = {name: module.delta() for name, module in got.items()}  # what a layer computes with, in fp32
    for name, value in dense_sum(parents, weights).items():
        if name in product:
            flat = product[name].T if LAYERS[name][0] == "embedding" else product[name].flatten(1)
            assert float((flat.double() - value).norm()) <= 1e-6 * sizes_of(parents, weights)[name]


@fast
@given(st.lists(st.tuples(adapter(dtypes=(torch.float16, torch.bfloat16, torch.float64)), weights_of), min_size=1, max_size=3))
def test_parents_of_any_dtype_are_summed_in_fp32_or_wider(drawn):
    parents, weights = [parent for parent, _ in drawn], [weight for _, weight in drawn]
    got = blend.stack(parents, weights)
    assert_equal(got, dense_sum(parents, weights), sizes_of(parents, weights), 1e-6)
    assert all(module.delta().dtype in (torch.float32, torch.float64) for module in got.values())


@fast
@given(adapter())
def test_a_blend_of_one_adapter_is_that_adapter(parent):
    got = blend.stack([parent], [1.0])
    assert got.keys() == parent.keys()
    for name, module in got.items():
        assert torch.equal(module.A, parent[name].A) and torch.equal(module.B, parent[name].B) and module.scale == parent[name].scale


@fast
@given(parents_and_weights, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(drawn, shuffle):
    other = list(drawn)
    shuffle.shuffle(other)
    first = blend.stack([parent for parent, _ in drawn], [weight for _, weight in drawn])
    second = blend.stack([parent for parent, _ in other], [weight for _, weight in other])
    assert first.keys() == second.keys()
    assert_equal(second, dense(first), sizes_of([parent for parent, _ in drawn], [weight for _, weight in drawn]), 1e-6)


@fast
@given(parents_and_weights, st.tuples(adapter(), weights_of), weights_of)
def test_a_blend_of_blends_is_the_blend(drawn, more, weight):
    inner = blend.stack([parent for parent, _ in drawn], [each for _, each in drawn])
    got = blend.stack([inner, more[0]], [weight, more[1]])
    parents, weights = [parent for parent, _ in drawn] + [more[0]], [each * weight for _, each in drawn] + [more[1]]
    assert_equal(got, dense_sum(parents, weights), sizes_of(parents, weights), 1e-6)


def test_an_adapter_taken_from_itself_leaves_nothing():
    generator = torch.Generator().manual_seed(0)
    parent = {"a.q_proj": draw_module("a.q_proj", 5, 1.3, generator)}
    assert blend.norm(blend.stack([parent, parent], [0.7, -0.7])["a.q_proj"]) < 1e-12
    assert blend.stack([parent], [0.0]) == {}


# ---- compression


@fast
@given(parents_and_weights, st.integers(1, 30))
def test_compression_is_the_eckart_young_optimum_and_its_loss_is_true(drawn, rank):
    whole = blend.stack([parent for parent, _ in drawn], [weight for _, weight in drawn])
    small, loss = blend.compress(whole, rank)
    meant, got = dense(whole), dense(small)
    apart = size = best = 0.0
    for name, value in meant.items():
        groups = LAYERS[name][3]
        spectra = [torch.linalg.svdvals(part) for part in value.chunk(groups)]
        keep = max(1, rank // groups)
        optimum = 0.0 if whole[name].rank <= rank else math.sqrt(sum(float(spectrum[keep:].square().sum()) for spectrum in spectra))
        true = float((got[name] - value).norm())
        assert small[name].rank <= max(rank, groups) or small[name].rank == whole[name].rank <= rank
        assert true <= optimum + 1e-5 * float(value.norm())
        assert loss.layers[name] == pytest.approx(true / float(value.norm()), rel=1e-6, abs=1e-8)
        apart, size, best = apart + true**2, size + float(value.norm()) ** 2, best + optimum**2
    if size:
        assert loss.overall == pytest.approx(math.sqrt(apart / size), rel=1e-6, abs=1e-8)
        assert math.sqrt(apart) <= math.sqrt(best) + 1e-5 * math.sqrt(size)


@fast
@given(parents_and_weights)
def test_the_preview_knows_the_loss_of_every_rank(drawn):
    parents, weights = [parent for parent, _ in drawn], [weight for _, weight in drawn]
    curve = blend.Preview(parents).curve(weights)
    whole = blend.stack(parents, weights)
    assert all(value >= after - 1e-12 for value, after in zip(curve.overall, curve.overall[1:]))
    for rank in range(1, len(curve.overall), 3):
        _, loss = blend.compress(whole, rank)
        assert curve.overall[rank] == pytest.approx(loss.overall, rel=1e-4, abs=2e-6)
        for name in whole:
            tail = curve.layers[name]
            assert tail[min(rank, len(tail) - 1)] == pytest.approx(loss.layers[name], rel=1e-4, abs=2e-6)


def test_one_preview_answers_for_all_weights_and_names_the_rank_for_a_loss():
    generator = torch.Generator().manual_seed(1)
    parents = [{name: draw_module(name, rank, 0.5, generator) for name in ("a.q_proj", "b.q_proj")} for rank in (4, 7)]
    preview = blend.Preview(parents)
    for weights in ([1.0, 1.0], [0.2, -3.0], [0.0, 1.0], [0.0, 0.0]):
        curve = preview.curve(weights)
        value = dense_sum(parents, weights)
        spectra = [torch.linalg.svdvals(part).square() for part in value.values()]
        whole = float(sum(spectrum.sum() for spectrum in spectra))
        for rank in range(len(curve.overall)):
            expected = math.sqrt(float(sum(spectrum[rank:].sum() for spectrum in spectra)) / whole) if whole else 0.0
            assert curve.overall[rank] == pytest.approx(expected, abs=1e-6)
    assert preview.curve([1.0, 1.0]).rank_for(1e-5) == 11
    assert preview.curve([1.0, 0.0]).rank_for(1e-5) == 4
    assert preview.curve([1.0, 1.0]).rank_for(1.0) == 1


def test_compressed_factors_are_balanced_so_that_fp16_keeps_tiny_updates():
    generator = torch.Generator().manual_seed(2)
    parents = [{"a.q_proj": draw_module("a.q_proj", 8, 1.0, generator, size=1e-6)} for _ in range(2)]
    small, _ = blend.compress(blend.stack(parents, [1.0, 1.0]), 4)
    module = small["a.q_proj"]
    assert blend.difference({"a.q_proj": module.cast(torch.float16)}, small).overall < 1e-3
    assert torch.allclose(module.A.norm(dim=1), module.B.norm(dim=0), rtol=1e-4)


def test_compressing_to_a_rank_it_has_changes_nothing():
    parent = {name: draw_module(name, 3, 0.7, torch.Generator().manual_seed(5)) for name in ("a.q_proj", "conv")}
    for rank in (3, 4, 100):
        small, loss = blend.compress(parent, rank)
        assert loss.overall == 0.0 and all(small[name] is parent[name] for name in parent)


def test_it_never_forms_the_dense_matrix():
    # 200,000 × 150,000 would take 120 GB in fp32; the factors take 11 MB.
    generator = torch.Generator().manual_seed(3)
    parents = [{"big": LowRank(torch.randn(4, 150_000, generator=generator), torch.randn(200_000, 4, generator=generator))} for _ in range(2)]
    whole = blend.stack(parents, [1.0, -0.5])
    small, loss = blend.compress(whole, 4)
    assert small["big"].rank == 4 and 0.4 < loss.overall < 0.5
    assert blend.Preview(parents).curve([1.0, -0.5]).overall[4] == pytest.approx(loss.overall, rel=1e-6)
    assert blend.difference(small, whole).overall == pytest.approx(loss.overall, rel=1e-6)


# ---- measures


@fast
@given(adapter(), adapter())
def test_norms_angles_and_differences_are_those_of_the_dense_updates(left, right):
    first, second = dense(left), dense(right)
    for name, module in left.items():
        assert blend.norm(module) == pytest.approx(float(first[name].norm()), rel=1e-9)
    shared = {name: float((first[name] * second[name]).sum()) for name in first.keys() & second.keys()}
    for name, value in shared.items():
        assert blend.inner(left[name], right[name]) == pytest.approx(value, abs=1e-9 * float(first[name].norm() * second[name].norm()))
    sizes = [math.sqrt(sum(float(value.square().sum()) for value in part.values())) for part in (first, second)]
    table = blend.cosines([left, right])
    assert table[0][0] == table[1][1] == 1.0
    assert table[0][1] == table[1][0] == pytest.approx(sum(shared.values()) / sizes[0] / sizes[1], abs=1e-9)
    gap = dense_sum([left, right], [1.0, -1.0])
    expected = math.sqrt(sum(float(value.square().sum()) for value in gap.values())) / sizes[1]
    assert blend.difference(left, right).overall == pytest.approx(expected, rel=1e-6)


def test_the_difference_of_an_adapter_to_itself_is_0_and_to_nothing_1():
    generator = torch.Generator().manual_seed(4)
    parent = {"a.q_proj": draw_module("a.q_proj", 5, 1.3, generator)}
    assert blend.difference(parent, parent).overall < 1e-14
    assert blend.difference({}, parent) == blend.Loss(1.0, {"a.q_proj": 1.0})
    assert blend.difference(parent, {}).overall == math.inf


# ---- what is refused


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, math.nan], [1.0, math.inf], [1.0, "2"], [1.0, None], [True, 1.0], [1.0, 1e30]])
def test_weights_that_are_no_numbers_or_too_few_are_refused(weights):
    parents = [{"a.q_proj": draw_module("a.q_proj", 2, 1.0, torch.Generator().manual_seed(0))}] * 2
    for ask in (lambda: blend.stack(parents, weights), lambda: blend.Preview(parents).curve(weights)):
        with pytest.raises(BlendError) as caught:
            ask()
        assert caught.value.key in ("blend.count", "blend.weight")


def test_shapes_that_differ_are_named():
    left = {"x": LowRank(torch.zeros(2, 8), torch.zeros(8, 2))}
    for A, B, kind in [((2, 9), (8, 2), "linear"), ((2, 8), (8, 2), "embedding"), ((2, 8, 3), (8, 2, 1), "conv")]:
        right = {"x": LowRank(torch.zeros(A), torch.zeros(B), kind=kind)}
        for ask in (lambda right=right: blend.stack([left, right], [1.0, 0.0]), lambda right=right: blend.Preview([left, right])):
            with pytest.raises(BlendError, match=r"The layer x is linear 8 × 8 in one adapter"):
                ask()


def test_a_blend_that_becomes_infinite_is_refused():
    parents = [{"x": LowRank(torch.ones(2, 8), torch.full((8, 2), 3e38))}] * 2
    with pytest.raises(BlendError, match="The layer x becomes infinite"):
        blend.stack(parents, [1.0, 100.0])


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "4"])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(BlendError, match="whole number"):
        blend.compress({}, rank)


# ---- PEFT as a witness


def peft_pair(tmp_path, first: dict, second: dict):
    """Two PEFT folders on a tiny Llama with random B, and the model with both."""
    import peft

    model, folders = None, []
    for number, options in enumerate((first, second)):
        torch.manual_seed(10 + number)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj", "down_proj"], **options})
        if model is None:
            model = peft.get_peft_model(tiny.model(), config, adapter_name="one")
        else:
            model.add_adapter("two", config)
        name = ("one", "two")[number]
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key and f".{name}." in key + ".":
                    value.normal_(std=0.1)
        folders.append(tmp_path / name)
        model.save_pretrained(tmp_path, selected_adapters=[name])
    return model.eval(), folders


def logits(model) -> torch.Tensor:
    tokens = torch.arange(40, 72).view(2, 16)
    with torch.no_grad():
        return model(tokens).logits


PAIRS = [
    ({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8}),
    ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {"r": 6, "lora_alpha": 3, "target_modules": ["k_proj", "q_proj", "embed_tokens"]}),
    ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 5, "down_proj": 1}}, {"r": 3, "lora_alpha": 9, "use_rslora": True, "layers_to_transform": [1]}),
]  # fmt: skip


@pytest.mark.parametrize("first,second", PAIRS)
def test_a_saved_blend_gives_the_logits_of_the_live_sum(tmp_path, first, second):
    import peft

    warnings.simplefilter("ignore")
    live, folders = peft_pair(tmp_path, first, second)
    weights = [1.4, -0.6]
    # One live sum by PEFT itself ...
    live.base_model.set_adapter(["one", "two"])
    for module in live.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, weight in zip(("one", "two"), weights):
                if name in module.scaling:
                    module.set_scale(name, weight)
    summed = logits(live)
    # ... and one by adding fp64 updates to the weights.
    parents = [adapters.read(folder) for folder in folders]
    plain = tiny.model().eval()
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())  # an adapter on the embedding leaves the tied head alone
    with torch.no_grad():
        for name, value in dense_sum([parent.modules for parent in parents], weights).items():
            target = plain.get_submodule(name).weight
            target.copy_(target.double() + (value.T if target.shape != value.shape else value))
    blended = adapters.with_modules(parents[0].card, blend.stack([parent.modules for parent in parents], weights))
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.3)):
        folder = tmp_path / dtype
        folder.mkdir()
        for file, data in adapters.write(blended, dtype=dtype).items():
            (folder / file).write_bytes(data)
        saved = logits(peft.PeftModel.from_pretrained(tiny.model(), folder).eval())
        assert float((saved - summed).abs().max()) < tolerance
        assert float((saved - logits(plain)).abs().max()) < tolerance
    assert float((summed - logits(tiny.model().eval())).abs().max()) > 0.1  # the blend does something
    again = adapters.read(tmp_path / "float32")
    assert blend.difference(again.modules, blended.modules).overall < 1e-6


def test_pefts_cat_agrees_where_peft_is_right(tmp_path):
    live, folders = peft_pair(tmp_path, {"r": 4, "lora_alpha": 8}, {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"]})
    live.add_weighted_adapter(["one", "two"], [0.8, -1.5], "sum", combination_type="cat")
    ours = blend.stack([adapters.read(folder).modules for folder in folders], [0.8, -1.5])
    seen = 0
    for name, module in live.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "sum" in module.lora_A:
            theirs = module.get_delta_weight("sum").detach().double()
            assert float((dense(ours)[name] - theirs).norm()) < 1e-6 * float(theirs.norm())
            seen += 1
    assert seen == len(ours) == 8
