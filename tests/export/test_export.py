"""The exported files find what the trained network and `detect` find."""

import json
import re
import subprocess
import sys
import textwrap
from contextlib import closing, nullcontext
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import onnxslim
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from safetensors.torch import save_file
from torch import Tensor

import main
from benchmarks import export as benchmark
from src.data.images.decode import decode, resize
from src.data.pipelines.batch import normalise
from src.evaluation.evaluate import detect_batch
from src.export.export import Difference, compare, folded_copy, label_categories, read_pictures
from src.export.onnx_graph import detections, detector_graph, network_graph, with_metadata
from src.report.report import Report
from src.runtime.errors import UserError
from src.runtime.version import VERSION
from src.ssd.default_boxes import default_boxes
from src.ssd.detect import Detections, detect, strip_padding
from src.ssd.model import SSD300
from src.weights.exported import build_trained_detector, load_checkpoint_or_export
from src.weights.files import load_checkpoint
from tests.helpers.datasets import annotation, write_coco, write_image
from tests.helpers.oracle_inputs import ORACLE_CASES, oracle_output, quiet_output, random_output
from tests.helpers.tiny_model import narrow_network

CPU = torch.device("cpu")
HERE = Path(__file__).parents[2]
CATEGORIES = [[3, "square"], [90, "disc"]]
AT_A_THRESHOLD = 0.01  # share of detections whose score or overlap may be there by the rounding of the network


def assert_same(found: list[Detections], expected: list[Detections], tolerance: float = 1e-4) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.labels.tolist() == theirs.labels.tolist()
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def onnx_detections():
    """What the ONNX graph behind the network gives: a function of offsets and logits."""
    session = onnxruntime.InferenceSession(detections.to_model_proto().SerializeToString())

    def run(offsets: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {"offsets": offsets.numpy(), "logits": logits.numpy()})
        return tuple(map(torch.from_numpy, outputs))

    return run


def all_kinds(labels: int) -> tuple[Tensor, Tensor]:
    """Output of a network for five images: crowded, empty, saturated, with NaN in it, with a few detections."""
    crowded, few = random_output(1, labels), random_output(1, labels, seed=2, sigma=1.0, background=9.0)
    saturated, broken = random_output(1, labels, seed=1, sigma=200.0), random_output(1, labels, seed=3)
    broken[1][0, 1, ::2] = float("nan")
    broken[0][0, 3, 1::4] = float("inf")
    kinds = (crowded, quiet_output(1, labels), saturated, broken, few)
    return tuple(torch.cat(parts) for parts in zip(*kinds, strict=True))


@pytest.mark.parametrize("labels", [2, 81])
@pytest.mark.parametrize("images", [[0], [1], [4, 2, 0], [number % 5 for number in range(32)]])
def test_output_of_all_kinds_is_detected_as_by_detect(onnx_detections, images, labels):
    offsets, logits = (part[images] for part in all_kinds(labels))
    expected = detect(offsets, logits)
    assert sum(len(image.scores) for image in expected) == 0 or images != [1]
    boxes, found, scores = onnx_detections(offsets, logits)
    assert_same(strip_padding(boxes, found, scores), expected, 1e-6)
    assert (boxes.dtype, found.dtype, scores.dtype) == (torch.float32, torch.int64, torch.float32)
    assert (tuple(boxes.shape), tuple(found.shape)) == ((len(images), 200, 4), (len(images), 200))
    nothing = scores == 0
    assert not boxes[nothing].any() and not found[nothing].any()


@pytest.mark.parametrize("case", ORACLE_CASES)
def test_detections_are_the_published_models(oracle, onnx_detections, case):
    arrays = oracle("decode.npz")
    boxes, labels, scores = (torch.from_numpy(arrays[f"{case}_{part}"]) for part in ("ltrb", "labels", "scores"))
    found = strip_padding(*onnx_detections(*oracle_output(case)))
    difference = compare([Detections(boxes, labels, scores)], found)
    assert difference.detections == len(scores)
    assert difference.farthest < 1e-5 and difference.unmatched == 0


def test_a_box_that_reaches_far_out_and_one_without_area(onnx_detections):
    offsets, logits = quiet_output(1, 81)
    logits[0, 1, [100, 101, 8000]] = 25
    offsets[0, 2:, 100] = 1e4
    offsets[0, 2:, 101] = -1e4
    expected = detect(offsets, logits)
    assert len(expected[0].scores) == 3
    assert_same(strip_padding(*onnx_detections(offsets, logits)), expected)


