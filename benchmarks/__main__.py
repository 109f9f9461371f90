"""All benchmarks in one table: `python -m benchmarks [NAME ...] [--data DIR] [--gpu] [--json FILE]`.

Most figures have a baseline that is measured in turns with them, because machines differ and their speed drifts: the
ratio counts.  A ratio whose turns spread by more than a tenth is unsteady: measure again on a quiet machine.  The other
figures stand alone or beside a fixed limit.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from src.runtime.environment import prepare

if __name__ == "__main__":
    prepare()

import torch

from benchmarks import annotations, evaluation, export, gpu, loaders, step
from benchmarks.machine import describe
from benchmarks.table import header, line
from src.data.synthetic import draw_dataset
from src.runtime.devices import configure_backends

DRAWN_IMAGES = 256  # without --data


def cpu_benchmarks(data: Path) -> dict[str, Callable[[], Iterable[dict]]]:
    """The benchmarks of a CPU by name."""
    return {
        "loaders": lambda: loaders.run(data),
        "step": step.run,
        "run": lambda: step.whole_run(data),
        "evaluation": evaluation.run,
        "export": export.run,
        "annotations": annotations.run,
    }


def gpu_benchmarks(data: Path) -> dict[str, Callable[[], Iterable[dict]]]:
    """The benchmarks of a GPU by name."""
    return {"gpu": lambda: gpu.run(data, torch.device("cuda", torch.cuda.current_device()))}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named benchmarks; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="loaders, step, run, evaluation, export, annotations; all"
    )
    parser.add_argument("--data", type=Path, default=None, help="a folder in the COCO 2017 layout; drawn if left out")
    parser.add_argument("--gpu", action="store_true", help="the figures of a GPU")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="also write the rows and the machine there"
    )
    args = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU here")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or Path(folder, "data")
        if args.data is None:
            draw_dataset(data, images=DRAWN_IMAGES, val_images=1, seed=0)
        if args.gpu:
            configure_backends(torch.device("cuda"))
        chosen = gpu_benchmarks(data) if args.gpu else cpu_benchmarks(data)
        unknown = set(args.names) - set(chosen)
        if unknown:
            parser.error(f"no benchmark named {sorted(unknown)[0]!r}: there are {', '.join(chosen)}")
        machine = describe(torch.device("cuda" if args.gpu else "cpu"))
        rows: list[dict] = []
        print(header())
        for name in args.names or chosen:
            for row in chosen[name]():
                rows.append(row)
                print(line(row), flush=True)  # at once: the next row may take longer than a user waits
                if args.json:
                    args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
