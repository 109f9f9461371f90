"""Whole runs through the launchers on gloo: what they print and leave, how they fail, stop and start again."""

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from main import DONE, main
from src.runtime.distributed import GROUP_TIMEOUT_VARIABLE
from tests.helpers import preloaded_python
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.equality import same
from tests.helpers.launch import LIMIT, NO_DALI, SMALL, TINY_MODEL, command, free_ports, launch
from tests.helpers.small_runs import records

pytestmark = pytest.mark.usefixtures("tiny_model")

IMAGES = 9  # 3 iterations of 2 processes with 2 images each
BOXES = 24  # an image
EPOCHS = 3
WHOLE_RUN = ("--epochs", EPOCHS, "--evaluation", 1, "--eval-batch-size", 1, "--learning-rate", 0.02, *SMALL)
ENDLESS = ("--epochs", 1000, *SMALL, *NO_DALI)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """So many large boxes that a network that has learnt nothing hits some."""
    rng = np.random.default_rng(0)
    corners, sizes = rng.uniform(0, [60, 40], (IMAGES, BOXES, 2)), rng.uniform([40, 30], [100, 80], (IMAGES, BOXES, 2))
    boxes = [annotation(1 + i, [*corners[i, k], *sizes[i, k]], 1 + k % 2) for i in range(IMAGES) for k in range(BOXES)]
    return write_coco(tmp_path_factory.mktemp("data"), boxes, images=IMAGES + 1)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of an uninterrupted run on two processes, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    done = launch(command([*TINY_MODEL, "--data", data, "--output", output, *WHOLE_RUN]))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return output, done.stdout


def program_lines(text: str) -> list[str]:
    """The program's own lines of what a launcher and its processes printed to stderr."""
    return re.findall(r"^main\.py: .*$", text, re.MULTILINE)


def test_only_one_process_prints(whole):
    _, text = whole
    forms = (
        r"Device: CPU, processes: 2",
        rf"Training images: {IMAGES} with {BOXES * IMAGES} boxes of 2 categories \(1 without boxes left out\)",
        rf"Validation images: {IMAGES + 1} with {BOXES * IMAGES} boxes",
        r"Iterations: 9 \(3 an epoch, of 4 images\), learning rate: 0.0025",
        r"Epoch:  0, Iteration: 0, Loss: \d+\.\d{4}",
        r"Epoch  0 finished\. .*",
        r"Epoch  1 finished\. .*",
        r"Epoch  1, Accuracy: 0\.\d{4} mAP",
        r"Epoch  2 finished\. .*",
        r"Training end: .*",
    )
    assert len(text.splitlines()) == len(forms)
    for line, form in zip(text.splitlines(), forms, strict=True):
        assert re.fullmatch(form, line)


def test_speeds_are_of_all_processes_together(whole):
    output, _ = whole
    for epoch in records(output, "epoch"):
        assert epoch["images_per_second"] == pytest.approx(3 * 4 / epoch["seconds"])


