"""Errors of the DALI pipeline: broken images, and DALI failing or missing."""

import importlib
import os
import sys

import pytest
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

from src.data.pipelines import dali_pipeline
from src.data.pipelines.dali_graph import OUTPUTS
from src.runtime.errors import DataError, UserError
from tests.helpers.dali_loaders import epoch, loader, random_annotations


def cut_header(content: bytes) -> bytes:
    return content[:200]


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "damage", [None, lambda _: b"", lambda _: b"<html>not an image</html>" * 20, cut_header, cut_short]
)
def test_a_broken_image_is_named(tmp_path, damage):
    data = random_annotations(tmp_path)
    path = tmp_path / "train2017" / "000004.jpg"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    ours = loader(data)
    with pytest.raises(DataError) as error:
        epoch(ours, 0)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    path.write_bytes(content)
    assert len(epoch(ours, 0)) == len(ours)


def test_an_image_that_breaks_later_is_named(tmp_path):
    ours = loader(random_annotations(tmp_path))
    for number in range(3):
        epoch(ours, number)
    path = tmp_path / "train2017" / "000002.jpg"
    path.write_bytes(b"no image at all" * 20)
    with pytest.raises(DataError, match=r"000002\.jpg: "):
        for number in range(3, 6):  # some batches are prepared already
            epoch(ours, number)


def test_an_image_of_another_size_than_the_file_says_is_named(tmp_path):
    data = random_annotations(tmp_path)
    path = tmp_path / "train2017" / "000003.jpg"
    Image.new("RGB", (120, 160)).save(path)
    with pytest.raises(DataError) as error:
        epoch(loader(data), 0)
    assert str(error.value).startswith(f"{path}: the picture is 120 x 160")


def test_a_failure_of_dali_names_the_other_pipeline(tmp_path, monkeypatch):
    ours = loader(random_annotations(tmp_path))
    ours.set_epoch(0)

    class Failing:
        def run(self, stream):
            raise RuntimeError("Critical error in pipeline:\nencountered:\n\nout of memory\nmore")

    monkeypatch.setattr(ours, "_pipeline", Failing())
    with pytest.raises(UserError, match=r"^DALI failed \(out of memory\).*--data_pipeline no_dali$"):
        list(ours)


def test_dali_that_does_not_start_names_the_other_pipeline(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("CUDA driver version is insufficient\nfor this and that")

    monkeypatch.setattr(dali_pipeline, "make_pipeline", failing)
    with pytest.raises(UserError, match=r"^DALI cannot start \(CUDA .*insufficient\): .*--data_pipeline no_dali$"):
        epoch(loader(random_annotations(tmp_path)), 0)


def test_a_batch_that_is_too_large_for_dali_has_a_hint(tmp_path):
    with pytest.raises(UserError, match=r"^DALI cannot start \(.*\): lower --batch-size$"):
        loader(random_annotations(tmp_path), batch_size=2**31 - 1).build(OUTPUTS)


def test_dali_that_is_absent_names_the_other_pipeline(monkeypatch):
    for module in ("src.data.pipelines.dali_graph", "src.data.pipelines.dali_pipeline"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"^DALI cannot be used here \(.+\): use --data_pipeline no_dali$"):
        importlib.import_module("src.data.pipelines.dali_pipeline")


def test_only_the_dali_pipeline_imports_dali():
    loaded = os.popen(
        f"{sys.executable} -c 'import src.data.pipelines.loaders, sys; print(\"nvidia.dali\" in sys.modules)'"
    ).read()
    assert loaded.strip() == "False"
