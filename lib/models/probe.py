"""What features are worth without training a network on them, and whether they have collapsed.

Features are (N, D) floats, one row an image; labels (N,) int64. All run on the features' device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH = 1024  # queries at a time


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of `features` whose nearest training features vote for their label.

    The k nearest by cosine vote with weight exp(cosine / temperature) (Wu et al. 2018, section
    3.4; DINO's k-NN protocol). k is cut to the number of training features.
    """
    bank = F.normalize(train_features.float(), dim=1)
    queries = F.normalize(features.float(), dim=1)
    num_classes = int(torch.maximum(train_labels.max(), labels.max())) + 1
    correct = 0
    for query, label in zip(queries.split(BATCH), labels.split(BATCH), strict=True):
        cosine, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)  # (b, k)
        # Less the largest, so that exp cannot overflow at a small temperature.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(query), num_classes)
        votes.scatter_add_(1, train_labels[nearest], weights)
        correct += int((votes.argmax(1) == label).sum())
    return correct / len(labels)


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    ridge: float = 1e-3,
) -> float:
    """Accuracy of the ridge regression from standardized features to one-hot labels, closed form.

    `ridge` is the penalty as a share of the features' variance. Less exact than a logistic
    regression tuned for long, but without a learning rate, and the same on every run.
    """
    mean, std = train_features.double().mean(0), train_features.double().std(0).clamp(min=1e-8)
    x, query = ((f.double() - mean) / std for f in (train_features, features))
    num_classes = int(torch.maximum(train_labels.max(), labels.max())) + 1
    y = F.one_hot(train_labels, num_classes).double()
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))  # (D, classes)
    return ((query @ weight + y.mean(0)).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Mean deviation of a unit-length feature's entries times sqrt(D): 1 is isotropic, 0 collapsed.

    Chen and He 2021 (SimSiam), figure 2.
    """
    x = F.normalize(features.float(), dim=1)
    return (x.std(0, correction=0).mean() * x.shape[1] ** 0.5).item()


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum, from 1 to min(N, D).

    Roy and Vetterli 2007, definition 1, of the features less their mean: how many directions the
    images differ in. Features that are all the same have rank 1.
    """
    x = features.double()
    values = torch.linalg.svdvals(x - x.mean(0))
    if values[0] <= 1e-9 * x.norm():  # nothing but rounding
        return 1.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


@torch.no_grad()
def channel_agreement(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine between channels a and b of one field, and of different fields: (C, C) each.

    features: (C, N, D), each field's channels embedded one by one, N > 1. Channels agree by as much
    as the first exceeds the second; features that are all alike have both at 1.
    """
    x = F.normalize(features.float(), dim=-1)
    C, N, D = x.shape
    same = torch.einsum("and,bnd->ab", x, x) / N
    total = x.sum(1) @ x.sum(1).T  # (C, C) over all pairs of fields
    return same, (total - N * same) / (N * (N - 1))
