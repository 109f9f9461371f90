"""Imports run one way: from what uses to what is used."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]

# The order of the rooms, which is the order of the program.  A room (a folder or a file of src, main.py, benchmarks)
# knows those of the lines below its own, and none beside it.
ORDER = (
    ("main", "benchmarks"),
    ("export", "benchmark", "check", "flags"),
    ("training", "evaluation"),
    ("report", "weights"),
    ("data",),
    ("data.pipelines",),
    ("data.images", "data.annotations"),
    ("ssd",),
    ("runtime",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def files(root: Path) -> list[Path]:
    return sorted((root / "main.py", *(root / "src").rglob("*.py"), *(root / "benchmarks").rglob("*.py")))


def room(module: tuple[str, ...]) -> str | None:
    """The room of a module, None where it is none of the project's."""
    if module[0] == "src":
        folders = ".".join(module[1:3])
        return folders if folders in LEVEL else module[1] if len(module) > 1 else None
    return module[0] if module[0] in ("main", "benchmarks") else None


def imported(file: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """Every module that the file imports, inside functions too, by its full name."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level] if node.level else ()
            named = (*parent, *(node.module.split(".") if node.module else ()))
            yield from ((*named, alias.name) for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    """The imports that do not run down, as "file: module"."""
    wrong = []
    for file in files(root):
        own = room(file.relative_to(root).with_suffix("").parts)
        for module in imported(file, root):
            other = room(module)
            if own is None or other is None or other == own:
                continue
            if own not in LEVEL or other not in LEVEL or LEVEL[other] <= LEVEL[own]:
                wrong.append(f"{file.relative_to(root)}: {'.'.join(module)}")
    return wrong


def test_imports_run_one_way():
    assert wrong_imports(HERE) == []


def test_every_room_stands_in_the_order_and_is_there():
    rooms = {room(file.relative_to(HERE).with_suffix("").parts) for file in files(HERE)}
    assert rooms - {"__init__"} == LEVEL.keys()


def test_no_test_module_is_imported():
    """What tests share stands in tests/helpers."""
    files = sorted((HERE / "tests").rglob("*.py"))
    found = [f"{file.relative_to(HERE)}: {'.'.join(name)}" for file in files for name in imported(file, HERE)]
    assert [line for line in found if re.search(r": tests\..*\btest_", line)] == []


@pytest.mark.parametrize(
    ("place", "statement", "is_wrong"),
    [
        ("src/data/annotations/coco.py", "from src.report.report import Report", True),
        ("src/data/annotations/coco.py", "def f():\n    from ...report import report", True),
        ("src/data/annotations/coco.py", "from ..images import decode", True),
        ("src/data/images/decode.py", "from ..annotations import coco", True),
        ("src/data/annotations/coco.py", "import src.ssd.model", False),
        ("src/training/loop.py", "from src.evaluation import evaluate", True),
        ("src/evaluation/scoring.py", "import src.training.loop", True),
        ("src/report/report.py", "import main", True),
        ("src/runtime/errors.py", "from ..ssd import model", True),
        ("src/check.py", "from src.utils import anything", True),
        ("benchmarks/step.py", "from src.benchmark import benchmark", False),
        ("main.py", "from benchmarks.step import run", True),
    ],
)
def test_what_counts_as_wrong(tmp_path, place, statement, is_wrong):
    (tmp_path / "main.py").touch()
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(statement)
    assert len(wrong_imports(tmp_path)) == is_wrong
