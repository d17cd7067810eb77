"""The optimizer and its parameter groups."""

from collections.abc import Iterator

import torch
from torch import nn

from lib.params import Optim

DECAYED = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def param_groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Weights of convolutions and linear layers decay; all else decays less or not.

    By the type of the module that owns a parameter, never by its name: `'bn' in name` misses
    `downsample.1`. With `optim.backbone_lr` what lies below `model.backbone` forms groups of its
    own, of that share of the LR. Each trainable parameter is in exactly one group.
    """
    backbone = set(model.backbone.modules()) if optim.backbone_lr != 1 else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue  # frozen, or tied to one that is in a group already
            seen.add(id(parameter))
            is_weight = isinstance(module, DECAYED) and name.endswith("weight")
            groups.setdefault((module in backbone, not is_weight), []).append(parameter)
    return [
        {
            "name": ("backbone: " if in_backbone else "")
            + ("norms, biases, others" if is_other else "conv and linear weights"),
            "params": parameters,
            "weight_decay": optim.norm_weight_decay if is_other else optim.weight_decay,
            "lr_share": optim.backbone_lr if in_backbone else 1.0,
        }
        for (in_backbone, is_other), parameters in sorted(groups.items())
    ]


def build(groups: list[dict], optim: Optim, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the params; `fused` runs each group in one kernel where there is one."""
    if optim.name == "sgd":
        nesterov = optim.nesterov and optim.momentum > 0
        sgd = torch.optim.SGD(groups, lr, momentum=optim.momentum, nesterov=nesterov, fused=True)
        if optim.momentum:  # torch leaves them as raw memory where fp16 skips the first step
            for parameter in (p for group in groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    betas = (optim.momentum, optim.beta2)
    return torch.optim.AdamW(groups, lr, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


def group_rows(
    model: nn.Module, groups: list[dict]
) -> Iterator[tuple[str, int, int, float, float]]:
    """Name, tensors, parameters, weight decay, share of the LR of each group and the frozen."""
    for group in groups:
        numel = sum(parameter.numel() for parameter in group["params"])
        yield (group["name"], len(group["params"]), numel, group["weight_decay"],
               group["lr_share"])
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if frozen:
        yield "frozen", len(frozen), sum(parameter.numel() for parameter in frozen), 0.0, 0.0
