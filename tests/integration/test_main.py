"""The program as a user runs it, on small data sets, without DALI."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from src.weights.files import load_checkpoint
from tests.helpers import preloaded_python
from tests.helpers.datasets import annotation, write_annotations, write_coco, write_image
from tests.helpers.launch import FP16, LIMIT, TINY_MODEL
from tests.helpers.small_runs import flags, losses
from tests.helpers.trainers import ScalarReads, make_trainer

PROGRAM = Path(main.__file__)
LINES = (
    r"Epoch:  0, Iteration: 0, Loss: \d+\.\d{4}",
    r"Epoch  0 finished\. Time: \d+\.\d s, Speed: \d+\.\d img/sec, Average speed: \d+\.\d",
    r"Epoch  0, Accuracy: \d\.\d{4} mAP",
    r"Training end: Average speed: \d+\.\d img/sec, Total time: \d+\.\d sec, Final accuracy: \d\.\d{4} mAP",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Three annotated images and one without boxes."""
    folder = tmp_path_factory.mktemp("small")
    return write_coco(folder, [annotation(image, (30, 20, 90, 80), 1 + image % 2) for image in (1, 2, 3)], images=4)


def weights(path: Path) -> dict:
    return load_checkpoint(path)["model"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory) -> tuple[Path, str]:
    """The output folder and the printed text of one run in a process of its own."""
    output = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *flags(small, output)], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return output, done.stdout


PLAIN_PROCESSOR = """
import sys
import torch
torch.cpu.get_capabilities = lambda: {"avx2": True}
import main
from tests.helpers.tiny_model import use_tiny_model
flags = sys.argv[2:]
with use_tiny_model():
    for name, more in (("plain", []), ("half", ["--fp16"])):
        print(name, file=sys.stderr)
        assert main.main([*flags, "--output", f"{sys.argv[1]}/{name}", *more]) == 0
"""


def test_a_processor_without_bfloat16_computes_fp16_in_float32(small, tmp_path):
    """In a process of its own, because torch chooses its kernels when it is imported."""
    variables = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    line = [argument for argument in flags(small, tmp_path) if argument not in FP16]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PROCESSOR, tmp_path, *line, "--evaluation"], capture_output=True, text=True,
        timeout=LIMIT, env=variables, cwd=PROGRAM.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning = "main.py: warning: --fp16: this CPU has no bfloat16 arithmetic, so it computes in float32"
    assert done.stderr.splitlines() == ["plain", "half", warning]
    assert losses(tmp_path / "half") == losses(tmp_path / "plain")


def test_a_run_prints_the_four_documented_lines(trained):
    for form in LINES:
        assert len(re.findall(f"^{form}$", trained[1], flags=re.MULTILINE)) == 1, form


def test_a_run_leaves_its_files(trained):
    left = {path.name for path in trained[0].iterdir()} - {"tensorboard"}
    assert left >= {"last.pt", "metrics.jsonl", "flags.json", "mlperf.log", "detections.json"}
    assert left >= {"training.png", "precision_recall.png", "detections.png"}
    assert [name for name in left if name.startswith(".")] == [".lock"]


def test_the_same_flags_give_the_same_losses_and_weights(trained, small, tmp_path):
    assert main.main(flags(small, tmp_path, "--num-workers", "2")) == 0
    assert losses(tmp_path) == losses(trained[0])
    again = weights(tmp_path / "last.pt")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(trained[0] / "last.pt").items())


def test_another_seed_gives_another_loss(trained, small, tmp_path):
    assert main.main(flags(small, tmp_path, "--seed", "1", "--evaluation")) == 0
    assert losses(tmp_path) != losses(trained[0])


