"""The benchmarks run with every row; what they measure is not looked at, what they compute from it is."""

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import annotations, evaluation, gpu, learning, loaders, machine, step
from benchmarks.table import cost, figure, limit, speed, table
from benchmarks.turns import CPU, Pair, cpu_seconds, in_turns, pair
from src.benchmark import Timing, peak_memory
from src.data.annotations.coco import locations, read_annotations
from tests.helpers.datasets import annotation, write_coco

FIELDS = {"name", "ours", "baseline", "ratio", "spread", "goal", "verdict"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    entries = [annotation(image, (20, 20, 60, 50)) for image in range(1, 5)]
    return write_coco(tmp_path_factory.mktemp("data"), entries, images=4)


@pytest.fixture
def small(monkeypatch) -> None:
    """One turn of one step each."""
    monkeypatch.setattr(step, "TURNS", 1)
    monkeypatch.setattr(step, "BARE_STEPS", {"cpu": 1})


@pytest.mark.usefixtures("tiny_model", "small")
@pytest.mark.parametrize("fast", [True, False])
def test_the_step_has_a_row_for_each_precision_of_the_processor(monkeypatch, capsys, fast):
    monkeypatch.setattr(step, "half_is_fast", lambda device: fast)
    rows = list(step.run(backbone="resnet18", batch_size=2))
    assert [row["goal"] for row in rows] == ([1.2, 2.4] if fast else [1.0])
    assert [row.keys() for row in rows] == [FIELDS] * len(rows)
    assert json.loads(json.dumps(rows)) == rows
    assert len(table(rows).splitlines()) == len(rows) + 1
    left_out = "training step, resnet18, --fp16: left out, this CPU has no bfloat16 arithmetic\n"
    assert capsys.readouterr().out == ("" if fast else left_out)


@pytest.mark.usefixtures("tiny_model", "small")
def test_a_whole_run_has_a_row_for_each_pipeline(data):
    rows = list(step.whole_run(data, backbone="resnet18", batch_size=2))
    assert [row["goal"] for row in rows] == [step.GOAL_WHOLE] * 2
    assert all(row["ours"] > 0 and row["baseline"] > 0 for row in rows)


def test_an_annotation_file_of_cocos_fields_is_read_in_every_row(monkeypatch):
    monkeypatch.setattr(annotations, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(annotations, "TURNS", 1)
    monkeypatch.setattr(annotations, "first_batch", lambda pipeline, file, image_folder: 1.0)
    rows = list(annotations.run(images=200))
    assert [row["goal"] for row in rows] == [0.1, 1.0, 1.0, 1.0, 1.0, None, None]
    assert rows[0]["ours"] > 0


def test_ten_times_coco_is_read_if_there_is_room(monkeypatch, capsys):
    monkeypatch.setattr(annotations, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(annotations, "TEN_TIMES_DISK", 0)
    monkeypatch.setattr(annotations, "TEN_TIMES_MEMORY", 0)
    seconds, memory = annotations.ten_times_rows(1.0, images=50)
    assert seconds["ours"] > 0 and memory["ours"] >= 0 and capsys.readouterr().out == ""
    monkeypatch.setattr(annotations, "TEN_TIMES_MEMORY", 10**6)
    assert list(annotations.ten_times_rows(1.0, images=50)) == []
    assert capsys.readouterr().out.startswith("ten times COCO: left out, ")


@pytest.mark.usefixtures("tiny_model")
def test_learning_trains_and_scores(data, monkeypatch):
    monkeypatch.setattr(learning, "ITERATIONS", 2)
    assert 0 <= learning.run(data, seed=1) <= 1


def test_loaders_have_a_row_for_each_pipeline_and_number_of_workers(data, monkeypatch):
    monkeypatch.setattr(loaders, "WORKERS", (1,))
    monkeypatch.setattr(loaders, "BATCH_SIZE", 2)
    rows = list(loaders.run(data, batches=1, turns=1))
    assert [row["name"] for row in rows] == ["no_dali, workers: 1 (images/s)", "dali, threads: 1 (images/s)"]
    assert all(row["ratio"] == row["ours"] / row["baseline"] for row in rows)


@pytest.fixture
def small_evaluation(monkeypatch) -> None:
    for name, value in {"TURNS": 1, "SCORING_TURNS": 1, "IMAGES": 20, "DETECTIONS": 100, "BATCH": 2}.items():
        monkeypatch.setattr(evaluation, name, value)


@pytest.mark.usefixtures("tiny_model", "small_evaluation")
@pytest.mark.parametrize("cores", [1, 2])
def test_an_evaluation_has_a_row_for_each_part(monkeypatch, cores):
    pinned = []
    monkeypatch.setattr(evaluation.os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(evaluation.os, "sched_setaffinity", lambda process, to: pinned.append(to), raising=False)
    monkeypatch.setattr(evaluation.multiprocessing, "spawn", score_alone)
    rows = list(evaluation.run())
    assert len(rows) == 6 + (cores > 1) + 1
    assert all(row["ours"] > 0 for row in rows)
    assert pinned == ([{0}, {0, 1}] * 2 if cores == 2 else [])


def score_alone(function, arguments, nprocs) -> None:
    """This process in place of two: `function` is the first of one rank."""
    assert nprocs == 2
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "0")
        patch.setattr(evaluation, "WORLD_SIZE", 1)
        function(0, *arguments)


@pytest.mark.usefixtures("tiny_model", "small", "small_evaluation")
def test_a_gpus_figures_have_every_row(data, monkeypatch):
    """On a CPU in its place, with eager steps for the compiled ones: not every machine has a compiler."""
    for name, value in {
        "WORKERS": (1, 2),
        "EPOCH": 2,
        "LOADER_BATCHES": 2,
        "COPIED": 2**10,
        "COMPILED": step.HALF,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(evaluation, "scoring_rows", lambda scene, folder: [])
    rows = list(gpu.run(data, CPU, backbone="resnet18", batch_size=2))
    named = [
        "bandwidth", "step.*float32", "step.*--fp16, beside its bound", "--compile, beside the eager step",
        "--compile, beside its bound", "dali alone, 1 threads", "cores", "dali alone, 2 threads", "cores",
        "no_dali alone, 1 workers", "cores", "no_dali alone, 2 workers", "cores", "cores below which dali starves",
        "cores below which no_dali starves", "whole run.*, dali", "cores", "whole run.*no_dali", "cores",
        "peak memory", "detections", "detections", "network", "network", "detections",
    ]  # fmt: skip
    assert len(rows) == len(named)
    assert all(re.search(name, row["name"]) for name, row in zip(named, rows, strict=True))
    assert all(row["ours"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize(
    ("traffic", "bandwidth", "expected"), [(1343, 2900, 1725), (977, 2900, 2205), (1343, 4155, 2165)]
)
def test_the_bound_is_that_of_a_sum_over_all_layers(traffic, bandwidth, expected):
    """In practice, of an H100, eager and fused, and of an H200."""
    assert gpu.bound(traffic, bandwidth) == pytest.approx(expected, rel=0.01)


def test_the_cores_that_a_step_needs_are_those_of_as_many_images():
    """4 cores for 800 images/s are 5 ms of a core an image."""
    loads = [gpu.Load(800, 4), gpu.Load(1200, 6), gpu.Load(1000, 16)]
    assert gpu.cores_needed(1500, loads) == pytest.approx(7.5)


def test_two_gpus_are_held_to_twice_one(data, monkeypatch):
    """The speed is that of the second epoch.  The runs are replaced by files of their metrics."""
    seen = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda line, **options: seen.append(line) or leave_metrics(line))
    row = gpu.two_gpus_row(data, 2, ("--backbone", "resnet18"))
    assert [line[line.index("main.py") - 1] for line in seen] == ["--nproc_per_node=1", "--nproc_per_node=2"]
    assert (row["ours"], row["baseline"], row["ratio"]) == (180.0, 200.0, 0.9)
    assert row["verdict"] == "NOT MET"


def leave_metrics(line) -> None:
    output = Path(line[line.index("--output") + 1])
    speeds = {"--nproc_per_node=1": 100.0, "--nproc_per_node=2": 180.0}
    of = speeds[line[line.index("main.py") - 1]]
    entries = [{"kind": "epoch", "images_per_second": value} for value in (1.0, of)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_workers_that_still_run_count_with_their_processor_time():
    from multiprocessing import get_context

    before, own = cpu_seconds(), time.process_time()
    worker = get_context("fork").Process(target=burn)
    worker.start()
    deadline = time.monotonic() + 60
    while cpu_seconds() - before < 10 * (time.process_time() - own) and time.monotonic() < deadline:
        time.sleep(0.1)
    counted, own = cpu_seconds() - before, time.process_time() - own
    worker.kill()
    worker.join()
    assert counted >= 10 * own


def burn() -> None:
    while True:
        pass


def test_a_repeated_data_set_has_each_image_as_often(data, tmp_path):
    annotations = read_annotations(*locations(gpu.repeat_data(data, 9, tmp_path), "train"))
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
    assert [speed("", Pair(ours, 10.0, 0), 0.5)["verdict"] for ours in (4.9, 5.0, 5.1)] == ["NOT MET", "met", "met"]
    assert [cost("", Pair(ours, 10.0, 0), 0.5)["verdict"] for ours in (4.9, 5.0, 5.1)] == ["met", "met", "NOT MET"]
    assert speed("", Pair(4.0, 10.0, 0.0))["verdict"] is None
    assert [limit("", value, 10.0)["verdict"] for value in (9.0, 11.0)] == ["met", "NOT MET"]
    assert figure("", 4.0).keys() == FIELDS and figure("", 4.0)["ratio"] is None


def test_a_ratio_that_spreads_by_more_than_a_tenth_is_unsteady():
    assert [speed("", Pair(9.0, 10.0, spread), 0.5)["verdict"] for spread in (0.1, 0.11)] == ["met", "unsteady"]
    assert speed("", Pair(9.0, 10.0, 0.5))["verdict"] is None
    rows = [cost("a", Pair(1, 2, 0), 1), cost("b", Pair(3, 2, 0), 1), cost("c", Pair(1, 2, 0.2), 1)]
    assert [line.split()[-1] for line in table(rows).splitlines()[1:]] == ["met", "MET", "unsteady"]


def test_the_spread_is_the_interquartile_range_of_the_turns_ratios():
    found = pair([8.0, 9.0, 10.0, 11.0, 12.0], [10.0] * 5)  # quartiles 0.9, 1.0 and 1.1
    assert found == (10.0, 10.0, pytest.approx(0.2))
    assert pair([8.0], [10.0]) == (8.0, 10.0, 0.0)
    both = pair([10.0, 20.0, 40.0], [5.0, 10.0, 20.0])  # a machine that slows down, and equal ratios
    assert both.spread == 0


def test_turns_alternate_and_the_first_does_not_count():
    called = []
    ours, baseline = iter([9.0, 2.0, 4.0]), iter([9.0, 1.0, 1.0])
    found = in_turns(lambda: called.append("ours") or next(ours), lambda: called.append("base") or next(baseline), 2)
    assert called == ["ours", "base"] * 3
    assert (found.ours, found.baseline) == (3.0, 1.0)


def test_what_was_measured_is_kept_when_the_rest_is_not(data, tmp_path, monkeypatch, capsys):
    def interrupted():
        yield cost("first", Pair(1, 2, 0.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "cpu_benchmarks", lambda folder: {"quick": lambda: [], "long": interrupted})
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(["--data", str(data), "--json", str(file)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["first", "1.00", "2.00", "0.500", "0.000"]
    kept = json.loads(file.read_text())
    assert kept["rows"] == [cost("first", Pair(1, 2, 0.0))] and "versions" in kept["machine"]


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
