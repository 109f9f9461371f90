"""The weights that runs start from, and whole evaluations of checkpoints."""

import functools
import io
import json
import socket
from email.message import Message
from pathlib import Path

import pytest
import torch
from torchvision import models

import main
from src.data.annotations.coco import Category
from src.evaluation.scoring import METRIC_NAMES
from src.runtime.errors import UserError
from src.ssd.model import SSD300
from src.training.checkpoint import save_checkpoint
from src.weights.backbone import load_backbone_weights
from src.weights.detector import build_trained_model, known_categories, load_detector, read_labelled
from src.weights.files import load_checkpoint
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.launch import FP16

OURS = (Category(7, "square"), Category(9, "disc"))
SAVED = [list(category) for category in OURS]
FILE = Path("ssd.pt")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """torch's empty cache; the machine has no network."""

    def unreachable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def small_state() -> dict:
    """The weights of a network of two categories."""
    torch.manual_seed(3)
    return SSD300("resnet18", 3).state_dict()


@functools.cache
def network(num_labels: int = 3) -> SSD300:
    """A network with random weights."""
    return SSD300("resnet18", num_labels)


# --- the backbone ----------------------------------------------------------------------------------------------------


def backbone_of(model: SSD300) -> dict:
    return model.feature_extractor.feature_extractor.state_dict()


def test_without_a_network_the_error_names_address_folder_and_remedies(cache):
    with pytest.raises(UserError) as error:
        load_backbone_weights(network(), "resnet18", "imagenet")
    message = str(error.value)
    assert "\n" not in message
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert str(cache) in message and "Name or service not known" in message
    assert "--backbone-weights none" in message and "--backbone-weights FILE" in message


def test_weights_in_the_cache_are_used(cache):
    resnet, model = models.resnet18(), network()
    cache.mkdir(parents=True)
    torch.save(resnet.state_dict(), cache / "resnet18-f37072fd.pth")
    load_backbone_weights(model, "resnet18", "imagenet")
    loaded = list(backbone_of(model).values())
    assert all(torch.equal(a, b) for a, b in zip(loaded, resnet.state_dict().values(), strict=False))
    assert torch.equal(backbone_of(model)["6.1.conv2.weight"], resnet.layer3[1].conv2.weight)


def test_a_broken_file_in_the_cache_is_named(cache):
    cache.mkdir(parents=True)
    file = cache / "resnet18-f37072fd.pth"
    file.write_bytes(b"PK\3\4half of a download")
    with pytest.raises(UserError, match=f"^{file}: is no checkpoint, or not a whole one"):
        load_backbone_weights(network(), "resnet18", "imagenet")


def test_a_download_with_another_hash_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: Answer(b"a proxy's page"))
    with pytest.raises(UserError, match=r"cannot fetch https.*resnet18.*invalid hash value"):
        load_backbone_weights(network(), "resnet18", "imagenet")
    assert list(cache.iterdir()) == []


class Answer(io.BytesIO):
    """A server's response."""

    def info(self) -> Message:
        return Message()


@pytest.mark.parametrize(
    ("backbone", "version"),
    [("resnet18", "V1"), ("resnet34", "V1"), ("resnet50", "V2"), ("resnet101", "V2"), ("resnet152", "V2")],
)
def test_torchvisions_best_weights_are_downloaded(backbone, version):
    enum = models.get_model_weights(backbone)
    with pytest.raises(UserError) as error:
        load_backbone_weights(None, backbone, "imagenet")
    assert f" {enum[f'IMAGENET1K_{version}'].url} " in str(error.value)


def test_none_leaves_the_backbone_random_and_a_file_is_looked_for(tmp_path):
    model = network()
    before = {name: tensor.clone() for name, tensor in backbone_of(model).items()}
    load_backbone_weights(model, "resnet18", "none")
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone_of(model).items())
    with pytest.raises(UserError, match=f"^{tmp_path}/a.pth: no such file$"):
        load_backbone_weights(model, "resnet18", f"{tmp_path}/a.pth")


# --- published detectors ---------------------------------------------------------------------------------------------


