"""The exported files that most tests here read."""

import pytest

from tests.helpers.exported import Exported


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Exported:
    made = Exported(tmp_path_factory.mktemp("export"))
    assert made.run("export", made.checkpoint, made.exported) == 0
    return made
