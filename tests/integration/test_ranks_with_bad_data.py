"""Annotation files that every rank refuses, or one rank alone: the run prints one line and ends with status 2."""

import shutil
from pathlib import Path

import pytest

from src.runtime.distributed import GROUP_TIMEOUT_VARIABLE
from tests.helpers import preloaded_python
from tests.helpers.datasets import annotation, write_annotations, write_coco
from tests.helpers.launch import LIMIT, NARROW, NO_DALI, SMALL
from tests.helpers.stopped_runs import free_ports

pytestmark = pytest.mark.usefixtures("narrow")


def run_two_ranks(folder: Path, data: tuple[Path, Path]) -> tuple[list[int], list[str]]:
    """Starts a training on two ranks as srun does, each with its own --data; their exit statuses and error texts.

    The time limit of the group is beyond LIMIT: no rank waits for it.
    """
    (port,) = free_ports(1)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        GROUP_TIMEOUT_VARIABLE: str(2 * LIMIT),
    }  # fmt: skip
    lines = [["python", *NARROW, "--data", data[rank], "--output", folder / "run", *SMALL, *NO_DALI] for rank in (0, 1)]
    with (
        preloaded_python.started(lines[0], RANK="0", LOCAL_RANK="0", **common) as first,
        preloaded_python.started(lines[1], RANK="1", LOCAL_RANK="1", **common) as second,
    ):
        texts = [process.communicate()[1] for process in (first, second)]
        return [first.returncode, second.returncode], texts


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
