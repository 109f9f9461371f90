"""Fixtures: the oracle's figures, photographs, the tiny model and each data pipeline."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.tiny_model import use_tiny_model

os.environ.pop("MPLBACKEND", None)  # a notebook sets one with which matplotlib cannot be imported
HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    hide_gpus(config.getoption("markexpr"))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children would ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Freezes imported objects: they cost each garbage collection a second, also when a DALI pipeline closes.

    Objects that tests make are still collected.  Starting a loader's workers undoes it, so each module freezes again.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def hide_gpus(markers: str) -> None:
    """Hides the GPUs from the tests and the processes that they start, except under `-m gpu`."""
    if markers != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _signals_are_handled_as_before() -> Iterator[None]:
    """Restores the handlers: a rank that has failed ignores SIGTERM, and later tests in this process must not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _cuda_or_skip(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA (make test-gpu)")


@pytest.fixture(scope="session")
def oracle():
    """`oracle(name)`: what the published model computes; an .npz file's arrays or a part of reference.json."""

    def read(name: str):
        if name.endswith(".npz"):
            with np.load(HERE / "oracle" / name) as arrays:
                return dict(arrays)
        return json.loads((HERE / "oracle" / "reference.json").read_text())[name]

    return read


@pytest.fixture(scope="session")
def coco128() -> Path:
    """128 photographs of COCO in the COCO 2017 layout; they are not part of the project."""
    folder = SHARED / "data" / "coco128"
    if not folder.is_dir():
        pytest.skip(f"the photographs of {folder.name} are not on this machine")
    return folder


@pytest.fixture(scope="session")
def encode_oracle() -> dict:
    """The matches of 24 photographs' annotations, which are not part of the project either."""
    file = SHARED / "oracle" / "encode.npz"
    if not file.is_file():
        pytest.skip(f"{file.name} is not on this machine")
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.fixture
def tiny_model() -> Iterator[None]:
    """Runs of the program in this process use the network of tests/helpers/tiny_model.py."""
    with use_tiny_model():
        yield


@pytest.fixture(params=["no_dali", "dali"])
def pipeline(request) -> str:
    """Each of the two data pipelines, by the name that its flag has."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")  # it has no wheels for this system
    return request.param