def network(backbone: str, categories: int, seed: int = 0) -> SSD300:
    """Random weights under which pictures hold many detections of any score."""
    torch.manual_seed(seed)
    model = SSD300(backbone, categories + 1).eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 300, 300))
        for heads, output, spread in ((model.loc, outputs[0], 0.3), (model.conf, outputs[1], 3)):
            for head in heads:
                head.weight.mul_(spread / output.std())
    return model


@pytest.mark.parametrize(("made", "categories"), [(narrow_network, 1), (nullcontext, 80)], ids=["narrow", "ResNet-50"])
def test_an_onnx_file_of_a_whole_network_finds_what_the_network_finds(made, categories):
    """ResNet-50 has every kind of layer that the other backbones have."""
    with made():
        model = network("resnet50", categories)
    content = with_metadata(detector_graph(network_graph(folded_copy(model))), {})
    images = torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, _ = detect_batch(model, normalise(images))
    outputs = onnxruntime.InferenceSession(content).run(None, {"images": images.numpy()})
    difference = compare(expected, strip_padding(*map(torch.from_numpy, outputs)))
    assert difference.detections > 100 and difference.farthest < 1e-4
    assert difference.unmatched <= AT_A_THRESHOLD * difference.detections


class Files:
    """A data set, a checkpoint of a narrow network, and what `--mode export` made of it."""

    def __init__(self, folder: Path) -> None:
        entries = [annotation(image, (30, 20, 90, 80), CATEGORIES[image % 2][0]) for image in (1, 2, 3, 4)]
        names = [{"id": number, "name": name} for number, name in CATEGORIES]
        self.data = write_coco(folder / "data", entries, categories=names)
        self.checkpoint, self.exported = folder / "model.pt", folder / "exported"
        with narrow_network():
            self.model = network("resnet18", 2)
        state = {"model": self.model.state_dict(), "categories": CATEGORIES, "backbone": "resnet18"}
        torch.save(state, self.checkpoint)

    def run(self, mode: str, checkpoint: Path, output: Path, data: Path | None = None, *more: str) -> int:
        flags = ["--data", str(data or self.data), "--mode", mode, "--checkpoint", str(checkpoint), *more]
        with narrow_network():
            return main.main([*flags, "--output", str(output), "--num-workers", "0", "--ebs", "3"])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    made = Files(tmp_path_factory.mktemp("export"))
    assert made.run("export", made.checkpoint, made.exported) == 0
    return made


def test_photographs(files, coco128):
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


def figures(printed: str) -> list[str]:
    return re.findall(r"^(?:mAP|A[PR])\d* .*(?:\d\.\d{4}|not defined)$", printed, flags=re.MULTILINE)


@pytest.mark.parametrize("mode", ["evaluation", "prediction"])
def test_the_program_takes_an_exported_file_in_a_checkpoints_place(files, tmp_path, capsys, mode):
    data = files.data / "val2017" if mode == "prediction" else None
    left, told = [], []
    for checkpoint in (files.checkpoint, files.exported / "detector.onnx"):
        assert files.run(mode, checkpoint, tmp_path / checkpoint.name, data) == 0
        left.append(json.loads((tmp_path / checkpoint.name / "detections.json").read_text()))
        told.append(figures(capsys.readouterr().out))
    assert len(left[0]) > 40
    assert len(told[0]) == (12 if mode == "evaluation" else 0) and told == [told[0]] * 2
    for ours, theirs in zip(*left, strict=True):
        assert ours["category_id"] == theirs["category_id"] and ours["image_id"] == theirs["image_id"]
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], rtol=0, atol=0.02)  # pixels
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_score_best_takes_each_categorys_own_score_from_an_exported_file(files, tmp_path):
    """The second category has no score of its own, so that of all counts."""
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
    """What each file takes, two images."""
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
def test_onnxslim_leaves_what_a_file_gives(files, inputs, tmp_path, name):
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


def test_the_version_is_the_projects():
    assert re.search(r'^version = "(.+)"$', (HERE / "pyproject.toml").read_text(), re.MULTILINE)[1] == VERSION


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


