"""The fast paths of image training: the same results and gradients as the plain layers, in fp32 to rounding and in bf16 no further from fp32."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import nn

from lora_studio.training import fused_image
from tests import tiny_image
from tests.benchmarks import image as benchmark

SHAPES = [  # in, out, kernel, stride, padding, edge
    (4, 8, 3, 1, 1, 16), (8, 8, 3, 2, 1, 16), (8, 4, 1, 1, 0, 9), (3, 5, 3, 1, 0, 7), (6, 6, 5, 1, 2, 8), (4, 4, 3, 1, 4, 6), (4, 6, (1, 3), 1, (0, 1), 8),
]  # fmt: skip


def unet(dtype=torch.float32):
    found = tiny_image.sd().unet.to(dtype).requires_grad_(False)
    found.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv2"]))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return found


def ran(model, x: torch.Tensor) -> tuple[torch.Tensor, dict]:
    given = x.clone().requires_grad_(True)
    text = torch.randn(len(x), 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32).to(x.dtype)
    said = model(given, torch.tensor([400] * len(x)), text).sample
    said.float().square().sum().backward()
    found = {name: parameter.grad.float().clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return said.detach().float(), {**found, "x": given.grad.float()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_convolution_and_its_gradient_are_those_of_the_plain_one(shape):
    given, out, kernel, stride, padding, edge = shape
    torch.manual_seed(0)
    layer = nn.Conv2d(given, out, kernel, stride=stride, padding=padding).requires_grad_(False)
    assert fused_image.install(layer) == {"convolutions": 1}
    for batch, size in ((2, edge), (1, edge + 3)):  # the second has another size than the layout was chosen for
        x = torch.randn(batch, given, size, size, dtype=torch.float64)
        wide = nn.Conv2d(given, out, kernel, stride=stride, padding=padding).double().requires_grad_(False)
        wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
        (there, back) = _both(wide, x)
        found, gradient = _both(layer, x.float())
        assert (found - there).norm() <= 1e-6 * there.norm() and (gradient - back).norm() <= 1e-6 * back.norm()
    assert layer.forward.func.packed is not None


def _both(layer, x):
    given = x.clone().requires_grad_(True)
    said = layer(given)
    said.sin().sum().backward()
    return said.detach().double(), given.grad.double()


def test_a_unet_and_every_gradient_of_its_adapter_are_those_of_the_plain_one():
    model, x = unet(), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    plain, gradients = ran(model, x)
    names = set(model.state_dict())
    counts = fused_image.install(model)
    assert counts["convolutions"] >= 10 and counts["attention"] >= 2
    fast, fast_gradients = ran(model, x)
    assert (fast - plain).norm() <= 1e-5 * plain.norm() and set(gradients) == set(fast_gradients)
    assert all((fast_gradients[name] - value).norm() <= 1e-4 * value.norm() + 1e-9 for name, value in gradients.items())
    assert set(model.state_dict()) == names
    fused_image.remove(model)
    again, _ = ran(model, x)
    assert torch.equal(again, plain) and all(type(layer.processor) is AttnProcessor2_0 for layer in model.modules() if hasattr(layer, "processor"))


def test_in_bf16_the_fast_path_is_no_further_from_the_truth_than_the_plain_one():
    truth, _ = ran(unet(), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)))
    model, x = unet(torch.bfloat16), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    plain, _ = ran(model, x)
    fused_image.install(model)
    fast, _ = ran(model, x)
    assert (fast - truth).norm() <= 1.5 * (plain - truth).norm() < 0.1 * truth.norm()


def test_a_processor_that_gives_something_else_keeps_the_plain_convolution(monkeypatch):
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 4, 8, 8)
    plain = layer(x)
    monkeypatch.setattr(fused_image._Packed, "forward", lambda self, given: plain * 1.01)
    fused_image.install(layer)
    assert torch.equal(layer(x), plain) and layer.forward.func.plain


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3).double()],
    ids=["groups", "circular", "same", "double"],
)
def test_what_it_does_not_know_it_leaves_alone(layer):
    assert fused_image.install(layer.requires_grad_(False)) == {} and "forward" not in layer.__dict__
    assert fused_image.install(nn.Conv2d(4, 4, 3)) == {}


def test_attention_between_many_tokens_goes_through_the_saving_kernel(monkeypatch):
    model = unet()
    fused_image.install(model)
    called = []
    monkeypatch.setattr(fused_image._Attention, "few", staticmethod(lambda *given, **more: called.append("few") or AttnProcessor2_0()(*given, **more)))
    monkeypatch.setattr(fused_image._Attention, "many", staticmethod(lambda *given, **more: called.append("many") or AttnProcessor2_0()(*given, **more)))
    monkeypatch.setattr(fused_image, "MOST_SCORES", 100)
    ran(model, torch.randn(1, 4, 16, 16))
    assert set(called) == {"few", "many"} or set(called) == {"many"}
    monkeypatch.setattr(fused_image, "MOST_SCORES", 1 << 20)
    called.clear()
    ran(model, torch.randn(1, 4, 16, 16))
    assert set(called) == {"few"}


def test_the_benchmarks_sides_agree_and_its_table_tells_ratios_of_the_same_round():
    assert max(benchmark.exactness().values()) < 1e-4
    row = {"pictures": 2, "peak_mb": 10.0}
    found = {"ours": [{**row, "cpu_seconds": 2.0, "once_cpu_seconds": 1.0}, {**row, "cpu_seconds": 4.0, "once_cpu_seconds": 1.0}]}
    found["script"] = [{**row, "cpu_seconds": 3.0}, {**row, "cpu_seconds": 8.0}]
    assert "| 1.50 | - | 10 | 1.0 |" in benchmark.table(found) and "1.75x (1.50 to 2.00)" in benchmark.table(found)
