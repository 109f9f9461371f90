"""Ranks whose flags or data differ, as two machines' may: all end with status 2, and one line says what differs."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

from src.runtime import distributed
from src.runtime.distributed import Processes
from src.runtime.errors import UserError
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.launch import NO_DALI, SMALL
from tests.helpers.preloaded_python import launch_ranks

HOST = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data"), [annotation(1), annotation(2)])


def refusal(*flags: list) -> str:
    """The one line that ranks with these flags print, all of which end with status 2."""
    statuses, texts = launch_ranks(*flags)
    assert statuses == [2] * len(flags), texts
    (line,) = "".join(texts).splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "differences"),
    [
        (["--lr", "0.1", "--seed", "1"], "--seed = 1, not 0; --learning-rate = 0.1, not 0.0026"),
        (["--epochs", "3", "--evaluation", "0"], r"--epochs = 3, not 65; --evaluation = \[0\], not \[3, 21, .*, 64\]"),
        (["--mode", "check"], "--mode = check, not training"),
    ],
    ids=["rate and seed", "epochs", "mode"],
)
def test_different_flags_are_refused(data, tmp_path, flags, differences):
    common = ["--data", data, "--output", tmp_path / "run", *SMALL, *NO_DALI]
    line = refusal(common, [*common, *flags])
    expected = (
        rf"main\.py: error: rank [01]: rank 1 \({HOST}\) differs from rank 0 \({HOST}\): {differences}: start all"
    )
    assert re.match(expected, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_older_copy_of_the_data_is_refused(data, tmp_path, split):
    """One box differs."""
    copy = shutil.copytree(data, tmp_path / "copy")
    file = copy / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    line = refusal(*(["--data", own, "--output", tmp_path / "run", *SMALL, *NO_DALI] for own in (data, data, copy)))
    name = {"train": "training", "val": "validation"}[split]
    summary = r"4 images with 2 boxes of 2 categories \(digest \w+\)"
    assert re.match(
        rf"main\.py: error: rank [012]: rank 2 \({HOST}\) differs from rank 0 \({HOST}\): {name} annotations = "
        rf"{summary}, not {summary}: copy the same data set to every machine$",
        line,
    )
    assert not (tmp_path / "run").exists()


def test_the_first_rank_that_differs_is_named(monkeypatch):
    processes = Processes.single(torch.device("cpu"))
    processes.require_agreement({"--seed": 1}, remedy="")  # one rank has nobody to ask
    processes.world_size = 3

    def gather(found: list, mine: tuple, group: None) -> None:
        found[:] = [("a", {"--seed": 1}), ("b", {"--seed": 1}), ("c", {"--seed": 2})]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(UserError, match=r"^rank 2 \(c\) differs from rank 0 \(a\): --seed = 2, not 1: give one seed$"):
        processes.require_agreement({"--seed": 1}, remedy="give one seed")
