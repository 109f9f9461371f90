"""No function has more than six parameters: values that belong together travel as one."""

import ast
from pathlib import Path

HERE = Path(__file__).parents[1]
MOST = 6  # parameters, without self and cls


def count_parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def long_signatures(root: Path) -> list[str]:
    files = [root / "main.py", *(root / "src").rglob("*.py"), *(root / "benchmarks").rglob("*.py")]
    return [
        f"{file.relative_to(root)}: {function.name}"
        for file in sorted(files)
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef) and count_parameters(function) > MOST
    ]


def test_no_function_has_more_than_six_parameters():
    assert long_signatures(HERE) == []


def test_the_count_takes_every_kind_of_parameter_but_self(tmp_path):
    (tmp_path / "main.py").write_text(
        "class A:\n    def six(self, a, /, b, *, c, d=1, e=2, f=3): ...\n"
        "def seven(a, /, b, *, c, d, e, f=1, g=2): ...\n"
    )
    assert long_signatures(tmp_path) == ["main.py: seven"]
