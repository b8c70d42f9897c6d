"""The tables of families: guidance and patches are those of diffusers' own pipelines, and what does not go with a base is said."""

import inspect

import diffusers
import pytest
import torch

from lora_studio import families
from lora_studio.spec import parse
from lora_studio.training.image_families import FAMILIES
from tests import tiny_image

STOCK = {family.pipeline: family for family in families.IMAGE_FAMILIES if hasattr(diffusers, family.pipeline)}


@pytest.mark.parametrize("name", STOCK)
def test_the_guidance_of_a_family_is_what_its_pipeline_takes_by_default(name):
    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    given = known["true_cfg_scale"] if name == "QwenImagePipeline" else known["guidance_scale"]
    wanted = 2.5 if name == "FluxKontextPipeline" else given.default  # as its model card has it
    assert families.of_pipeline(name).guidance == families.guidance("somewhere/else", name) == wanted


def test_distilled_and_bundled_bases_have_a_guidance_of_their_own():
    assert families.guidance("demo-image") == families.guidance("demo-image", "StableDiffusionPipeline") == 2.0
    assert {families.guidance(base) for base in ("black-forest-labs/FLUX.1-schnell", "Tongyi-MAI/Z-Image-Turbo", "black-forest-labs/FLUX.2-klein-4B")} == {1.0}
    assert families.guidance("stabilityai/stable-diffusion-xl-base-1.0") == 5.0 and families.guidance("no/where") == 5.0


@pytest.mark.parametrize("kind", [kind for kind, make in tiny_image.PIPELINES.items() if kind not in ("sd15", "sd2", "sdxl", "pixart")])
def test_the_edge_of_a_token_is_the_transformers_own(kind):
    """Counted in what the transformer's first block is given of one picture beyond what it is given of a smaller one."""
    pipeline = tiny_image.PIPELINES[kind]()
    family, patch = FAMILIES[type(pipeline).__name__], families.of_pipeline(type(pipeline).__name__).patch
    with torch.no_grad():
        conditions = family.batch(family.embed(pipeline, ["a circle"]))
        seen = []
        for size in ((128, 64), (128, 128)):
            x = family.encode(pipeline.vae, torch.zeros(1, 3, size[1], size[0]))[0]
            lengths = []
            hooks = [
                module.register_forward_pre_hook(lambda _, args, kwargs, lengths=lengths: lengths.append([one.shape[1] for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one.ndim == 3]), with_kwargs=True)
                for name, module in pipeline.transformer.named_modules()
                if name in ("transformer_blocks.0", "single_transformer_blocks.0", "layers.0", "blocks.0")
            ]  # fmt: skip
            family.predict(pipeline.transformer, x, torch.tensor([500.0]), conditions, size)
            for hook in hooks:
                hook.remove()
            seen.append((lengths[0], x.shape[-2] * x.shape[-1] / patch**2))
    assert max(large - small for small, large in zip(seen[0][0], seen[1][0])) == seen[1][1] - seen[0][1] > 0


@pytest.mark.parametrize(
    ("pipeline", "task", "fields"),
    [
        ("StableDiffusionPipeline", {"shift": 3}, ["task.shift"]),
        ("StableDiffusionPipeline", {"shift": "resolution"}, ["task.shift"]),
        ("StableDiffusionPipeline", {"timesteps": "mode"}, []),
        ("FluxPipeline", {"shift": 3, "more_resolutions": [768]}, []),
        ("FluxPipeline", {"weighting": "min_snr"}, ["task.weighting"]),
        ("FluxPipeline", {"buckets": False, "more_resolutions": [768, 520]}, ["task.more_resolutions"]),
        ("SanaPipeline", {"buckets": False, "resolution": 528, "more_resolutions": [560]}, ["task.resolution", "task.more_resolutions"]),
    ],
)
def test_what_does_not_go_with_a_family_is_named_by_its_field(pipeline, task, fields):
    found = families.misfits(pipeline, parse({"data": [{"path": "x"}], "task": {"kind": "image", **task}}))
    assert [field for field, _ in found] == fields
