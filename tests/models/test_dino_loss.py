import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lib.models import dino_loss as L
from lib.models.dino import Outputs
from tests.models.test_dino import crops, make

torch.set_num_threads(1)

B, NUM_LOCAL, K = 6, 3, 40


def cosines(n: int, k: int = K, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, k, generator=generator) - 1


def probabilities(n: int, seed: int = 1) -> torch.Tensor:
    return (cosines(n, seed=seed) / 0.1).softmax(-1)


def naive_dino(logits, targets, num_crops):
    """DINO, algorithm 1: every teacher crop with every student crop but itself."""
    students, teachers = logits.unflatten(0, (num_crops, B)), targets.unflatten(0, (2, B))
    pairs = [
        -(teachers[i] * F.log_softmax(students[j] / 0.1, dim=-1)).sum(-1).mean()
        for i in range(2) for j in range(num_crops) if i != j
    ]
    return sum(pairs) / len(pairs)


# Terms


@pytest.mark.parametrize("num_local", [0, 1, NUM_LOCAL])
def test_dino_is_the_mean_over_pairs_of_different_crops(num_local):
    num_crops = 2 + num_local
    targets = probabilities(2 * B)
    ours, naive = (cosines(num_crops * B).requires_grad_() for _ in range(2))
    loss, expected = L.dino(ours, targets), naive_dino(naive, targets, num_crops)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, naive.grad)


def test_cross_entropy_agrees_with_autograd_and_keeps_no_table():
    logits, targets = cosines(3 * 5).view(3, 5, K), probabilities(5)
    ours, naive = (logits.clone().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ce = L.soft_cross_entropy(ours, targets, 0.1)
    assert sorted(t.numel() for t in kept) == [15, 5 * K, 15 * K]  # logsumexp beside the inputs
    expected = -(targets * F.log_softmax(naive / 0.1, dim=-1)).sum(-1)
    torch.testing.assert_close(ce, expected)
    weights = torch.randn(3, 5)
    (ce * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad)
    assert not targets.requires_grad


def test_cross_entropy_is_fp32_under_autocast():
    logits, targets = cosines(20).view(1, 20, K), probabilities(20)
    exact = L.soft_cross_entropy(logits, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(L.soft_cross_entropy(logits, targets), exact)
    half = logits.bfloat16().requires_grad_()
    ce = L.soft_cross_entropy(half, targets)
    ce.sum().backward()
    assert ce.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ce, L.soft_cross_entropy(half.detach().float(), targets))


def test_ibot_weighs_images_evenly_whatever_they_hide():
    logits, targets = cosines(5), probabilities(5)
    per_image = [[0], [1, 2, 3, 4]]  # and two images without a mask
    ce = -(targets * F.log_softmax(logits / 0.1, dim=-1)).sum(-1)
    expected = sum(ce[rows].mean() for rows in per_image) / 4
    weights = torch.tensor([1 / 4] + 4 * [1 / 16])
    torch.testing.assert_close(L.ibot(logits, targets, weights), expected)
    assert L.ibot(logits[:0], targets[:0], weights[:0]) == 0


def test_koleo_is_the_log_distance_to_the_nearest_neighbour():
    x = torch.randn(2, 7, 5, requires_grad=True)
    unit = x.detach().numpy() / np.linalg.norm(x.detach().numpy(), axis=-1, keepdims=True)
    expected = 0.0
    for group in unit:
        distance = np.linalg.norm(group[:, None] - group[None], axis=-1) + 10 * np.eye(7)
        expected -= np.log(distance.min(1)).mean()
    koleo = L.koleo(x)
    assert koleo.item() == pytest.approx(expected, rel=1e-5)
    koleo.backward()
    step = 1e-3 * x.grad / x.grad.norm()
    assert L.koleo((x - step).detach()) < koleo  # its gradient spreads


def test_koleo_of_equal_features_is_finite_and_one_sample_has_no_neighbour():
    x = torch.ones(1, 4, 3, requires_grad=True)
    L.koleo(x).backward()
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match="two samples"):
        L.koleo(torch.randn(2, 1, 5))


def outputs(n: int, seed: int) -> Outputs:
    return Outputs(torch.randn(n, 16), cosines(n, seed=seed), cosines(5, seed=seed + 1))


