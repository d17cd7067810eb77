"""Losses of the one-stage detector: task-aligned assignment, then CIoU, DFL and BCE.

Each ground-truth box takes the ten anchors inside it that already do best at both tasks, class and
place, and teaches them in proportion (TOOD, Feng et al. 2021). All other anchors are background.

Everything after the assignment works on the K = 10 candidates of each box, (B, M, K), instead of on
all A anchors: static shapes, no mask indexing, no wait for the device, and no dense (B, A, C)
targets, which at 96 images of 1440 x 832 would be as large as the logits themselves.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lib.models.boxes import area, cxcywh_to_xyxy, pairwise_iou, scale_boxes
from lib.models.yolo import (
    NUM_BINS,
    STRIDES,
    YOLOOutputs,
    class_prior_bias,
    decode_distances,
    distance_prior,
    make_anchors,
)

TOP_K = 10  # anchors a box may teach (TOOD uses 13; the v8 family 10)
ALPHA = 0.5  # exponent of the class score in the alignment
BETA = 6.0  # exponent of the IoU in the alignment
ELEMENTS_AT_ONCE = 2**24  # of a temporary in the assignment: 64 MiB each in fp32


@dataclass(frozen=True)
class Gains:
    """Weight of each term in the total."""

    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5


class Assignment(NamedTuple):
    """What each ground-truth box teaches, K candidate anchors a box."""

    anchors: Tensor  # (B, M, K) index into the A anchors
    weights: Tensor  # (B, M, K) target class score in [0, 1]; 0 where the candidate is not assigned


def yolo_loss(
    outputs: YOLOOutputs,
    boxes: Tensor,
    labels: Tensor,
    image_size: tuple[int, int],
    gains: Gains = Gains(),  # noqa: B008 (frozen)
) -> dict[str, Tensor]:
    """All terms for a batch of padded targets.

    boxes       (B, M, 4) float32, cxcywh normalized by the network input; M may be 0
    labels      (B, M) long, -1 where there is no box
    image_size  (H, W) of the network input in pixels

    Returns scalars: "box", "cls" and "dfl" as they are, "box_weighted", ... times their gains, and
    "loss", the sum of the weighted ones. Each is a sum over the batch divided by the sum of the
    target scores, about the number of boxes, over all processes.
    """
    targets = cxcywh_to_xyxy(scale_boxes(boxes.float(), *image_size))  # (B, M, 4) pixels
    cls = outputs.cls.float()  # (B, A, C)
    assignment = assign(outputs, targets, labels)
    weights = assignment.weights.flatten(1)  # (B, M * K)
    normalizer = mean_over_processes(weights.sum()).clamp(min=1)

    # Each candidate beside its ground truth; N = M * K rows an image.
    index = assignment.anchors.flatten(1)  # (B, N)
    num_candidates = assignment.anchors.shape[-1]
    row_targets = targets.repeat_interleave(num_candidates, dim=1)  # (B, N, 4)
    row_labels = labels.clamp(min=0).repeat_interleave(num_candidates, dim=1)  # (B, N)
    row_dist = outputs.box_dist.float().gather(1, index.unsqueeze(-1).expand(-1, -1, 4 * NUM_BINS))
    row_anchors, row_strides = outputs.anchors[index], outputs.strides[index]  # (B, N, 2), (B, N)

    # BCE(x, t) = softplus(x) - t x, and t is zero but at one class of each assigned anchor.
    row_logits = cls.flatten(1).gather(1, index * cls.shape[-1] + row_labels)  # (B, N)
    cls_loss = F.softplus(cls).sum() - (weights * row_logits).sum()
    row_boxes = decode_distances(row_dist, row_anchors, row_strides)  # (B, N, 4)
    box_loss = (weights * (1 - complete_iou(row_boxes, row_targets))).sum()
    row_dfl = distribution_focal_loss(row_dist, row_targets, row_anchors, row_strides)  # (B, N)
    dfl_loss = (weights * row_dfl).sum()

    terms = {"box": box_loss, "cls": cls_loss, "dfl": dfl_loss}
    terms = {name: term / normalizer for name, term in terms.items()}
    weighted = {f"{name}_weighted": getattr(gains, name) * term for name, term in terms.items()}
    return {"loss": sum(weighted.values()), **terms, **weighted}


@torch.no_grad()
def assign(outputs: YOLOOutputs, targets: Tensor, labels: Tensor) -> Assignment:
    """Task-aligned assignment (TOOD, section 3.2) of targets (B, M, 4) xyxy in pixels.

    Scores of every (box, anchor) pair exist only for as many images at a time as fit in
    ELEMENTS_AT_ONCE; a batch of usual size is done in one go.
    """
    num_images, num_boxes = labels.shape
    num_anchors = len(outputs.anchors)
    # What is held per anchor: its score for each box, and its own 4 x 16 box logits in fp32.
    per_image = num_anchors * max(num_boxes, 4 * NUM_BINS)
    images_at_once = max(ELEMENTS_AT_ONCE // per_image, 1)
    candidates = []
    for start in range(0, num_images, images_at_once):
        chunk = slice(start, start + images_at_once)
        chunk_outputs = outputs._replace(cls=outputs.cls[chunk], box_dist=outputs.box_dist[chunk])
        candidates.append(top_candidates(chunk_outputs, targets[chunk], labels[chunk]))
    anchors, alignment, iou = (torch.cat(parts) for parts in zip(*candidates, strict=True))

    assigned = wins_anchor(anchors, iou.where(alignment > 0, -1), num_anchors)  # (B, M, K)
    alignment, iou = alignment * assigned, iou * assigned
    # Section 3.2: the best aligned anchor of a box is asked for the best IoU of the box.
    best_alignment = alignment.amax(-1, keepdim=True).clamp(min=torch.finfo().tiny)
    return Assignment(anchors, alignment / best_alignment * iou.amax(-1, keepdim=True))


def top_candidates(
    outputs: YOLOOutputs, targets: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The K anchors of highest alignment in each box: index, alignment, IoU, each (B, M, K).

    The alignment is score^alpha * IoU^beta (equation 2), and 0 outside of the box.
    """
    predictions = decode_distances(outputs.box_dist, outputs.anchors, outputs.strides)  # (B, A, 4)
    iou = pairwise_iou(targets, predictions)  # (B, M, A)
    num_anchors = iou.shape[-1]
    index = labels.clamp(min=0).unsqueeze(-1).expand(-1, -1, num_anchors)  # (B, M, A)
    logits = outputs.cls.float().transpose(1, 2).gather(1, index)  # (B, M, A)
    alignment = logits.sigmoid().pow(ALPHA) * iou.pow(BETA)
    inside = anchors_inside(targets, outputs.anchors) & (labels >= 0).unsqueeze(-1)  # (B, M, A)
    alignment, anchors = (alignment * inside).topk(min(TOP_K, num_anchors), dim=-1)  # (B, M, K)
    return anchors, alignment, iou.gather(-1, anchors)


