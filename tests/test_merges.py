"""Resizing and merging: the loss that is told is the true one, the file is what its loaders read, and a recipe makes the same bytes again."""

import json

import peft
import pytest
import torch
import transformers
import yaml

from lora_studio import adapters, blend, library, merges, merging, ranks, shelf
from lora_studio.adapters.files import LINEAGE, NESTED, read_metadata, reheaded
from lora_studio.errors import BlendError
from lora_studio.jobs import bench
from lora_studio.lowrank import LowRank
from tests import tiny, tiny_image
from tests.browser import made
from tests.test_adapter_images import updates
from tests.test_cli import command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home whose bench serves all tests of this file."""
    folder = tmp_path_factory.mktemp("merges")
    yield folder / "home"
    with made.at(folder / "home"):
        bench.stop()


@pytest.fixture(autouse=True)
def one_bench(place, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(place))


@pytest.fixture
def space(one_bench, tmp_path):
    from lora_studio.workspace import Workspace

    root = tmp_path / "space"
    root.mkdir()
    return Workspace(root)


def add(workspace, base, name, **how) -> str:
    return library.add(workspace, tiny.adapter_files(base, name=str(base), **{"rank": 6, **how}), {"name": name, "base": str(base)})


def modules(workspace, id) -> dict[str, LowRank]:
    return {name: module.cast(torch.float64) for name, module in adapters.read(library.adapter_folder(workspace, id)).modules.items()}


def decaying(workspace, base) -> str:
    """An adapter whose layers need different ranks."""
    found = adapters.read(tiny.adapter_files(base, seed=3, rank=8, ends=("q_proj", "v_proj", "down_proj")))
    for number, (name, module) in enumerate(found.modules.items()):
        most = 8 if number else 3
        found.modules[name] = LowRank(module.A[:most] * torch.logspace(0, -1 - number % 3, 8)[:most, None], module.B[:, :most], module.scale)
    return library.add(workspace, adapters.write(found, even=False), {"name": "wide", "base": str(base)})


@pytest.mark.parametrize("asked", [{"rank": 2}, {"rank": 5}, {"loss": 0.1}, {"loss": 0.1, "per_layer": True}, {"size": 10000}], ids=str)
def test_a_resized_adapter_has_the_loss_that_is_told_and_what_was_asked(space, base, asked):
    id = decaying(space, base)
    small, done = merges.resize(space, id, name="small", **asked)
    before, after = modules(space, id), modules(space, small)
    meant = torch.cat([module.delta().flatten() for module in before.values()])
    got = torch.cat([(after[name].delta() if name in after else torch.zeros(module.shape).double()).flatten() for name, module in before.items()])
    assert abs(done["loss"] - float((got - meant).norm() / meant.norm())) < 1e-6
    found, card = {name: module.rank for name, module in after.items()}, library.card(space, small)
    assert done["ranks"] == [min(found.values()), max(found.values())] and card["recipe"]["resize"] == {"adapter": id, **asked}
    assert card["parents"] == [{"id": id, "name": "wide", "sha256": library.card(space, id)["sha256"], "weight": 1.0}]
    wide = {name: module.cast(torch.float64) for name, module in before.items()}
    if asked == {"rank": 2}:
        assert set(found.values()) == {2} and abs(done["loss"] - blend.compress(wide, 2)[1].overall) < 1e-6 and done["clamped"] == 0
    elif "rank" in asked:
        assert sorted(found.values())[:2] == [3, 5] and done["clamped"] == 1
    elif "size" in asked:
        assert (library.adapter_folder(space, small) / adapters.WEIGHTS).stat().st_size == done["bytes"] <= 10000 and done["bytes"] > 8000
    else:
        chosen = ranks.per_layer(wide, 0.1) if asked.get("per_layer") else ranks.shared(wide, 0.1)
        assert found == {name: rank for name, rank in chosen.items() if rank} and len(set(found.values())) > 1
        assert done["loss"] <= 0.1 + 1e-6 and all(loss <= 0.1 + 1e-6 for loss in done["layers"].values() if asked.get("per_layer"))


def test_peft_reads_every_layer_of_a_resized_adapter_at_its_own_rank(space, base):
    id = decaying(space, base)
    small, _ = merges.resize(space, id, name="small", loss=0.1, per_layer=True)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), library.adapter_folder(space, small))
    meant, seen = modules(space, small), 0
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            assert torch.allclose(layer.get_delta_weight("default").double(), meant[name].delta(), atol=1e-6), name
            seen += 1
    assert seen == len(meant)


def test_diffusers_reads_every_part_of_a_resized_image_adapter(space, tmp_path):
    import diffusers

    base = tiny_image.write_pipeline(tmp_path / "sd15")
    found = {}
    for number, (name, module) in enumerate(tiny_image.random_adapter(base, seed=1, ends=("to_q", "conv1", "q_proj", "out_proj")).items()):
        found[name] = LowRank(module.A * torch.tensor([1.0, 0.1 ** (number % 3), 0.01]).view(3, *[1] * (module.A.ndim - 1)), module.B, 1.0, module.kind)
    id = library.add(space, tiny_image.adapter_files(base, found), {"name": "style", "base": str(base)})
    small, done = merges.resize(space, id, name="small", loss=0.05)
    assert done["ranks"][0] < done["ranks"][1]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(shelf.export_adapter(space, small, tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
    got, meant = updates(pipeline), modules(space, small)
    assert got.keys() == meant.keys() and all(torch.allclose(got[name].double(), meant[name].delta(), atol=1e-6) for name in meant)


WAYS = [("slerp", {}), ("subtract", {}), ("orthogonal", {}), ("orthogonal", {"space": "subspace"}), ("knots", {"density": 0.3})]


@pytest.mark.parametrize(("how", "settings"), WAYS, ids=str)
def test_a_merge_of_factors_is_an_adapter_without_loss_and_compressed_it_tells_the_loss(space, base, how, settings):
    one, two = add(space, base, "one", seed=1), add(space, base, "two", seed=2, ends=("q_proj", "v_proj"))
    weights = [0.7, 1.0] if how == "orthogonal" else [0.7, 0.4]
    id, done = merges.merge(space, [(one, weights[0]), (two, weights[1])], how, name="both", **settings)
    left, right = modules(space, one), modules(space, two)
    meant = {
        "slerp": lambda: merging.slerp(left, right, 0.4 / 1.1), "subtract": lambda: blend.stack([left, right], [0.7, -0.4]),
        "orthogonal": lambda: blend.stack([merging.orthogonal(left, right, **settings)], [0.7]), "knots": lambda: merging.knots([left, right], weights, **settings),
    }[how]()  # fmt: skip
    assert blend.difference(modules(space, id), meant).overall < 1e-6 and done["loss"] < 1e-6
    card = library.card(space, id)
    assert card["recipe"]["merge"] == {"how": how, **settings, "parts": [{"adapter": one, "weight": weights[0]}, {"adapter": two, "weight": weights[1]}]} and card["tags"] == ["merged"]
    small, told = merges.merge(space, [(one, weights[0]), (two, weights[1])], how, name="small", rank=2, **settings)
    assert told["rank"] == 2 and abs(told["loss"] - blend.difference(modules(space, small), meant).overall) < 1e-9 + 1e-6 and told["loss"] > 0.01


@pytest.mark.parametrize(("how", "settings"), [("ties", {"density": 0.4}), ("dare", {"density": 0.6, "seed": 7}), ("della", {"seed": 3, "epsilon": 0.2}), ("magnitude", {}), ("breadcrumbs", {"gamma": 0.05})], ids=str)
def test_a_merge_entry_by_entry_is_approximated_and_its_true_loss_told(space, base, how, settings):
    one, two = add(space, base, "one", seed=1), add(space, base, "two", seed=2, ends=("q_proj", "v_proj"))
    id, done = merges.merge(space, [(one, 1.0), (two, 0.5)], how, name="both", rank=9, **settings)
    plain = [adapters.read(library.adapter_folder(space, one)).modules for one in (one, two)]
    whole = merging.entrywise(plain, [1.0, 0.5], merging.Recipe(how, **settings))
    got = modules(space, id)
    meant = {name: one.rows(0, one.shape[0]).double() for name, one in whole.items()}
    apart = sum(float((got[name].delta() - value).square().sum()) for name, value in meant.items())
    true = (apart / sum(float(value.square().sum()) for value in meant.values())) ** 0.5
    assert abs(done["loss"] - true) < 1e-5 and 0.01 < true < 1 and done["rank"] == 9 and library.card(space, id)["recipe"]["loss"] == done["loss"]
    best = sum(float(torch.linalg.svdvals(value)[9:].square().sum()) for value in meant.values())
    assert apart <= best * 1.05 + 1e-9, "near the best of that rank"


def test_every_recipe_makes_the_same_bytes_again(space, base):
    one, two = add(space, base, "one", seed=1), add(space, base, "two", seed=2)
    parts = [(one, 1.0), (two, -0.5)]
    ids = [
        shelf.blend(space, parts, name="sum")[0], shelf.blend(space, parts, name="small sum", rank=3)[0],
        merges.merge(space, parts, "dare", name="dare", rank=5, density=0.5, seed=11)[0], merges.merge(space, parts, "knots", name="knots")[0],
        merges.resize(space, one, name="resized", loss=0.3)[0],
    ]  # fmt: skip
    for id in ids:
        weights = (library.adapter_folder(space, id) / adapters.WEIGHTS).read_bytes()
        library.remove(space, id)
        library.undo(space, id)
        found, done = merges.again(space, id)
        assert (found, done["identical"]) == (id, True) and (library.adapter_folder(space, id) / adapters.WEIGHTS).read_bytes() == weights
    with pytest.raises(BlendError, match="one has no recipe"):
        merges.again(space, one)
    library.remove(space, two)
    with pytest.raises(BlendError, match="its parent two is not in the library"):
        merges.again(space, ids[0])


LEFT, RIGHT = {"": 0.7, "model.layers.0": 0.2, "down_proj": 1.1}, {"layers.1": 0.5, "": 1.0}


def test_weights_by_layer_are_in_the_recipe_and_the_parents_and_make_the_same_bytes_again(space, base):
    one, two = add(space, base, "one", seed=1), add(space, base, "two", seed=2, ends=("q_proj", "v_proj"))
    parts = [(one, LEFT), (two, RIGHT)]
    ids = {
        "sum": shelf.blend(space, parts, name="sum")[0], "small": shelf.blend(space, parts, name="small", rank=3)[0],
        **{how: merges.merge(space, parts, how, name=how)[0] for how in ("slerp", "subtract")},
        "ties": merges.merge(space, parts, "ties", name="ties", rank=6)[0],
    }  # fmt: skip
    for id in ids.values():
        card, weights = library.card(space, id), (library.adapter_folder(space, id) / adapters.WEIGHTS).read_bytes()
        rows = card["recipe"]["sum"] if "sum" in card["recipe"] else card["recipe"]["merge"]["parts"]
        assert [row["weight"] for row in rows] == [parent["weight"] for parent in card["parents"]] == [LEFT, RIGHT]
        found, done = merges.again(space, id)
        assert (found, done["identical"]) == (id, True) and (library.adapter_folder(space, id) / adapters.WEIGHTS).read_bytes() == weights
    left, right = modules(space, one), modules(space, two)
    assert blend.difference(modules(space, ids["sum"]), blend.stack([left, right], [LEFT, RIGHT])).overall < 1e-6
    negative = {"": -1.0, "layers.1": -0.5}
    assert blend.difference(modules(space, ids["subtract"]), blend.stack([left, right], [LEFT, negative])).overall < 1e-6
    places = {"model.layers.0.self_attn.q_proj": 1 / 1.2, "model.layers.1.self_attn.q_proj": 0.5 / 1.2}
    arc = merging.slerp(*({name: found[name] for name in places} for found in (left, right)), places)
    assert blend.difference({name: modules(space, ids["slerp"])[name] for name in places}, arc).overall < 1e-6
    with pytest.raises(BlendError, match=r"its weight 1, layers\.1 0\.5 has no effect"):
        merges.merge(space, [(one, LEFT), (two, {"layers.1": 0.5})], "orthogonal", name="x")
    with pytest.raises(BlendError, match="name no place between"):
        merges.merge(space, [(one, {"layers.1": -0.5}), (two, 1.0)], "slerp", name="x")
    draft = shelf.draft(space, ids["sum"], shelf.Push("me/sum"))
    assert r"0.7, down\_proj 1.1, model.layers.0 0.2" in draft.readme
    assert yaml.safe_load(draft.readme.partition("```yaml\n")[2].partition("```")[0]) == library.card(space, ids["sum"])["recipe"]
    assert [parent["weight"] for parent in library.lineage(space, ids["sum"])["parents"]] == [LEFT, RIGHT]


def test_what_would_have_no_effect_or_no_meaning_is_refused_and_the_library_stays_as_it_was(space, base):
    one, two = add(space, base, "one", seed=1), add(space, base, "two", seed=2)
    parts = [(one, 1.0), (two, 0.5)]
    before = library.count(space)
    for act, said in (
        (lambda: merges.merge(space, parts, "ties", name="x"), "has full rank. Give --rank"),
        (lambda: merges.merge(space, parts, "ties", name="x", rank=4, seed=3), "seed has no effect on a merge by ties"),
        (lambda: merges.merge(space, parts, "slerp", name="x", density=0.5), "density has no effect"),
        (lambda: merges.merge(space, parts, "sum", name="x"), "sum is no way to merge"),
        (lambda: merges.merge(space, [(one, 1.0), (two, -0.5)], "slerp", name="x"), "name no place between"),
        (lambda: merges.merge(space, parts, "orthogonal", name="x"), "so its weight 0.5 has no effect"),
        (lambda: merges.merge(space, [*parts, (two, 1.0)], "slerp", name="x"), "slerp puts two adapters together, and 3"),
        (lambda: merges.merge(space, parts, "knots", name="x", density=0.0), "density 0.0 is no share"),
        (lambda: merges.merge(space, parts, "ties", name="x", rank=0), "rank 0 is not"),
        (lambda: merges.resize(space, one, name="x"), "Give one of the three"),
        (lambda: merges.resize(space, one, name="x", rank=2, loss=0.1), "Give one of the three"),
        (lambda: merges.resize(space, one, name="x", rank=2, per_layer=True), "Give one of the three"),
        (lambda: merges.resize(space, one, name="x", size=900), "hold nothing of this adapter"),
        (lambda: merges.resize(space, one, name="x", loss=1.5), "loss 1.5 is no share"),
        (lambda: merges.resize(space, one, name="x", rank=50), "is within that already .rank 6"),
        (lambda: merges.resize(space, one, name="x", size=1000000), "is within that already"),
    ):
        with pytest.raises(BlendError, match=said):
            act()
    assert library.count(space) == before


def test_on_the_command_line(one_bench, base):
    from lora_studio.workspace import local

    one, two = add(local(), base, "left", seed=1), add(local(), base, "right", seed=2)
    told = json.loads(command("merge", "left=1", "right=0.7", "--how", "ties", "--density", "0.5", "--rank", "4", "--name", "both", "--json").stdout)
    assert told["rank"] == 4 and 0 < told["loss"] < 1
    assert "relative error" in command("merge", "left", "right", "--how", "slerp", "--name", "arc").stdout
    said = command("resize", "left", "--name", "small", "--size", "6KB").stdout
    assert "relative error" in said and " MB." in said
    assert "layers have a lower rank than 3" in command("resize", "small", "--name", "smaller", "--rank", "3").stdout
    assert "is within that already" in command("resize", "left", "--name", "same", "--rank", "40", code=1).stderr
    assert "the same, byte for byte" in command("blend", "--again", "both").stdout
    assert "goes with no parts" in command("blend", "left=1", "--again", "both", code=1).stderr
    assert "A blend needs adapters and a name" in command("blend", "left=1", code=1).stderr
    assert "5 apples is no whole number" in command("resize", "left", "--name", "x", "--size", "5 apples", code=1).stderr
    shown = json.loads(command("inspect", "left", "--json").stdout)
    assert {"both", "arc", "small"} <= {child["name"] for child in shown["children"]}
    assert [parent["name"] for parent in json.loads(command("inspect", "both", "--json").stdout)["parents"]] == ["left", "right"]
    assert "children:" in command("inspect", one).stdout and "family: " in command("inspect", told["id"]).stdout and two


def told_in(workspace, id) -> dict:
    """What the header of an adapter's weights says of where it comes from."""
    weights = (library.adapter_folder(workspace, id) / adapters.WEIGHTS).read_bytes()
    return json.loads(read_metadata(weights)[LINEAGE])


