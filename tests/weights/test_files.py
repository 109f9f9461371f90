"""Reading files with weights: what is refused and why, and whether the weights fit."""

import argparse
import gzip
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from src.runtime.errors import UserError
from src.ssd.model import SSD300
from src.weights.backbone import load_backbone, load_backbone_file
from src.weights.detector import count_labels, load_weights
from src.weights.files import check_fit, load_checkpoint

WEIGHTS = {"conf.0.bias": torch.arange(12.0), "loc.0.bias": torch.arange(16.0)}


class Custom:
    pass


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 300
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["dict", "bare", "safetensors", "old format"])
def test_published_checkpoints_of_all_forms_load(tmp_path, form, prefix):
    file = tmp_path / "ssd.pt"
    weights = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    extra = {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 5}, "epoch": 64, "label_map": {1: "person"}}
    if form == "safetensors":
        save_file(weights, file)
    else:
        content = weights if form == "bare" else {"model": weights, **extra}
        torch.save(content, file, _use_new_zipfile_serialization=form != "old format")
    loaded = load_checkpoint(file)
    assert loaded["model"].keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in WEIGHTS.items())
    assert loaded.get("label_map") == (None if form in ("bare", "safetensors") else {1: "person"})


NEEDING_MORE = {
    "argparse.Namespace": argparse.Namespace(bs=32),
    f"{__name__}.Custom": Custom(),
    "numpy": np.float64(0.27),
    "pathlib": Path("a"),
    "posix.system": os.system,
    "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("needed", NEEDING_MORE)
def test_a_file_that_needs_another_package_is_refused_by_name(tmp_path, needed, old_format):
    file = tmp_path / "a.pt"
    content = {"model": WEIGHTS, "more": NEEDING_MORE[needed]}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    message = refusal(file)
    assert message.startswith(f"refused: it needs {needed}")
    assert "GLOBAL" not in message


def test_no_code_in_a_file_runs(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for file, save in (
        (tmp_path / "a.pt", torch.save),
        (tmp_path / "b.pt", lambda *a: a[1].write_bytes(pickled(a[0]))),
    ):
        save({"model": Harm()}, file)
        assert "posix.mkdir" in refusal(file)
    assert not (tmp_path / "harm").exists()


def pickled(content) -> bytes:
    return pickle.dumps(content, protocol=2)


def test_a_changed_byte_is_an_error(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"model": {"a": torch.arange(999.0)}}, file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert "data/0 is not as it was written" in refusal(file)


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    assert refusal(tmp_path / "missing.pt") == "no such file"
    assert refusal(tmp_path) == "cannot be read (Is a directory)"


def other_files() -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"hello\nworld\n",
        "json": b'{"model": {}}',
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "pickle": pickle.dumps({"model": 1}),
        "zeros": bytes(1000),
        "safetensors' beginning": (10**6).to_bytes(8, "little") + b'{"a":',
    }


@pytest.mark.parametrize("kind", other_files())
def test_a_file_of_another_kind_is_an_error(tmp_path, kind, recwarn):
    file = tmp_path / "a.pt"
    file.write_bytes(other_files()[kind])
    assert refusal(file).startswith("is no checkpoint, or not a whole one (")
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]


FOREIGN = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HTML": b"\n<!DOCTYPE html>\n<html><head><title>Quota exceeded</title></head></html>",
    "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "gzip": gzip.compress(b"weights"),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_error_says_what_a_file_of_another_kind_is(tmp_path, kind):
    (tmp_path / "a.pt").write_bytes(FOREIGN[kind])
    message = refusal(tmp_path / "a.pt")
    assert message.startswith("is no checkpoint but ") and kind in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"model.a": torch.zeros(1)}, "pytorch-lightning_version": "2.5", "epoch": 3},
         "a checkpoint of PyTorch Lightning. Take 'state_dict', without the prefix 'model' of its names"),
        ({"ema": WEIGHTS, "step": 9}, "averaged weights (EMA). Take 'ema'"),
        ({"model_ema": WEIGHTS}, "averaged weights (EMA). Take 'model_ema'"),
        ({"meta": {"epoch": 12}, "state_dict": WEIGHTS}, "a checkpoint of MMDetection. Take 'state_dict'"),
        ({"net": WEIGHTS}, "of another program. Take 'net'"),
        ({"model": {"net": WEIGHTS}, "weights": WEIGHTS}, "of another program. Take 'weights'"),
    ],
)  # fmt: skip
def test_the_error_says_which_key_of_another_programs_checkpoint_to_take(tmp_path, content, said):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "a.pt")
    assert f"it seems to be {said}" in str(error.value) and "\n" not in str(error.value)


