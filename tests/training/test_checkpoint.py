import argparse
import os
import pickle
import random
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from src.errors import UserError
from src.ssd.model import SSD300
from src.training.checkpoint import save_checkpoint
from src.weights.backbone import load_backbone, load_backbone_file
from src.weights.detector import label_count, load_weights
from src.weights.files import check_fit, load_checkpoint

WEIGHTS = {"conf.0.bias": torch.arange(12.0), "loc.0.bias": torch.arange(16.0)}


class Custom:
    pass


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 300
    return message.removeprefix(f"{path}: ")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "last.pt"
    state = {"model": WEIGHTS, "epoch": 3, "best_map": None, "names": ["a"], "state": {"bytes": b"\0"}}
    save_checkpoint(file, {"model": {}})
    save_checkpoint(file, state)
    loaded = load_checkpoint(file)
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in WEIGHTS.items())
    assert {**loaded, "model": None} == {**state, "model": None}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


NUMBERS = 200_000  # of a checkpoint that is killed: writing it takes some milliseconds
KILLS = 60


def kill_writers(path: Path, connection) -> None:
    """Forks processes that save time and again, kills each at a random moment; sends what was found after each kill."""
    torch.set_num_threads(1)
    states = [{"model": {"a": torch.full((NUMBERS,), float(k)), "b": torch.full((9,), float(k))}} for k in range(3)]
    save_checkpoint(path, states[0])
    chance = random.Random(6)
    found = []
    for _ in range(KILLS):
        writer = os.fork()
        while writer == 0:
            for state in states:
                save_checkpoint(path, state)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        weights = load_checkpoint(path)["model"]
        parts = list(path.parent.glob("*.part"))
        found.append((torch.cat([weights["a"], weights["b"]]).unique().tolist(), len(weights["a"]), bool(parts)))
        for part in parts:
            part.unlink()
    connection.send(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    context = torch.multiprocessing.get_context("spawn")  # a process without threads, to fork from
    ours, theirs = context.Pipe()
    process = context.Process(target=kill_writers, args=(tmp_path / "last.pt", theirs))
    process.start()
    assert ours.poll(100)
    found = ours.recv()
    process.join()
    assert len(found) == KILLS
    assert all(values in ([0.0], [1.0], [2.0]) and length == NUMBERS for values, length, _ in found)
    assert len({values[0] for values, _, _ in found}) > 1  # some were replaced
    assert any(while_writing for _, _, while_writing in found)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_ended_before_its_last_moment_the_old_file_is_there(tmp_path, monkeypatch, moment):
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"model": WEIGHTS, "epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(file, {"model": WEIGHTS, "epoch": 2})
    assert load_checkpoint(file)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"model": WEIGHTS})
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        with pytest.raises(UserError, match=r"^cannot write [^\n]*last\.pt: File too large[^\n]*as it was$"):
            save_checkpoint(file, {"model": {"a": torch.zeros(2**16)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^cannot write [^\n]*last\.pt: No such file or directory"):
        save_checkpoint(tmp_path / "missing" / "last.pt", {"model": WEIGHTS})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write [^\n]*last\.pt: a file is in its place"):
        save_checkpoint(tmp_path / "file" / "last.pt", {"model": WEIGHTS})


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["dict", "bare", "safetensors", "old format"])
def test_the_forms_of_published_checkpoints(tmp_path, form, prefix):
    file = tmp_path / "ssd.pt"
    weights = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    extra = {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 5}, "epoch": 64, "label_map": {1: "person"}}
    if form == "safetensors":
        save_file(weights, file)
    else:
        content = weights if form == "bare" else {"model": weights, **extra}
        torch.save(content, file, _use_new_zipfile_serialization=form != "old format")
    loaded = load_checkpoint(file)
    assert loaded["model"].keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in WEIGHTS.items())
    assert loaded.get("label_map") == (None if form in ("bare", "safetensors") else {1: "person"})


NEEDING_MORE = {
    "argparse.Namespace": argparse.Namespace(bs=32),
    "tests.test_checkpoint.Custom": Custom(),
    "numpy": np.float64(0.27),
    "pathlib": Path("a"),
    "posix.system": os.system,
    "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("needed", NEEDING_MORE)
def test_a_file_that_needs_more_is_refused_by_the_name_of_its_type(tmp_path, needed, old_format):
    file = tmp_path / "a.pt"
    content = {"model": WEIGHTS, "more": NEEDING_MORE[needed]}
    torch.save(content, file, _use_new_zipfile_serialization=not old_format)
    message = refusal(file)
    assert message.startswith(f"refused: it needs {needed}")
    assert "GLOBAL" not in message


def test_nothing_of_a_file_is_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for file, save in (
        (tmp_path / "a.pt", torch.save),
        (tmp_path / "b.pt", lambda *a: a[1].write_bytes(pickled(a[0]))),
    ):
        save({"model": Harm()}, file)
        assert "posix.mkdir" in refusal(file)
    assert not (tmp_path / "harm").exists()


def pickled(content) -> bytes:
    return pickle.dumps(content, protocol=2)


def test_a_byte_that_has_changed_is_noticed(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"model": {"a": torch.arange(999.0)}}, file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert "data/0 is not as it was written" in refusal(file)


def test_no_file_and_a_folder(tmp_path):
    assert refusal(tmp_path / "missing.pt") == "no such file"
    assert refusal(tmp_path) == "cannot be read (Is a directory)"


def other_files() -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"hello\nworld\n",
        "json": b'{"model": {}}',
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "pickle": pickle.dumps({"model": 1}),
        "zeros": bytes(1000),
        "safetensors' beginning": (10**6).to_bytes(8, "little") + b'{"a":',
    }


