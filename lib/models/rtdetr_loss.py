"""RT-DETR's training loss: Hungarian matching, then varifocal, L1 and GIoU terms.

Zhao et al. 2023, section 4 and appendix; matching after DETR (Carion et al. 2020, section 3.1), the
classification term after VarifocalNet (Zhang et al. 2021, equation 2).

Everything is batched over the S supervised layers (the encoder's proposals and the decoder's
layers): one cost tensor, one copy to the host, one loss. Shapes: B images, Q queries, K classes,
M box slots an image, P predictions that own a target.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lib.models.boxes import cxcywh_to_xyxy, elementwise_giou, elementwise_iou, pairwise_giou
from lib.models.rtdetr import PRIOR, Outputs, Targets, at_least_one_slot

COST_CLASS, COST_L1, COST_GIOU = 2.0, 5.0, 2.0
WEIGHT_VFL, WEIGHT_L1, WEIGHT_GIOU = 1.0, 5.0, 2.0
FOCAL_ALPHA = 0.25  # of the matching cost
VFL_ALPHA = 0.75  # weight of the negatives
GAMMA = 2  # exponent of both


def losses(
    outputs: Outputs,
    targets: Targets,
    reduce_num_boxes: Callable[[Tensor], Tensor] | None = None,
    matcher: Callable[[Outputs, Targets], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Named terms, all 0-d float32; `loss` is the one to call backward on.

    vfl, l1, giou are the last layer's, unweighted; encoder_*, aux_* (the layers between) and dn_*
    are sums over their layers; *_weighted are the sums of all of a kind times the published weights
    1, 5, 2, and loss is their sum. last_layer is the last layer's part of it, which is all of the
    loss in evaluation.
    `reduce_num_boxes` maps this process's number of boxes, a 0-d tensor, to the mean over all
    processes, so that a box weighs the same whichever process holds it. `matcher` stands in for
    `match`: `fixed_match` in a dry run.
    """
    targets = at_least_one_slot(targets)
    num_boxes = (targets.labels >= 0).sum().float()
    if reduce_num_boxes is not None:
        num_boxes = reduce_num_boxes(num_boxes)
    num_boxes = num_boxes.clamp(min=1)

    predictions = [outputs.logits.float()]  # all of them, with or without a target
    pairs = [_matched_pairs(outputs, targets, (matcher or match)(outputs, targets))]
    if outputs.dn_logits is not None:
        predictions.append(outputs.dn_logits.float())
        pairs.append(_denoising_pairs(outputs, targets))
    sums = _sums(predictions, pairs)

    matched = sums[0] / num_boxes  # (3, S)
    groups = {"": matched[:, -1]}
    if matched.shape[1] > 1:  # evaluation has the last layer only
        groups |= {"encoder_": matched[:, 0], "aux_": matched[:, 1:-1].sum(1)}
    if outputs.dn_logits is not None:
        groups["dn_"] = sums[1].sum(1) / (num_boxes * outputs.num_dn_groups)

    stacked = torch.stack(list(groups.values()))  # (groups, 3)
    vfl, l1, giou = stacked.sum(0)
    weighted = {
        "vfl_weighted": WEIGHT_VFL * vfl, "l1_weighted": WEIGHT_L1 * l1,
        "giou_weighted": WEIGHT_GIOU * giou,
    }
    terms = {"loss": sum(weighted.values()), **weighted}
    vfl, l1, giou = stacked[0]
    terms["last_layer"] = WEIGHT_VFL * vfl + WEIGHT_L1 * l1 + WEIGHT_GIOU * giou
    for prefix, group in zip(groups, stacked.detach(), strict=True):
        terms |= {prefix + name: t for name, t in zip(("vfl", "l1", "giou"), group, strict=True)}
    return terms


@torch.no_grad()
def match(outputs: Outputs, targets: Targets) -> Tensor:
    """The query that answers for each target: (S, B, M) int64, -1 for padding or none left.

    Costs are computed only between an image's queries and its own targets, for all layers at once,
    and cross to the host in one copy; padded slots say so by an infinite cost.
    """
    logits, boxes = outputs.logits.float(), outputs.boxes.float()
    S, B, Q, _ = logits.shape
    labels = targets.labels.clamp(min=0)[None, :, None].expand(S, B, Q, -1)
    x = logits.gather(-1, labels)  # (S, B, Q, M)
    p = x.sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** GAMMA * F.softplus(-x)
    negative = (1 - FOCAL_ALPHA) * p**GAMMA * F.softplus(x)
    l1 = (boxes[..., None, :] - targets.boxes[:, None]).abs().sum(-1)
    giou = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))
    cost = COST_CLASS * (positive - negative) + COST_L1 * l1 - COST_GIOU * giou
    # A diverged model's NaN must not stop the assignment: the loop reports it by the loss.
    cost = cost.nan_to_num(nan=1e9, posinf=1e9, neginf=1e9)
    cost = cost.masked_fill((targets.labels < 0)[:, None], torch.inf)

    cost = cost.transpose(2, 3).cpu().numpy()  # (S, B, M, Q), the step's one copy to the host
    exists = np.isfinite(cost[0, :, :, 0])  # (B, M)
    query = np.full(cost.shape[:3], -1)
    for b in range(B):
        slots = exists[b].nonzero()[0]
        for s in range(S):
            rows, columns = linear_sum_assignment(cost[s, b, slots])
            query[s, b, slots[rows]] = columns
    return torch.from_numpy(query).to(boxes.device, non_blocking=True)