def test_losses_are_the_weighted_sum_of_their_terms():
    student, teacher = outputs(5 * B, 0), outputs(2 * B, 7)
    patch_weights = torch.full((5,), 0.02)
    terms = L.losses(student, teacher, L.Weights(1.0, 0.5, 0.1), 0.04, patch_weights)
    targets = L.sinkhorn_knopp(teacher.logits, 0.04)
    patch_targets = L.sinkhorn_knopp(teacher.patch_logits, 0.04)
    assert terms["dino"] == L.dino(student.logits, targets)
    assert terms["ibot"] == L.ibot(student.patch_logits, patch_targets, patch_weights)
    first, second = student.features[:B], student.features[B : 2 * B]  # global crops only
    torch.testing.assert_close(
        terms["koleo"], L.koleo(first[None]) + L.koleo(second[None])
    )
    torch.testing.assert_close(
        terms["loss"], terms["dino"] + 0.5 * terms["ibot"] + 0.1 * terms["koleo"]
    )
    assert terms["teacher_entropy"] == pytest.approx(-(targets * targets.log()).sum(-1).mean())
    only = L.losses(student, teacher, L.Weights(1.0, 0.0, 0.0), 0.04)
    assert only.keys() == {"loss", "dino", "teacher_entropy"}


# The teacher's targets


def test_sinkhorn_fills_prototypes_evenly_and_samples_fully():
    q = L.sinkhorn_knopp(cosines(64), 0.05, num_iterations=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((K,), 64 / K), rtol=1e-3, atol=0)
    few = L.sinkhorn_knopp(cosines(64), 0.05)
    torch.testing.assert_close(few.sum(1), torch.ones(64))  # rows last, whatever the iterations


def test_sinkhorn_is_the_published_algorithm():
    """SwAV, listing 1, in double precision."""
    scores = cosines(12).double().numpy()
    q = np.exp(scores / 0.05).T  # (K, N)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * K
        q /= q.sum(0, keepdims=True) * 12
    ours = L.sinkhorn_knopp(torch.from_numpy(scores), 0.05)
    np.testing.assert_allclose(ours.numpy(), (q * 12).T, rtol=1e-4, atol=1e-7)


def test_sinkhorn_does_not_overflow_and_takes_no_rows():
    scores = 100 * cosines(12)
    q = L.sinkhorn_knopp(scores, 0.05)
    assert q.isfinite().all()
    torch.testing.assert_close(L.sinkhorn_knopp(cosines(12) + 1000, 1.0),
                               L.sinkhorn_knopp(cosines(12), 1.0), rtol=1e-3, atol=1e-6)
    assert L.sinkhorn_knopp(cosines(0), 0.05).shape == (0, K)


def test_centering_takes_the_center_off_and_follows_only_where_gradients_are_on():
    student, teacher = outputs(5 * B, 0), outputs(2 * B, 7)
    center, patch_center = 0.1 * torch.randn(K), 0.1 * torch.randn(K)
    before = center.clone(), patch_center.clone()
    expected = ((teacher.logits - before[0]) / 0.04).softmax(-1)
    with torch.no_grad():
        L.losses(student, teacher, L.Weights(), 0.04, torch.ones(5), (center, patch_center))
    assert torch.equal(center, before[0])
    terms = L.losses(student, teacher, L.Weights(), 0.04, torch.ones(5), (center, patch_center))
    torch.testing.assert_close(terms["dino"], L.dino(student.logits, expected))
    torch.testing.assert_close(center, 0.9 * before[0] + 0.1 * teacher.logits.mean(0))
    torch.testing.assert_close(patch_center, 0.9 * before[1] + 0.1 * teacher.patch_logits.mean(0))


