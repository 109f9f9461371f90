"""Names in one Unicode form in the annotation file and in another on the disk."""

import json
from unicodedata import normalize

import pytest

from src.data.annotations.coco import check_images_exist
from src.data.annotations.unicode_names import spelled_as_on_disk
from tests.helpers.both_pipelines import train_loader
from tests.helpers.datasets import annotation, read, write_annotations, write_coco

COMPOSED, APART = (normalize(form, "é ü.jpg") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path):
    """A folder that keeps names as they are given."""
    (tmp_path / APART).touch()
    if (tmp_path / COMPOSED).exists():
        pytest.skip("this file system takes both forms for one name")
    (tmp_path / APART).unlink()
    return tmp_path


@pytest.mark.parametrize(("given", "stored"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_pictures_are_found_whatever_the_form_of_their_names(pipeline, folder, given, stored):
    images = [{"id": i, "file_name": f"{i} {stored}/{stored}", "width": 160, "height": 120} for i in (1, 2)]
    data = write_coco(folder, [annotation(1), annotation(2)], images=images, splits=("train",))
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"{image['id']} {given}/{given}"
    write_annotations(data, content)
    annotations = read(data)
    check_images_exist(annotations)
    assert [annotations.file_name(index) for index in (0, 1)] == [image["file_name"] for image in images]
    assert len(list(train_loader(pipeline, annotations))) == 2


def test_where_several_files_could_be_meant_names_stay_as_they_are(folder):
    mixed = COMPOSED[:2] + APART[3:]  # of neither form
    names = [mixed, "plain.jpg", f"{COMPOSED}/missing.jpg"]
    for name in (COMPOSED, APART):
        (folder / name).touch()
    assert spelled_as_on_disk(names, folder) == names
    (folder / APART).unlink()
    assert spelled_as_on_disk(names, folder) == [COMPOSED, *names[1:]]
    assert spelled_as_on_disk([mixed, APART], folder) == [COMPOSED, APART]
    assert spelled_as_on_disk([mixed, COMPOSED], folder) == [mixed, COMPOSED]
    assert spelled_as_on_disk([mixed], folder / "absent") == [mixed]
