"""Private parts and message texts of libraries that the program relies on; a new release may change them."""

import argparse
import io
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader

from tests.helpers import collective_messages

SRC = Path(__file__).parents[1] / "src"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the program forks its worker processes on Linux only")

# --- private parts ---------------------------------------------------------------------------------------------------

# Library, what is used of it, the file that uses it, the release it was last seen in.
PRIVATE = [
    ("torch", "optimizer.found_inf", "training/step.py", "2.14.1"),  # GradScaler hands it to fused optimizers
    ("torch", "torch._dynamo.exc.TorchDynamoException", "training/step.py", "2.14.1"),  # the base of --compile's errors
    ("torch", "._shutdown_workers()", "data/pipelines/workers.py", "2.14.1"),  # of DataLoader's iterator
    # Only for releases without torch.cpu.get_capabilities.
    ("torch", "torch.cpu._is_avx512_bf16_supported()", "runtime/precision.py", "2.14.1"),
    ("torch", "torch.cpu._is_amx_tile_supported()", "runtime/precision.py", "2.14.1"),
    ("Python", "super()._get_help_string(action)", "flags.py", "3.11"),  # of argparse.ArgumentDefaultsHelpFormatter
]


@pytest.mark.parametrize(("library", "name", "file", "release"), PRIVATE)
def test_a_private_part_is_used_where_the_table_says(library, name, file, release):
    assert name in (SRC / file).read_text(), (
        f"{file} no longer uses {name} of {library} {release}: remove it from the table"
    )


def test_torch_still_has_what_training_uses():
    from torch.amp import GradScaler

    release = version("torch")
    base = getattr(torch._dynamo.exc, "TorchDynamoException", None)
    assert base is not None, f"torch {release} has no torch._dynamo.exc.TorchDynamoException: see training/step.py"
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=0.1, fused=True), GradScaler("cpu")
    seen = []
    optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(hasattr(optimizer, "found_inf")))
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert seen == [True], f"torch {release} hands no found_inf to fused optimizers: see training/step.py"


def test_torch_still_knows_a_cpus_bfloat16():
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = hasattr(torch.cpu, "get_capabilities") or all(hasattr(torch.cpu, name) for name in names)
    assert known, f"torch {version('torch')} has neither get_capabilities nor {names}: see runtime/precision.py"


def test_argparse_still_asks_for_a_flags_help():
    """A formatter that overrides the method changes the text."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str:
            return "overridden"

    parser = argparse.ArgumentParser(formatter_class=Formatter)
    parser.add_argument("--flag", help="text")
    shown = parser.format_help()
    assert "overridden" in shown, f"Python {sys.version} no longer calls _get_help_string of a formatter: see flags.py"


@linux
def test_torch_still_ends_workers_on_request():
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    batches = iter(loader)
    assert len(list(batches)) == 4
    where = f"of torch {version('torch')}'s DataLoader iterator: see data/pipelines/workers.py"
    assert hasattr(batches, "_shutdown_workers"), f"there is no _shutdown_workers {where}"
    batches._shutdown_workers()
    with pytest.raises(Exception):  # noqa: B017  (any: the queues of the workers are closed)
        list(loader)
        pytest.fail(f"_shutdown_workers leaves workers running {where}")


# --- message texts ---------------------------------------------------------------------------------------------------


class Acting:
    """A data set for which a worker process does something instead of reading a sample."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.act()
        return index


def error_of(work: Callable[[], object]) -> str:
    with pytest.raises(Exception) as raised:
        work()
    return str(raised.value)


def worker_error(act: Callable[[], object]) -> str:
    """The error of a DataLoader whose worker does that, or its cause, which names the signal that ended the worker."""
    with pytest.raises((OSError, RuntimeError)) as raised:
        list(DataLoader(Acting(act), num_workers=1, multiprocessing_context="fork"))
    return str(raised.value.__cause__ or raised.value)


def raise_os_error() -> None:
    raise OSError("no such thing")


def many_workers() -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DataLoader(range(9), num_workers=10_000)
    return "; ".join(str(warning.message) for warning in caught)


def no_file_left() -> str:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        return error_of(lambda: torch.ones(9).share_memory_())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def port_in_use() -> str:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return error_of(lambda: dist.TCPStore("127.0.0.1", store.port, is_master=True, wait_for_workers=False))


def unsafe_checkpoint() -> str:
    file = io.BytesIO()
    torch.save(Acting(list), file)
    file.seek(0)
    return error_of(lambda: torch.load(file))


def absent_rank() -> str:
    """Gloo's error on a rank whose peer takes no part in a collective."""
    store, timeout = dist.HashStore(), timedelta(seconds=1)
    groups: dict[int, dist.ProcessGroupGloo] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: groups.update({rank: dist.ProcessGroupGloo(store, rank, 2, timeout)}))
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return error_of(lambda: groups[0].allreduce(torch.ones(2)).wait())


