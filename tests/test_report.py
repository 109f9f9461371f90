import fcntl
import io
import json
import logging
import os
import platform
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from src import mlperf
from src.errors import UserError
from src.report import NullReport, Report, set_aside_old_run

PROJECT = Path(__file__).parents[1]
CONSTANTS = mlperf.Constants(
    backbone="resnet50",
    feature_channels=(1024, 512, 512, 256, 256, 256),
    images=117266,
    batch_size=256,
    batch_norm_span=32,
    learning_rate=0.0208,
    warmup=None,
    multistep=(1, 2),
    momentum=0.9,
    weight_decay=5e-4,
    nms_threshold=0.5,
    max_detections=200,
    evaluation_images=5000,
    target=0.25,
)
# The order in which the tags of a run are to come.
CONSTANT_TAGS = [
    "run_start",
    "backbone",
    "feature_sizes",
    "steps",
    "scales",
    "aspect_ratios",
    "num_defaults_per_cell",
    "loc_conf_out_channels",
    "num_default_boxes",
    "nms_threshold",
    "nms_max_detections",
    "input_size",
    "input_shard",
    "input_order",
    "num_cropping_iterations",
    "random_flip_probability",
    "data_normalization_mean",
    "data_normalization_std",
    "input_batch_size",
    "input_bn_span",
    "opt_name",
    "opt_learning_rate",
    "opt_momentum",
    "opt_weight_decay",
    "opt_learning_rate_warmup_steps",
    "train_loop",
]
EVALUATION_TAGS = ["eval_start", "eval_size", "eval_accuracy", "eval_target", "eval_stop"]
ITERATIONS = 30  # an epoch of the runs below