@pytest.mark.usefixtures("tiny_model")
def test_evaluation_can_be_left_out(small, tmp_path, capsys):
    (small / "annotations" / "instances_val2017.json").rename(small / "annotations" / "hidden.json")
    try:
        assert main.main(flags(small, tmp_path, "--evaluation")) == 0
    finally:
        (small / "annotations" / "hidden.json").rename(small / "annotations" / "instances_val2017.json")
    assert "Final accuracy: not evaluated" in capsys.readouterr().out
    assert not (tmp_path / "detections.json").exists()


def test_target_sets_the_exit_status(small, trained, tmp_path, capsys):
    scored = ["--mode", "evaluation", "--checkpoint", str(trained[0] / "last.pt")]
    assert main.main(flags(small, tmp_path, *scored, "--target", "0.99")) == 1
    assert main.main(flags(small, tmp_path, *scored, "--target", "0")) == 0
    assert "mAP by category" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_model")
def test_an_older_run_is_moved_and_its_checkpoint_still_read(small, tmp_path, capsys):
    assert main.main(flags(small, tmp_path, "--evaluation")) == 0
    assert main.main(flags(small, tmp_path, "--evaluation", "--checkpoint", str(tmp_path / "last.pt"))) == 0
    assert (tmp_path / "run-001" / "last.pt").exists()
    assert str(tmp_path / "run-001") in capsys.readouterr().out


def test_prediction_needs_no_annotations(small, trained, tmp_path):
    found = flags(small / "val2017", tmp_path, "--mode", "prediction", "--checkpoint", str(trained[0] / "last.pt"))
    assert main.main(found) == 0
    assert len(list(tmp_path.glob("*.jpg.png"))) == 4
    json.loads((tmp_path / "detections.json").read_text())


@pytest.mark.usefixtures("tiny_model")
def test_prediction_leaves_a_run_as_it_is_and_names_what_it_leaves_out(small, tmp_path, capsys):
    assert main.main(flags(small, tmp_path / "run")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    write_image(tmp_path / "in" / "sub" / "a.bmp", 60, 40)
    (tmp_path / "in" / "b.heic").write_bytes(b"\0\0\0\x24ftypheic")
    (tmp_path / "in" / "notes.txt").touch()
    write_image(tmp_path / "in" / "before" / "a.bmp.png", 60, 40)
    (tmp_path / "in" / "before" / "detections.json").touch()
    checkpoint = str(tmp_path / "run" / "last.pt")
    capsys.readouterr()
    found = flags(tmp_path / "in", tmp_path / "run", "--mode", "prediction", "--checkpoint", checkpoint)
    assert main.main(found) == 2
    printed = capsys.readouterr()
    assert f"the predictions go to {tmp_path / 'run' / 'predictions'}" in printed.out
    assert re.search(r"^1 images, \d+ detections: .*; 1 other files skipped$", printed.out, re.MULTILINE)
    assert "Folders with detections.json left out, as earlier results: 1" in printed.out
    assert "1 of 2 images left out" in printed.err and str(tmp_path / "in" / "b.heic") in printed.err
    predictions = tmp_path / "run" / "predictions"
    assert {path.relative_to(predictions).as_posix() for path in predictions.rglob("*")} == {
        *("detections.json", "sub", "sub/a.bmp.png")
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_check_draws_a_batch_of_either_pipeline(small, tmp_path, pipeline):
    assert main.main(flags(small, tmp_path, "--mode", "check", "--data_pipeline", pipeline)) == 0
    assert (tmp_path / "batch.png").exists()


@pytest.mark.parametrize(
    ("images", "boxes", "categories"),
    [(1, [1], None), (3, [2], [{"id": 0, "name": "only"}]), (2, [1, 2], None)],
    ids=["one image", "one class, images without boxes", "fewer images than a batch"],
)
@pytest.mark.usefixtures("tiny_model")
def test_small_data_sets_train(tmp_path, images, boxes, categories):
    category = 1 if categories is None else 0
    data = write_coco(
        tmp_path,
        [annotation(image, (30, 20, 90, 80), category) for image in boxes],
        images=images,
        categories=categories,
    )
    assert main.main(flags(data, tmp_path / "output", "-b", "3", "--evaluation")) == 0
    assert load_checkpoint(tmp_path / "output" / "last.pt")["iteration"] == 1


def remove(path: str):
    def act(data: Path) -> Path:
        (data / path).rename(data / "elsewhere")
        return data / path

    return act


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda data: data.rename(data.with_name("gone")), "no such"),
        (remove("annotations/instances_train2017.json"), "instances_train2017.json"),
        (remove("annotations/instances_val2017.json"), "instances_val2017.json"),
        (remove("train2017"), "train2017"),
        (remove("val2017/000002.jpg"), "val2017/000002.jpg"),
    ],
    ids=["data", "training annotations", "validation annotations", "image folder", "validation image"],
)
def test_a_missing_file_is_named_in_one_line_before_training(tmp_path, capsys, fault, said):
    data = write_coco(tmp_path / "data", [annotation(1)], images=2)
    fault(data)
    assert main.main(flags(data, tmp_path / "output")) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("main.py: error: ")
    assert said in lines[0]
    assert "Iteration" not in printed.out
    assert not (tmp_path / "output").exists()