def alone(code: str, folder: Path, *, without: tuple[str, ...]) -> str:
    """What the code prints in a process of its own, in which some modules cannot be imported."""
    code = WITHOUT.format(names=without) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_in_the_docs_finds_what_the_program_finds_without_torch(files, tmp_path):
    page = (HERE / "docs" / "export.rst").read_text()
    (code,) = re.findall(r"^ {3}import json\n(?:(?: {3}.*)?\n)*", page, re.MULTILINE)
    code = textwrap.dedent(code)
    (tmp_path / "exported").symlink_to(files.exported)
    write_image(tmp_path / "photograph.jpg", 300, 300, seed=5, format="png")  # no resizing, no decoder's freedom
    printed = alone(code, tmp_path, without=("torch", "torchvision", "src"))
    assert files.run("prediction", files.checkpoint, tmp_path / "found", tmp_path / "photograph.jpg") == 0
    expected = [
        entry for entry in json.loads((tmp_path / "found" / "detections.json").read_text()) if entry["score"] > 0.5
    ]
    told = [re.fullmatch(r"(\w+) (\d\.\d\d) \[(.*)\]", line).groups() for line in printed.splitlines()]
    assert len(told) == len(expected) > 3
    for (name, score, box), entry in zip(told, expected, strict=True):
        left, top, width, height = entry["bbox"]
        assert (name, float(score)) == (entry["category"], pytest.approx(entry["score"], abs=0.006))
        clipped = np.array(box.split(), float).clip(0, 300)  # as prediction lists it
        np.testing.assert_allclose(clipped, [left, top, left + width, top + height], atol=0.51)


@pytest.mark.parametrize("mode", ["export", "evaluation", "prediction"])
def test_a_missing_package_is_told_of_with_the_command_that_installs_it(files, tmp_path, capsys, monkeypatch, mode):
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
    ("name", "content", "said"),
    [
        ("a.onnx", b"nonsense", "is no .onnx file, or not a whole one"),
        ("a.pt2", b"nonsense", "give the checkpoint itself, or detector.onnx of --mode export"),
        ("network.onnx", None, "is not the detector.onnx of --mode export"),
        ("missing.onnx", None, "no such file"),
    ],
)
def test_a_file_that_is_no_exported_detector(files, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = files.exported / name if name == "network.onnx" else tmp_path / name
    with pytest.raises(UserError, match=said) as raised:
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


def test_compare_finds_the_same_detection_wherever_it_stands():
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
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    with narrow_network():
        rows = benchmark.run(backbone="resnet18", labels=3, batch_size=2)
    (row,) = rows
    assert row["name"].startswith("detector.onnx ") and row["ours"] > 0 and row["yardstick"] > 0


def test_pictures_that_cannot_be_read_are_left_out(tmp_path, capsys):
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
    torch.save(weights, tmp_path / "spoilt.pt")
    flags = ["--mode", "export", "--data", files.data, "--checkpoint", tmp_path / "spoilt.pt"]
    assert main.main([*map(str, flags), "--output", str(tmp_path / "o")]) == 2
    assert f"{tmp_path / 'spoilt.pt'}: loc.0.bias holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_an_exported_file_is_no_checkpoint(files):
    for path in files.exported.glob("detector.*"):
        with pytest.raises(UserError, match=f"{path.name}: is no checkpoint: give that from which it was exported"):
            load_checkpoint(path)


def test_a_checkpoint_that_does_not_say_its_categories_has_those_of_the_data(files, tmp_path, capsys):
    """In their order, as in its evaluation."""
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in files.model.state_dict().items()}, file)
    with closing(Report(None, append=True)) as report:
        categories = label_categories(load_checkpoint_or_export(file), files.data, source=file, report=report)
    assert [list(category) for category in categories] == CATEGORIES
    assert f"{file}: does not say what its labels are: the categories of {files.data}" in capsys.readouterr().out


def test_without_a_data_set_labels_are_the_ids_of_a_published_checkpoints_categories(files, capsys):
    state = {"model": files.model.state_dict(), "label_map": {1: "square", 2: "disc"}}
    with closing(Report(None, append=True)) as report:
        pictures = files.data / "val2017"
        categories = label_categories(state, pictures, source=Path("published.pt"), report=report)
        assert [tuple(category) for category in categories] == [(1, "square"), (2, "disc")]
        assert "published.pt: does not say the ids of its categories" in capsys.readouterr().out
        state["label_map"] = {1: "disc", 2: "square"}
        with pytest.raises(UserError, match="label 1 is 'disc' there and 'square' here"):
            label_categories(state, files.data, source=Path("published.pt"), report=report)
