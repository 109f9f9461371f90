import pytest
import torch

from src.ssd.model import BACKBONES, SSD300
from tests.recipes import fill_weights, images


@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_shapes_and_outputs_are_the_oracles(oracle, backbone):
    expected = oracle("model")[backbone]
    model = fill_weights(SSD300(backbone, 81)).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(shapes.items()) == list(expected["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    with torch.inference_mode():
        offsets, logits = model(images())
    assert list(offsets.shape) == expected["loc_shape"]
    assert list(logits.shape) == expected["conf_shape"]
    assert offsets.norm().item() == pytest.approx(expected["loc_norm"], rel=1e-4)
    assert logits.norm().item() == pytest.approx(expected["conf_norm"], rel=1e-4)
    # relative to the outputs' size: a single one may be close to 0, where rounding of the terms is all there is
    for outputs, part, name in ((offsets, slice(0, 8), "loc"), (logits, slice(-8, None), "conf")):
        size = expected[f"{name}_norm"] / outputs.numel() ** 0.5
        values = expected["loc_first8" if name == "loc" else "conf_last8"]
        assert outputs.flatten()[part].tolist() == pytest.approx(values, rel=1e-4, abs=1e-4 * size)


def test_channels_last_gives_the_same_outputs():
    model = fill_weights(SSD300("resnet18", 5)).eval()
    with torch.inference_mode():
        plain = model(images())
        last = model.to(memory_format=torch.channels_last)(images().contiguous(memory_format=torch.channels_last))
    for one, other in zip(plain, last, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_labels", [2, 21])
def test_number_of_labels(num_labels):
    with torch.inference_mode():
        offsets, logits = SSD300("resnet18", num_labels).eval()(images())
    assert offsets.shape == (2, 4, 8732)
    assert logits.shape == (2, num_labels, 8732)
