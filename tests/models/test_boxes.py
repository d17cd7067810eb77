"""Box helpers against torchvision and by hand."""

import torch
from torchvision import ops

from lib.models import boxes


def random_xyxy(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, *shape, 2, generator=generator)
    return torch.cat((low, low + 0.02 + 0.5 * size), dim=-1)


def test_conversions_agree_with_torchvision_and_invert_each_other():
    xyxy = random_xyxy(5, 3, seed=0)
    cxcywh = boxes.xyxy_to_cxcywh(xyxy)
    torch.testing.assert_close(cxcywh, ops.box_convert(xyxy, "xyxy", "cxcywh"))
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(cxcywh), xyxy)


def test_overlaps_agree_with_torchvision():
    a, b = random_xyxy(6, seed=1), random_xyxy(4, seed=2)
    torch.testing.assert_close(boxes.pairwise_iou(a, b), ops.box_iou(a, b))
    torch.testing.assert_close(boxes.pairwise_giou(a, b), ops.generalized_box_iou(a, b))
    torch.testing.assert_close(boxes.elementwise_iou(a[:4], b), ops.box_iou(a, b).diag())
    wanted = ops.generalized_box_iou(a, b).diag()
    torch.testing.assert_close(boxes.elementwise_giou(a[:4], b), wanted)


def test_pairwise_is_batched():
    a, b = random_xyxy(2, 6, seed=3), random_xyxy(2, 4, seed=4)
    giou = boxes.pairwise_giou(a, b)
    assert giou.shape == (2, 6, 4)
    torch.testing.assert_close(giou[1], boxes.pairwise_giou(a[1], b[1]))
    assert boxes.pairwise_iou(a, b[:, :0]).shape == (2, 6, 0)


def test_giou_by_hand():
    a = torch.tensor([0.0, 0.0, 1.0, 1.0])
    far = torch.tensor([2.0, 0.0, 3.0, 1.0])  # hull 3, union 2: 0 - 1 / 3
    assert boxes.elementwise_iou(a, far) == 0
    torch.testing.assert_close(boxes.elementwise_giou(a, far), torch.tensor(-1 / 3))
    torch.testing.assert_close(boxes.elementwise_giou(a, a), torch.tensor(1.0))


def test_empty_boxes_have_finite_overlaps_and_gradients():
    empty = torch.zeros(1, 4, requires_grad=True)
    overlap = boxes.elementwise_iou(empty, empty) + boxes.elementwise_giou(empty, empty)
    overlap.sum().backward()
    assert overlap.isfinite().all() and empty.grad.isfinite().all()


def test_scale_to_pixels():
    box = torch.tensor([[0.5, 0.5, 1.0, 0.25]])
    wanted = torch.tensor([[960.0, 540.0, 1920.0, 270.0]])
    torch.testing.assert_close(boxes.scale_boxes(box, height=1080, width=1920), wanted)
