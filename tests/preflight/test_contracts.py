"""Each contract with what breaks it, and its clean twin."""

import math

import pytest
import torch
from torch import nn

from lib.errors import BadInput
from lib.loops import optim
from lib.loops.overfit import OverfitResult
from lib.loops.schedule import Plan
from lib.models.weights import LoadReport
from lib.preflight import contracts
from lib.preflight.audit import census_checks
from lib.tasks import build_task

CPU = torch.device("cpu")


def result(**changes) -> OverfitResult:
    clean = {"initial": {"loss": math.log(10)}, "metrics": {"top1": 1.0}, "dead_parameters": (),
             "num_steps": 50, "finite": True}
    return OverfitResult(**clean | changes)


class Expecting:
    """A task as far as its expectation of the first losses goes."""

    def __init__(self, ranges: dict[str, tuple[float, float]]):
        self.ranges = ranges

    def expected_initial(self, batch: dict) -> dict[str, tuple[float, float]]:
        return self.ranges

    def initial_advice(self, term: str) -> str:
        return f"of {term}"


# -- the overfit gate's -----------------------------------------------------------------------


@pytest.mark.parametrize("loss, passed", [
    (math.log(10), True), (148.5, False), (0.39, False), (math.nan, False),
])
def test_the_first_loss_against_its_range_term_by_term(loss, passed):
    """M1 of the failures: 148.5 was called "expected and correct"."""
    found = contracts.initial_losses(
        Expecting({"loss": (0.9, 1.1), "class": (2.0, 3.0)}),
        result(initial={"loss": 1.0, "class": loss}), {})
    assert {check.id: check.passed for check in found} == {
        "initial_loss": True, "initial_class": passed}
    assert all(check.severity == "error" for check in found)
    assert [check.advice for check in found] == ["of loss", "of class"]


@pytest.mark.parametrize("loss, passed, severity", [
    (3.0, True, "error"), (3.1, False, "warning"), (9.0, False, "warning"), (9.1, False, "error"),
    (1.9, False, "error"),
])
def test_a_somewhat_uneven_start_is_only_noted(loss, passed, severity):
    """Sound networks may start at up to three times the upper end; nothing excuses a low start."""
    (check,) = contracts.initial_losses(
        Expecting({"loss": (2.0, 3.0)}), result(initial={"loss": loss}), {})
    assert (check.passed, check.severity) == (passed, severity)


def test_parameters_without_a_gradient_are_counted_and_named():
    assert contracts.gradients_reach(result()).passed
    check = contracts.gradients_reach(result(dead_parameters=("neck.weight", "neck.bias")))
    assert not check.passed and check.severity == "error"
    assert check.value == "2: neck.weight, neck.bias"


def test_a_loss_that_stopped_being_a_number_is_dated():
    assert contracts.stayed_finite(result()).passed
    check = contracts.stayed_finite(result(finite=False, num_steps=7))
    assert not check.passed and check.value == 7


@pytest.mark.parametrize("loaded, passed", [(100, True), (90, True), (89, False), (0, False)])
def test_too_few_loaded_weights_fail_the_gate(loaded, passed):
    (check,) = contracts.weights_loaded(LoadReport(loaded, 100, (), (), ()))
    assert check.passed is passed and check.severity == "error"


def test_no_weights_file_asks_nothing():
    assert contracts.weights_loaded(None) == []


# -- leakage ----------------------------------------------------------------------------------


class Reshaped(nn.Module):
    """The wrong reshape: it swaps batch and width before the head."""

    def __init__(self, wrong: bool):
        super().__init__()
        self.wrong, self.head = wrong, nn.Linear(8, 10)

    def forward(self, images):
        features = images.mean((1, 2))[:, :8]  # (B, 8)
        if self.wrong:
            features = features.t().reshape(features.shape)
        return self.head(features)


