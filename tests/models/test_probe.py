import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.models import probe

torch.set_num_threads(1)


def clusters(n: int, num_classes: int = 4, dim: int = 16, spread: float = 0.3, seed: int = 0):
    """Features around one direction a class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.eye(dim)[:num_classes]
    labels = torch.arange(n) % num_classes
    return centers[labels] + spread * torch.randn(n, dim, generator=generator), labels


def test_knn_is_the_published_vote():
    """DINO's eval_knn, sample by sample."""
    train, train_labels = clusters(60, spread=0.8)
    test, labels = clusters(40, spread=0.8, seed=1)
    correct = 0
    for x, label in zip(test, labels, strict=True):
        cosine = F.cosine_similarity(x[None], train).numpy()
        votes = np.zeros(4)
        for i in np.argsort(-cosine)[:7]:
            votes[train_labels[i]] += np.exp(cosine[i] / 0.07)
        correct += votes.argmax() == label
    expected = correct / 40
    assert 0.3 < expected < 1  # or it would agree by chance
    assert probe.knn_accuracy(train, train_labels, test, labels, k=7) == pytest.approx(expected)


def test_knn_weighs_near_neighbours_more():
    train = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, 1.0]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]])
    assert probe.knn_accuracy(train, labels, query, torch.tensor([0]), k=3) == 1
    assert probe.knn_accuracy(train, labels, query, torch.tensor([0]), k=3, temperature=100.0) == 0
    assert probe.knn_accuracy(train, labels, query, torch.tensor([0]), 3, temperature=1e-3) == 1


def test_knn_does_not_depend_on_length_batches_or_a_small_bank(monkeypatch):
    train, train_labels = clusters(60, spread=0.8)
    test, labels = clusters(40, spread=0.8, seed=1)
    expected = probe.knn_accuracy(train, train_labels, test, labels)
    assert probe.knn_accuracy(5 * train, train_labels, 0.1 * test, labels) == expected
    monkeypatch.setattr(probe, "BATCH", 7)
    assert probe.knn_accuracy(train, train_labels, test, labels) == expected
    assert probe.knn_accuracy(train[:3], train_labels[:3], test, labels) > 0  # k is cut


def test_linear_probe_solves_what_a_line_can():
    train, train_labels = clusters(400)
    test, labels = clusters(200, seed=1)
    assert probe.linear_probe(train, train_labels, test, labels) > 0.9
    shift, scale = torch.randn(16), torch.ones(16)  # standardized, so neither matters
    scale[:4] = 1e-4  # of what tells the classes apart
    same = probe.linear_probe(train * scale + shift, train_labels, test * scale + shift, labels)
    assert same == pytest.approx(probe.linear_probe(train, train_labels, test, labels), abs=0.01)
    shuffled = train_labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert probe.linear_probe(train, shuffled, test, labels) < 0.5
    constant = torch.cat((train, torch.ones(400, 1)), 1), torch.cat((test, torch.ones(200, 1)), 1)
    assert probe.linear_probe(constant[0], train_labels, constant[1], labels) > 0.9


def test_feature_std_is_one_for_directions_at_random_and_zero_for_one_direction():
    assert probe.feature_std(torch.randn(4000, 64)) == pytest.approx(1, abs=0.02)
    assert probe.feature_std(torch.randn(1, 64) * torch.rand(50, 1)) == pytest.approx(0, abs=1e-3)


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(32, 5)).Q  # (32, 5)
    x = torch.linalg.qr(torch.randn(200, 5) - torch.randn(200, 5).mean(0)).Q
    x = torch.linalg.qr(x - x.mean(0)).Q  # orthonormal columns without a mean
    x = torch.linalg.qr(torch.cat((torch.ones(200, 1), x), 1)).Q[:, 1:]
    assert probe.effective_rank(x @ basis.T + 7) == pytest.approx(5, abs=1e-3)
    weights = torch.tensor([8.0, 4, 2, 1, 1]) / 16  # singular values in these shares
    expected = torch.exp(-(weights * weights.log()).sum()).item()
    assert probe.effective_rank((x * weights) @ basis.T) == pytest.approx(expected, rel=1e-4)
    assert probe.effective_rank(torch.ones(50, 32) * 3.3) == 1


def test_channel_agreement_of_same_and_different_fields():
    features = torch.randn(3, 6, 8)
    same, different = probe.channel_agreement(features)
    unit = F.normalize(features, dim=-1)
    for a in range(3):
        for b in range(3):
            cosine = unit[a] @ unit[b].T  # (fields, fields)
            assert same[a, b].item() == pytest.approx(cosine.diagonal().mean().item(), abs=1e-5)
            off = cosine[~torch.eye(6, dtype=torch.bool)].mean().item()
            assert different[a, b].item() == pytest.approx(off, abs=1e-5)
    torch.testing.assert_close(same.diagonal(), torch.ones(3))
    alike = probe.channel_agreement(torch.ones(3, 6, 8))
    torch.testing.assert_close(alike[0], alike[1])