def anchors_inside(targets: Tensor, anchors: Tensor) -> Tensor:
    """Which anchors (A, 2) lie in which boxes (B, M, 4): (B, M, A) bool.

    A box narrower than the finest stride counts as that wide, so none falls between the anchors.
    """
    center = (targets[..., :2] + targets[..., 2:]) / 2  # (B, M, 2)
    reach = ((targets[..., 2:] - targets[..., :2]) / 2).clamp(min=STRIDES[0] / 2)
    inside_x, inside_y = (
        (anchors[:, axis] - center[..., axis, None]).abs() <= reach[..., axis, None]
        for axis in (0, 1)
    )
    return inside_x & inside_y


def wins_anchor(anchors: Tensor, iou: Tensor, num_anchors: int) -> Tensor:
    """Who gets an anchor that several boxes want: (B, M, K) index, IoU -> (B, M, K) bool.

    The box of highest IoU; of equal ones, such as a box annotated twice, the first.
    """
    num_images, num_boxes, _ = anchors.shape
    index, rows_iou = anchors.flatten(1), iou.flatten(1)  # (B, M * K)
    best_iou = iou.new_zeros(num_images, num_anchors).scatter_reduce(1, index, rows_iou, "amax")
    is_best = rows_iou == best_iou.gather(1, index)  # (B, M * K)

    box = torch.arange(num_boxes, device=anchors.device).unsqueeze(-1).expand_as(anchors).flatten(1)
    contenders = torch.where(is_best, box, num_boxes)
    owner = index.new_full((num_images, num_anchors), num_boxes)
    owner = owner.scatter_reduce(1, index, contenders, "amin")  # (B, A)
    return (owner.gather(1, index) == box).view_as(anchors)


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of xyxy boxes in pixels, element by element: (..., 4), (..., 4) -> (...).

    IoU - (center distance / hull diagonal)^2 - alpha v, where v compares the aspect ratios (Zheng
    et al. 2020, equations 6 to 11). torchvision's loss gives NaN for the empty boxes that padding
    is made of, and its mask indexing waits for the device.
    """
    eps = 1e-7
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = area((high - low).clamp(min=0))
    iou = intersection / (area(size_a) + area(size_b) - intersection + eps)

    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    center_offset = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    distance = center_offset.square().sum(-1) / (hull.square().sum(-1) + eps)

    angle_a, angle_b = (
        torch.atan(size[..., 0] / (size[..., 1] + eps)) for size in (size_a, size_b)
    )
    v = (angle_a - angle_b).square() * (4 / math.pi**2)
    with torch.no_grad():  # a weight, not a part of the function
        alpha = v / (1 - iou + v + eps)
    return iou - distance - alpha * v


def distribution_focal_loss(
    box_dist: Tensor, targets: Tensor, anchors: Tensor, strides: Tensor
) -> Tensor:
    """Mean over the four sides: (..., 4 * 16), (..., 4) xyxy pixels, (..., 2), (...) -> (...).

    A side at distance y asks for the two bins around it in proportion (GFL, equation 6); uniform
    bins cost ln 16 whatever the target. Sides out of reach aim at the nearest distance.
    """
    distances = torch.cat((anchors - targets[..., :2], targets[..., 2:] - anchors), dim=-1)
    # Just below the last bin, so that there is always a bin on the right.
    distances = (distances / strides.unsqueeze(-1)).clamp(0, NUM_BINS - 1 - 1e-3)  # (..., 4)
    left = distances.floor()
    right_weight = (distances - left).unsqueeze(-1)  # (..., 4, 1)
    log_prob = box_dist.unflatten(-1, (4, NUM_BINS)).log_softmax(-1)  # (..., 4, 16)
    bins = left.long().unsqueeze(-1)  # (..., 4, 1)
    log_left, log_right = log_prob.gather(-1, bins), log_prob.gather(-1, bins + 1)
    return -((1 - right_weight) * log_left + right_weight * log_right).mean((-2, -1))


def mean_over_processes(value: Tensor) -> Tensor:
    """DDP averages gradients, so the average normalizer makes them those of one large batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


@torch.no_grad()
def expected_initial(
    boxes: Tensor, labels: Tensor, image_size: tuple[int, int], num_classes: int
) -> dict[str, Tensor]:
    """The unweighted terms of an untrained network for these targets, by arithmetic.

    With each class logit at its prior bias b and each side at `distance_prior`, the assignment,
    hence the sum S of the target scores, follows from the targets alone, and so do all terms:

        cls = (B C sum_a softplus(b_a) - sum of b over the targets, each times its score) / S

    Targets as in `yolo_loss`. A fresh network comes within a few percent; one without the prior
    bias starts with ln 2 for each of its B A C logits, orders of magnitude above.
    """
    anchors, strides = make_anchors(image_size, boxes.device)
    bias = class_prior_bias(strides, num_classes)  # (A,)
    sides = distance_prior(boxes.device).repeat(4)  # (4 * 16,)
    num_images, num_anchors = len(boxes), len(anchors)
    initial = YOLOOutputs(
        bias.view(1, -1, 1).expand(num_images, -1, num_classes),
        sides.expand(num_images, num_anchors, -1),
        anchors,
        strides,
    )
    terms = yolo_loss(initial, boxes, labels, image_size)
    return {name: terms[name] for name in ("box", "cls", "dfl")}
