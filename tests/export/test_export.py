"""`--mode export` writes files that detect what the trained network detects, and other modes take them."""

import json
import re
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

import main
from benchmarks import export as benchmark
from src.data.images.decode import decode, resize
from src.data.pipelines.batch import normalise
from src.evaluation.evaluate import detect_batch
from src.export.export import Difference, compare, label_categories, read_pictures
from src.report.report import Report
from src.runtime.errors import UserError
from src.runtime.version import VERSION
from src.ssd.detect import Detections
from src.weights.exported import build_trained_detector, load_checkpoint_or_export
from src.weights.files import load_checkpoint
from tests.helpers.datasets import write_image
from tests.helpers.exported import CATEGORIES
from tests.helpers.tiny_model import use_tiny_model

CPU = torch.device("cpu")
HERE = Path(__file__).parents[2]
# Rounding may move the score or the overlap of this share of detections across a threshold.
AT_A_THRESHOLD = 0.01


def test_the_exported_detector_detects_the_same_on_photographs(files, coco128):
    file = files.exported / "detector.onnx"
    detector = build_trained_detector(
        load_checkpoint_or_export(file), backbone="", num_categories=2, source=file, device=CPU
    )
    paths = sorted((coco128 / "train2017").glob("*.jpg"))[:32]
    images = torch.stack([resize(decode(path)) for path in paths])
    with torch.inference_mode():
        expected, _ = detect_batch(files.model, normalise(images))
    for count in (1, 3, 32):
        found, _ = detect_batch(detector, images[:count])
        difference = compare(expected[:count], found)
        assert difference.detections > 10 * count and difference.farthest < 1e-4
        assert difference.unmatched <= AT_A_THRESHOLD * difference.detections


def metric_lines(output: str) -> list[str]:
    return re.findall(r"^(?:mAP|A[PR])\d* .*(?:\d\.\d{4}|not defined)$", output, flags=re.MULTILINE)


