"""Parameter groups by the type of module, and what the optimizer does with them."""

import pytest
import torch
from torch import nn

from lib.loops import optim
from lib.params import Optim


class Net(nn.Module):
    """Names that fool a rule by name: `downsample.1` is a norm, `bn_reduce` a convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.bn_reduce = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.GroupNorm(2, 4)])
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.head.weight


def names(model: nn.Module, params: list) -> set[str]:
    found = {id(weight): name for name, weight in model.named_parameters()}
    return {found[id(weight)] for weight in params}


def test_groups_go_by_the_type_of_module_not_by_its_name():
    """C10 of the failures: `'bn' in name` misses `downsample.1`."""
    model = Net()
    decayed, other = optim.param_groups(model, Optim(weight_decay=0.1, norm_weight_decay=0.01))
    assert names(model, decayed["params"]) == {
        "stem.weight", "downsample.0.weight", "bn_reduce.weight", "attention.in_proj_weight",
        "attention.out_proj.weight", "head.weight",
    }
    assert names(model, other["params"]) == {
        "stem.bias", "downsample.1.weight", "downsample.1.bias", "bn_reduce.bias",
        "norms.0.weight", "norms.0.bias", "norms.1.weight", "norms.1.bias",
        "attention.in_proj_bias", "attention.out_proj.bias", "embedding.weight", "token",
        "head.bias", "tied.bias",
    }
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.01)


def test_each_trainable_parameter_is_in_exactly_one_group_tied_ones_too():
    model = Net()
    grouped = [id(p) for group in optim.param_groups(model, Optim()) for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable


def test_the_table_counts_every_parameter_once():
    model = Net()
    rows = list(optim.group_rows(model, optim.param_groups(model, Optim(weight_decay=0.1))))
    assert [row[0] for row in rows] == ["conv and linear weights", "norms, biases, others",
                                        "frozen"]
    assert sum(row[2] for row in rows) == sum(p.numel() for p in model.parameters())
    assert [row[3:] for row in rows] == [(0.1, 1.0), (0.0, 1.0), (0.0, 0.0)]


class Detector(nn.Module):
    """A network with a backbone of its own, part of it frozen."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        self.backbone[2].requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


SHARED = Optim(backbone_lr=0.1, weight_decay=0.2, norm_weight_decay=0.01)


def test_the_backbone_forms_groups_of_its_own_where_its_rate_is_another():
    model = Detector()
    groups = {group["name"]: group for group in optim.param_groups(model, SHARED)}
    assert {name: (names(model, group["params"]), group["weight_decay"], group["lr_share"])
            for name, group in groups.items()} == {
        "conv and linear weights": ({"head.0.weight"}, 0.2, 1.0),
        "norms, biases, others": ({"head.0.bias", "head.1.weight", "head.1.bias"}, 0.01, 1.0),
        "backbone: conv and linear weights": ({"backbone.0.weight"}, 0.2, 0.1),
        "backbone: norms, biases, others": (
            {"backbone.0.bias", "backbone.1.weight", "backbone.1.bias"}, 0.01, 0.1),
    }
    rows = list(optim.group_rows(model, list(groups.values())))
    assert [row[4] for row in rows] == [1.0, 1.0, 0.1, 0.1, 0.0] and rows[-1][0] == "frozen"
    assert sum(row[2] for row in rows) == sum(p.numel() for p in model.parameters())


def test_with_the_same_rate_the_backbone_is_like_the_rest():
    groups = optim.param_groups(Detector(), Optim())
    assert [group["name"] for group in groups] == ["conv and linear weights",
                                                   "norms, biases, others"]
    assert all(group["lr_share"] == 1.0 for group in groups)