@pytest.mark.parametrize("wrong", [True, False])
def test_samples_mixed_by_a_wrong_reshape_are_found(tmp_path, tiny_params, wrong):
    """M6 of the failures."""
    task = build_task(tiny_params(tmp_path), CPU)
    task.model = Reshaped(wrong)
    check = contracts.no_leakage(task, task.frozen_batches(1, 8)[0])
    assert check.passed is not wrong and check.severity == "error"
    assert (check.value > 0) is wrong


def test_batch_norm_in_training_is_not_called_leakage(tmp_path, tiny_params):
    task = build_task(tiny_params(tmp_path), CPU)
    task.model.train()
    assert contracts.no_leakage(task, task.frozen_batches(1, 8)[0]).passed
    assert task.model.training
    assert all(weight.grad is None for weight in task.model.parameters())


# -- parameter groups -------------------------------------------------------------------------


def test_every_parameter_in_one_group(tmp_path, tiny_params):
    params = tiny_params(tmp_path)
    model = build_task(params, CPU).model
    assert contracts.all_grouped(model, optim.param_groups(model, params.optim)).passed


@pytest.mark.parametrize("fault", ["missing", "twice"])
def test_parameters_in_no_group_or_in_two_are_found(tmp_path, tiny_params, fault):
    """C10 of the failures: groups missing parameters."""
    params = tiny_params(tmp_path)
    model = build_task(params, CPU).model
    groups = optim.param_groups(model, params.optim)
    if fault == "missing":
        groups[1]["params"].pop(0)
    else:
        groups[1]["params"].append(groups[0]["params"][0])
    check = contracts.all_grouped(model, groups)
    assert not check.passed and check.severity == "error"
    assert check.value == {"missing": "1 in none, 0 in several",
                           "twice": "0 in none, 1 in several"}[fault]
    assert ("conv1.1.weight" in check.advice) is (fault == "missing")


# -- sizes ------------------------------------------------------------------------------------


def test_d12_every_size_of_the_run_is_tried_and_shown(tmp_path, tiny_params):
    params = tiny_params(tmp_path, **{"train.image_sizes": [48, [32, 64]]})
    check = contracts.accepts_sizes(params, 10)
    assert check.passed and check.value == "32 x 32, 32 x 64, 48 x 48"


@pytest.mark.parametrize("name, shown", [
    ("yolo_n", "64 x 64, 72 x 104 (padded to 96 x 128)"), ("rtdetr_tiny", "64 x 64, 72 x 104"),
])
def test_d12_a_size_that_is_padded_says_to_what(tmp_path, tiny_detect, name, shown):
    params = tiny_detect(tmp_path, model__name=name, train__image_sizes=[[72, 104]])
    assert contracts.accepts_sizes(params, 10).value == shown


def test_a_size_that_the_network_does_not_take_is_refused(tmp_path, tiny_params):
    params = tiny_params(tmp_path, **{
        "model.name": "test_vit", "data.image_size": 160, "train.image_sizes": [[100, 160]]})
    with pytest.raises(BadInput, match="test_vit does not take 100 x 160 pixels"):
        contracts.accepts_sizes(params, 10)


# -- the plan ---------------------------------------------------------------------------------


@pytest.fixture
def plan_of(tmp_path, tiny_params):
    def make(lr: float | None = 0.1, **overrides) -> dict:
        """Checks of a run of 10 epochs of 10 steps, by their id."""
        params = tiny_params(tmp_path, **{"train.steps": None, "train.epochs": 10} | overrides)
        return {check.id: check for check in contracts.plan_checks(Plan(params, 320), lr)}

    return make


def test_a_sound_plan_passes(plan_of):
    found = plan_of(optim__warmup_epochs=1.0)
    assert all(check.passed for check in found.values()) and set(found) == {"schedule", "intervals"}
    assert found["schedule"].value == "4.00e-03, 1.00e-01, 0.00e+00"  # R13: never 0.0000


def test_a_peak_that_is_never_reached_fails(plan_of):
    """C9 of the failures."""
    check = plan_of(optim__warmup_epochs=12.0)["schedule"]
    assert not check.passed and check.severity == "error"