def test_the_file_itself_says_what_it_was_made_of(space, base):
    one, two = (library.add(space, tiny.adapter_files(base, name=str(base), seed=seed), {"name": f"n{seed}", "base": str(base)}) for seed in (1, 2))
    hashes = [library.card(space, id)["sha256"] for id in (one, two)]
    mix, _ = shelf.blend(space, [[one, 0.5], [two, {"": 1.0, "model.layers.0": -0.25}]], name="mix", rank=2)
    told = told_in(space, mix)
    assert (told["made"], told["rank"]) == ("blend", 2) and told["versions"].keys() == {"lora_studio", "torch"}
    assert told["parents"] == [{"name": "n1", "sha256": hashes[0], "weight": 0.5}, {"name": "n2", "sha256": hashes[1], "weight": {"": 1.0, "model.layers.0": -0.25}}]
    assert told["loss"] == library.card(space, mix)["recipe"]["loss"] > 0
    both, _ = merges.merge(space, [[one, 1.0], [two, 1.0]], "ties", name="ties", rank=3, density=0.4)
    assert {key: told_in(space, both)[key] for key in ("made", "how", "rank", "density")} == {"made": "merge", "how": "ties", "rank": 3, "density": 0.4}
    small, _ = merges.resize(space, both, name="small", rank=2)
    assert told_in(space, small)["parents"][0]["sha256"] == library.card(space, both)["sha256"]
    assert str(space.root) not in json.dumps([told_in(space, id) for id in (mix, both, small)])


