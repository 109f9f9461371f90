"""What all plots have in common: PNG files with the same bytes each time, whatever the settings and names."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from src.report.image_plots import Example, draw_batch, draw_detections, draw_prediction
from src.report.precision_recall_plot import draw_precision_recall
from src.report.training_plot import draw_training
from src.runtime.errors import UserError
from tests.helpers.plot_inputs import (
    IOU_THRESHOLDS,
    RECALLS,
    evaluation_entry,
    example,
    iteration_entry,
    random_boxes,
    random_image,
    texts,
    write_metrics,
)

ROOT = Path(__file__).parents[2]
ODD_NAMES = [
    "$5 bill$ and \\frac{",
    "_hidden",
    "名前",
    "ñandú 🦤",
    "",
    "a name of more than two dozen characters",
    "a\nb",
]


def draw_each(folder: Path) -> dict[str, Path]:
    """Every kind of picture, of small input."""
    metrics = write_metrics(
        folder / "metrics.jsonl", [iteration_entry(0, 0), iteration_entry(20, 0), evaluation_entry(0, 0.2)]
    )
    one = example()
    draws = {
        "training.png": lambda path: draw_training(metrics, path),
        "precision_recall.png": lambda path: draw_precision_recall(
            np.full((10, 101, 2), 0.5), IOU_THRESHOLDS, RECALLS, ["dog", "cat"], path
        ),
        "detections.png": lambda path: draw_detections([one], path),
        "batch.png": lambda path: draw_batch(np.zeros((1, 3, 30, 30)), [np.array([[1, 2, 20, 25.0]])], [["dog"]], path),
        "prediction.png": lambda path: draw_prediction(one.image, one.boxes, one.names, one.scores, path),
    }
    for name, draw in draws.items():
        draw(folder / name)
    return {name: folder / name for name in draws}


def test_every_picture_is_a_png_file_with_the_same_bytes_each_time(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    first, second = draw_each(tmp_path / "first"), draw_each(tmp_path / "second")
    for name, path in first.items():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) >= 48
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 2, "something is drawn"
        assert path.read_bytes() == second[name].read_bytes()
    assert {path.name for path in (tmp_path / "first").iterdir()} == {*first, "metrics.jsonl"}, (
        "no temporary file stays"
    )


def test_pyplot_is_not_imported(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.report.test_plots import draw_each;"
        "draw_each(Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'tkinter' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_users_matplotlib_settings_are_ignored_and_kept(tmp_path):
    for folder in ("theirs", "ours"):
        (tmp_path / folder).mkdir()
    ours = draw_each(tmp_path / "ours")
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "savefig.dpi": 30, "font.size": 30}):
        before = dict(matplotlib.rcParams)
        theirs = draw_each(tmp_path / "theirs")
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in theirs.values()] == [path.read_bytes() for path in ours.values()]


def test_an_unwritable_picture_is_a_user_error_and_the_old_one_stays(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot write .*nowhere.*picture\.png: No such file or directory"):
        draw_detections([example()], tmp_path / "nowhere" / "picture.png")
    (tmp_path / "picture.png").write_text("the old one")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(UserError, match="No space left"):
        draw_detections([example()], tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert (tmp_path / "picture.png").read_text() == "the old one"


def test_names_may_be_any_text(tmp_path):
    count = len(ODD_NAMES)
    image, boxes, scores = random_image(200, 200), random_boxes(count, 200, 200), np.full(count, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_prediction(image, boxes, ODD_NAMES, scores, tmp_path / "prediction.png")
        draw_detections([Example(image, boxes, ODD_NAMES, boxes, ODD_NAMES, scores)], tmp_path / "grid.png")
        draw_precision_recall(
            np.full((10, 101, count), 0.5), IOU_THRESHOLDS, RECALLS, ODD_NAMES, tmp_path / "curves.png"
        )
    assert "名前 0.50" in texts(figure.axes[0])