def log_iteration(to: Report, iteration: int, **changes) -> None:
    figures = {
        "loss": 17.20314,
        "localisation_loss": 2.5,
        "label_loss": 14.75,
        "learning_rate": 2.6e-3,
        "images_per_second": 523.1,
        "loss_scale": 65536.0,
    }
    to.iteration(epoch=iteration // ITERATIONS, iteration=iteration, **(figures | changes))


def end_epoch(to: Report, epoch: int) -> None:
    to.end_epoch(epoch=epoch, seconds=61.23, images_per_second=523.14, average_images_per_second=523.14)


class Stage(NamedTuple):
    """A part of a run that leaves no checkpoint before it is over."""

    epoch: int  # with iteration, the position of a checkpoint that is written just before
    iteration: int
    inside: bool  # whether the epoch has begun and is not over
    play: Callable[[Report], None]


def stages() -> list[Stage]:
    """A run of three epochs, each evaluated; what it tells depends on the position alone."""
    found = []
    for epoch in range(3):
        first = epoch * ITERATIONS
        found.append(Stage(epoch, first, False, methodcaller("begin_epoch", epoch=epoch, iterations=ITERATIONS)))
        for iteration in range(first, first + ITERATIONS):
            found.append(Stage(epoch, iteration, True, partial(train_and_log, iteration=iteration)))
        found.append(Stage(epoch, first + ITERATIONS, True, partial(end_epoch, epoch=epoch)))
        found.append(Stage(epoch, first + ITERATIONS, False, partial(evaluate, epoch=epoch)))
    end = methodcaller("end", average_images_per_second=531.04, seconds=4021.66, accuracy=2 / 7)
    return [*found, Stage(3, 3 * ITERATIONS, False, end)]


def train_and_log(to: Report, iteration: int) -> None:
    to.step(256)
    if iteration % 20 == 0:
        log_iteration(to, iteration, loss=20 - iteration / 7)


def evaluate(to: Report, epoch: int) -> None:
    to.begin_evaluation(epoch)
    to.evaluation(epoch=epoch, figures={"mAP": epoch / 7, "AP50": epoch / 3, "AP small": None})


def run(to: Report, start: int = 0, stop: int | None = None) -> None:
    """Plays stages start..stop, as a run that begins there does."""
    to.begin_run(CONSTANTS)
    stage = stages()[start]
    if stage.inside:
        to.begin_epoch(stage.epoch, ITERATIONS, stage.iteration - stage.epoch * ITERATIONS)
    for stage in stages()[start:stop]:
        stage.play(to)


def metrics(folder: Path) -> list[dict]:
    """The objects of metrics.jsonl, read by a parser that takes nothing but JSON."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tags(folder: Path) -> list[tuple[str, object]]:
    """Key and value of each line of mlperf.log; fails on a line that has another form."""
    found = []
    for line in (folder / "mlperf.log").read_text().splitlines():
        match = re.fullmatch(r":::MLPv0\.5\.0 ssd \d+\.\d{9} \(src/mlperf\.py:\d+\) (\w+)(?:: (.+))?", line)
        assert match, line
        found.append((match[1], None if match[2] is None else json.loads(match[2])))
    return found


def test_lines_have_the_documented_forms(tmp_path):
    stream = io.StringIO()
    to = Report(tmp_path, append=False, stream=stream)
    log_iteration(to, 20)
    end_epoch(to, 0)
    to.evaluation(epoch=3, figures={"mAP": 0.07134})
    to.evaluation(epoch=12, figures={"mAP": None})
    to.end(average_images_per_second=531.04, seconds=4021.66, accuracy=0.27118)
    to.end(average_images_per_second=531.04, seconds=4021.66, accuracy="not evaluated")
    to.close()
    assert stream.getvalue().splitlines() == [
        "Epoch:  0, Iteration: 20, Loss: 17.2031",
        "Epoch  0 finished. Time: 61.2 s, Speed: 523.1 img/sec, Average speed: 523.1",
        "Epoch  3, Accuracy: 0.0713 mAP",
        "Epoch 12, Accuracy: not defined",
        "Training end: Average speed: 531.0 img/sec, Total time: 4021.7 sec, Final accuracy: 0.2712 mAP",
        "Training end: Average speed: 531.0 img/sec, Total time: 4021.7 sec, Final accuracy: not evaluated",
    ]


def test_warnings_go_to_standard_error(capsys):
    Report(None, append=False).warn("the CPU has no bfloat16 arithmetic")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "main.py: warning: the CPU has no bfloat16 arithmetic\n")


def test_metrics_hold_what_was_logged_at_once(tmp_path):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    train_and_log(to, 39)
    log_iteration(to, 40)
    end_epoch(to, 1)
    to.evaluation(epoch=1, figures={"mAP": np.float64(0.25), "AP small": None})
    assert metrics(tmp_path) == [  # the report is not closed yet
        {
            "kind": "iteration",
            "epoch": 1,
            "iteration": 40,
            "loss": 17.20314,
            "localisation_loss": 2.5,
            "label_loss": 14.75,
            "learning_rate": 2.6e-3,
            "images_per_second": 523.1,
            "loss_scale": 65536.0,
        },
        {
            "kind": "epoch",
            "epoch": 1,
            "iteration": 41,
            "seconds": 61.23,
            "images_per_second": 523.14,
            "average_images_per_second": 523.14,
        },
        {"kind": "evaluation", "epoch": 1, "mAP": 0.25, "AP small": None},
    ]
    to.close()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -np.float32("inf")])
def test_numbers_that_are_not_finite_are_null(tmp_path, number):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    log_iteration(to, 0, loss=number, label_loss=number)
    to.close()
    assert metrics(tmp_path)[0]["loss"] is None and metrics(tmp_path)[0]["label_loss"] is None


def test_a_new_run_starts_its_files_afresh(tmp_path):
    for _ in range(2):
        to = Report(tmp_path, append=False, stream=io.StringIO())
        run(to)
        to.close()
    assert len(metrics(tmp_path)) == 5 + 3 + 3  # 0, 20, ..., 80; epochs; evaluations
    assert [key for key, _ in tags(tmp_path)].count("run_start") == 1


PER_EPOCH = ITERATIONS + 3  # stages: the begin, the iterations, the end and the evaluation


@pytest.mark.parametrize(
    ("checkpoint", "killed"),
    [
        (0, 0),
        (0, 7),
        (1, PER_EPOCH + 5),
        (PER_EPOCH, PER_EPOCH),  # between an evaluation and the next epoch
        (PER_EPOCH, 2 * PER_EPOCH + 9),
        (PER_EPOCH + 1, PER_EPOCH + 1),
        (PER_EPOCH + 12, PER_EPOCH + 12),  # inside an epoch, in which the learning rate fell
        (PER_EPOCH + 12, PER_EPOCH + 14),  # two iterations on, nothing was logged
        (PER_EPOCH + 26, 2 * PER_EPOCH),  # nothing but the end of the epoch was logged
        (2 * PER_EPOCH - 1, 2 * PER_EPOCH - 1),  # between an epoch and its evaluation
        (2 * PER_EPOCH - 1, 2 * PER_EPOCH),  # after the evaluation
        (2 * PER_EPOCH - 1, 3 * PER_EPOCH),
        (3 * PER_EPOCH, 3 * PER_EPOCH + 1),  # when all was done
    ],
)
def test_a_continued_run_leaves_the_files_of_an_uninterrupted_one(tmp_path, checkpoint, killed):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    to = Report(whole, append=False, stream=io.StringIO())
    run(to)
    to.close()

    to = Report(parted, append=False, stream=io.StringIO())
    run(to, stop=killed)
    to.close()
    for file in ("metrics.jsonl", "mlperf.log"):  # the kill came in the middle of a line
        with (parted / file).open("a") as lines:
            lines.write(':::MLPv0.5.0 ssd 1.000000000 (src/mlperf.py:1) train_ep{"kind": "iteration", "epoch": 0, "ite')
    to = Report(parted, append=True, stream=io.StringIO())
    stage = stages()[checkpoint]
    to.truncate(epoch=stage.epoch, iteration=stage.iteration)
    run(to, start=checkpoint)
    to.close()

    assert (parted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert tags(parted) == tags(whole)


def test_a_completed_run_goes_on_to_more_epochs(tmp_path):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    run(to)
    to.close()
    before = metrics(tmp_path)
    to = Report(tmp_path, append=True, stream=io.StringIO())
    to.truncate(epoch=3, iteration=3 * ITERATIONS)
    to.begin_run(CONSTANTS)
    to.begin_epoch(3, ITERATIONS)
    log_iteration(to, 100)
    to.end(average_images_per_second=1, seconds=1, accuracy=0.1)
    to.close()
    assert metrics(tmp_path)[:-1] == before
    assert [key for key, _ in tags(tmp_path)][-4:] == ["eval_stop", "train_epoch", "run_stop", "run_final"]


def test_lines_that_are_none_of_ours_are_dropped_when_a_run_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'null\n7\n{"epoch": 0}\n\xff\xfe\n{"kind": "evaluation", "epoch": 0}')
    to = Report(tmp_path, append=True, stream=io.StringIO())
    to.truncate(epoch=1, iteration=ITERATIONS)
    end_epoch(to, 1)
    to.close()
    assert [(entry["kind"], entry["epoch"]) for entry in metrics(tmp_path)] == [("evaluation", 0), ("epoch", 1)]


def test_going_on_where_there_are_no_files_starts_them(tmp_path):
    to = Report(tmp_path / "new", append=True, stream=io.StringIO())
    to.truncate(epoch=1, iteration=ITERATIONS)
    run(to, start=PER_EPOCH)
    to.close()
    assert metrics(tmp_path / "new")[0]["iteration"] == 40
    assert tags(tmp_path / "new")[0][0] == "run_start"


def test_flags_hold_the_flags_the_versions_and_the_facts(tmp_path):
    to = Report(tmp_path / "a" / "b", append=False)
    to.flags({"data": Path("coco"), "evaluation": [3, 21], "target": None, "fp16": True}, seed=5, device="cpu")
    content = json.loads((tmp_path / "a" / "b" / "flags.json").read_text())
    assert content["flags"] == {"data": "coco", "evaluation": [3, 21], "target": None, "fp16": True}
    assert content["seed"] == 5 and content["device"] == "cpu"
    assert content["versions"]["python"] == platform.python_version()
    assert torch.__version__.startswith(content["versions"]["torch"])
    assert content["versions"]["numpy"] == np.__version__
    assert os.listdir(tmp_path / "a" / "b") == ["flags.json"]


def test_a_report_without_a_folder_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    to = Report(None, append=False, stream=stream)
    to.flags({"seed": 0})
    run(to)
    to.truncate(epoch=0, iteration=0)
    to.break_down()
    to.close()
    assert "Epoch  2, Accuracy: 0.2857 mAP" in stream.getvalue()
    assert os.listdir(tmp_path) == []


# Errors


@pytest.mark.parametrize("file", ["metrics.jsonl", "mlperf.log"])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, file, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is always full")
    (tmp_path / file).symlink_to("/dev/full")
    to = Report(tmp_path, append=False, stream=io.StringIO())
    with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path / file}: No space left on device")):
        run(to)
    to.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [lambda to: to.flags({}), lambda to: log_iteration(to, 0)])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "models"
    with pytest.raises(UserError, match=re.escape(f"cannot write {folder}: Not a directory")):
        write(Report(folder, append=False, stream=io.StringIO()))


# The MLPerf log


def test_mlperf_log_holds_the_ssd_tags_in_order(tmp_path):
    from mlperf_compliance.tags import SSD_TAGS

    to = Report(tmp_path, append=False, stream=io.StringIO())
    run(to)
    to.close()
    keys = [key for key, _ in tags(tmp_path)]
    assert set(keys) <= set(SSD_TAGS)
    epoch = ["train_epoch", *EVALUATION_TAGS]
    falling = ["train_epoch", "opt_learning_rate", *EVALUATION_TAGS]
    assert keys == [*CONSTANT_TAGS, *epoch, *falling, *falling, "run_stop", "run_final"]


def test_mlperf_log_holds_the_constants_of_ssd300(tmp_path):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    run(to)
    to.close()
    found = tags(tmp_path)
    constants = dict(found[: len(CONSTANT_TAGS)])
    assert constants["feature_sizes"] == [38, 19, 10, 5, 3, 1]
    assert constants["steps"] == [8, 16, 32, 64, 100, 300]
    assert constants["scales"] == [21, 45, 99, 153, 207, 261, 315]
    assert constants["aspect_ratios"] == [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    assert constants["num_defaults_per_cell"] == [4, 6, 6, 6, 4, 4]
    assert constants["num_default_boxes"] == 8732
    assert constants["loc_conf_out_channels"] == [1024, 512, 512, 256, 256, 256]
    assert constants["data_normalization_mean"] == [0.485, 0.456, 0.406]
    assert constants["input_size"] == 117266 and constants["input_batch_size"] == 256
    assert constants["opt_name"] == "stochastic_gradient_descent_with_momentum"
    assert constants["opt_learning_rate_warmup_steps"] == 0
    rates = [value for key, value in found if key == "opt_learning_rate"]
    assert rates == pytest.approx([0.0208, 0.00208, 0.000208])
    assert [value for key, value in found if key == "eval_accuracy"][1] == {"epoch": 1, "value": 1 / 7}
    assert ("eval_target", 0.25) in found and ("eval_size", 5000) in found


@pytest.mark.parametrize(
    ("target", "accuracy", "success"),
    [
        (0.25, 0.25, True),
        (0.25, 0.2499, False),
        (0.25, None, False),
        (0.25, "not evaluated", False),
        (None, 0.1, True),
        (None, "not evaluated", True),
    ],
)
def test_a_run_is_a_success_when_it_reaches_its_target(tmp_path, target, accuracy, success):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    to.begin_run(mlperf.Constants(**(vars(CONSTANTS) | {"target": target})))
    to.end(average_images_per_second=1, seconds=1, accuracy=accuracy)
    to.close()
    assert tags(tmp_path)[-2:] == [("run_stop", {"success": success}), ("run_final", None)]


def test_a_run_that_broke_down_is_no_success(tmp_path):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    to.begin_run(CONSTANTS)
    to.break_down()
    to.close()
    assert tags(tmp_path)[-2:] == [("run_stop", {"success": False}), ("run_final", None)]


def test_constants_that_a_kill_cut_short_are_told_again(tmp_path):
    to = Report(tmp_path, append=False, stream=io.StringIO())
    to.begin_run(CONSTANTS)
    to.close()
    whole = tags(tmp_path)
    lines = (tmp_path / "mlperf.log").read_text().splitlines(keepends=True)
    (tmp_path / "mlperf.log").write_text("".join(lines[:10]))
    to = Report(tmp_path, append=True, stream=io.StringIO())
    to.truncate(epoch=0, iteration=0)
    to.begin_run(CONSTANTS)
    to.close()
    assert tags(tmp_path) == whole


def test_the_mlperf_package_writes_nowhere_else(tmp_path):
    """In a process of its own, since the package does its damage when it is first imported."""
    code = f"""
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from pathlib import Path
from src import mlperf, report
assert "mlperf_compliance" not in sys.modules
from tests.test_report import CONSTANTS, run
sink = open({str(tmp_path / "lines")!r}, "w")
to = report.Report(Path({str(tmp_path / "out")!r}), append=False, stream=sink)
run(to)
to.close()
"""
    stray = tmp_path / "stray.log"
    environment = {**os.environ, "COMPLIANCE_FILE": str(stray)}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not stray.exists()
    assert set(os.listdir(tmp_path / "out")) - {"tensorboard"} == {"metrics.jsonl", "mlperf.log"}
    assert len(tags(tmp_path / "out")) == len(CONSTANT_TAGS) + 3 * 6 + 2 + 2


def test_a_console_handler_of_the_package_is_taken_away(tmp_path, capfd):
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger("mlperf_compliance").addHandler(handler)
    to = Report(tmp_path, append=False, stream=io.StringIO())
    run(to)
    to.close()
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlperf_compliance").handlers == []


# An earlier run's files


def old_run(folder: Path, generation: str = "first") -> dict[str, str]:
    """Writes the files of a run and gives their contents by name."""
    checkpoints, logs = ("last.pt", "best.pt"), ("metrics.jsonl", "flags.json", "mlperf.log", "detections.json")
    pictures = ("training.png", "precision_recall.png", "detections.png", "batch.png")
    names = (*checkpoints, *logs, *pictures, "tensorboard/events.out.tfevents.1.host.2.0")
    contents = {name: f"{generation} {name}" for name in names}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return contents


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_old_run_is_moved_to_the_next_free_folder(tmp_path):
    first = old_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    assert set_aside_old_run(tmp_path) == f"{tmp_path} held an earlier run: its files are now in {tmp_path}/run-001"
    assert contents(tmp_path / "run-001") == first
    second = old_run(tmp_path, "second")
    assert set_aside_old_run(tmp_path).endswith("run-002")
    assert contents(tmp_path / "run-002") == second
    assert contents(tmp_path / "run-001") == first
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "tensorboard" / "notes.txt").read_text() == "mine"


def test_nothing_is_moved_where_there_was_no_run(tmp_path):
    assert set_aside_old_run(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run-001").mkdir()
    assert set_aside_old_run(tmp_path) is None
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "run-001"]


@pytest.mark.parametrize("taken", ["run-007", "run-1234"])
def test_numbers_count_on_from_the_greatest(tmp_path, taken):
    old_run(tmp_path)
    (tmp_path / taken).write_text("a file in the way")
    (tmp_path / "run-final").mkdir()
    number = int(taken.removeprefix("run-")) + 1
    assert set_aside_old_run(tmp_path).endswith(f"run-{number:03d}")
    assert (tmp_path / taken).read_text() == "a file in the way"


@pytest.mark.parametrize("moves", [0, 1, 5, 10])
def test_an_interruption_while_moving_loses_nothing(tmp_path, monkeypatch, moves):
    first = old_run(tmp_path)
    rename, done = os.rename, []

    def interrupted(*paths) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(rename(*paths))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            set_aside_old_run(tmp_path)
    assert sorted(contents(tmp_path).values()) == sorted(first.values())
    set_aside_old_run(tmp_path)
    assert contents(tmp_path / "run-001") | contents(tmp_path / "run-002") == first


def test_a_folder_that_cannot_be_moved_in_is_named(tmp_path, monkeypatch):
    old_run(tmp_path)

    def refuse(*_) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=re.escape(f"cannot write {tmp_path}: Permission denied")):
        set_aside_old_run(tmp_path)


# Bars

BAR_SCRIPT = """
import sys
from src.report import Report
from tests.test_report import run
to = Report(None, append=False)
run(to)
with to.progress(12, "Evaluation") as bar:
    for _ in range(12):
        bar.update()
    to.warn("a notice while the bar shows")
to.close()
"""


def output_at_a_terminal(script: str, columns: int) -> str:
    """What a process writes to a terminal of so many columns that is its standard output and standard error."""
    terminal, child_side = pty.openpty()
    fcntl.ioctl(child_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=child_side, stderr=child_side)
    os.close(child_side)
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # how the terminal tells that nobody writes any more
        pass
    os.close(terminal)
    assert child.wait() == 0, written
    return written.decode()


def as_seen(written: str) -> list[str]:
    """The lines that stay on the terminal's screen, after each return has begun to overwrite its line."""
    seen = []
    for line in written.replace("\r\n", "\n").split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        seen.append(screen.rstrip())
    return [line for line in seen if line]


def expected_lines() -> list[str]:
    stream = io.StringIO()
    run(Report(None, append=False, stream=stream))
    return [*stream.getvalue().splitlines(), "main.py: warning: a notice while the bar shows"]


def test_a_terminal_shows_bars_and_whole_lines():
    columns = 100
    written = output_at_a_terminal(BAR_SCRIPT, columns)
    assert as_seen(written) == expected_lines()
    bars = [bar for bar in re.split(r"[\r\n]+", written) if "left" in bar]
    assert re.search(r"Epoch  1 \|.*\| 11/30, [\d:?]+ left, loss 14\.2857, rate 2\.60e-03, [\d.]+ images/s", written)
    assert re.search(r"Evaluation \|.*\| \d+/12, [\d:?]+ left", written)
    assert max(len(bar) for bar in bars) <= columns


def test_a_pipe_gets_the_lines_alone():
    done = subprocess.run([sys.executable, "-c", BAR_SCRIPT], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).splitlines() == expected_lines()
    assert "\r" not in done.stdout + done.stderr


# TensorBoard and the other ranks


def test_without_tensorboard_there_are_no_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails as when it is not installed
    to = Report(tmp_path, append=False, stream=io.StringIO())
    run(to)
    to.close()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "mlperf.log"]


def test_tensorboard_gets_the_figures_of_metrics_jsonl(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    to = Report(tmp_path, append=False, stream=io.StringIO())
    run(to)
    to.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert losses == [
        (entry["iteration"], pytest.approx(entry["loss"])) for entry in metrics(tmp_path) if "loss" in entry
    ]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/mAP")][1] == (1, pytest.approx(1 / 7))
    set_aside_old_run(tmp_path)
    assert list((tmp_path / "run-001" / "tensorboard").iterdir())


def test_the_other_ranks_report_does_nothing_with_the_same_calls(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    to = NullReport()
    to.note("a line")
    to.warn("a line")
    to.flags({}, seed=1)
    to.truncate(epoch=0, iteration=0)
    run(to)
    with to.progress(3, "Evaluation") as bar:
        bar.update()
    to.break_down()
    to.close()
    assert capfd.readouterr() == ("", "") and os.listdir(tmp_path) == []
    public = {name for name in dir(Report) if not name.startswith("_")}
    assert public == {name for name in dir(NullReport) if not name.startswith("_")}
