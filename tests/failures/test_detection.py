"""Failures of detection that real projects lost days to: each injected, and seen named."""

import numpy as np
import pytest
import torch
from torch import nn

from lib.datasets import detection
from lib.params import ROOT
from lib.tasks.detect import Detect

MODELS = ("rtdetr", "yolo")


@pytest.fixture(params=MODELS)
def overfit(request, gate, scenes):
    """The overfit gate of a demo on a few scenes, cut short: memorising is not what is asked."""
    overrides = {
        "data.root": str(scenes), "data.train": "train", "data.val": "val", "data.num_workers": 0,
        "overfit.num_batches": 1, "overfit.batch_size": 4, "overfit.steps": 3,
    }
    return lambda: gate("overfit", ROOT / f"params/demo_{request.param}.yaml", overrides)


STARTS = {"rtdetr": ("initial_vfl", "initial_aux_vfl"), "yolo": ("initial_cls",)}
SOUND = ("boxes_normalized", "labels_in_range", "truth_scores_one", "gradients", "leakage")


def test_a_sound_network_and_sound_boxes_pass(overfit):
    checks = overfit()
    starts = [name for name in checks if name.startswith("initial_")]
    assert len(starts) >= 3
    for name in (*starts, *SOUND):
        assert checks[name]["passed"], checks[name]


def test_m1_a_missing_prior_bias_is_named(overfit, monkeypatch, request):
    build = Detect.network

    def without_bias(*arguments) -> nn.Module:
        model = build(*arguments)
        heads = getattr(model, "cls_heads", None) or [
            *model.decoder.dec_score_head, model.decoder.enc_score_head
        ]
        for head in heads:
            nn.init.zeros_(getattr(head, "predict", head).bias)
        return model

    monkeypatch.setattr(Detect, "network", staticmethod(without_bias))
    checks = overfit()
    failed = [check for name, check in checks.items()
              if name.startswith("initial_") and not check["passed"]]
    assert {check["id"] for check in failed} & {"initial_vfl", "initial_cls"}
    for check in failed:
        assert check["severity"] == "error" and "prior bias" in check["advice"], check


def test_d1_boxes_in_pixels_are_named(overfit, monkeypatch):
    make_boxes = detection.make_boxes

    def in_pixels(corners: np.ndarray, units: np.ndarray):
        boxes, clipped, faults = make_boxes(corners, units)
        return (boxes * np.tile((160, 128), 2)).astype(np.float32), clipped, faults

    monkeypatch.setattr(detection, "make_boxes", in_pixels)
    checks = overfit()
    check = checks["boxes_normalized"]
    assert not check["passed"] and check["severity"] == "error"
    assert "normalized" in check["advice"] and "pixels" in check["advice"]
    assert float(check["value"].split(", ")[1]) > 10  # the number that shows it
    assert not checks["truth_scores_one"]["passed"]
    if "initial_l1" in checks:
        assert not checks["initial_l1"]["passed"]
        assert "normalized" in checks["initial_l1"]["advice"]


def test_the_first_loss_without_prior_bias_is_far_from_its_range(scenes):
    """The number itself: a hundred times and more, not a matter of tolerance."""
    from lib import params as params_module
    from lib.tasks import build_task

    params = params_module.load(ROOT / "params/demo_rtdetr.yaml", {
        "data.root": str(scenes), "data.train": "train", "data.val": "val",
    })
    task = build_task(params, torch.device("cpu"))
    batch = task.frozen_batches(1, 4)[0]
    _, high = task.expected_initial(batch)["vfl"]
    for head in task.model.decoder.dec_score_head:
        nn.init.zeros_(head.bias)
    with torch.no_grad():
        first = task.losses(task.model.train(), task.to_device(batch))["vfl"]
    assert first > 5 * high