def test_groups_without_parameters_are_not_listed():
    model = Detector()
    model.backbone.requires_grad_(False)
    assert [group["name"] for group in optim.param_groups(model, SHARED)] == [
        "conv and linear weights", "norms, biases, others"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_each_group_moves_by_its_share_of_the_rate(name):
    """Every later call of `set_lr` keeps the shares, as the schedule calls it at each step."""
    model = Detector()
    settings = Optim(name=name, backbone_lr=0.25, momentum=0.0, weight_decay=0.0)
    optimizer = optim.build(optim.param_groups(model, settings), settings, lr=1.0)
    for lr in (0.5, 0.02):
        before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
        optim.set_lr(optimizer, lr)
        assert {group["lr"] for group in optimizer.param_groups} == {lr, 0.25 * lr}
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight) if weight.requires_grad else None
        optimizer.step()
        for key, weight in model.named_parameters():
            share = 0.25 if key.startswith("backbone.") else 1.0
            moved = -lr * share if weight.requires_grad else 0.0
            torch.testing.assert_close(weight - before[key], torch.full_like(weight, moved),
                                       rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_shrinks_the_weights_and_leaves_norms_and_biases(name):
    """With a gradient of zero, one step is decay alone: w (1 - lr d)."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    settings = Optim(name=name, weight_decay=0.5, momentum=0.0)
    optimizer = optim.build(optim.param_groups(model, settings), settings, lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for key, value in model.state_dict().items():
        shrunk = 0.95 if key == "0.weight" else 1.0
        torch.testing.assert_close(value, before[key] * shrunk, msg=key)
    assert not torch.equal(model[0].weight, before["0.weight"])


GRADS = [1.0, -2.0, 0.5, 3.0]


@pytest.mark.parametrize("momentum, nesterov", [(0.9, True), (0.9, False), (0.0, True)])
def test_sgd_is_the_textbooks_momentum(momentum, nesterov):
    weight, velocity, wanted = torch.zeros(1, requires_grad=True), 0.0, 0.0
    settings = Optim(name="sgd", momentum=momentum, nesterov=nesterov)
    optimizer = optim.build([{"params": [weight], "weight_decay": 0.0}], settings, lr=0.1)
    for gradient in GRADS:
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        velocity = momentum * velocity + gradient
        wanted -= 0.1 * (gradient + momentum * velocity if nesterov and momentum else velocity)
        assert weight.item() == pytest.approx(wanted, rel=1e-5)


def test_adamw_takes_both_betas():
    weight, settings = torch.zeros(1, requires_grad=True), Optim(momentum=0.8, beta2=0.95,
                                                                 name="adamw")
    optimizer = optim.build([{"params": [weight], "weight_decay": 0.0}], settings, lr=0.1)
    m, v, wanted = 0.0, 0.0, 0.0
    for n, gradient in enumerate(GRADS, 1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        wanted -= 0.1 * (m / (1 - 0.8**n)) / ((v / (1 - 0.95**n)) ** 0.5 + 1e-8)
        assert weight.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_first_step_that_fp16_skips_leaves_no_trace(name):
    """The usual start of an fp16 run; torch's fused SGD keeps raw memory as momentum there."""
    weights = [torch.ones(4096, requires_grad=True) for _ in range(2)]
    settings = Optim(name=name)
    plain, skipped = (
        optim.build([{"params": [weight], "weight_decay": 0.0}], settings, lr=0.1)
        for weight in weights
    )
    junk = [torch.full((4096,), 7e3) for _ in range(50)]
    del junk  # memory to be handed out again
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weights[1].grad = torch.full((4096,), float("inf"))
    scaler.scale(torch.ones(1))
    scaler.step(skipped)
    scaler.update()
    assert torch.equal(weights[1], torch.ones(4096))
    for gradient in GRADS:
        weights[0].grad = torch.full((4096,), gradient)
        plain.step()
        weights[1].grad = torch.full((4096,), gradient * scaler.get_scale())
        scaler.step(skipped)
        scaler.update()
    torch.testing.assert_close(weights[1], weights[0])



def test_a_model_without_norms_or_biases_builds():
    model = nn.Linear(2, 2, bias=False)
    optimizer = optim.build(optim.param_groups(model, Optim()), Optim(), lr=0.1)
    assert len(optimizer.param_groups) == 1
    optim.set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
