"""Two nodes on one machine: `python -m benchmarks.two_nodes` trains across two network namespaces, then stops a rank.

Each namespace stands for a machine, with a virtual cable between them. After two epochs and an evaluation a rank
of the second node is stopped (SIGSTOP), as if its machine hung: the first node must end with an error within the
process group's time limit. Needs root and iproute2.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from src.data.synthetic import draw_dataset
from src.runtime.distributed import GROUP_TIMEOUT_VARIABLE
from src.runtime.precision import half_is_fast

HERE = Path(__file__).parents[1]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29500
TIME_LIMIT = 10  # seconds of the process group
PATIENCE = 180  # seconds for an epoch with its evaluation, and for an end
FLAGS = (
    *("--backbone", "resnet18", "--backbone-weights", "none", "--batch-size", "2", "--data_pipeline", "no_dali"),
    *("--num-workers", "0", "--epochs", "1000", "--evaluation", "0"),
)


class Outcome(NamedTuple):
    """What was seen."""

    text: str  # all that the first node printed
    second: str  # what the second node printed while all was well: nothing
    noticed: float  # seconds from the stop to the first node's message
    statuses: tuple[int, int]  # of the launchers, the second one's after its rank was let go on


def hindrance() -> str | None:
    """Why this machine cannot do it, None where it can."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        with two_namespaces():
            return None
    except subprocess.CalledProcessError as error:
        return f"cannot make network namespaces here: {error.stderr.strip()}"


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces that reach each other at ADDRESSES; gone afterwards."""
    names = f"ssd300-{os.getpid()}-0", f"ssd300-{os.getpid()}-1"
    cables = tuple(f"v{os.getpid()}-{node}" for node in range(2))
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def node(name: str, rank: int, log: Path, script: Sequence[str], *, processes: int, rendezvous: str) -> Iterator:
    """The running launcher of one node, whose text goes to `log`; `script` is what it starts, with its flags."""
    if rendezvous == "static":
        meeting = [f"--node_rank={rank}", f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}"]
    else:  # each node has to say its address, since both have the same host name
        meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}", "--rdzv_id=two-nodes"]
        meeting += [f"--local_addr={ADDRESSES[rank]}", f"--rdzv_conf=is_host={rank == 0}"]
    line = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *meeting]
    line += [f"--nproc_per_node={processes}", *script]
    # gloo looks for its interface by the host name, which stands for no address in a namespace.
    interface = {"GLOO_SOCKET_IFNAME": f"v{os.getpid()}-{rank}", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, cwd=HERE, env={**os.environ, **interface})
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher ends its processes, after 30 s by force
                process.wait(PATIENCE)


def run(
    folder: Path,
    data: Path,
    *,
    processes: int = 1,
    rendezvous: str = "static",
    program: Sequence[str] = ("main.py",),
    flags: Sequence = (),
) -> Outcome:
    """Trains and evaluates an epoch across both nodes, stops the last rank and sees how the run ends."""
    logs = folder / "first.log", folder / "second.log"
    os.environ.setdefault(GROUP_TIMEOUT_VARIABLE, str(TIME_LIMIT))
    script = [*program, "--data", data, "--output", folder / "run", *FLAGS, *flags]
    start = partial(node, script=list(map(str, script)), processes=processes, rendezvous=rendezvous)
    with (
        two_namespaces() as names,
        start(names[0], 0, logs[0]) as first,
        start(names[1], 1, logs[1]) as second,
    ):
        wait_for("Epoch  1 finished", logs[0], first)
        # torch warns there of addresses without a name.
        second_text = "".join(line for line in logs[1].open() if "hostname of the client socket" not in line)
        victim = max(children(second.pid))
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            wait_for("main.py: error:", logs[0], first)
            noticed = time.monotonic() - stopped
            status = first.wait(PATIENCE)
        finally:
            os.kill(victim, signal.SIGCONT)
        return Outcome(logs[0].read_text(), second_text, noticed, (status, second.wait(PATIENCE)))


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    """Returns when the text stands in the log; raises RuntimeError, with the log, where it never will."""
    deadline = time.monotonic() + PATIENCE
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{text!r} was not printed:\n{log.read_text()}")
        time.sleep(0.1)


def children(parent: int) -> list[int]:
    """The processes that `parent` started and that are still there."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs once and prints what was seen; exit status 1 where something was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder in the COCO 2017 layout (default: images that are drawn)")
    parser.add_argument("--processes", type=int, default=1, help="of each node (default: %(default)s)")
    parser.add_argument("--rendezvous", choices=("static", "c10d"), default="static", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if reason := hindrance():
        print(f"two nodes: skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="ssd300-nodes-") as folder:
        data = args.data or Path(folder, "data")
        if args.data is None:
            draw_dataset(data, images=8, val_images=4, seed=0)
        half = ("--fp16",) if half_is_fast(torch.device("cpu")) else ()
        seen = run(Path(folder), data, processes=args.processes, rendezvous=args.rendezvous, flags=half)
    print(*(line for line in seen.text.splitlines() if line.startswith(("Epoch ", "main.py:"))), sep="\n")
    limit = float(os.environ[GROUP_TIMEOUT_VARIABLE])
    print(f"The loss was noticed after {seen.noticed:.1f} s (time limit {limit:g} s), exit statuses {seen.statuses}")
    if seen.second:
        print(f"The second node printed:\n{seen.second}")
    # Half the limit more, because it counts from the moment when the others begin to wait.
    return int(not (not seen.second and seen.noticed < 1.5 * limit and all(seen.statuses)))


if __name__ == "__main__":
    sys.exit(main())
