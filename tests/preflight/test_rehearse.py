"""The dry run goes through everything the long run will call, and notices what is broken there."""

import math

import pytest
import torch

from lib.loops import checkpoint
from lib.preflight.rehearse import TIMED_STEPS, UNTIMED_STEPS, rehearse
from lib.run import Run
from lib.tasks import build_task

CPU = torch.device("cpu")
MANY = {"train.steps": 40}
NUM_STEPS = UNTIMED_STEPS + TIMED_STEPS


@pytest.fixture
def rehearsed(tmp_path, tiny_params):
    def go(spoil=lambda task: None, **overrides):
        params = tiny_params(tmp_path, **{"data.classes": ["0", "1"], "train.batch_size": 8}
                             | overrides)
        task, run = build_task(params, CPU), Run(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        spoil(task)
        found = rehearse(task, params, run)
        assert not (run.path / "rehearsal").exists() and not run.checkpoints.exists()
        return task, found, {check.id: check for check in found.checks}

    return go


@pytest.mark.parametrize("overrides", [
    {}, {"train.ema.decay": 0.9}, {"train.accumulate": 2, "data.augment.cutmix": 1.0},
    {"train.precision": "bf16"}, {"train.image_sizes": [16, 24]}, {"optim.name": "adamw"},
])
def test_a_sound_run_is_rehearsed_to_the_end(rehearsed, overrides):
    task, found, checks = rehearsed(**overrides)
    assert all(check.passed for check in checks.values())
    assert set(checks) == {"input_shape", "rehearsed_steps", "rehearsed_eval", "reload"}
    assert 0 < found.step_seconds < 60 and found.eval_seconds > 0 and found.save_seconds > 0
    sizes = overrides.get("train.image_sizes", [32])  # each size is rehearsed
    batch = 4 if "train.accumulate" in overrides else 8
    assert checks["input_shape"].value == ", then ".join(
        f"{batch} x 3 x {size} x {size}" for size in sizes)
    weights = sum(t.numel() * t.element_size() for t in task.model.state_dict().values())
    copies = 3 if "train.ema.decay" in overrides or "optim.name" in overrides else 2
    assert found.checkpoint_bytes == pytest.approx(copies * weights, rel=0.2)


@pytest.mark.parametrize("overrides, shown", [
    ({"model.name": "rtdetr_tiny", "data.image_size": [64, 96], "optim.backbone_lr": 0.1},
     "4 x 3 x 64 x 96"),
    ({"model.name": "yolo_n", "train.image_sizes": [[72, 104], 64], "train.accumulate": 2},
     "2 x 3 x 96 x 128, then 2 x 3 x 64 x 64"),
    ({"model.name": "yolo_n", "data.boxes.multi_scale": 0.4, "data.boxes.mosaic": 1.0}, None),
])
def test_a_detector_is_rehearsed_at_the_sizes_it_gets(tmp_path, tiny_detect, overrides, shown):
    params = tiny_detect(tmp_path, **overrides)
    run = Run(tmp_path / "run")
    run.path.mkdir()
    found = rehearse(build_task(params, CPU), params, run)
    checks = {check.id: check for check in found.checks}
    assert all(check.passed for check in checks.values())
    assert "val/mAP" in checks["rehearsed_eval"].title
    assert shown is None or checks["input_shape"].value == shown


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_shorter_than_the_rehearsal_is_rehearsed_too(rehearsed, steps):
    _, found, checks = rehearsed(train__steps=steps)
    assert all(check.passed for check in checks.values())
    assert steps < NUM_STEPS and found.step_seconds > 0


def test_true_steps_are_taken(rehearsed):
    """Weights and running statistics move; a rehearsal without updates would prove nothing."""
    before = {}

    def keep(task):
        before.update({name: t.clone() for name, t in task.model.state_dict().items()})

    task, *_ = rehearsed(keep, **MANY)
    after = task.model.state_dict()
    assert not torch.equal(before["conv1.0.weight"], after["conv1.0.weight"])
    assert after["bn1.num_batches_tracked"] == NUM_STEPS


def test_a_loss_that_is_no_number_is_found(rehearsed):
    def poison(task):
        honest = task.losses
        task.losses = lambda model, batch: {"loss": honest(model, batch)["loss"] * math.inf}

    _, _, checks = rehearsed(poison)
    assert not checks["rehearsed_steps"].passed
    assert checks["rehearsed_steps"].severity == "error"


def test_another_image_size_than_asked_for_is_found(rehearsed):
    """D12 of the failures: [1440, 808] became 1440 square, and VRAM 13 times the estimate."""

    def shrink(task):
        honest = task.to_device
        task.to_device = lambda batch: {
            name: value[..., ::2, ::2] if name == "images" else value
            for name, value in honest(batch).items()
        }

    _, _, checks = rehearsed(shrink)
    check = checks["input_shape"]
    assert not check.passed and (check.value, check.limit) == ("8 x 3 x 16 x 16",
                                                               "8 x 3 x 32 x 32")


def test_tensors_that_do_not_survive_a_checkpoint_are_named(rehearsed, monkeypatch):
    honest = checkpoint._tensors
    monkeypatch.setattr(checkpoint, "_tensors", lambda model: {
        name: tensor + (name == "fc.bias") for name, tensor in honest(model).items()})
    _, _, checks = rehearsed()
    assert not checks["reload"].passed and checks["reload"].value == 1
    assert "fc.bias" in checks["reload"].advice


@pytest.mark.parametrize("where", ["losses", "evaluate", "save"])
def test_a_crash_of_the_long_run_happens_here(rehearsed, monkeypatch, where):
    """R10 of the failures: the crash was in `evaluate`, after 36 paid hours."""

    def crash(*args, **options):
        raise TypeError("unexpected keyword argument")

    def spoil(task):
        if where == "save":
            monkeypatch.setattr(checkpoint, "save_file", crash)
        else:
            setattr(task, where, crash)

    with pytest.raises(TypeError, match="unexpected keyword"):
        rehearsed(spoil)


def test_what_a_killed_rehearsal_left_is_not_taken_for_this_one(rehearsed, tmp_path):
    stale = Run(tmp_path / "run" / "rehearsal")
    checkpoint.save(stale, 1, torch.nn.Linear(2, 2), None, {"optimizer": {}})
    _, _, checks = rehearsed()
    assert checks["reload"].passed