def test_weights_of_whole_numbers_do_not_fit():
    with pytest.raises(UserError, match=r"model\['a'\] holds torch\.int8: expected floating-point numbers"):
        check_fit({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int8)}, source=Path("x.pt"))


def test_an_archive_of_another_kind_is_an_error(tmp_path):
    file = tmp_path / "a.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b", "c")
    assert refusal(file).startswith("is no checkpoint, or not a whole one (")


@pytest.mark.parametrize("form", ["new", "old", "safetensors"])
def test_a_truncated_file_is_an_error(tmp_path, form):
    whole, file = tmp_path / "whole", tmp_path / "a.pt"
    if form == "safetensors":
        save_file(WEIGHTS, whole)
    else:
        torch.save({"model": WEIGHTS}, whole, _use_new_zipfile_serialization=form == "new")
    content = whole.read_bytes()
    lengths = sorted({*np.linspace(0, len(content) - 1, 40, dtype=int).tolist(), len(content) - 1, len(content) - 30})
    for length in lengths:
        file.write_bytes(content[:length])
        assert refusal(file)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2),
        3,
        [WEIGHTS],
        {},
        {"model": {}},
        {"model": {"a": "b"}},
        {"state_dict": WEIGHTS},
        {1: torch.zeros(1)},
    ],
    ids=["tensor", "number", "list", "nothing", "empty network", "text", "state_dict", "numbered"],
)
def test_a_file_without_a_network_is_an_error(tmp_path, content):
    file = tmp_path / "a.pt"
    torch.save(content, file)
    message = refusal(file)
    assert "not a checkpoint" in message or "has no network in it" in message


# --- loading into a network ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> SSD300:
    return SSD300("resnet18", 3)


def test_the_error_names_a_parameter_that_does_not_fit_and_both_shapes():
    here = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}

    def error(**there) -> str:
        with pytest.raises(UserError) as raised:
            check_fit(here, there, source=Path("x.pt"))
        return str(raised.value)

    assert error(a=torch.zeros(2), b=torch.zeros(1)).startswith(
        "x.pt: does not fit this network: a is [2] there and [2, 3] here"
    )
    assert error(a=here["a"]) == "x.pt: does not fit this network: it has no b [4]"
    assert error(**here, c=torch.zeros(7, 8)) == "x.pt: does not fit this network, which has no c [7, 8]"


def test_new_classification_heads_stay_and_everything_else_is_loaded(model):
    torch.manual_seed(1)
    other, expected = SSD300("resnet18", 5).state_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    assert count_labels(other) == 5
    with pytest.raises(UserError, match=r"conf\.0\.weight is \[20, 256, 3, 3\] there and \[12, 256, 3, 3\] here"):
        load_weights(model, other, source=Path("x.pt"), new_classification_heads=False)
    load_weights(model, other, source=Path("x.pt"), new_classification_heads=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name] if name.startswith("conf.") else other[name]), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_resnet_fills_the_backbone(model, tmp_path, suffix):
    torch.manual_seed(2)
    resnet, file = models.resnet18(), tmp_path / f"resnet{suffix}"
    with torch.no_grad():
        for tensor in resnet.buffers():
            tensor.add_(1)
    (save_file if suffix == ".safetensors" else torch.save)(resnet.state_dict(), file)
    load_backbone_file(model, file)
    pairs = zip(model.feature_extractor.feature_extractor, list(resnet.children())[:7], strict=True)
    for ours, theirs in pairs:
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )


def test_a_resnet_without_batch_counters_loads(model):
    resnet = models.resnet18().state_dict()
    load_backbone(model, {k: v for k, v in resnet.items() if "num_batches" not in k}, source=Path("old.pth"))
    assert torch.equal(model.state_dict()["feature_extractor.feature_extractor.0.weight"], resnet["conv1.weight"])


@pytest.mark.parametrize(
    ("backbone", "complaint"),
    [
        ("resnet34", "this network, which has no layer1.2.conv1.weight [64, 64, 3, 3]"),
        ("resnet50", "layer1.0.conv1.weight is [64, 64, 1, 1] there and [64, 64, 3, 3] here"),
        ("vgg11", "it has no conv1.weight [64, 3, 7, 7]"),
    ],
)
def test_weights_of_another_backbone_are_an_error(model, backbone, complaint):
    with torch.device("meta"):
        weights = models.get_model(backbone).state_dict()
    with pytest.raises(UserError) as error:
        load_backbone(model, weights, source=Path("x.pth"))
    assert str(error.value).startswith("x.pth: does not fit") and complaint in str(error.value)
