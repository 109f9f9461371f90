"""Fixtures of the tests on a fake GPU."""

from pathlib import Path

import pytest

from tests.helpers.datasets import annotation, write_coco
from tests.helpers.fake_cuda import fake_gpu
from tests.helpers.fake_cuda_runs import IMAGES


@pytest.fixture
def gpu():
    with fake_gpu() as entered:
        yield entered


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    boxes = [annotation(image, (5 + image, 6, 130, 108), 1 + image % 2) for image in range(1, IMAGES + 1)]
    return write_coco(tmp_path_factory.mktemp("data"), boxes, images=IMAGES)
