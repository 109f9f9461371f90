import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from src.ssd.loss import MultiBoxLoss, mine_hard_negatives
from tests.helpers.oracle_inputs import loss_inputs


@pytest.mark.parametrize("case", ["mixed", "all_empty"])
def test_loss_and_gradients_are_the_oracles(oracle, case):
    expected = oracle("loss")[case]
    offsets, logits, boxes, labels = loss_inputs(
        expected["seed"], expected["counts"], oracle("default_boxes.npz")["xywh"]
    )
    offsets.requires_grad_()
    logits.requires_grad_()
    loss = MultiBoxLoss()(offsets, logits, boxes, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert offsets.grad.norm().item() == pytest.approx(expected["grad_ploc_norm"], rel=1e-5)
    assert logits.grad.norm().item() == pytest.approx(expected["grad_plabel_norm"], rel=1e-5)
    assert (logits.grad != 0).any(dim=1).sum() == expected["default_boxes_with_label_gradient"]


def test_hard_negatives_are_three_a_positive_and_the_hardest():
    cross_entropy = torch.tensor([[5.0, 4.0, 9.0, 3.0, 2.0, 1.0, 0.5]])
    positive = torch.tensor([[False, False, True, False, False, False, False]])
    chosen = mine_hard_negatives(cross_entropy, positive, positive.sum(dim=1))
    assert chosen.tolist() == [[True, True, False, True, False, False, False]]


def test_hard_negatives_never_include_a_positive():
    positive = torch.tensor([[True, True, False, True, False]])
    chosen = mine_hard_negatives(torch.ones(1, 5), positive, positive.sum(dim=1))
    assert chosen.tolist() == [[False, False, True, False, True]]


def test_one_label_image_by_hand(oracle):
    """One positive, no offset error: the label part alone, by cross-entropy over it and the three hardest."""
    boxes = torch.from_numpy(oracle("default_boxes.npz")["xywh"])[None]
    labels = torch.zeros(1, 8732, dtype=torch.long)
    labels[0, 100] = 1
    logits = torch.zeros(1, 2, 8732)
    logits[0, 1, :3] = torch.tensor([3.0, 2.0, 1.0])
    parts = MultiBoxLoss().parts(torch.zeros(1, 4, 8732), logits, boxes, labels)
    zero = torch.zeros(())
    expected = F.softplus(zero) + sum(F.softplus(torch.tensor(value)) for value in (3.0, 2.0, 1.0))
    assert_close(parts.label, expected)
    assert_close(parts.localisation, zero)


def test_half_precision_outputs_are_computed_in_float32(oracle):
    expected = oracle("loss")["mixed"]
    inputs = loss_inputs(expected["seed"], expected["counts"], oracle("default_boxes.npz")["xywh"])
    rounded = [inputs[0].bfloat16(), inputs[1].bfloat16()]
    assert torch.equal(
        MultiBoxLoss()(*rounded, *inputs[2:]), MultiBoxLoss()(*(x.float() for x in rounded), *inputs[2:])
    )