def test_a_published_checkpoint_loads_for_training(oracle, tmp_path):
    shapes = oracle("model")["resnet18"]["state_dict"]
    torch.manual_seed(4)
    weights = {
        name: torch.zeros((), dtype=torch.int64) if name.endswith("tracked") else torch.rand(shape)
        for name, shape in shapes.items()
    }
    published = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": published, "epoch": 64, "iteration": 3, "optimizer": {}}, tmp_path / "ssd.pt")
    state, model = load_checkpoint(tmp_path / "ssd.pt"), SSD300("resnet18", 81)
    coco = [Category(k, f"name {k}") for k in range(1, 81)]
    assert load_detector(model, state, coco, source=FILE) == []
    assert list(model.state_dict()) == list(shapes)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


LABEL_MAP = {0: "background", 1: "square", 2: "disc"}


@pytest.mark.parametrize(
    ("extra", "categories", "difference"),
    [
        ({}, OURS, None),
        ({}, [*OURS, Category(11, "cat")], "2 there, 3 here"),
        ({"label_map": LABEL_MAP}, OURS, None),
        ({"label_map": LABEL_MAP}, OURS[::-1], "label 1 is 'square' there and 'disc' here"),
        ({"label_map": {"square": 1}}, OURS[::-1], None),  # of another form: ignored
        ({"categories": SAVED}, OURS, None),
        ({"categories": SAVED}, [Category(1, "square"), Category(2, "disc")], None),
        ({"categories": SAVED}, [OURS[0], Category(9, "cat")], "label 2 is 'disc' there and 'cat' here"),
        ({"categories": SAVED}, OURS[:1], "label 2 is 'disc' there and nothing here"),
    ],
)
def test_classification_heads_start_afresh_for_other_categories(small_state, extra, categories, difference):
    model = network(len(categories) + 1)
    fresh = model.conf[0].weight.clone()
    lines = load_detector(model, {"model": small_state, **extra}, categories, source=FILE)
    kept = [name for name in model.state_dict() if difference is None or not name.startswith("conf.")]
    assert all(torch.equal(model.state_dict()[name], small_state[name]) for name in kept)
    if difference is None:
        assert lines == []
    else:
        assert torch.equal(model.conf[0].weight, fresh)
        (line,) = lines
        assert line.startswith(f"ssd.pt: its categories are not the data's ({difference}): backbone, extra blocks and")
        assert line.endswith("the classification heads start afresh")


def test_a_checkpoints_network_is_channels_last(small_state):
    model = build_trained_model(
        {"model": small_state}, backbone="resnet18", num_categories=2, source=FILE, device=torch.device("cpu")
    )
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_the_categories_of_a_published_checkpoint_are_its_labels(small_state):
    assert known_categories({"model": small_state}) == (Category(1, "label 1"), Category(2, "label 2"))
    assert known_categories({"model": small_state, "label_map": LABEL_MAP}) == (
        Category(1, "square"),
        Category(2, "disc"),
    )
    assert known_categories({"model": small_state, "categories": SAVED}) == OURS


def test_data_with_other_categories_than_the_checkpoint_is_an_error_that_names_it(tmp_path, small_state):
    write_coco(tmp_path, [annotation(1)], images=1)
    file, state = tmp_path / "annotations" / "instances_val2017.json", {"model": small_state, "categories": SAVED}
    with pytest.raises(UserError, match=r"are not those of ssd\.pt: only here: .*; only there: 7 'square'"):
        read_labelled(file, tmp_path, state, source=FILE)


def test_training_from_non_finite_weights_is_an_error(small_state):
    spoilt = {**small_state, "loc.0.bias": torch.full_like(small_state["loc.0.bias"], torch.nan)}
    with pytest.raises(UserError, match=r"^ssd\.pt: loc\.0\.bias holds NaN or infinity: take a checkpoint from before"):
        load_detector(network(3), {"model": spoilt}, OURS, source=FILE)


def test_a_checkpoint_without_a_detector_is_an_error():
    with torch.device("meta"):
        state = {"model": models.resnet18().state_dict()}
        model = SSD300("resnet18", 3)
    with pytest.raises(UserError, match=r"it has no feature_extractor\.feature_extractor\.0\.weight \[64, 3, 7, 7\]"):
        load_detector(model, state, OURS, source=FILE)


