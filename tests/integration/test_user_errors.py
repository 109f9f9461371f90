"""Mistakes of a new user: where output goes, who reads it, and flags out of range."""

import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from src.flags import parse_args
from src.runtime.errors import UserError, escape_control_characters
from src.runtime.output_files import convert_write_errors
from tests.helpers.both_pipelines import train_loader
from tests.helpers.datasets import annotation, read, write_coco
from tests.helpers.small_runs import error_line, flags
from tests.helpers.stopped_runs import idle_run

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data"), [annotation(image) for image in (1, 2, 3)])


def write_weights(path: Path) -> str:
    """A checkpoint with the categories of small data sets and no network worth the name."""
    torch.save({"model": {"weight": torch.zeros(1)}, "categories": [[1, "square"], [2, "disc"]]}, path)
    return str(path)


# --- how it is started and stopped -----------------------------------------------------------------------------------


def test_an_interrupt_while_libraries_are_imported_shows_no_traceback(data, tmp_path):
    status, left = interrupted_while_importing(flags(data, tmp_path))
    assert status in (-signal.SIGINT, 130)
    assert "Traceback" not in left


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals are not handed on on Windows")
def test_an_interrupt_that_who_starts_it_ignores_stays_ignored(data, tmp_path):
    """As a shell script does for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status, _ = interrupted_while_importing(flags(data, tmp_path, "--mode", "check"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 0


def interrupted_while_importing(arguments: list[str]) -> tuple[int, str]:
    """Exit status and what standard error got after SIGINT, which was sent when torch was being imported."""
    command = [sys.executable, "-X", "importtime", main.__file__, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:
            if "torch" in line:
                break
        process.send_signal(signal.SIGINT)
        left = process.stderr.read()
    return process.returncode, left


def test_standard_error_may_be_closed(data, tmp_path):
    command = [sys.executable, main.__file__, *flags(data, tmp_path, "--mode", "check")]
    done = subprocess.run(shlex.join(command) + " 2>&-", shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "nothing is wrong" in done.stdout


# --- where output goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["check", "evaluation", "prediction"])
def test_output_that_is_a_file_is_refused_before_the_work(data, tmp_path, capsys, mode):
    (tmp_path / "file").touch()
    folder = data / "val2017" if mode == "prediction" else data
    more = () if mode == "check" else ("--checkpoint", write_weights(tmp_path / "weights.pt"))
    assert main.main(flags(folder, tmp_path / "file", "--mode", mode, *more)) == 2
    printed = capsys.readouterr()
    assert f"main.py: error: cannot write {tmp_path / 'file'}: a file is in its place" in printed.err
    assert printed.out == ""


def test_pictures_are_not_drawn_among_the_images(data, tmp_path, capsys):
    folder, checkpoint = data / "val2017", write_weights(tmp_path / "weights.pt")
    assert main.main(flags(folder, folder, "--mode", "prediction", "--checkpoint", checkpoint)) == 2
    assert "is the folder of the images" in error_line(capsys)


def test_a_full_temporary_folder_is_a_user_error(data, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from src.data.pipelines import dali_pipeline

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dali_pipeline, "try_write_reader_files", full)
    with pytest.raises(UserError, match=r"cannot write /.*: No space left on device$"):
        next(iter(train_loader("dali", read(data))))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path, monkeypatch, encoding):
    data = write_coco(tmp_path / "日本", [annotation(1)], images=1)
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    assert main.main(flags(data, tmp_path / "output", "--mode", "check")) == 0
    assert rb"\u65e5\u672c/annotations/instances_train2017.json" in output.getvalue()


def test_an_error_is_one_line_whatever_names_hold():
    assert str(UserError("a\nb\x1b[31m\udce9 日本")) == r"a\nb\x1b[31m\udce9 日本"
    assert escape_control_characters("plain, ünïcode") == "plain, ünïcode"
    with pytest.raises(UserError, match=r"^cannot write /a: No space left on device$"), convert_write_errors("/a"):
        raise OSError(28, "No space left on device")


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--data ~nobody-of-that-name/coco", "no home folder is known"),
        ("--data x --backbone-weights ~nobody-of-that-name/file", "no home folder is known"),
        (f"--data x --seed {2**64}", "from 0 to 2^64 - 1"),
        ("--data x -b 99999999999", "from 1 to 2147483647"),
        (f"--data x --warmup {'9' * 400}", "from 0 to 2147483647"),
    ],
)
def test_flags_out_of_range_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(given.split())
    assert ended.value.code == 2
    assert said in error_line(capsys)


def test_the_largest_seed_shuffles_and_initialises(pipeline, data):
    seed = parse_args(["-d", "x", "--seed", str(2**64 - 1)]).seed
    torch.manual_seed(seed)
    assert len(list(train_loader(pipeline, read(data), seed=seed, augment=True))) == 3


def test_evaluations_after_the_last_epoch_are_listed():
    assert parse_args(["-d", "x", "-e", "5", "--evaluation", "3", "5", "9"]).unreached_evaluations == [5, 9]
    assert parse_args(["-d", "x", "-e", "5"]).unreached_evaluations == []


def test_a_missing_checkpoint_and_a_warm_up_beyond_the_run_cause_warnings(data, tmp_path, capsys):
    """The former may be a mistyped --output."""
    more = ("--data_pipeline", "no_dali", "--lr", "0.016", "--warmup", "8", "--resume")
    assert idle_run(data, tmp_path, *more) == (main.DONE, 4)
    assert capsys.readouterr().err.splitlines() == [
        f"main.py: warning: --resume: there is no {tmp_path}/last.pt, so the run starts afresh",
        "main.py: warning: --warmup 8: the run has 4 iterations, so the learning rate gets to 0.000375 of 0.001",
    ]
    assert idle_run(data, tmp_path, *more, "--warmup", "3") == (main.DONE, 0)
    assert "afresh" not in capsys.readouterr().err


@pytest.mark.parametrize("below", ["train2017/000001.jpg", "annotations", "annotations/instances_train2017.json"])
def test_data_that_is_not_the_data_sets_folder_is_refused(data, tmp_path, capsys, below):
    assert main.main(flags(data / below, tmp_path / "output")) == 2
    assert "--data must be a folder in the COCO 2017 layout" in error_line(capsys)
