"""Runs that are stopped and continued: main.py in this process, in two on gloo, and as a process of its own."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

import main
from tests.helpers import preloaded_python
from tests.helpers.datasets import write_small_coco
from tests.helpers.equality import same
from tests.helpers.launch import TINY_MODEL, free_ports
from tests.helpers.small_runs import losses, records
from tests.helpers.stopped_runs import (
    BOUNDARY,
    FLAGS,
    FULL_RATE,
    INSIDE,
    PAIR_SETTINGS,
    SETTINGS,
    idle_run,
    pipeline_flags,
    run_and_stop,
    run_as_rank,
    run_two_epochs,
    state_of,
)

pytestmark = pytest.mark.usefixtures("tiny_model")

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")


def check_same(folder: Path, *, length: int, rates: list[float]) -> None:
    """The run that was stopped went the way of the one that was not, at these rates.  length: iterations an epoch."""
    whole, stopped = folder / "whole", folder / "stopped"
    assert [entry["learning_rate"] for entry in records(stopped, "iteration")] == pytest.approx(rates)
    assert losses(stopped) == losses(whole)
    assert len(set(losses(whole))) == len(rates)
    assert same(state_of(stopped), state_of(whole))
    assert [entry["iteration"] for entry in records(stopped, "epoch")] == list(range(length, len(rates) + 1, length))
    inside = torch.load(folder / INSIDE)
    assert [inside[name] for name in ("epoch", "within", "iteration")] == [0, length - 1, length - 1]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small_coco(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Callable[[str, bool], Path]:
    """`runs(pipeline, half)`: the folder of `run_and_stop` on one process."""

    @cache
    def made(pipeline: str, half: bool) -> Path:
        folder = tmp_path_factory.mktemp("one")

        def start(data: Path, output: Path, *more: str, signalled_at: int | None = None) -> int:
            return run_two_epochs(data, output, *pipeline_flags(pipeline, half), *more, signalled_at=signalled_at)

        run_and_stop(data, folder, [1, 1, None], start)
        return folder

    return made


# --- bit for bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pipeline", "half"), SETTINGS)
def test_one_process_continues_bit_for_bit(runs, pipeline, half):
    """Stopped inside an epoch and where the rate falls, both in the warm-up."""
    rates = [0.0, 0.25 * FULL_RATE, 0.1 * 0.5 * FULL_RATE, 0.1 * 0.75 * FULL_RATE]
    check_same(runs(pipeline, half), length=2, rates=rates)
    boundary = torch.load(runs(pipeline, half) / BOUNDARY)
    assert [boundary[name] for name in ("epoch", "within", "iteration")] == [0, 2, 2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A folder with that of `run_and_stop` on two processes, SIGTERM coming to the second, for PAIR_SETTINGS."""
    folder = tmp_path_factory.mktemp("two")
    for pipeline, half in PAIR_SETTINGS:
        (folder / f"{pipeline} {half}").mkdir()
    data = write_small_coco(folder / "data", 12)
    ports = free_ports(4 * len(PAIR_SETTINGS))  # one for each start
    preloaded_python.spawn(run_as_rank, (data, folder, ports), processes=2)
    return folder


@pytest.mark.parametrize(("pipeline", "half"), PAIR_SETTINGS)
def test_two_processes_continue_bit_for_bit(pair, pipeline, half):
    full = 2 * FULL_RATE
    rates = [0.0, 0.25 * full, 0.5 * full, 0.1 * 0.75 * full, 0.1 * full, 0.1 * full]
    check_same(pair / f"{pipeline} {half}", length=3, rates=rates)


def test_sigterm_to_a_process_group_and_the_rest_by_another_process(runs, data, tmp_path):
    """With a worker process, which the signal must not end; the run that continues has none."""
    line = [sys.executable, *TINY_MODEL, "--data", data, "--output", tmp_path, "--epochs", "2", *FLAGS]
    stopped = preloaded_python.launch(
        [*line, *pipeline_flags("no_dali", True), "--num-workers", "1"], FAULT="group:SIGTERM 0 0"
    )
    assert stopped.returncode == 143, stopped.stderr
    assert (
        f"Stopped by SIGTERM in epoch 0 after 1 of its 2 iterations; --resume continues from {tmp_path}"
        in stopped.stdout
    )
    assert "Traceback" not in stopped.stderr
    assert state_of(tmp_path)["iteration"] == 1
    assert run_two_epochs(data, tmp_path, *pipeline_flags("no_dali", True), "--resume") == main.DONE
    assert same(state_of(tmp_path), state_of(runs("no_dali", True) / "whole"))


