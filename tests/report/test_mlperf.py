"""mlperf.log: its tags, their order and values, and the package that writes them."""

import io
import logging
import os
import sys
from dataclasses import replace

import pytest

from src.report.report import Report
from tests.helpers.example_run import CONSTANTS, play_run, tags
from tests.helpers.preloaded_python import launch

# The tags of a run in the required order.
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


def test_mlperf_log_holds_the_ssd_tags_in_order(tmp_path):
    from mlperf_compliance.tags import SSD_TAGS

    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report)
    report.close()
    keys = [key for key, _ in tags(tmp_path)]
    assert set(keys) <= set(SSD_TAGS)
    epoch = ["train_epoch", *EVALUATION_TAGS]
    falling = ["train_epoch", "opt_learning_rate", *EVALUATION_TAGS]
    assert keys == [*CONSTANT_TAGS, *epoch, *falling, *falling, "run_stop", "run_final"]


def test_mlperf_log_holds_the_constants_of_ssd300(tmp_path):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report)
    report.close()
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
    report = Report(tmp_path, append=False, stream=io.StringIO())
    report.begin_run(replace(CONSTANTS, target=target))
    report.end_run(average_images_per_second=1, seconds=1, accuracy=accuracy)
    report.close()
    assert tags(tmp_path)[-2:] == [("run_stop", {"success": success}), ("run_final", None)]


def test_a_diverged_run_is_no_success(tmp_path):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    report.begin_run(CONSTANTS)
    report.mark_failed()
    report.close()
    assert tags(tmp_path)[-2:] == [("run_stop", {"success": False}), ("run_final", None)]


def test_incomplete_constants_are_written_again(tmp_path):
    report = Report(tmp_path, append=False, stream=io.StringIO())
    report.begin_run(CONSTANTS)
    report.close()
    whole = tags(tmp_path)
    lines = (tmp_path / "mlperf.log").read_text().splitlines(keepends=True)
    (tmp_path / "mlperf.log").write_text("".join(lines[:10]))
    report = Report(tmp_path, append=True, stream=io.StringIO())
    report.rewind(epoch=0, iteration=0)
    report.begin_run(CONSTANTS)
    report.close()
    assert tags(tmp_path) == whole


def test_the_mlperf_package_writes_nowhere_else(tmp_path):
    """In a process of its own, because the package opens files at its first import."""
    code = f"""
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from pathlib import Path
from src.report import mlperf
from src.report.report import Report
assert "mlperf_compliance" not in sys.modules
from tests.helpers.example_run import CONSTANTS, play_run
sink = open({str(tmp_path / "lines")!r}, "w")
report = Report(Path({str(tmp_path / "out")!r}), append=False, stream=sink)
play_run(report)
report.close()
"""
    stray = tmp_path / "stray.log"
    done = launch([sys.executable, "-c", code], COMPLIANCE_FILE=str(stray))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not stray.exists()
    assert set(os.listdir(tmp_path / "out")) - {"tensorboard"} == {"metrics.jsonl", "mlperf.log"}
    assert len(tags(tmp_path / "out")) == len(CONSTANT_TAGS) + 3 * 6 + 2 + 2


def test_a_console_handler_of_the_package_is_removed(tmp_path, capfd):
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger("mlperf_compliance").addHandler(handler)
    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report)
    report.close()
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlperf_compliance").handlers == []
