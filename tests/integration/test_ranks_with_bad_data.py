"""Annotation files that every rank refuses, or one rank alone: the run prints one line and ends with status 2."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.datasets import annotation, write_annotations, write_coco
from tests.helpers.launch import NO_DALI, SMALL
from tests.helpers.preloaded_python import launch_ranks

pytestmark = pytest.mark.usefixtures("tiny_model")


def run_two_ranks(folder: Path, data: tuple[Path, Path]) -> tuple[list[int], list[str]]:
    """Starts a training on two ranks, each with its own --data; their exit statuses and error texts."""
    return launch_ranks(*(["--data", own, "--output", folder / "run", *SMALL, *NO_DALI] for own in data))


def test_a_file_that_all_ranks_refuse_is_reported_once(tmp_path):
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2)])
    bad = write_annotations(data, '{"images": [}')
    statuses, texts = run_two_ranks(tmp_path, (data, data))
    assert statuses == [2, 2]
    (line,) = "".join(texts).splitlines()
    assert line.startswith(f"main.py: error: rank 0: {bad}: JSON is malformed")
    assert "line 1, column 13" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_refuses_is_reported_by_that_rank(tmp_path, rank):
    data = [write_coco(tmp_path / "data 0", [annotation(1), annotation(2)])]
    data.append(shutil.copytree(data[0], tmp_path / "data 1"))
    missing = data[rank] / "val2017" / "000003.jpg"
    missing.unlink()
    statuses, texts = run_two_ranks(tmp_path, tuple(data))
    assert statuses == [2, 2], texts
    (line,) = "".join(texts).splitlines()
    assert line.startswith(f"main.py: error: rank {rank}: {missing}: no such image file")
    assert not (tmp_path / "run").exists()
