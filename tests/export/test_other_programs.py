"""Other programs run the exported files, and other tools change them."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic

from src.runtime.version import VERSION
from src.ssd.default_boxes import default_boxes
from tests.helpers.datasets import write_image

HERE = Path(__file__).parents[2]


def test_the_files_hold_what_other_programs_need(files):
    for name in ("detector.onnx", "network.onnx"):
        model = onnx.load(files.exported / name)
        onnx.checker.check_model(model, full_check=True)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["categories"]) == [{"id": 3, "name": "square"}, {"id": 90, "name": "disc"}]
        assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
        assert json.loads(metadata["deviation"]) == [0.229, 0.224, 0.225]
        assert metadata["version"] == VERSION
        assert str(HERE).encode() not in (files.exported / name).read_bytes()
    boxes = json.loads((files.exported / "default_boxes.json").read_text())
    assert torch.equal(torch.tensor(boxes["default_boxes"]), default_boxes()) and boxes["variances"] == [0.1, 0.2]


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    """Two images as each file takes them."""
    rng = np.random.default_rng(0)
    return {
        "detector.onnx": rng.integers(0, 256, (2, 3, 300, 300)).astype(np.uint8),
        "network.onnx": rng.standard_normal((2, 3, 300, 300)).astype(np.float32),
    }


OUTPUTS = {"detector.onnx": ["boxes", "labels", "scores"], "network.onnx": ["offsets", "logits"]}


def run_file(file: Path, name: str, images: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file)
    return session.run(OUTPUTS[name], {session.get_inputs()[0].name: images})


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_file_simplified_by_onnxslim_gives_the_same(files, inputs, tmp_path, name):
    onnx.save(onnxslim.slim(str(files.exported / name)), tmp_path / name)
    expected, slimmed = (run_file(folder / name, name, inputs[name]) for folder in (files.exported, tmp_path))
    for ours, theirs in zip(slimmed, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_quantized_file_gives_nearly_the_same(files, inputs, tmp_path, name):
    quantize_dynamic(files.exported / name, tmp_path / name)
    *_, expected = run_file(files.exported / name, name, inputs[name])  # scores, or logits
    *_, quantized = run_file(tmp_path / name, name, inputs[name])
    assert quantized.shape == expected.shape
    assert np.abs(quantized - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("name", OUTPUTS)
def test_opencv_gives_the_same(files, inputs, name):
    network = cv2.dnn.readNetFromONNX(str(files.exported / name))
    network.setInput(inputs[name])
    found = network.forward(OUTPUTS[name])
    for ours, theirs in zip(found, run_file(files.exported / name, name, inputs[name]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_network_file_gives_offsets_and_logits(files):
    session = onnxruntime.InferenceSession(files.exported / "network.onnx")
    images = torch.randn(3, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    outputs = session.run(["offsets", "logits"], {"normalised": images.numpy()})
    with torch.inference_mode():
        for ours, theirs in zip(outputs, files.model(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4)


WITHOUT = """
import sys
for name in {names}:
    sys.modules[name] = None  # cannot be imported
"""


def run_python(code: str, folder: Path, *, without: tuple[str, ...]) -> str:
    """The output of the code in another process, in which some modules cannot be imported."""
    code = WITHOUT.format(names=without) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_in_the_docs_detects_the_same_without_torch(files, tmp_path):
    page = (HERE / "docs" / "export.rst").read_text()
    (code,) = re.findall(r"^ {3}import json\n(?:(?: {3}.*)?\n)*", page, re.MULTILINE)
    code = textwrap.dedent(code)
    (tmp_path / "exported").symlink_to(files.exported)
    write_image(tmp_path / "photograph.jpg", 300, 300, seed=5, format="png")  # no resizing, and decoders agree on PNG
    printed = run_python(code, tmp_path, without=("torch", "torchvision", "src"))
    assert files.run("prediction", files.checkpoint, tmp_path / "found", tmp_path / "photograph.jpg") == 0
    expected = [
        entry for entry in json.loads((tmp_path / "found" / "detections.json").read_text()) if entry["score"] > 0.5
    ]
    rows = [re.fullmatch(r"(\w+) (\d\.\d\d) \[(.*)\]", line).groups() for line in printed.splitlines()]
    assert len(rows) == len(expected) > 3
    for (name, score, box), entry in zip(rows, expected, strict=True):
        left, top, width, height = entry["bbox"]
        assert (name, float(score)) == (entry["category"], pytest.approx(entry["score"], abs=0.006))
        clipped = np.array(box.split(), float).clip(0, 300)  # as prediction lists it
        np.testing.assert_allclose(clipped, [left, top, left + width, top + height], atol=0.51)