def _rank(rank: int, rendezvous: str, num_rows: list[int], results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mine = cosines(sum(num_rows)).split(num_rows)[rank]
    center = torch.zeros(K)
    L.follow_center(center, mine)
    results.put((rank, L.sinkhorn_knopp(mine, 0.05).numpy(), center.numpy()))
    dist.destroy_process_group()


def test_two_processes_assign_and_center_as_one(tmp_path):
    num_rows = [4, 9]  # masked patches differ in number
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path / "store"), num_rows, results))
             for r in range(2)]
    for process in ranks:
        process.start()
    got = sorted((results.get() for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join()
    scores = cosines(13)
    together = np.concatenate([q for _, q, _ in got])
    np.testing.assert_allclose(together, L.sinkhorn_knopp(scores, 0.05), rtol=1e-4, atol=1e-7)
    alone = L.sinkhorn_knopp(scores[:4], 0.05).numpy()
    assert np.abs(together[:4] - alone).max() > 1e-2
    for _, _, center in got:
        np.testing.assert_allclose(center, 0.1 * scores.mean(0), rtol=1e-4, atol=1e-7)


# Schedules and the start


def test_schedules():
    assert [L.linear(s, 4, 0.04, 0.08) for s in (0, 2, 4, 9)] == pytest.approx(
        [0.04, 0.06, 0.08, 0.08])
    assert L.linear(0, 0, 0.04, 0.07) == 0.07
    momentum = [L.cosine(s, 101, 0.996, 1.0) for s in range(101)]
    assert momentum[0] == pytest.approx(0.996) and momentum[-1] == 1
    assert momentum[50] == pytest.approx(0.998) and momentum == sorted(momentum)
    lr = [L.cosine(s, 100, 2.0, 0.1, warmup_steps=10) for s in range(100)]
    assert lr[0] == 0 and lr[5] == 1 and lr[10] == max(lr) == 2 and lr[-1] == pytest.approx(0.1)
    assert L.cosine(500, 100, 2.0, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("centering", [False, True])
@pytest.mark.parametrize("num_prototypes", [64, 4096])
def test_a_random_network_starts_where_theory_says(num_prototypes, centering):
    for seed in range(3):
        model = make(seed=seed, num_prototypes=num_prototypes, bottleneck_dim=64)
        masked = torch.arange(0, 2 * 8 * 16, 32) + torch.arange(8) % 16  # every second image
        weights = torch.full((8,), 1 / 16)
        with torch.no_grad():
            student, teacher = model([crops(16), crops(24, 16)], masked)
            centers = (model.center, model.patch_center) if centering else None
            terms = L.losses(student, teacher, L.Weights(), 0.07, weights, centers)
        expected = L.expected_initial(num_prototypes, num_prototypes, 8, 0.5, 0.07, 64)
        for name, (low, high) in expected.items():
            assert low <= terms[name] <= high, (name, terms[name], low, high)
        low, high = expected["dino"]
        assert low < math.log(num_prototypes) < high and high - low < 5  # not empty talk


def test_the_expected_range_is_narrow_where_it_matters():
    low, high = L.expected_initial(65536, 65536, 80, 0.5, 0.04)["dino"]
    assert math.log(65536) - 0.9 < low < high < math.log(65536) + 0.25


def test_koleo_reaches_its_bound_at_a_simplex():
    corners = torch.eye(8) - 1 / 8
    low, high = L.expected_initial(9, 9, 8, 0.5, 0.04)["koleo"]
    assert L.koleo(corners.expand(2, 8, 8)).item() == pytest.approx(low, rel=1e-5)
    assert L.koleo(torch.ones(2, 8, 8)).item() == pytest.approx(high)


# Beside lightly


def test_losses_agree_with_lightly():
    pytest.importorskip("lightly")
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

    logits, teacher = cosines(5 * B), cosines(2 * B, seed=3)
    theirs = DINOLoss(K, teacher_temp=0.04, student_temp=0.1)
    center = 0.1 * torch.randn(K)
    theirs.center.data = center[None, None].clone()
    expected = theirs(list(teacher.split(B)), list(logits.split(B)))
    ours = L.dino(logits, L.teacher_targets(teacher, 0.04, center))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
    L.follow_center(center, teacher)
    torch.testing.assert_close(center, theirs.center.flatten())

    from lib.datasets.multicrop import masked_patches, plan_masks

    masks = plan_masks(6, 6, 0.5, (0.1, 0.5), 0, 0, range(B), B).flatten(0, 1)
    indices, weights = masked_patches(masks)
    logits, teacher = cosines(len(indices)), cosines(len(indices), seed=3)
    expected = IBOTPatchLoss(K, teacher_temp=0.04)(teacher, logits, masks)
    ours = L.ibot(logits, L.teacher_targets(teacher, 0.04, torch.zeros(K)), weights)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)

    x = torch.randn(B, 16)
    torch.testing.assert_close(L.koleo(x[None]), KoLeoLoss()(x), rtol=1e-5, atol=0)