@pytest.mark.parametrize("mode", ["evaluation", "prediction"])
def test_evaluation_and_prediction_take_an_exported_file_as_checkpoint(files, tmp_path, capsys, mode):
    data = files.data / "val2017" if mode == "prediction" else None
    listed, printed = [], []
    for checkpoint in (files.checkpoint, files.exported / "detector.onnx"):
        assert files.run(mode, checkpoint, tmp_path / checkpoint.name, data) == 0
        listed.append(json.loads((tmp_path / checkpoint.name / "detections.json").read_text()))
        printed.append(metric_lines(capsys.readouterr().out))
    assert len(listed[0]) > 40
    assert len(printed[0]) == (12 if mode == "evaluation" else 0) and printed == [printed[0]] * 2
    for ours, theirs in zip(*listed, strict=True):
        assert ours["category_id"] == theirs["category_id"] and ours["image_id"] == theirs["image_id"]
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], rtol=0, atol=0.02)  # pixels
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_score_best_takes_each_categorys_threshold_from_an_exported_file(files, tmp_path):
    """The second category has no threshold of its own, so the one of all categories counts."""
    pictures, checkpoint, exported = files.data / "val2017", tmp_path / "best.pt", tmp_path / "exported"
    assert files.run("prediction", files.checkpoint, tmp_path / "all", pictures) == 0
    every = json.loads((tmp_path / "all" / "detections.json").read_text())
    scores = {name: np.sort([entry["score"] for entry in every if entry["category"] == name]) for _, name in CATEGORIES}
    # Between two scores, far from both: rounding cannot move a detection across.
    middles = {name: (own[1:] + own[:-1]) / 2 for name, own in scores.items()}
    widest = {name: np.diff(own)[len(own) // 4 :].argmax() + len(own) // 4 for name, own in scores.items()}
    least = {name: float(middles[name][widest[name]]) for name in scores}
    assert least["square"] != least["disc"]
    thresholds = {"all": least["disc"], "by_label": [least["square"], None]}
    torch.save({**torch.load(files.checkpoint), "score_thresholds": thresholds}, checkpoint)
    assert files.run("export", checkpoint, exported) == 0
    metadata = {entry.key: entry.value for entry in onnx.load(exported / "detector.onnx").metadata_props}
    assert json.loads(metadata["score_thresholds"]) == thresholds
    found = []
    for number, file in enumerate((checkpoint, exported / "detector.onnx")):
        output = tmp_path / str(number)
        assert files.run("prediction", file, output, pictures, "--score", "best") == 0
        found.append(json.loads((output / "detections.json").read_text()))
    for entries in found:
        for name in scores:
            own = sorted(entry["score"] for entry in entries if entry["category"] == name)
            assert 0 < len(own) < len(scores[name])
            assert own == pytest.approx(scores[name][scores[name] > least[name]], abs=1e-4)
    boxes = [np.array([[entry["image_id"] * 1e4, entry["category_id"] * 1e4, *entry["bbox"]] for entry in entries])
             for entries in found]  # fmt: skip
    distances = np.abs(boxes[0][:, None] - boxes[1]).max(axis=2)
    assert distances.min(axis=0).max() < 0.1 and distances.min(axis=1).max() < 0.1


def test_the_version_is_the_projects():
    assert re.search(r'^version = "(.+)"$', (HERE / "pyproject.toml").read_text(), re.MULTILINE)[1] == VERSION


@pytest.mark.parametrize("mode", ["export", "evaluation", "prediction"])
def test_the_error_for_a_missing_package_has_the_command_that_installs_it(files, tmp_path, capsys, monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    checkpoint = files.checkpoint if mode == "export" else files.exported / "detector.onnx"
    assert files.run(mode, checkpoint, tmp_path) == 2
    assert capsys.readouterr().err.strip().endswith("pip install onnxruntime")


@pytest.mark.parametrize("mode", ["export", "evaluation", "prediction"])
def test_a_package_that_cannot_be_imported_is_named_before_any_work(files, tmp_path, capsys, monkeypatch, mode):
    (tmp_path / "packages" / "onnxruntime").mkdir(parents=True)
    program = "raise ImportError('libcudart.so.99: cannot open shared object file')"
    (tmp_path / "packages" / "onnxruntime" / "__init__.py").write_text(program)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    checkpoint = files.checkpoint if mode == "export" else files.exported / "detector.onnx"
    assert files.run(mode, checkpoint, tmp_path / "output") == 2
    error = capsys.readouterr().err
    assert "onnxruntime, which is installed but cannot be imported (ImportError: libcudart.so.99" in error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.onnx", b"nonsense", "is no .onnx file, or not a whole one"),
        ("a.pt2", b"nonsense", "give the checkpoint itself, or detector.onnx of --mode export"),
        ("network.onnx", None, "is not the detector.onnx of --mode export"),
        ("missing.onnx", None, "no such file"),
    ],
)
def test_a_file_that_is_no_exported_detector_is_an_error(files, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = files.exported / name if name == "network.onnx" else tmp_path / name
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint_or_export(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_a_damaged_file_is_refused_and_onnxruntime_prints_nothing(files, tmp_path, capfd):
    content = (files.exported / "detector.onnx").read_bytes()
    broken_name = content.replace(b"ReduceSum", b"Reduce\xffum")  # onnxruntime prints and tries again
    assert broken_name != content
    for damaged in (b"", content[:1], content[: len(content) // 2], content[:-1000], content[:-1], broken_name):
        (tmp_path / "cut.onnx").write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole one"):
            load_checkpoint_or_export(tmp_path / "cut.onnx")
    assert capfd.readouterr() == ("", "")


def found(*rows: tuple[float, int, float]) -> Detections:
    """Detections of (left edge, label, score)."""
    boxes = torch.tensor([[left, 0.0, 1.0, 1.0] for left, _, _ in rows]).reshape(-1, 4)
    labels, scores = (torch.tensor([row[part] for row in rows]) for part in (1, 2))
    return Detections(boxes, labels.long(), scores.float())


def test_compare_matches_detections_in_any_order():
    first = [found((0.1, 1, 0.9), (0.2, 2, 0.8)), found()]
    assert compare(first, first) == Difference(2, 0.0, 0)
    moved = [found((0.2, 2, 0.801), (0.103, 1, 0.9)), found()]
    difference = compare(first, moved)
    assert difference[::2] == (2, 0) and difference.farthest == pytest.approx(0.003, abs=1e-6)
    assert compare(first, [found((0.1, 2, 0.9), (0.2, 2, 0.8)), found((0.1, 1, 0.9))])[::2] == (2, 3)
    assert compare([found()], [found()]) == Difference(0, 0.0, 0)


def test_the_benchmark_compares_the_file_with_the_evaluation(files, monkeypatch):
    written = {path.name: path.read_bytes() for path in files.exported.iterdir()}
    monkeypatch.setattr(benchmark, "exported_files", lambda *_: written)
    monkeypatch.setattr(benchmark, "TURNS", 1)
    with use_tiny_model():
        rows = benchmark.run(backbone="resnet18", labels=3, batch_size=2)
    (row,) = rows
    assert row["name"].startswith("detector.onnx ") and row["ours"] > 0 and row["baseline"] > 0


def test_unreadable_pictures_are_left_out(tmp_path, capsys):
    for name in ("a.jpg", "c.jpg"):
        write_image(tmp_path / name, 90, 70)
    (tmp_path / "b.jpg").write_text("no image")
    with closing(Report(None, append=True)) as report:
        assert read_pictures(tmp_path, report).shape == (2, 3, 300, 300)
        assert f"main.py: warning: left out: {tmp_path / 'b.jpg'}: " in capsys.readouterr().err
        for name in ("a.jpg", "c.jpg"):
            (tmp_path / name).unlink()
        with pytest.raises(UserError, match="none of its images can be read"):
            read_pictures(tmp_path, report)


def test_weights_that_are_not_finite_are_not_exported(files, tmp_path, capsys):
    weights = {name: tensor.clone() for name, tensor in files.model.state_dict().items()}
    weights["loc.0.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "non_finite.pt")
    flags = ["--mode", "export", "--data", files.data, "--checkpoint", tmp_path / "non_finite.pt"]
    assert main.main([*map(str, flags), "--output", str(tmp_path / "o")]) == 2
    assert f"{tmp_path / 'non_finite.pt'}: loc.0.bias holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_an_exported_file_is_no_checkpoint(files):
    for path in files.exported.glob("detector.*"):
        with pytest.raises(UserError, match=f"{path.name}: is no checkpoint: give that from which it was exported"):
            load_checkpoint(path)


def test_a_checkpoint_without_categories_takes_those_of_the_data(files, tmp_path, capsys):
    """In their order, as in its evaluation."""
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in files.model.state_dict().items()}, file)
    with closing(Report(None, append=True)) as report:
        categories = label_categories(load_checkpoint_or_export(file), files.data, source=file, report=report)
    assert [list(category) for category in categories] == CATEGORIES
    assert f"{file}: does not say what its labels are: the categories of {files.data}" in capsys.readouterr().out


def test_without_a_data_set_a_published_checkpoints_labels_are_category_ids(files, capsys):
    state = {"model": files.model.state_dict(), "label_map": {1: "square", 2: "disc"}}
    with closing(Report(None, append=True)) as report:
        pictures = files.data / "val2017"
        categories = label_categories(state, pictures, source=Path("published.pt"), report=report)
        assert [tuple(category) for category in categories] == [(1, "square"), (2, "disc")]
        assert "published.pt: does not say the ids of its categories" in capsys.readouterr().out
        state["label_map"] = {1: "disc", 2: "square"}
        with pytest.raises(UserError, match="label 1 is 'disc' there and 'square' here"):
            label_categories(state, files.data, source=Path("published.pt"), report=report)