def test_made_again_is_the_same_though_a_parent_has_another_name_now(space, base):
    one = library.add(space, tiny.adapter_files(base, name=str(base), seed=1), {"name": "one", "base": str(base)})
    mix, _ = shelf.blend(space, [[one, 0.5]], name="mix")
    shelf.rename(space, one, "another")
    assert merges.again(space, mix)[0] == mix and merges.again(space, mix)[1]["identical"]
    assert len(library.find(space)) == 2


def test_a_nested_adapter_is_cut_exactly_and_no_other_is_cut(space, base):
    files = tiny.adapter_files(base, name=str(base), seed=4, rank=6)
    nested = {**files, adapters.WEIGHTS: reheaded(files[adapters.WEIGHTS], metadata={NESTED: "true"})}
    id = library.add(space, nested, {"name": "nested", "base": str(base)})
    plain = add(space, base, "plain", seed=5)
    assert adapters.inspect(library.adapter_folder(space, id)).nested
    cut, told = merges.resize(space, id, name="cut", rank=2, slice=True)
    meant, got = modules(space, id), modules(space, cut)
    for name, module in meant.items():
        assert torch.allclose(got[name].delta(), module.scale * module.B[:, :2] @ module.A[:2], atol=1e-12, rtol=0)
    assert told["ranks"] == [2, 2] and library.card(space, cut)["recipe"]["resize"]["slice"] is True
    assert merges.again(space, cut)[1]["identical"]
    with pytest.raises(BlendError, match="was not trained to be cut"):
        merges.resize(space, plain, name="other", rank=2, slice=True)
    with pytest.raises(BlendError, match="Give one of the three"):
        merges.resize(space, id, name="other", loss=0.1, slice=True)