# --- other settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pipeline", "half"), [("dali", True), ("no_dali", False)])
def test_half_precision_continues_in_full_and_the_other_way_round(runs, data, tmp_path, capsys, pipeline, half):
    inside = runs(pipeline, half) / INSIDE
    status = run_two_epochs(
        data, tmp_path, *pipeline_flags(pipeline, not half), "--resume", str(inside), signalled_at=1
    )
    assert status == main.TERMINATED
    assert losses(tmp_path) == pytest.approx(losses(runs(pipeline, half) / "whole")[1:2], rel=0.02)
    (warning,) = warnings_of(capsys)
    assert warning.endswith(f": --fp16 ({half} -> {not half})")


def warnings_of(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    usual = ("bfloat16 arithmetic", "warning: --warmup 4: takes", "warning: --multistep 1: the rate falls")
    return [line for line in lines if "main.py: warning: " in line and not any(text in line for text in usual)]


def test_settings_that_alter_the_run_are_named_in_one_warning_and_hold(runs, data, tmp_path, capsys):
    other = write_small_coco(tmp_path / "data", 6)
    changed = ["--seed", "1", "-b", "3", "--lr", "0.5", "--momentum", "0.8", "--wd", "0.25", "--warmup", "0"]
    changed += ["--orientation", "upright"]
    inside = runs("no_dali", True) / INSIDE
    output = tmp_path / "run"
    status, _ = idle_run(other, output, *pipeline_flags("no_dali", True), *changed, "--resume", str(inside))
    assert status == main.DONE
    (warning,) = warnings_of(capsys)
    for name in ("--seed (0 -> 1)", "--batch-size (2 -> 3)", "--learning-rate (0.16 -> 0.5)", "the training data",
                 "--momentum (0.9 -> 0.8)", "--weight-decay (0.0005 -> 0.25)", "--warmup (4 -> 0)",
                 "--orientation (stored -> upright)"):  # fmt: skip
        assert name in warning
    assert "fp16" not in warning and "pipeline" not in warning and "processes" not in warning
    groups = state_of(output)["optimizer"]["param_groups"]
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.8, 0.25), (0.8, 0.0)]


def test_a_checkpoint_from_before_a_flag_needs_no_warning(runs, data, tmp_path, capsys):
    state = torch.load(runs("dali", True) / INSIDE)
    for name in ("--orientation", "--compile"):
        del state["settings"][name]
    for own in state["pipeline"]:
        del own["fingerprint"]["orientation"]
    torch.save(state, tmp_path / "old.pt")
    resumed = ["--resume", str(tmp_path / "old.pt")]
    status, _ = idle_run(data, tmp_path / "run", *pipeline_flags("dali", True), *resumed)
    assert status == main.DONE
    assert warnings_of(capsys) == []


def test_flags_that_do_not_alter_the_run_need_no_warning(runs, data, tmp_path, capsys):
    boundary = runs("dali", True) / BOUNDARY
    more = ["--num-workers", "2", "--epochs", "3", "--ebs", "3", "--backbone-weights", "imagenet"]
    status, steps = idle_run(data, tmp_path, *pipeline_flags("dali", True), *more, "--resume", str(boundary))
    assert (status, steps) == (main.DONE, 4)
    assert warnings_of(capsys) == []


def refused(capsys, data: Path, output: Path, *more: str) -> str:
    """The one line of a run that does not begin."""
    assert idle_run(data, output, *more) == (main.BAD_INPUT, 0)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_backbone_or_other_categories_are_an_error(runs, data, tmp_path, capsys):
    inside = str(runs("no_dali", True) / INSIDE)
    line = refused(capsys, data, tmp_path, "--backbone", "resnet34", "--resume", inside)
    assert line == f"main.py: error: {inside}: is a run of --backbone resnet18, not resnet34"
    other = write_small_coco(tmp_path / "data", 4, categories=[{"id": 1, "name": "square"}, {"id": 2, "name": "cat"}])
    line = refused(capsys, other, tmp_path, "--resume", inside)
    assert inside in line and "label 2 is 'disc' (id 2) there and 'cat' (id 2) here" in line and "--checkpoint" in line