@pytest.mark.usefixtures("tiny_model")
def test_a_run_that_diverges_ends_with_one_line_and_keeps_its_last_checkpoint(small, tmp_path, capsys):
    """Whether the loss or the weights overflow first depends on the processor."""
    assert main.main(flags(small, tmp_path, "--evaluation")) == 0
    saved = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    assert main.main(flags(small, tmp_path, "--resume", "--lr", "1e6", "-e", "30", "--evaluation")) == 1
    warning, line = capsys.readouterr().err.splitlines()
    assert "--learning-rate (0.0026 -> 1000000.0)" in warning
    what = "the loss is not finite since|the weights or batch-norm statistics are not finite after"
    assert re.search(rf"error: ({what}) epoch \d+, iteration \d+ \(learning rate 6\.25e\+04\)", line)
    assert (tmp_path / "last.pt").read_bytes() == saved


@pytest.mark.parametrize(("signal_sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_exit_status(small, tmp_path, signal_sent, status):
    line = [sys.executable, *TINY_MODEL, *flags(small, tmp_path, "-e", "1000", "--evaluation", "--num-workers", "1")]
    with preloaded_python.started(line) as program:
        program.wait_for("Epoch  1 finished")
        os.kill(program.pid, signal_sent)
        _, errors = program.communicate()
        assert program.returncode == status
    assert "Traceback" not in errors
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["iteration"] == 2 * state["epoch"] + state["within"] >= 2


def test_an_iteration_reads_nothing_from_the_device():
    from src.benchmark import random_batch
    from src.ssd.model import SSD300

    trainer = make_trainer(SSD300("resnet18", 3).train())
    batch = random_batch(2, 3, device=trainer.device, dtype=torch.float32)
    with ScalarReads() as reads:
        parts = trainer.step(batch, 0.01)
        trainer.loss_monitor.observe(sum(parts), 0)
        assert reads.count == 0
        trainer.loss_monitor.check(epoch=0, iteration=0, learning_rate=0.01)
        assert reads.count == 1


def test_photographs_train_from_one_command(coco128, tmp_path, capsys):
    """A few photographs of coco128, as in README's first steps."""
    content = json.loads((coco128 / "annotations" / "instances_train2017.json").read_text())
    kept = [image["id"] for image in content["images"]][:4]
    content["images"] = content["images"][:4]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    for split in ("train", "val"):
        write_annotations(tmp_path, content, split)
        (tmp_path / f"{split}2017").symlink_to(coco128 / "train2017")
    assert main.main(flags(tmp_path, tmp_path / "output")) == 0
    printed = capsys.readouterr().out
    assert all(re.search(f"^{form}$", printed, flags=re.MULTILINE) for form in LINES)
