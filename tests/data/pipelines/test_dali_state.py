import io
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

from src.runtime.distributed import Shard
from src.runtime.errors import UserError
from tests.helpers.dali_loaders import epoch, loader, random_annotations
from tests.helpers.equality import same


def saved_and_read(state: dict) -> dict:
    """The state as it comes out of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def test_continues_bit_for_bit_after_every_iteration(tmp_path):
    data, options = random_annotations(tmp_path, 9), {"seed": 3, "shard": Shard(1, 2)}
    whole = loader(data, **options)
    iterations = len(whole)
    assert iterations == 3
    batches, states = [], []
    for number in range(3):
        whole.set_epoch(number)
        for batch in whole:
            batches.append(batch)
            states.append(whole.state_dict())
    for done, state in enumerate(states, 1):
        number, iteration = divmod(done, iterations)
        continued = loader(data, **options, num_workers=1)
        continued.load_state_dict(saved_and_read(state), epoch=number, iteration=iteration)
        continued.set_epoch(number, iteration)
        rest = list(continued) if number < 3 else []
        for later in range(number + 1, 3):
            rest += epoch(continued, later)
        assert same(rest, batches[done:])
        assert continued.warnings == []
        continued.close()


def test_a_state_before_the_first_batch_continues_too(tmp_path):
    data = random_annotations(tmp_path)
    first, second = loader(data), loader(data)
    second.load_state_dict(saved_and_read(first.state_dict()), epoch=0, iteration=0)
    assert same(epoch(first, 0), epoch(second, 0))


def test_a_later_epoch_starts_without_a_state(tmp_path):
    data = random_annotations(tmp_path)
    first, second = loader(data), loader(data)
    expected = epoch(first, 5)
    second.set_epoch(5, 2)
    assert same(list(second), expected[2:])


DIFFERENT = {
    "seed": {"seed": 1},
    "batch size": {"batch_size": 3},
    "processes": {"shard": Shard(0, 2)},
    "augmentation": {"augment": False},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_state_of_other_settings_raises_inside_an_epoch_and_warns_between_epochs(tmp_path, what):
    data = random_annotations(tmp_path)
    other = loader(data, **DIFFERENT[what])
    other.set_epoch(2)
    next(iter(other))
    state = other.state_dict()
    ours = loader(data)
    with pytest.raises(UserError, match=f"^cannot continue inside epoch 2: .*{what} .*now.*$"):
        ours.load_state_dict(state, epoch=2, iteration=1)
    ours.load_state_dict(state, epoch=2, iteration=0)
    (warning,) = ours.warnings
    assert what in warning and "afresh" in warning and "\n" not in warning
    assert same(epoch(ours, 2), epoch(loader(data), 2))


def test_the_state_after_one_of_other_settings_is_that_of_the_next_epoch(tmp_path):
    """A run that is continued between an epoch and its evaluation saves before it reads anything."""
    data = random_annotations(tmp_path)
    ours, later = loader(data), loader(data)
    ours.load_state_dict(loader(data, seed=1).state_dict(), epoch=2, iteration=len(ours))
    later.load_state_dict(ours.state_dict(), epoch=3, iteration=0)
    assert later.warnings == []
    assert same(epoch(later, 3), epoch(loader(data), 3))


def test_a_state_of_the_other_orientation_raises(tmp_path):
    data = random_annotations(tmp_path)
    with pytest.raises(UserError, match=r"^cannot continue inside epoch 0: .* orientation upright \(now stored\): "):
        loader(data).load_state_dict(loader(replace(data, upright=True)).state_dict(), epoch=0, iteration=1)


def test_a_state_without_an_orientation_is_of_stored_pictures(tmp_path):
    ours = loader(random_annotations(tmp_path))
    whole = epoch(ours, 0)
    state = {**loader(random_annotations(tmp_path)).state_dict()}
    state["fingerprint"] = {name: value for name, value in state["fingerprint"].items() if name != "orientation"}
    ours.load_state_dict(state, epoch=0, iteration=0)
    assert ours.warnings == []
    assert same(epoch(ours, 0), whole)


def test_a_state_of_other_annotations_or_the_other_pipeline_raises(tmp_path):
    ours, other = loader(random_annotations(tmp_path / "a")), loader(random_annotations(tmp_path / "b", seed=1))
    with pytest.raises(UserError, match="annotations"):
        ours.load_state_dict(other.state_dict(), epoch=1, iteration=1)
    with pytest.raises(UserError, match="--data_pipeline no_dali"):
        ours.load_state_dict({}, epoch=1, iteration=1)
    ours.load_state_dict({}, epoch=1, iteration=0)
    assert len(ours.warnings) == 1
    assert len(epoch(ours, 1)) == len(ours)


@pytest.mark.parametrize("version", [1, None], ids=["another", "none, as before graphs had one"])
def test_a_state_of_another_version_of_the_graph_raises(tmp_path, version):
    ours = loader(random_annotations(tmp_path))
    state = ours.state_dict()
    state["fingerprint"]["version of the graph"] = version
    if version is None:
        del state["fingerprint"]["version of the graph"]
    with pytest.raises(UserError, match=f"^cannot continue inside epoch 1: .*version of the graph {version} .*now 2"):
        ours.load_state_dict(state, epoch=1, iteration=1)
    ours.load_state_dict(state, epoch=1, iteration=0)
    assert len(ours.warnings) == 1


def test_the_graphs_of_cpu_and_gpu_have_different_versions(tmp_path):
    data = random_annotations(tmp_path)
    prints = [loader(data, device=torch.device(name)).fingerprint() for name in ("cpu", "cuda")]
    assert [one["version of the graph"] for one in prints] == [2, 4]


def test_the_state_is_plain(tmp_path):
    state = loader(random_annotations(tmp_path)).state_dict()
    assert isinstance(state.pop("checkpoint"), bytes)
    json.dumps(state)