@pytest.mark.parametrize("what", ["a missing file", "weights alone"])
def test_a_file_that_is_no_runs_checkpoint_is_refused(data, tmp_path, capsys, what):
    file = tmp_path / "file.pt"
    if what == "weights alone":
        torch.save({"model": {"weight": torch.zeros(2)}, "epoch": 3}, file)
    line = refused(capsys, data, tmp_path / "run", "--resume", str(file))
    assert str(file) in line and ("no such file" in line or f"use --checkpoint {file}" in line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("before", ["dali", "no_dali"])
def test_dali_refuses_other_settings_inside_an_epoch_and_leaves_the_run_as_it_is(runs, data, tmp_path, capsys, before):
    shutil.copy(runs(before, True) / INSIDE, tmp_path / "last.pt")
    capsys.readouterr()  # of that run, if this test is the first that needs it
    (tmp_path / "metrics.jsonl").write_text('{"kind": "iteration", "epoch": 5, "iteration": 99}\n')
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    batch_size = "3" if before == "dali" else "2"
    line = refused(capsys, data, tmp_path, "-b", batch_size, "--resume", "--fp16")
    assert "cannot continue inside epoch 0" in line
    assert ("batch size 2 (now 3)" if before == "dali" else "--data_pipeline no_dali") in line
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content


@pytest.mark.parametrize("before", ["dali", "no_dali"])
def test_between_epochs_dali_starts_afresh(runs, data, tmp_path, capsys, before):
    boundary = runs(before, True) / BOUNDARY
    capsys.readouterr()
    status, steps = idle_run(data, tmp_path, "-b", "3", "--resume", str(boundary), "--fp16")
    assert (status, steps) == (main.DONE, 2)  # those of the second epoch
    flags_changed, afresh = warnings_of(capsys)
    assert "--batch-size (2 -> 3)" in flags_changed
    assert "the DALI pipeline starts afresh" in afresh
    assert ("batch size 2 (now 3)" if before == "dali" else "--data_pipeline no_dali") in afresh


def test_a_run_of_two_processes_continues_on_one(pair, tmp_path, capsys):
    """Inside an epoch after 2 of 3 iterations of 2 x 2 images, which are 4 of 6 here; between epochs with dali."""
    data = pair / "data"
    inside = pair / "no_dali True" / INSIDE
    assert idle_run(data, tmp_path, *pipeline_flags("no_dali", True), "--resume", str(inside)) == (main.DONE, 2 + 6)
    assert "the number of processes (2 -> 1)" in warnings_of(capsys)[0]
    boundary = pair / "dali True" / BOUNDARY
    assert idle_run(data, tmp_path, *pipeline_flags("dali", True), "--resume", str(boundary)) == (main.DONE, 6)
    assert "processes 2 (now 1)" in warnings_of(capsys)[1]
    line = refused(capsys, data, tmp_path, *pipeline_flags("dali", True), "--resume", str(pair / "dali True" / INSIDE))
    assert "cannot continue inside epoch 0" in line and "processes 2 (now 1)" in line


# --- beginnings and ends ---------------------------------------------------------------------------------------------


def test_a_finished_run_says_so(runs, data, capsys):
    folder = runs("dali", True) / "whole"
    before, metrics = state_of(folder), (folder / "metrics.jsonl").read_text()
    assert idle_run(data, folder, *pipeline_flags("dali", True), "--resume") == (main.DONE, 0)
    assert "Nothing is left to train: 2 epochs are done (--epochs 2)" in capsys.readouterr().out
    assert same(state_of(folder), before)
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_resume_without_a_checkpoint_begins_afresh(data, tmp_path, capsys):
    assert idle_run(data, tmp_path, *pipeline_flags("no_dali", True), "--resume") == (main.DONE, 4)
    assert "ResumePoint" not in capsys.readouterr().out


def test_a_checkpoint_gives_weights_and_training_starts_at_epoch_0(runs, data, tmp_path):
    file = runs("no_dali", True) / "whole" / "last.pt"
    more = ["--backbone-weights", "imagenet", "--checkpoint", str(file)]  # which is not needed then
    assert idle_run(data, tmp_path, *pipeline_flags("no_dali", True), *more) == (main.DONE, 4)
    before, after = torch.load(file), state_of(tmp_path)
    assert same(after["model"], before["model"])
    momenta = [[one["momentum_buffer"] for one in state["optimizer"]["state"].values()] for state in (before, after)]
    assert any(momentum.any() for momentum in momenta[0])
    assert momenta[1] and not any(momentum.any() for momentum in momenta[1])
    assert (after["epoch"], after["iteration"]) == (2, 4)


def test_best_is_the_best_so_far_over_continuations_and_old_epochs_go(data, tmp_path):
    figures = {0: 0.3, 1: 0.2, 2: None, 3: 0.4, 4: 0.4}
    with mock.patch("main.make_evaluation", return_value=nullcontext(lambda epoch: (figures[epoch], {}))):
        for epochs, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
            flags = [*pipeline_flags("no_dali", True), "--evaluation", *map(str, figures)]
            assert idle_run(data, tmp_path, *flags, "--resume", "--epochs", str(epochs)) == (main.DONE, 2)
            assert torch.load(tmp_path / "best.pt")["epoch"] == best
    assert torch.load(tmp_path / "best.pt")["best_map"] == 0.4
    assert {path.name for path in tmp_path.iterdir() if path.suffix not in (".jsonl", ".json", ".log")} == {
        ".lock", "last.pt", "best.pt", *(["tensorboard"] if (tmp_path / "tensorboard").exists() else []),
    }  # fmt: skip


def test_a_run_that_continues_elsewhere_leaves_its_best_network_there(data, tmp_path):
    here, there, figures = tmp_path / "here", tmp_path / "there", {0: 0.9, 1: 0.2}
    with mock.patch("main.make_evaluation", return_value=nullcontext(lambda epoch: (figures[epoch], {}))):
        more = [*pipeline_flags("no_dali", True), "--evaluation", "0", "1"]
        assert idle_run(data, here, *more, "--epochs", "1") == (main.DONE, 2)
        assert idle_run(data, there, *more, "--epochs", "2", "--resume", str(here / "last.pt")) == (main.DONE, 2)
        assert idle_run(data, here, *more, "--epochs", "2", "--resume") == (main.DONE, 2)
    best = [torch.load(folder / "best.pt") for folder in (here, there)]
    assert [(one["epoch"], one["best_map"]) for one in best] == [(1, 0.9), (2, 0.2)]


@pytest.mark.parametrize("spelling", ["link/last.pt", "other/../run/last.pt"])
def test_the_output_folder_by_another_spelling_keeps_its_best_network(data, tmp_path, spelling):
    output, figures = tmp_path / "run", {0: 0.9, 1: 0.2}
    with mock.patch("main.make_evaluation", return_value=nullcontext(lambda epoch: (figures[epoch], {}))):
        more = [*pipeline_flags("no_dali", True), "--evaluation", "0", "1"]
        assert idle_run(data, output, *more, "--epochs", "1") == (main.DONE, 2)
        (tmp_path / "link").symlink_to(output)
        (tmp_path / "other").mkdir()
        assert idle_run(data, output, *more, "--epochs", "2", "--resume", str(tmp_path / spelling)) == (main.DONE, 2)
    best = torch.load(output / "best.pt")
    assert (best["epoch"], best["best_map"]) == (1, 0.9)
    assert not (output / "run-001").exists()


def test_a_run_that_goes_back_and_is_killed_continues_where_it_went_back_to(data, tmp_path, capsys):
    figures = {0: 0.9, 1: 0.2, 2: 0.1}
    more = [*pipeline_flags("no_dali", True), "--epochs", "3"]
    with mock.patch("main.make_evaluation", return_value=nullcontext(lambda epoch: (figures[epoch], {}))):
        assert idle_run(data, tmp_path, *more, "--evaluation", "0", "1", "2") == (main.DONE, 6)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    with mock.patch("main.TrainingLoop.run", side_effect=KeyboardInterrupt):
        status = main.main(["--data", str(data), "--output", str(tmp_path), *FLAGS, *more,
                            "--resume", str(tmp_path / "best.pt")])  # fmt: skip
    assert status == main.INTERRUPTED
    assert (tmp_path / "run-001" / "metrics.jsonl").read_text() == metrics
    assert torch.load(tmp_path / "run-001" / "last.pt")["epoch"] == 3
    assert f"a copy of what it had reached is in {tmp_path / 'run-001'}" in capsys.readouterr().out
    assert idle_run(data, tmp_path, *more, "--resume") == (main.DONE, 4)


def test_a_full_disk_is_one_error_line_and_the_old_checkpoint_stays(runs, data, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    shutil.copy(runs("no_dali", False) / INSIDE, tmp_path / "last.pt")
    before = state_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "last.pt").stat().st_size // 2, limits[1]))
        assert idle_run(data, tmp_path, *pipeline_flags("no_dali", False), "--resume") == (main.BAD_INPUT, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning: " not in line)
    assert line.startswith(f"main.py: error: cannot write {tmp_path / 'last.pt'}: File too large")
    assert same(state_of(tmp_path), before)
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]
