"""The losses of DINO, iBOT and KoLeo, the teacher's targets and the schedules.

Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Caron et al. 2020 (SwAV, Sinkhorn-Knopp),
Sablayrolles et al. 2019 (KoLeo); put together, and weighted, as in DINOv2 (Oquab et al. 2024).

Shapes: 2 global and L local crops of B samples, K prototypes, M masked patches, h x w patches an
image. Terms are means over a process's own samples, so their mean over processes is that of the
global batch; KoLeo alone looks at one process's samples together, as published.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lib.models.dino import Outputs

STUDENT_TEMPERATURE = 0.1
CENTER_MOMENTUM = 0.9
SINKHORN_ITERATIONS = 3
KOLEO_EPS = 1e-8


class Weights(NamedTuple):
    """Weights of the terms; 0 leaves a term out."""

    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1


def losses(
    student: Outputs,
    teacher: Outputs,
    weights: Weights,
    teacher_temperature: float,
    patch_weights: Tensor | None = None,
    centers: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Named terms, all 0-d float32; `loss`, their weighted sum, is the one to call backward on.

    student: of 2 B global and L B local crops; teacher: of the same 2 B global crops.
    patch_weights: (M,) of `multicrop.masked_patches`, for iBOT. centers: (K,), (K',), to center the
    teacher and follow it in place wherever gradients are on; None runs Sinkhorn-Knopp.
    teacher_entropy (nats) is DINO's floor: near ln K the teacher says nothing, near 0 it sees a
    single prototype in each crop.
    """
    center, patch_center = centers or (None, None)
    targets = teacher_targets(teacher.logits, teacher_temperature, center)
    terms = {"dino": dino(student.logits, targets)}
    loss = weights.dino * terms["dino"]
    if weights.ibot:
        patch_targets = teacher_targets(teacher.patch_logits, teacher_temperature, patch_center)
        terms["ibot"] = ibot(student.patch_logits, patch_targets, patch_weights)
        loss = loss + weights.ibot * terms["ibot"]
    if weights.koleo:
        terms["koleo"] = koleo(student.features[: len(targets)].unflatten(0, (2, -1)))
        loss = loss + weights.koleo * terms["koleo"]
    if centers is not None and torch.is_grad_enabled():  # looking at a loss changes nothing
        follow_center(center, teacher.logits)
        if weights.ibot:
            follow_center(patch_center, teacher.patch_logits)
    entropy = torch.special.entr(targets).sum(-1).mean()
    return {"loss": loss} | {k: t.detach() for k, t in terms.items()} | {"teacher_entropy": entropy}


# --------------------------------------------------------------------------------------------
# Terms
# --------------------------------------------------------------------------------------------


def dino(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each student crop with the teacher's other global crops (DINO, equation 3).

    logits: (2 B + L B, K), crop the slow index. targets: (2 B, K), rows summing to 1. The mean over
    the 2 + 2 L pairs of crops and the samples, nats.
    """
    num_global = len(targets)  # 2 B
    B = num_global // 2
    own, local = logits.split((num_global, len(logits) - num_global))
    first, second = targets.split(B)
    ce_global = soft_cross_entropy(own.unsqueeze(0), torch.cat((second, first)))  # (1, 2 B)
    # Both teachers at once: the cross-entropy is linear in its target.
    ce_local = soft_cross_entropy(local.unflatten(0, (-1, B)), 0.5 * (first + second))  # (L, B)
    num_pairs = 2 + 2 * len(ce_local)
    return (ce_global.sum() + 2 * ce_local.sum()) / (num_pairs * B)


def ibot(logits: Tensor, targets: Tensor, patch_weights: Tensor) -> Tensor:
    """Cross-entropy at the masked patches (iBOT, equation 2), nats.

    logits, targets: (M, K). patch_weights: (M,), of an image 1 / (images x its masked patches).
    Images without a mask count with 0, as in DINOv2, so its value near the start is the share of
    masked images times ln K.
    """
    return (soft_cross_entropy(logits.unsqueeze(0), targets)[0] * patch_weights).sum()


def koleo(features: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour on the unit sphere, summed over groups.

    features: (G, B, D); neighbours are sought within a group, so that two crops of one image are
    none (Sablayrolles et al. 2019, equation 2; DINOv2 sums over its two global crops).

    Raises ValueError: B < 2.
    """
    if features.shape[1] < 2:
        raise ValueError("KoLeo needs two samples a process: a larger batch, or weight 0")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=KOLEO_EPS)
        with torch.no_grad():
            cosine = x @ x.transpose(1, 2)  # (G, B, B)
            cosine.diagonal(dim1=1, dim2=2).fill_(-2)
            nearest = cosine.argmax(-1, keepdim=True).expand_as(x)
        distance = (x - x.gather(1, nearest)).norm(dim=-1)
    return -(distance + KOLEO_EPS).log().mean(-1).sum()


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, temperature: float = STUDENT_TEMPERATURE
) -> Tensor:
    """-sum_k t_k log softmax(x / temperature)_k in fp32: (S, N, K), (N, K) -> (S, N).

    Rows of `targets` sum to 1 and get no gradient. Besides its inputs only the logsumexp (S, N) is
    kept for backward, where autograd would keep an (S, N, K) of log-probabilities.
    """
    return _SoftCrossEntropy.apply(logits, targets, temperature)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            x = logits.float() / temperature
            logsumexp = x.logsumexp(-1)
            expected = torch.einsum("snk,nk->sn", x, targets)
        ctx.save_for_backward(logits, targets, logsumexp)
        ctx.temperature = temperature
        return logsumexp - expected

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, logsumexp = ctx.saved_tensors
        x = logits.float() / ctx.temperature
        p = x.sub_(logsumexp.unsqueeze(-1)).exp_()
        grad_logits = p.sub_(targets).mul_((grad / ctx.temperature).unsqueeze(-1))
        return grad_logits.to(logits.dtype), None, None


