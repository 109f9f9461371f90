"""The benchmarks run; what they measure is not looked at."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import annotations, learning, loaders, machine, sharing, step
from benchmarks.table import cost, speed, table
from src.benchmark import Timing, peak_memory
from src.data.annotations.coco import locations, read_annotations
from src.evaluation.scoring import Results
from tests.helpers.datasets import annotation, write_coco

CPU = torch.device("cpu")
FIELDS = {"name", "ours", "yardstick", "ratio", "goal", "met"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    entries = [annotation(image, (20, 20, 60, 50)) for image in range(1, 5)]
    return write_coco(tmp_path_factory.mktemp("data"), entries, images=4)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("fast", [True, False])
def test_the_step_has_a_row_a_kind_that_the_processor_computes(monkeypatch, capsys, fast):
    monkeypatch.setattr(step, "STEPS", {"cpu": 1})
    monkeypatch.setattr(step, "half_is_fast", lambda device: fast)
    rows = list(step.run(backbone="resnet18", batch_size=2))
    assert [row["goal"] for row in rows] == ([step.GOAL_FLOAT32, step.GOAL_HALF] if fast else [step.GOAL_PLAIN_CPU])
    assert [row.keys() for row in rows] == [FIELDS] * len(rows)
    assert json.loads(json.dumps(rows)) == rows
    assert len(table(rows).splitlines()) == len(rows) + 1
    left_out = "training step, resnet18, --fp16: left out, this CPU has no bfloat16 arithmetic\n"
    assert capsys.readouterr().out == ("" if fast else left_out)


@pytest.mark.usefixtures("narrow")
def test_a_whole_run_has_a_row_a_pipeline(data, monkeypatch):
    monkeypatch.setattr(step, "TRIALS", 1)
    monkeypatch.setattr(step, "BARE_STEPS", {"cpu": 1})
    rows = list(step.whole_run(data, CPU, backbone="resnet18", batch_size=2))
    assert [row["goal"] for row in rows] == [step.GOAL_WHOLE] * 2
    assert all(row["ours"] > 0 and row["yardstick"] > 0 for row in rows)


def test_ten_times_coco_is_read_where_there_is_room(monkeypatch, capsys):
    monkeypatch.setattr(annotations, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(annotations, "WATCH_EVERY", 1e-4)
    monkeypatch.setattr(annotations, "TEN_TIMES_DISK", 0)
    monkeypatch.setattr(annotations, "TEN_TIMES_MEMORY", 0)
    seconds, memory = annotations.ten_times_rows(1.0, images=50)
    assert seconds["ours"] > 0 and memory["ours"] > 1 and capsys.readouterr().out == ""
    monkeypatch.setattr(annotations, "TEN_TIMES_MEMORY", 10**6)
    assert annotations.ten_times_rows(1.0, images=50) == []
    assert capsys.readouterr().out.startswith("ten times COCO: left out, ")


@pytest.mark.usefixtures("narrow")
def test_learning_trains_and_scores(data, monkeypatch):
    monkeypatch.setattr(learning, "ITERATIONS", 2)
    assert 0 <= learning.run(data, seed=1) <= 1


def test_loaders_have_a_row_a_pipeline_and_number_of_workers(data, monkeypatch):
    monkeypatch.setattr(loaders, "WORKERS", (1,))
    monkeypatch.setattr(loaders, "BATCH_SIZE", 2)
    rows = loaders.run(data, batches=1, repeats=1)
    assert [row["name"] for row in rows] == ["no_dali, workers: 1 (images/s)", "dali, threads: 1 (images/s)"]
    assert all(row["ratio"] == row["ours"] / row["yardstick"] for row in rows)


@pytest.mark.parametrize("cores", [1, 2])
def test_scoring_shared_out_has_its_rows(data, tmp_path, monkeypatch, cores):
    file = shutil.copy(locations(data, "val")[0], tmp_path)
    annotations = read_annotations(file, tmp_path, for_scoring=True)
    ones = np.ones(4)
    results = Results(annotations.image_ids, ones.astype(int), np.tile([20.0, 20, 60, 50], (4, 1)), ones)
    # One process, this one, in the place of the launcher's two.
    pinned = []

    def launch(line, check, cwd) -> None:
        folder, name, *rest = line[line.index("benchmarks.sharing") + 1 :]
        sharing.main(Path(folder), name, a_core_each=rest == [sharing.A_CORE_EACH])

    monkeypatch.setattr(sharing.subprocess, "run", launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: pinned.append(cores))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = sharing.rows(annotations, results, tmp_path)
    assert [row.keys() for row in rows] == [FIELDS] * (cores + 1)
    assert all(row["ours"] >= 0 for row in rows)
    assert pinned == ([{0}, {0, 1}, {1}, {0, 1}] if cores == 2 else [])


def test_a_repeated_data_set_has_each_image_as_often(data, tmp_path):
    annotations = read_annotations(*locations(step.repeated(data, 9, tmp_path), "train"))
    assert len(annotations) == len(annotations.boxes) == 12
    assert len({annotations.image_path(index).resolve() for index in range(12)}) == 4


@pytest.mark.parametrize(
    ("gibibytes", "float32", "half"), [(80, 128, 128), (24, 64, 128), (16, 32, 64), (8, 8, 32), (2, 2, 2)]
)
def test_a_batch_fits_the_card(gibibytes, float32, half):
    """By 330 and 117 MiB an image."""
    assert machine.fitting_batch(gibibytes * 2**30, "float32") == float32
    assert machine.fitting_batch(gibibytes * 2**30, "--fp16") == half


def test_figures_come_with_card_driver_and_versions(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100", total_memory=2**34, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(machine.collect_env, "get_nvidia_driver_version", lambda run: "580.1")
    found = json.loads(json.dumps(machine.describe(torch.device("cuda", 0))))
    assert found["device"] == "NVIDIA H100"
    assert found["memory (MiB)"] == 16384
    assert found["compute capability"] == "9.0"
    assert found["driver"] == "580.1"
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert machine.describe(CPU).keys() == {"device", "versions"}


def test_a_goal_is_the_least_ratio_of_a_speed_and_the_greatest_of_a_cost():
    assert [speed("", ours, 10.0, 0.5)["met"] for ours in (4.9, 5.0, 5.1)] == [False, True, True]
    assert [cost("", ours, 10.0, 0.5)["met"] for ours in (4.9, 5.0, 5.1)] == [True, True, False]
    assert speed("", 4.0, 10.0)["met"] is None
    assert cost("", 4.0) == {"name": "", "ours": 4.0, "yardstick": None, "ratio": None, "goal": None, "met": None}
    verdicts = [line.split()[-1] for line in table([cost("a", 1, 2, 1), cost("b", 3, 2, 1)]).splitlines()[1:]]
    assert verdicts == ["met", "MET"]


def test_what_was_measured_is_kept_when_the_rest_is_not(data, tmp_path, monkeypatch, capsys):
    def interrupted():
        yield cost("first", 1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "cpu_benchmarks", lambda folder: {"quick": lambda: [], "long": interrupted})
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(["--data", str(data), "--json", str(file)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["first", "1.00", "2.00", "0.500"]
    kept = json.loads(file.read_text())
    assert kept["rows"] == [cost("first", 1, 2)] and "versions" in kept["machine"]


def test_the_spread_holds_nine_of_ten_steps():
    seconds = np.arange(1.0, 21.0)
    timing = Timing("steps", 60, seconds, np.zeros(20))
    slow, fast = map(float, re.search(r"\((\S+) to (\S+) in nine of ten steps\)", timing.line()).groups())
    inside = sum(slow <= round(60 / second, 1) <= fast for second in seconds)
    assert inside == 18


def test_peak_memory_is_unknown_where_the_system_does_not_count_it(monkeypatch):
    assert peak_memory(CPU) > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(CPU) is None
