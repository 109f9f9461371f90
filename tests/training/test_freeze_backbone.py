"""--freeze-backbone: the backbone stays as it was, and the run is otherwise like any other."""

from pathlib import Path

import pytest

import main
from src.training.schedule import Schedule, schedule_warnings
from tests.helpers.datasets import write_small_coco
from tests.helpers.equality import same
from tests.helpers.launch import NO_DALI, SMALL, TINY_MODEL, command, launch
from tests.helpers.small_runs import losses
from tests.helpers.stopped_runs import INSIDE, pipeline_flags, run_and_stop, run_two_epochs, state_of

BACKBONE = "feature_extractor."
LEARNING = ("conf.0.weight", "additional_blocks.0.0.weight", "additional_blocks.0.1.running_mean")
FROZEN = (*pipeline_flags("no_dali", False), "--freeze-backbone")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small_coco(tmp_path_factory.mktemp("data"), 4)


def split_names(before: dict, after: dict) -> tuple[dict[str, bool], dict[str, bool]]:
    """Whether each tensor is as before: those of the backbone, and the others."""
    equal = {name: same(tensor, after[name]) for name, tensor in before.items()}
    own = {name: value for name, value in equal.items() if name.startswith(BACKBONE)}
    return own, {name: value for name, value in equal.items() if name not in own}


def test_nothing_of_the_backbone_changes_and_the_rest_learns(data, tiny_model, tmp_path):
    assert run_two_epochs(data, tmp_path / "first", *pipeline_flags("no_dali", False)) == main.DONE
    checkpoint = tmp_path / "first" / "last.pt"
    assert run_two_epochs(data, tmp_path / "frozen", *FROZEN, "--checkpoint", str(checkpoint)) == main.DONE
    backbone, rest = split_names(state_of(tmp_path / "first")["model"], state_of(tmp_path / "frozen")["model"])
    assert any("running_mean" in name for name in backbone)
    assert all(backbone.values())
    assert not any(rest[name] for name in LEARNING)


def test_continuing_is_exact(data, tiny_model, tmp_path):
    def start(data: Path, output: Path, *more: str, signalled_at: int | None = None) -> int:
        return run_two_epochs(data, output, *FROZEN, *more, signalled_at=signalled_at)

    run_and_stop(data, tmp_path, [1, 1, None], start)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert same(state_of(tmp_path / "stopped"), state_of(tmp_path / "whole"))
    assert (tmp_path / INSIDE).exists()


def test_a_run_may_go_on_with_the_backbone_trained(data, tiny_model, tmp_path, capsys):
    output = tmp_path / "run"
    assert run_two_epochs(data, output, *FROZEN) == main.DONE
    frozen = state_of(output)["model"]
    assert run_two_epochs(data, output, *pipeline_flags("no_dali", False), "--resume", "--epochs", "4") == main.DONE
    assert "--freeze-backbone (True -> False)" in capsys.readouterr().err
    backbone, _ = split_names(frozen, state_of(output)["model"])
    assert not any(backbone.values())


def test_two_processes_train_what_is_not_frozen(data, tiny_model, tmp_path):
    more = ("--epochs", "2", "--evaluation", "--freeze-backbone", *SMALL, *NO_DALI)
    assert run_two_epochs(data, tmp_path / "first", *pipeline_flags("no_dali", False)) == main.DONE
    before = tmp_path / "first" / "last.pt"
    done = launch(command([*TINY_MODEL, "--data", data, "--output", tmp_path / "run", "--checkpoint", before, *more]))
    assert done.returncode == 0, done.stderr
    backbone, rest = split_names(state_of(tmp_path / "first")["model"], state_of(tmp_path / "run")["model"])
    assert all(backbone.values())
    assert not any(rest[name] for name in LEARNING)


@pytest.mark.parametrize(
    ("warmup", "multistep", "said"),
    [
        (100, (20, 26), []),
        (101, (20, 26), ["--warmup 101: takes 25% of the run's 400 iterations; give 100 or fewer"]),
        (90, (5,), ["--multistep 5: the rate falls after 50 iterations, before the warm-up of 90 is over"]),
        (0, (0,), []),
        (50, (5,), []),
        (90, (43, 54), []),
        (390, (20,), ["--warmup 390: takes 98%", "--multistep 20: the rate falls after 200"]),
        (401, (43,), ["--warmup 401: the run has 400 iterations, so the learning rate gets to"]),
    ],
)
def test_schedules_that_do_not_fit_are_warned_of(warmup, multistep, said):
    schedule = Schedule(base_learning_rate=2.6e-3, global_batch_size=32, warmup=warmup, multistep=multistep, epochs=40)
    warnings = schedule_warnings(schedule, 10, [], None)
    assert len(warnings) == len(said)
    assert all(text in warning for text, warning in zip(said, warnings, strict=True))
