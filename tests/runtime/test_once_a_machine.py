"""Data that one process of a machine reads and the others have in common; once_checks.py is what the processes run."""

import json
import re
import sys
from pathlib import Path

import pytest

from src.data.annotations.dataset import read_dataset
from src.runtime.distributed import GROUP_TIMEOUT_VARIABLE
from tests.helpers import once_checks
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.launch import LIMIT, NARROW, NO_DALI, SMALL, command, launch

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere every process reads itself")

FILES = ["annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"]
GROWN_LIMIT = 20  # MB, of 134


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("once") / "data", [annotation(1), annotation(2), annotation(2)])


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def reports(request, data) -> list[dict]:
    """What each process tells."""
    done = launch(command(["-m", "tests.helpers.once_checks", "--data", data], processes=request.param))
    assert done.returncode == 0, done.stderr
    return [json.loads((data.parent / f"rank-{rank}.json").read_text()) for rank in range(request.param)]


@pytest.fixture(scope="module")
def digests(data) -> list[str]:
    """Of what a lone process reads."""
    return [once_checks.digest(part) for part in read_dataset(data, evaluating=True, upright=False)]


def test_one_process_reads_and_lists_and_all_have_the_same(reports, digests):
    first, *others = [report["shared"] for report in reports]
    assert sorted(first["looked at"]) == FILES
    assert [other["looked at"] for other in others] == [[]] * len(others)
    for report in (first, *others):
        assert report["digests"] == digests
        assert not report["writeable"]
        assert report["aligned"]


def test_a_process_that_cannot_have_the_others_arrays_reads_for_itself(reports, digests):
    found = [report["last cannot attach"] for report in reports]
    assert [sorted(each["looked at"]) for each in found] == [FILES, *[[]] * (len(found) - 2), FILES]
    assert all(each["digests"] == digests for each in found)


def test_where_the_system_refuses_to_share_every_process_reads(reports, digests):
    found = [report["cannot share"] for report in reports]
    assert [sorted(each["looked at"]) for each in found] == [FILES] * len(found)
    assert all(each["digests"] == digests for each in found)


def test_processes_of_another_machine_have_their_own(reports):
    last = len(reports) - 1

    def makers(where: str) -> list[int]:
        return [report[where] for report in reports]

    assert makers("unknown machine") == list(range(last + 1))
    assert makers("last elsewhere") == [*[0] * last, last]
    assert makers("first elsewhere") == [0, *[1] * last]


def test_no_process_owns_a_copy(reports):
    assert all(report["grown"] < GROWN_LIMIT for report in reports), [report["grown"] for report in reports]


def test_a_fault_is_raised_on_all(reports):
    assert [report["lost"] for report in reports] == ["UserError('a file: is bad')"] * len(reports)


def test_bad_data_is_told_of_once_and_ends_all_with_status_2(tmp_path):
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2)])
    missing = data / "val2017" / "000003.jpg"
    missing.unlink()
    flags = ["--data", data, "--output", tmp_path / "run", *SMALL, *NO_DALI]
    done = launch(command([*NARROW, *flags]), **{GROUP_TIMEOUT_VARIABLE: str(2 * LIMIT)})
    told = re.findall(r"^main\.py: (.*)$", done.stderr, re.MULTILINE)
    assert len(told) == 1
    assert re.match(rf"error: rank [01]: {re.escape(str(missing))}: no such image file", told[0])
    assert re.findall(r"exitcode +: (\d+)", done.stderr) == ["2", "2"]
