"""Only tests that are marked gpu see a machine's GPUs."""

import os

import pytest
import torch

from tests.conftest import hide_gpus


@pytest.mark.parametrize(("markers", "visible"), [("", ""), ("not gpu", ""), ("gpu", "2,3")])
def test_gpus_are_hidden_but_from_the_tests_marked_gpu(monkeypatch, markers, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    hide_gpus(markers)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_this_run_sees_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