def test_an_evaluation_in_the_run_is_that_of_the_checkpoint_it_wrote(whole, data, tmp_path, monkeypatch, capsys):
    """Every process has other batch-norm statistics by then; one network is scored and saved."""
    output, _ = whole
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = ["--data", data, "--mode", "evaluation", "--checkpoint", output / "best.pt", "--eval-batch-size", 1, *SMALL]
    assert main(list(map(str, [*flags, "--output", tmp_path]))) == DONE
    torch.set_num_threads(threads)
    (during,) = records(output, "evaluation")
    printed = dict(re.findall(r"^(A[PR]\S*(?: \w+)?|mAP) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert printed["mAP"] == f"{during['mAP']:.4f}"
    assert during["AP50"] > 0
    ours, theirs = (json.loads((folder / "detections.json").read_text()) for folder in (tmp_path, output))
    assert len(ours) > 0
    assert ours == theirs


def test_a_run_that_is_killed_stopped_and_restarted_ends_with_the_weights_of_the_uninterrupted_one(
    whole, data, tmp_path
):
    """Rank 1 is killed in epoch 2 and restarted by the launcher; then rank 0 gets SIGTERM inside the same epoch."""
    flags = ["--data", data, "--output", tmp_path, *WHOLE_RUN, "--resume"]
    fault = "SIGKILL 1 7; SIGTERM 1 0"
    line = command([*TINY_MODEL, *flags])
    line.insert(line.index("--standalone"), "--max-restarts=1")
    stopped = preloaded_python.launch(line, FAULT=fault)
    assert stopped.returncode != 0
    afresh, lost = program_lines(stopped.stderr)
    assert afresh == f"main.py: warning: --resume: there is no {tmp_path / 'last.pt'}, so the run starts afresh"
    assert lost.startswith("main.py: error: rank 0: lost touch with rank 1 (")
    assert f"Continued from {tmp_path / 'last.pt'}: epoch 2, iteration 6" in stopped.stdout
    assert f"--resume continues from {tmp_path / 'last.pt'}" in stopped.stdout.splitlines()[-1]
    assert re.findall(r"exitcode +: (\d+)", stopped.stderr) == ["143", "143"]
    position = torch.load(tmp_path / "last.pt")
    assert (position["epoch"], position["iteration"]) in {(2, 7), (2, 8)}  # all agree one iteration later
    finished = preloaded_python.launch(command([*TINY_MODEL, *flags]))
    assert finished.returncode == 0, finished.stderr
    ours, theirs = (torch.load(folder / "last.pt") for folder in (tmp_path, whole[0]))
    for part in ("model", "optimizer"):
        assert same(ours[part], theirs[part])
    assert (ours["epoch"], ours["iteration"], ours["last_map"]) == (3, 9, theirs["last_map"])


def launch_to_fail(*flags, **variables: str) -> tuple[str, str]:
    """The one message of a run that fails, without its beginning, and all that stood on stderr.

    The group's time limit is beyond LIMIT: nobody waits for it.
    """
    done = preloaded_python.launch(
        command([*TINY_MODEL, *flags]), **{GROUP_TIMEOUT_VARIABLE: str(2 * LIMIT)}, **variables
    )
    assert done.returncode != 0
    (message,) = program_lines(done.stderr)
    return message.removeprefix("main.py: error: "), done.stderr


def test_an_exception_in_one_process_ends_all_with_its_traceback_alone(data, tmp_path):
    message, text = launch_to_fail("--data", data, "--output", tmp_path, *ENDLESS, FAULT="raise 1 1")
    assert message == "rank 1: a fault of the program:"
    assert "KeyError: 'a mistake'" in text
    assert text.count("Traceback (most recent call last)") == 2  # this one and the launcher's


def test_bad_data_that_one_process_meets_ends_all(data, tmp_path):
    """Its loader's worker process reads it."""
    boxes = [annotation(i) for i in range(1, 5)]
    broken = write_coco(tmp_path / "data", boxes, images=4)
    (broken / "train2017" / "000003.jpg").write_text("no picture")
    flags = ["--data", broken, "--output", tmp_path / "run", *ENDLESS, "--num-workers", 1]
    message, _ = launch_to_fail(*flags)
    assert re.match(rf"rank [01]: {broken}/train2017/000003.jpg: cannot be read as an image", message)


def test_a_loss_that_is_not_finite_ends_all_with_one_message(data, tmp_path):
    flags = ["--data", data, "--output", tmp_path, *ENDLESS, "--learning-rate", 1e30]
    message, text = launch_to_fail(*flags)
    assert re.match(r"rank [01]: the loss is not finite since epoch 0, iteration 1 ", message)
    assert re.findall(r"exitcode +: (\d+)", text) == ["1", "1"]


def children(parent: int) -> set[int]:
    """The running processes that `parent` started."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.add(int(status.parent.name))
    return found


def descendants(process: int) -> set[int]:
    found = children(process)
    return found.union(*map(descendants, found))


def test_interrupting_the_launcher_leaves_no_process_behind(data, tmp_path):
    flags = ["--data", data, "--output", tmp_path, *ENDLESS, "--num-workers", 1, "--evaluation"]
    with preloaded_python.started(command([*TINY_MODEL, *flags])) as launcher:
        launcher.wait_for("Epoch:")
        processes = descendants(launcher.pid)
        assert len(processes) == 4  # two ranks with a worker each
        os.kill(launcher.pid, signal.SIGINT)
        _, text = launcher.communicate()
        assert launcher.returncode != 0
    assert [process for process in processes if Path("/proc", str(process)).exists()] == []
    assert program_lines(text) == []


def test_two_nodes_train_together_and_a_stopped_process_is_noticed_in_time(tmp_path, data):
    """Two launchers, as on two machines.  A stopped process (SIGSTOP) is as silent as a machine that hangs."""
    (port,) = free_ports(1)

    def node(rank: int) -> list[str]:
        nodes = ("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}")
        script = [*TINY_MODEL, "--data", data, "--output", tmp_path / "run", *ENDLESS, "--evaluation", 0]
        return command(script, processes=1, launcher=("-m", "torch.distributed.run", *nodes))

    limit = {GROUP_TIMEOUT_VARIABLE: "8"}
    with preloaded_python.started(node(0), **limit) as first, preloaded_python.started(node(1), **limit) as second:
        first.wait_for("Epoch  1 finished")
        assert [text.read_text() for text in second.texts] == ["", ""]
        (victim,) = children(second.pid)
        os.kill(victim, signal.SIGSTOP)
        try:
            printed, errors = first.communicate()
        finally:
            os.kill(victim, signal.SIGCONT)
        second.communicate()
        assert first.returncode != 0 and second.returncode != 0
    assert "Device: CPU, processes: 2" in printed
    assert re.search(r"^Epoch  0, Accuracy: 0\.\d{4} mAP$", printed, re.MULTILINE)
    (message,) = program_lines(errors)
    assert re.match(r"main.py: error: rank 0: lost touch with rank 1 \(Timed out waiting 8000 ?ms", message)
