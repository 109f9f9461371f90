"""A fixture for all tests of reports."""

import inspect
import sys
import traceback
from types import FrameType

import pytest


@pytest.fixture(autouse=True)
def _stacks_without_sources(monkeypatch):
    """Leaves out sources, which the package of mlperf.log reads for all callers: with pytest that takes seconds."""
    monkeypatch.setattr(inspect, "stack", _frames)


def _frames() -> list[tuple[FrameType]]:
    """The frames from the caller outwards, each first in a tuple, as `inspect.stack` has them."""
    return [(frame,) for frame, _ in traceback.walk_stack(sys._getframe(1))]