def test_a_rate_still_to_be_found_is_shown_as_shares(plan_of):
    assert plan_of(lr=None)["schedule"].value.endswith("x the LR to be found")


@pytest.mark.parametrize("key, sound, late", [
    ("train.eval_every_epochs", 10, 11), ("train.save_every_steps", 100, 101),
    ("optim.warmup_epochs", 9.0, 10.0), ("train.patience_evals", 9, 10),
    ("optim.milestones_epochs", [9.0], [9.0, 10.0]),
])
def test_an_interval_longer_than_the_run_is_named(plan_of, key, sound, late):
    """C7 of the failures: a thing due at step 1000 of a run that ended at 40."""
    schedule = {"optim.schedule": "multistep"} if "milestones" in key else {}
    assert plan_of(**schedule | {key: sound})["intervals"].passed
    check = plan_of(**schedule | {key: late})["intervals"]
    assert not check.passed and key in check.value and check.severity == "warning"


@pytest.mark.parametrize("ema, passed", [
    ({"decay": 0.9}, True), ({"decay": 0.9999}, True),  # the warm-up mends a long horizon
    ({"decay": 0.9999, "warmup": False}, False), ({"decay": 0.96, "warmup": False}, False),
    ({"decay": 0.9, "warmup": False}, True),
])
def test_an_average_longer_than_the_run_is_found_before_it(plan_of, ema, passed):
    """C8 of the failures: 61 % of the initial weights at the end."""
    check = plan_of(train__ema=ema)["ema_horizon"]
    assert check.passed is passed
    if ema == {"decay": 0.9999, "warmup": False}:
        assert check.value == pytest.approx(0.9999**100) and "0.9000" in check.advice


def test_the_advice_for_a_slow_average_mends_it(plan_of):
    assert plan_of(train__ema={"decay": 0.9, "warmup": False})["ema_horizon"].passed


@pytest.mark.parametrize("reference, rule, shown, passed", [
    (16, "linear", "2.00e-01", True), (16, "sqrt", "1.41e-01", True), (1, "linear", "3.20e+00",
                                                                      True),
])
def test_the_lr_rule_is_shown_beside_the_other(plan_of, reference, rule, shown, passed):
    """C6 of the failures: 3.2 where the linear rule gives 0.8."""
    check = plan_of(optim__lr=0.1, optim__lr_batch_size=reference, optim__lr_rule=rule)["lr_rule"]
    assert check.value == shown and check.passed is passed
    assert "linear" in check.limit and "sqrt" in check.limit


def test_a_batch_far_beyond_the_reference_is_a_warning(plan_of):
    check = plan_of(optim__lr_batch_size=1, train__batch_size=64, train__epochs=20)["lr_rule"]
    assert not check.passed and check.severity == "warning"


# -- the census -------------------------------------------------------------------------------


def census(dropped: dict, per_class: dict) -> list[dict]:
    return [{"split": "train", "listed": 100, "used": 99, "dropped": dropped,
             "per_class": per_class, "digest": ""}]


def test_files_left_out_are_counted_with_their_reasons():
    clean, *_ = census_checks(census({}, {"a": 5, "b": 5}))
    assert clean.passed
    check, *_ = census_checks(census({"empty file": 2, "hidden file": 1}, {"a": 5, "b": 5}))
    assert not check.passed and check.severity == "warning"
    assert "3 of 100" in check.value and "2 empty file" in check.value


@pytest.mark.parametrize("largest, passed", [(100, True), (101, False)])
def test_uneven_classes_are_named(largest, passed):
    *_, check = census_checks(census({}, {"many": largest, "few": 5, "some": 50}))
    assert check.passed is passed and "'many'" in check.value and "'few'" in check.value


@pytest.mark.parametrize("per_class, passed", [({"a": 5}, False), ({"a": 5, "b": 5}, True)])
def test_one_class_leaves_nothing_to_tell_apart(per_class, passed):
    (check,) = [c for c in census_checks(census({}, per_class)) if c.id == "num_classes"]
    assert check.passed is passed and check.severity == "error"
