"""Small runs of main.py in this process, and what they print and leave."""

import json
from pathlib import Path

import main
from tests.helpers.launch import FP16


def flags(data: Path, output: Path, *more: str) -> list[str]:
    """The command line of one epoch of ResNet-18 from random weights, two images a batch, without DALI."""
    small = "--data_pipeline no_dali --backbone resnet18 --backbone-weights none -b 2 --ebs 2 -e 1 --num-workers 0"
    return ["--data", str(data), "--output", str(output), *small.split(), *FP16, *more]


def run(pipeline: str, data: Path, output: Path, *more: str) -> int:
    """The exit status of such a run."""
    return main.main(flags(data, output, "--data_pipeline", pipeline, *more))


def error_line(capsys) -> str:
    """The one line on standard error, without DALI's own lines, which contain colour codes."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "\x1b[" not in line)
    assert line.startswith("main.py: error: ")
    return line


def metrics(folder: Path) -> list[dict]:
    """The objects of metrics.jsonl; the parser refuses NaN and Infinity."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records(folder: Path, kind: str) -> list[dict]:
    """The objects of metrics.jsonl of one kind: iteration, epoch or evaluation."""
    return [entry for entry in metrics(folder) if entry["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in records(folder, "iteration")]