def undecodable_picture() -> str:
    pytest.importorskip("nvidia.dali")
    from src.data.pipelines.dali_graph import DECODER_INPUT, make_decoder

    pipeline = make_decoder(batch_size=1, device_id=None, upright=False)
    pipeline.feed_input(DECODER_INPUT, [np.frombuffer(b"\xff\xd8\xff no picture", np.uint8)])
    return error_of(pipeline.run)


def too_large_batch() -> str:
    pytest.importorskip("nvidia.dali")
    from src.data.pipelines.dali_graph import OUTPUTS
    from tests.helpers.dali_loaders import loader, random_annotations

    with tempfile.TemporaryDirectory() as folder:
        train_loader = loader(random_annotations(Path(folder)), batch_size=2**31 - 1)
        return error_of(lambda: train_loader.build(OUTPUTS)).removesuffix(": lower --batch-size")


class Point(msgspec.Struct):
    x: int


def json_error(text: bytes, kind: type = Point) -> str:
    return error_of(lambda: msgspec.json.decode(text, type=kind))


class Message(NamedTuple):
    """A text that the program looks for in a library's messages.  NCCL's are recorded: they need several GPUs."""

    library: str
    release: str  # in which it was last seen
    file: str  # that looks for it
    text: str  # a regular expression, as it stands in the file
    provoke: Callable[[], str]  # gives the library's message


WORKERS, COLLECTIVES = "data/pipelines/workers.py", "runtime/collective_errors.py"
COCO, CHECKPOINTS = "data/annotations/coco_errors.py", "weights/files.py"
# fmt: off
TORCH, NCCL, DALI, MSGSPEC = ("torch", "2.14.1"), ("NCCL", "2.28.9"), ("nvidia-dali", "2.4.0"), ("msgspec", "0.23.0")
MESSAGES = [
    Message(*TORCH, WORKERS, "This DataLoader will create", many_workers),
    Message(*TORCH, WORKERS, "DataLoader worker", lambda: worker_error(lambda: os._exit(1))),
    Message(*TORCH, WORKERS, "exited unexpectedly", lambda: worker_error(lambda: os._exit(1))),
    Message(*TORCH, WORKERS, "killed by signal", lambda: worker_error(lambda: os.kill(os.getpid(), signal.SIGKILL))),
    Message(*TORCH, WORKERS, "Bus error", lambda: worker_error(lambda: os.kill(os.getpid(), signal.SIGBUS))),
    Message(*TORCH, WORKERS, "Caught ", lambda: worker_error(raise_os_error)),
    Message(*TORCH, WORKERS, "Too many open files", no_file_left),
    Message(*TORCH, "report/exit_status.py", "can't allocate memory", lambda: error_of(lambda: torch.empty(2**60))),
    Message(*TORCH, "runtime/process_group.py", "EADDRINUSE", port_in_use),
    Message(*TORCH, CHECKPOINTS, r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)", unsafe_checkpoint),
    Message(*TORCH, COLLECTIVES, r"\[[^\]]*/gloo/[^\]]*\.\w+:\d+\]", absent_rank),
    Message(*NCCL, COLLECTIVES, "ncclInvalidUsage", lambda: collective_messages.DUPLICATE),
    Message(*NCCL, COLLECTIVES, "ncclSystemError", lambda: collective_messages.FULL),
    Message(*NCCL, COLLECTIVES, "ncclUnhandledCudaError", lambda: collective_messages.SILENT),
    Message(*NCCL, COLLECTIVES, "Last error:", lambda: collective_messages.GONE),
    Message(*DALI, "data/pipelines/dali_graph.py", "encountered:", undecodable_picture),
    Message(*DALI, "data/pipelines/dali_pipeline.py", "batch size|memory|alloc", too_large_batch),
    Message(*MSGSPEC, COCO, r"missing required field `(\w+)`", lambda: json_error(b"{}")),
    Message(*MSGSPEC, COCO, r"trailing characters \(byte (\d+)\)", lambda: json_error(b'{"x":1} 2')),
    Message(*MSGSPEC, COCO, r"(.*) \(byte (\d+)\)", lambda: json_error(b'{"x":?}')),
    Message(*MSGSPEC, COCO, " - at `", lambda: json_error(b'{"x":""}')),
    Message(*MSGSPEC, COCO, "UTF-8", lambda: json_error(b'"\xff"', str)),
]
# fmt: on


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: f"{message.library}: {message.text}")
def test_a_library_still_says_what_the_program_looks_for(message):
    said = message.provoke()
    assert re.search(message.text, said, re.IGNORECASE), (
        f"{message.file} looks for {message.text!r} in a message of {message.library}, last seen in {message.release}, "
        f"which now says {said!r}"
    )


@pytest.mark.parametrize(("file", "text"), sorted({(message.file, message.text) for message in MESSAGES}))
def test_the_program_looks_for_a_text_where_the_table_says(file, text):
    assert text in (SRC / file).read_text(), f"{file} no longer looks for {text!r}: remove it from the table"
