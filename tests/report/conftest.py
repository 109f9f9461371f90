"""What the tests of reports share."""

import inspect
import sys
import traceback
from types import FrameType

import pytest


@pytest.fixture(autouse=True)
def _stacks_without_sources(monkeypatch):
    """The package that writes mlperf.log asks who calls it; among pytest's many frames the sources take seconds."""
    monkeypatch.setattr(inspect, "stack", _frames)


def _frames() -> list[tuple[FrameType]]:
    """The frames from the caller outwards, each first in a tuple, as `inspect.stack` has them."""
    return [(frame,) for frame, _ in traceback.walk_stack(sys._getframe(1))]
