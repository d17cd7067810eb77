"""Boxes: one internal form, and the few operations every detector needs.

A box is stored as normalized cxcywh: float32 (center x, center y, width, height), each divided by
the image's width or height, so a full-image box is (0.5, 0.5, 1, 1) at every input size. Overlaps
are computed on corner form xyxy. Pixels appear only at the metric and in pictures: `scale_boxes`.
"""

import torch
from torch import Tensor

EPS = 1e-7  # keeps 0 / 0 away when both boxes are empty; far below one pixel of a normalized box


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) center form to (..., 4) corner form, in the same units."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corner form to (..., 4) center form, in the same units."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((0.5 * (low + high), high - low), dim=-1)


def scale_boxes(boxes: Tensor, height: float, width: float) -> Tensor:
    """Normalized (..., 4) boxes, either form, to pixels of a `height` x `width` image."""
    return boxes * boxes.new_tensor((width, height, width, height))


def elementwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes that broadcast: (..., 4), (..., 4) -> (...)."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / (union + EPS)


def elementwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU in (-1, 1] of xyxy boxes that broadcast: (..., 4), (..., 4) -> (...).

    Rezatofighi et al. 2019, algorithm 1: IoU - (hull - union) / hull, where the hull is the
    smallest box around both. Unlike IoU it has a gradient when the boxes do not touch.
    """
    intersection, union = _intersection_and_union(a, b)
    hull = area(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    return intersection / (union + EPS) - (hull - union) / (hull + EPS)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each xyxy box in `a` with each in `b`: (..., N, 4), (..., M, 4) -> (..., N, M)."""
    return elementwise_iou(a.unsqueeze(-2), b.unsqueeze(-3))


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of each xyxy box in `a` with each in `b`: (..., N, 4), (..., M, 4) -> (..., N, M)."""
    return elementwise_giou(a.unsqueeze(-2), b.unsqueeze(-3))


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) shared by and covered by two broadcasting sets of xyxy boxes."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = area((high - low).clamp(min=0))
    union = area(a[..., 2:] - a[..., :2]) + area(b[..., 2:] - b[..., :2]) - intersection
    return intersection, union


def area(size: Tensor) -> Tensor:
    """Width times height: (..., 2) to (...). With `prod` backward would wait for the device."""
    width, height = size.unbind(-1)
    return width * height
