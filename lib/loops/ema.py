"""Exponential moving average of a network's weights and buffers (Polyak and Juditsky 1992)."""

import copy

import torch
from torch import nn

from lib import params


class Ema:
    """A second copy of the network that follows the first with decay d: e <- d e + (1 - d) w.

    Float buffers (running statistics) are averaged over the same horizon as the weights they
    belong to; other buffers are copied.
    """

    def __init__(self, model: nn.Module, ema: params.Ema):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = ema.decay, ema.warmup
        own, followed = self.model.state_dict(), model.state_dict()
        # One name a tensor: a weight used under two names must not be moved twice.
        named = {id(t): name for name, t in self.model.state_dict(keep_vars=True).items()}.values()
        averaged = [name for name in named if own[name].is_floating_point()]
        copied = [name for name in named if name not in averaged]
        self._averaged = [own[name] for name in averaged], [followed[name] for name in averaged]
        self._copied = [own[name] for name in copied], [followed[name] for name in copied]

    def decay_at(self, update: int) -> float:
        """Decay of optimizer update `update`, from 0; a short horizon at first (TensorFlow's)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Follow the network after optimizer update `update`."""
        torch._foreach_lerp_(*self._averaged, 1 - self.decay_at(update))
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    def initial_share(self, num_updates: int) -> float:
        """Share of the initial weights that is left after `num_updates`."""
        share = 1.0
        for update in range(num_updates):
            share *= self.decay_at(update)
            if share < 1e-12:
                break
        return share