# --- main.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images 10, 20, 30 of the categories 7 and 9."""
    images = [{"id": 10 * k, "file_name": f"{k}.jpg", "width": 160, "height": 120} for k in (1, 2, 3)]
    more = {"iscrowd": 0, "area": 3000}  # some scorers need them
    boxes = [annotation(10 * k, (10 * k, 20, 60, 50), category, **more) for k in (1, 2, 3) for category in (7, 9)]
    categories = [category._asdict() for category in OURS]
    return write_coco(tmp_path_factory.mktemp("data"), boxes, images=images, categories=categories)


def evaluate(data: Path, state: dict, folder: Path, *flags: str) -> tuple[int, Path]:
    save_checkpoint(folder / "last.pt", state)
    output = folder / "scores"
    line = ["--mode", "evaluation", "--data", data, "--checkpoint", folder / "last.pt", "--output", output]
    return main.main([*map(str, line), "--num-workers", "0", *FP16, *flags]), output


def test_evaluation_prints_metrics_and_writes_files(data, small_state, tmp_path, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    state = {"model": small_state, "backbone": "resnet18", "categories": SAVED}
    status, output = evaluate(data, state, tmp_path)
    assert status == main.DONE
    lines = capsys.readouterr().out.splitlines()
    width = max(map(len, METRIC_NAMES))
    printed = {line[:width].rstrip(): line[width:].lstrip() for line in lines[:12]}
    assert tuple(printed) == METRIC_NAMES
    assert [line.split()[0] for line in lines[13:15]] == ["square", "disc"]

    detections = json.loads((output / "detections.json").read_text())
    assert len(detections) > 10
    for found in detections:
        assert {name: type(value) for name, value in found.items()} == {
            "image_id": int, "category_id": int, "bbox": list, "score": float,
        }  # fmt: skip
        assert found["image_id"] in (10, 20, 30) and found["category_id"] in (7, 9)
        assert [type(value) for value in found["bbox"]] == [float] * 4
    truth = coco.COCO(str(data / "annotations" / "instances_val2017.json"))
    scorer = cocoeval.COCOeval(truth, truth.loadRes(str(output / "detections.json")), "bbox")
    scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    for value, name in zip(scorer.stats, METRIC_NAMES, strict=True):
        assert printed[name] == (f"{value:.4f}" if value >= 0 else "not defined"), name
    for picture in ("precision_recall.png", "detections.png"):
        assert (output / picture).stat().st_size > 1000
    assert not list(output.glob("*.pt")) and not (output / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"categories": [[7, "square"], [9, "cat"]]}, ["9 'disc'", "9 'cat'"]),
        ({"label_map": {1: "square", 2: "cat"}}, ["label 2 is 'cat' there and 'disc' here"]),
        ({"label_map": {1: "disc", 2: "square"}}, ["label 1 is 'disc' there and 'square' here"]),
    ],
)
def test_evaluation_on_other_categories_is_an_error_that_names_them(data, small_state, tmp_path, capsys, extra, words):
    status, output = evaluate(data, {"model": small_state, "backbone": "resnet18", **extra}, tmp_path)
    assert status == main.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error: ") and all(word in line for word in words)
    assert not output.exists()


def test_evaluation_of_a_checkpoint_that_does_not_fit_is_an_error(data, small_state, tmp_path, capsys):
    """A published checkpoint names no backbone."""
    status, _ = evaluate(data, {"model": small_state}, tmp_path, "--backbone", "resnet34")
    assert status == main.BAD_INPUT
    status, _ = evaluate(data, {"model": {"conv1.weight": torch.zeros(1)}}, tmp_path)
    assert status == main.BAD_INPUT
    first, second = capsys.readouterr().err.splitlines()
    assert "it has no feature_extractor.feature_extractor.4.2.conv1.weight [64, 64, 3, 3]" in first
    assert "holds no SSD300 network" in second


def test_training_without_a_network_prints_one_line_and_writes_nothing(data, cache, tmp_path, capsys):
    output = tmp_path / "run"
    assert main.main(["--data", str(data), "--output", str(output), "--backbone", "resnet18"]) == main.BAD_INPUT
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("Downloading: "))  # torch's
    assert line.startswith("main.py: error: --backbone-weights imagenet: cannot fetch ") and str(cache) in line
    assert not output.exists()
