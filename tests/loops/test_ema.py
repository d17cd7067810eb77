"""The moving average against its closed form, with warm-up, buffers and what is left at the end."""

import pytest
import torch
from torch import nn

from lib.loops.ema import Ema
from lib.params import Ema as EmaParams


def model_of(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fill(model, value)
    return model


@torch.no_grad()
def fill(model: nn.Module, value: float) -> None:
    for tensor in model.state_dict().values():
        tensor.fill_(value)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_closed_form_buffers_included(warmup):
    """e_n = d_n e + (1 - d_n) w over ten updates, for weights and running statistics alike."""
    model = model_of(5.0)
    ema, wanted = Ema(model, EmaParams(decay=0.8, warmup=warmup)), 5.0
    for n in range(10):
        fill(model, float(n * n))
        ema.update(n)
        decay = min(0.8, (1 + n) / (10 + n)) if warmup else 0.8
        wanted = decay * wanted + (1 - decay) * n * n
        for name, tensor in ema.model.state_dict().items():
            if name.endswith("num_batches_tracked"):  # counts are copied
                assert tensor.item() == n * n
            else:
                torch.testing.assert_close(tensor, torch.full_like(tensor, wanted), msg=name)
    assert {"1.running_mean", "1.running_var"} < ema.model.state_dict().keys()


def test_warm_up_starts_short_and_ends_at_the_decay():
    ema = Ema(nn.Identity(), EmaParams(decay=0.98))
    assert ema.decay_at(0) == pytest.approx(0.1)
    decays = [ema.decay_at(update) for update in range(600)]
    assert decays == sorted(decays) and decays[439] < 0.98 == decays[441] == decays[-1]
    assert Ema(nn.Identity(), EmaParams(decay=0.98, warmup=False)).decay_at(0) == 0.98


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("updates", [0, 1, 37])
def test_the_initial_share_is_what_is_really_left_of_the_initial_weights(warmup, updates):
    """C8 of the failures: 61 % initial weights at the end of the run."""
    model = model_of(1.0)
    ema = Ema(model, EmaParams(decay=0.95, warmup=warmup))
    fill(model, 0.0)
    for update in range(updates):
        ema.update(update)
    left = ema.model[0].weight.mean().item()
    assert ema.initial_share(updates) == pytest.approx(left, rel=1e-4)


def test_the_share_of_the_failure_on_record():
    """Decay .9999 every 10 steps over 49,430 steps left 61 %: 4,943 updates."""
    ema = Ema(nn.Identity(), EmaParams(decay=0.9999, warmup=False))
    assert ema.initial_share(4943) == pytest.approx(0.61, abs=0.005)


def test_the_average_is_a_network_of_its_own():
    """Training the network leaves it alone until the next update; it is never trained."""
    model = model_of(1.0)
    ema = Ema(model.train(), EmaParams(decay=0.5))
    fill(model, 9.0)
    assert ema.model[0].weight.eq(1).all()
    assert not ema.model.training and model.training
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_average_follows_on_after_its_weights_were_loaded():
    """As resume does: loading must not cut it off from the tensors it updates."""
    model = model_of(0.0)
    ema = Ema(model, EmaParams(decay=0.5, warmup=False))
    ema.model.load_state_dict(model_of(8.0).state_dict())
    model.load_state_dict(model_of(2.0).state_dict())
    ema.update(0)
    assert ema.model[0].weight.eq(5).all() and ema.model[1].running_var.eq(5).all()


def test_a_weight_used_twice_is_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    fill(model, 0.0)
    ema = Ema(model, EmaParams(decay=0.5, warmup=False))
    fill(model, 8.0)
    ema.update(0)
    assert ema.model[0].weight.eq(4).all() and ema.model[1].weight is ema.model[0].weight