# --------------------------------------------------------------------------------------------
# The teacher's targets
# --------------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_targets(logits: Tensor, temperature: float, center: Tensor | None) -> Tensor:
    """Probabilities (N, K) in fp32: by Sinkhorn-Knopp, or less the center (K,) where there is one.
    """
    if center is None:
        return sinkhorn_knopp(logits, temperature)
    return ((logits.float() - center) / temperature).softmax(-1)


@torch.no_grad()
def follow_center(center: Tensor, logits: Tensor, momentum: float = CENTER_MOMENTUM) -> None:
    """center <- momentum center + (1 - momentum) mean of the logits of all processes, in place.

    center: (K,). logits: (N, K). DINO, equation 4.
    """
    total = torch.cat((logits.float().sum(0), logits.new_tensor([len(logits)], dtype=torch.float)))
    total = _sum_over_processes(total)
    center.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - momentum)


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temperature: float, num_iterations: int = SINKHORN_ITERATIONS
) -> Tensor:
    """Assign samples to prototypes, evenly over all processes: (N, K) to probabilities (N, K).

    SwAV, section 3.1: scale exp(logits / temperature) in turn so that each prototype has as much
    as any other and each sample has 1; samples last, so rows sum to 1 whatever the iterations.
    """
    x = logits.float() / temperature
    # One maximum of all: any other shift would weigh samples differently. Without it exp overflows.
    largest = x.max() if x.numel() else x.new_tensor(-torch.inf)
    if _is_distributed():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    q = (x - largest).exp_()
    tiny = torch.finfo(q.dtype).tiny  # a prototype that no sample is near stays at 0
    for _ in range(num_iterations):
        q /= _sum_over_processes(q.sum(0)).clamp_(min=tiny)
        q /= q.sum(1, keepdim=True).clamp_(min=tiny)
    return q


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(x: Tensor) -> Tensor:
    if _is_distributed():
        dist.all_reduce(x)
    return x


# --------------------------------------------------------------------------------------------
# Schedules and the start
# --------------------------------------------------------------------------------------------


def linear(step: int, num_steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `num_steps`, which then stays: teacher temperature."""
    return end if step >= num_steps else start + (end - start) * step / num_steps


def cosine(step: int, num_steps: int, start: float, end: float, warmup_steps: int = 0) -> float:
    """Half a cosine from `start` to `end`, reached at the last of `num_steps`; from 0 up before it.

    Momentum 0.996 to 1, weight decay 0.04 to 0.2, and with a warm-up the learning rate.
    """
    if step < warmup_steps:
        return start * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def expected_initial(
    num_prototypes: int,
    num_patch_prototypes: int,
    batch_size: int,
    mask_share: float,
    teacher_temperature: float,
    bottleneck_dim: int = 256,
) -> dict[str, tuple[float, float]]:
    """(low, high) of each term before the first step; `batch_size` is that of one process.

    Cosines of random unit vectors in d dimensions have deviation 1 / sqrt(d), so logits deviate by
    s = 1 / (sqrt(d) tau) and the student's logsumexp is ln K + s^2 / 2. From it goes the student's
    logit expected under the teacher: 0 where the two see nothing in common (Sinkhorn-Knopp on
    features that are alike), s_student s_teacher where they see the same (centering), and no more
    than the largest of K normal numbers. Chance adds what a mean over K prototypes spreads by, over
    K / exp(s_teacher^2) where the teacher weighs them, at most one deviation. With 65,536
    prototypes and a bottleneck of 256 this is ln K - 0.8 to ln K + 0.2.
    KoLeo's distances are at most those of a simplex of B corners and at least 0.
    """
    s_student, s_teacher = (
        1 / (math.sqrt(bottleneck_dim) * t) for t in (STUDENT_TEMPERATURE, teacher_temperature)
    )

    def cross_entropy(K: int) -> tuple[float, float]:
        high = math.log(K) + 0.5 * s_student**2
        most = s_student * min(s_teacher, math.sqrt(2 * math.log(K)))
        chance = s_student * min(1, 3 * math.sqrt((1 + math.exp(s_teacher**2)) / K))
        return high - most - chance, high + chance

    low, high = cross_entropy(num_patch_prototypes)
    simplex = math.sqrt(2 * batch_size / (batch_size - 1))
    return {
        "dino": cross_entropy(num_prototypes),
        "ibot": (mask_share * low, mask_share * high),
        "koleo": (-2 * math.log(simplex), -2 * math.log(KOLEO_EPS)),
    }