def fixed_match(outputs: Outputs, targets: Targets) -> Tensor:
    """Query m for target m, in the shape of `match`: for dry runs on tensors without data."""
    S, _, Q, _ = outputs.logits.shape
    M = targets.labels.shape[1]
    query = torch.arange(M, device=targets.labels.device)
    return query.where((targets.labels >= 0) & (query < Q), -1).expand(S, -1, -1)


def expected_initial_vfl(
    num_queries: int, num_classes: int, num_boxes_per_image: float, prior: float = PRIOR
) -> tuple[float, float]:
    """(low, high) of one layer's VFL before the first step, from the prior alone.

    A negative costs alpha p^2 softplus(x), a match of IoU q costs q (softplus(x) - q x), where x is
    the prior's logit. The low end has no overlap, the high end IoU 0.6 at every match; both allow
    for logits spread by 0.6 around the prior, what the heads' random weights give.
    """
    x = math.log(prior / (1 - prior))
    softplus = -math.log(1 - prior)
    num_negatives = num_queries * num_classes - num_boxes_per_image
    negatives = num_negatives * VFL_ALPHA * prior**GAMMA * softplus / num_boxes_per_image
    # For small p the term is about p^3, so a normal spread of x multiplies its mean by this.
    spread = math.exp(0.5 * (3 * 0.6) ** 2)
    return negatives / spread, negatives * spread + 0.6 * (softplus - 0.6 * x)


class Pairs(NamedTuple):
    """Predictions of S layers beside the targets they answer for, P a layer."""

    logit: Tensor  # (S, P) at the target's class
    box: Tensor  # (S, P, 4) predicted
    target_box: Tensor  # (S, P, 4)
    exists: Tensor  # (S, P), false for padding


def _matched_pairs(outputs: Outputs, targets: Targets, query: Tensor) -> Pairs:
    """Queries beside their matched targets, P = B x M."""
    S, _, _, K = outputs.logits.shape
    exists = query >= 0  # (S, B, M)
    query = query.clamp(min=0)
    logit = outputs.logits.float().flatten(2).gather(2, query * K + targets.labels.clamp(min=0))
    box = outputs.boxes.float().gather(2, query.unsqueeze(-1).expand(-1, -1, -1, 4))
    target_box = targets.boxes.expand(S, -1, -1, -1)
    return Pairs(logit.flatten(1), box.flatten(1, 2), target_box.flatten(1, 2), exists.flatten(1))


def _denoising_pairs(outputs: Outputs, targets: Targets) -> Pairs:
    """Positive denoising queries, whose targets are known without matching; P = B x groups x M."""
    M = targets.labels.shape[1]
    groups = (outputs.num_dn_groups, 2, M)
    logits = outputs.dn_logits.float().unflatten(2, groups)[:, :, :, 0]  # (L, B, groups, M, K)
    box = outputs.dn_boxes.float().unflatten(2, groups)[:, :, :, 0]  # (L, B, groups, M, 4)
    shape = logits.shape[:4]
    labels = targets.labels.clamp(min=0)[:, None].expand(shape)
    logit = logits.gather(4, labels.unsqueeze(-1)).squeeze(-1)
    target_box = targets.boxes[:, None].expand(box.shape)
    exists = (targets.labels >= 0)[:, None].expand(shape)
    return Pairs(logit.flatten(1), box.flatten(1, 3), target_box.flatten(1, 3), exists.flatten(1))


def _sums(predictions: list[Tensor], pairs: list[Pairs]) -> list[Tensor]:
    """VFL, L1 and GIoU summed over all but the layers: a (3, S) for each group of predictions.

    Each predictions (S, B, Q, K) are charged as negatives, densely; those at a target's class are
    then charged the difference to a positive. So no (S, B, Q, K) tensor of targets or weights is
    ever made. The pairs of all groups and layers go through the same few operations at once.
    """
    logit, box, target_box, exists = (
        torch.cat([x.flatten(0, 1) for x in parts]) for parts in zip(*pairs, strict=True)
    )  # (S * P) of the first group, then of the second
    xyxy, target_xyxy = cxcywh_to_xyxy(box), cxcywh_to_xyxy(target_box)
    iou = elementwise_iou(xyxy.detach(), target_xyxy)  # VFL's target score q
    positive = iou * (F.softplus(logit) - iou * logit)  # q BCE(x, q)
    correction = positive - _negative_vfl(logit)
    l1 = (box - target_box).abs().sum(-1)
    giou = 1 - elementwise_giou(xyxy, target_xyxy)
    terms = torch.stack((correction, l1, giou)) * exists

    sizes = [group.logit.shape for group in pairs]
    terms = terms.split([S * P for S, P in sizes], dim=1)
    sums = [t.unflatten(1, size).sum(2) for t, size in zip(terms, sizes, strict=True)]
    negatives = [_negative_vfl(x).sum((1, 2, 3)) for x in predictions]  # (S) each
    return [x + F.pad(n[None], (0, 0, 0, 2)) for x, n in zip(sums, negatives, strict=True)]


def _negative_vfl(x: Tensor) -> Tensor:
    """alpha p^2 BCE(x, 0), the weight without a gradient."""
    return VFL_ALPHA * x.detach().sigmoid() ** GAMMA * F.softplus(x)
