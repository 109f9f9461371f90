import pytest
import torch
from torch import nn

from src.ssd.detect import detect
from src.ssd.model import BACKBONES, SSD300, fold_batch_norms, training_memory_format
from tests.helpers.oracle_inputs import fill_weights, images

FOLDED = ("resnet18", "resnet50")  # the other backbones have more of the same blocks


@pytest.mark.parametrize("backbone", BACKBONES)
def test_names_shapes_and_outputs_are_the_oracles(oracle, backbone):
    expected = oracle("model")[backbone]
    model = fill_weights(SSD300(backbone, 81)).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(shapes.items()) == list(expected["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    with torch.inference_mode():
        offsets, logits = model(images())
        folded = fold_batch_norms(model)(images()) if backbone in FOLDED else (offsets, logits)
    assert list(offsets.shape) == expected["loc_shape"]
    assert list(logits.shape) == expected["conf_shape"]
    assert offsets.norm().item() == pytest.approx(expected["loc_norm"], rel=1e-4)
    assert logits.norm().item() == pytest.approx(expected["conf_norm"], rel=1e-4)
    # Relative to the outputs' size, because an output close to 0 consists of rounding errors.
    for outputs, part, name in ((offsets, slice(0, 8), "loc"), (logits, slice(-8, None), "conf")):
        size = expected[f"{name}_norm"] / outputs.numel() ** 0.5
        values = expected["loc_first8" if name == "loc" else "conf_last8"]
        assert outputs.flatten()[part].tolist() == pytest.approx(values, rel=1e-4, abs=1e-4 * size)
        index = 0 if name == "loc" else 1
        assert folded[index].norm().item() == pytest.approx(expected[f"{name}_norm"], rel=1e-4)
        assert folded[index].flatten()[part].tolist() == pytest.approx(values, rel=1e-4, abs=1e-4 * size)


def with_trained_batch_norms(model: SSD300) -> SSD300:
    """The model with random batch-norm statistics and weights, as after training."""
    torch.manual_seed(5)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
    return model


def test_folded_batch_norms_detect_the_same_and_leave_the_model_as_it_was():
    model = with_trained_batch_norms(SSD300("resnet18", 5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = fold_batch_norms(model)
    assert not [module for module in copy.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.training and all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    with torch.inference_mode():
        (plain, logits), (fold, fold_logits) = model.eval()(images()), copy(images())
    scale = logits.abs().max() / 5  # so that scores are neither all 0 nor all 1
    for ours, theirs in zip(detect(fold, fold_logits / scale), detect(plain, logits / scale), strict=True):
        close = (ours.scores[:, None] - theirs.scores).abs() < 1e-4
        close &= (ours.boxes[:, None] - theirs.boxes).abs().amax(dim=2) < 1e-4
        close &= ours.labels[:, None] == theirs.labels
        certain = theirs.scores > theirs.scores.min() + 1e-4  # the lowest scores may have changed places
        assert certain.sum() > 100
        assert close.any(dim=0)[certain].float().mean() >= 0.99  # an overlap may equal the threshold to the last digit


def test_folded_weights_are_channels_last_whatever_the_models_are():
    copy = fold_batch_norms(SSD300("resnet18", 5).to(memory_format=torch.contiguous_format))
    weights = [module.weight for module in copy.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_model_without_anything_to_fold_is_returned_itself():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    assert fold_batch_norms(model) is model


@pytest.mark.parametrize(
    ("capability", "device", "backbone", "layout"),
    [
        ("AVX2", "cpu", "resnet18", torch.contiguous_format),
        ("AVX2", "cpu", "resnet34", torch.contiguous_format),
        ("AVX2", "cpu", "resnet50", torch.channels_last),
        ("AVX2", "cuda", "resnet18", torch.channels_last),
        ("AVX512", "cpu", "resnet18", torch.channels_last),
        ("DEFAULT", "cpu", "resnet18", torch.channels_last),
    ],
)
def test_the_training_memory_format_depends_on_the_processor(monkeypatch, capability, device, backbone, layout):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert training_memory_format(backbone, torch.device(device)) is layout


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