@pytest.mark.parametrize("kind", other_files())
def test_a_file_of_another_kind(tmp_path, kind, recwarn):
    file = tmp_path / "a.pt"
    file.write_bytes(other_files()[kind])
    assert refusal(file).startswith("is no checkpoint, or not a whole one (")
    assert not [warning for warning in recwarn if "pickle" in str(warning.message)]


def test_an_archive_of_another_kind(tmp_path):
    file = tmp_path / "a.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b", "c")
    assert refusal(file).startswith("is no checkpoint, or not a whole one (")


@pytest.mark.parametrize("form", ["new", "old", "safetensors"])
def test_a_truncated_file(tmp_path, form):
    whole, file = tmp_path / "whole", tmp_path / "a.pt"
    if form == "safetensors":
        save_file(WEIGHTS, whole)
    else:
        torch.save({"model": WEIGHTS}, whole, _use_new_zipfile_serialization=form == "new")
    content = whole.read_bytes()
    lengths = sorted({*np.linspace(0, len(content) - 1, 40, dtype=int).tolist(), len(content) - 1, len(content) - 30})
    for length in lengths:
        file.write_bytes(content[:length])
        assert refusal(file)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2),
        3,
        [WEIGHTS],
        {},
        {"model": {}},
        {"model": {"a": "b"}},
        {"state_dict": WEIGHTS},
        {1: torch.zeros(1)},
    ],
    ids=["tensor", "number", "list", "nothing", "empty network", "text", "state_dict", "numbered"],
)
def test_no_network_in_it(tmp_path, content):
    file = tmp_path / "a.pt"
    torch.save(content, file)
    message = refusal(file)
    assert "not a checkpoint" in message or "has no network in it" in message


# --- loading into a network ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> SSD300:
    return SSD300("resnet18", 3)


def test_what_does_not_fit_is_named_with_both_shapes():
    here = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}

    def error(**there) -> str:
        with pytest.raises(UserError) as raised:
            check_fit(here, there, source=Path("x.pt"))
        return str(raised.value)

    assert error(a=torch.zeros(2), b=torch.zeros(1)).startswith(
        "x.pt: does not fit this network: a is [2] there and [2, 3] here"
    )
    assert error(a=here["a"]) == "x.pt: does not fit this network: it has no b [4]"
    assert error(**here, c=torch.zeros(7, 8)) == "x.pt: does not fit this network, which has no c [7, 8]"


def test_fresh_label_heads_stay_and_all_the_rest_is_loaded(model):
    torch.manual_seed(1)
    other, expected = SSD300("resnet18", 5).state_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    assert label_count(other) == 5
    with pytest.raises(UserError, match=r"conf\.0\.weight is \[20, 256, 3, 3\] there and \[12, 256, 3, 3\] here"):
        load_weights(model, other, source=Path("x.pt"), fresh_label_heads=False)
    load_weights(model, other, source=Path("x.pt"), fresh_label_heads=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name] if name.startswith("conf.") else other[name]), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_resnet_fills_the_backbone(model, tmp_path, suffix):
    torch.manual_seed(2)
    resnet, file = models.resnet18(), tmp_path / f"resnet{suffix}"
    with torch.no_grad():
        for tensor in resnet.buffers():
            tensor.add_(1)
    (save_file if suffix == ".safetensors" else torch.save)(resnet.state_dict(), file)
    load_backbone_file(model, file)
    pairs = zip(model.feature_extractor.feature_extractor, list(resnet.children())[:7], strict=True)
    for ours, theirs in pairs:
        assert all(
            torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )


def test_a_resnet_without_the_counters_of_batches_is_taken(model):
    resnet = models.resnet18().state_dict()
    load_backbone(model, {k: v for k, v in resnet.items() if "num_batches" not in k}, source=Path("old.pth"))
    assert torch.equal(model.state_dict()["feature_extractor.feature_extractor.0.weight"], resnet["conv1.weight"])


@pytest.mark.parametrize(
    ("backbone", "complaint"),
    [
        ("resnet34", "this network, which has no layer1.2.conv1.weight [64, 64, 3, 3]"),
        ("resnet50", "layer1.0.conv1.weight is [64, 64, 1, 1] there and [64, 64, 3, 3] here"),
        ("vgg11", "it has no conv1.weight [64, 3, 7, 7]"),
    ],
)
def test_weights_of_another_backbone_are_an_error(model, backbone, complaint):
    with torch.device("meta"):
        weights = models.get_model(backbone).state_dict()
    with pytest.raises(UserError) as error:
        load_backbone(model, weights, source=Path("x.pth"))
    assert str(error.value).startswith("x.pth: does not fit") and complaint in str(error.value)
