"""One click on each image demo, and a blend of the two: what their pictures show of scenes nobody trained on."""

import time

import pytest

from lora_studio import library, shelf, studio
from lora_studio.adapters.pipeline_files import NAME
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.workspace import local

STYLES = ("stripes", "outline")
COUNT = 96


def score(adapter=None, *, seed: int):
    """What demo-image's pictures of held-out scenes show, bare or with an exported adapter."""
    import diffusers

    from lora_studio.demo import image_score, image_world

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(demo_base("demo-image"))
    if adapter is not None:
        pipeline.load_lora_weights(adapter, weight_name=NAME)
    scenes = image_world.exam(COUNT, seed=seed)
    return image_score.score(scenes, image_score.paint(pipeline, [image_world.caption(scene) for scene in scenes], seed=seed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace in which both demos were trained, their folders, and the seconds from click to adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_STUDIO_HOME", str(tmp_path_factory.mktemp("demos") / "home"))
        workspace, seconds = local(), {}
        for style in STYLES:
            began = time.monotonic()
            id = studio.start(workspace, studio.compose(f"demo/{style}"))
            assert studio.wait_until_ended(workspace, id, seconds=900).state == "done", studio.log(workspace, id)
            seconds[style] = time.monotonic() - began
            shelf.export_adapter(workspace, style, workspace.root / "out" / style)
        yield workspace, seconds
        bench.stop()


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_a_demo_learns_its_style_and_keeps_what_the_base_draws(trained, style):
    workspace, seconds = trained
    before, after = score(seed=77), score(workspace.root / "out" / style, seed=77)
    print(f"\n{style}: {seconds[style]:.0f} s from click to adapter; before {before}, after {after}")
    assert getattr(before, style) < 0.1 < 0.8 < getattr(after, style)
    assert after.colors > before.colors - 0.1 and after.shape > before.shape - 0.1


@pytest.mark.slow
def test_a_blend_of_both_shows_both(trained, monkeypatch):
    workspace, _ = trained
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    id, done = shelf.blend(workspace, [(style, 1.0) for style in STYLES], name="both")
    shelf.export_adapter(workspace, id, workspace.root / "out" / "both")
    found = score(workspace.root / "out" / "both", seed=78)
    print(f"\nblend: rank {done['rank']}, relative error {done['loss']:.1e}; {found}")
    assert done["loss"] < 1e-6 and library.card(workspace, id)["base"] == "demo-image"
    assert found.both >= 0.6
