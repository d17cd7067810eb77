"""Each rule with an injected failure and its clean twin; the worst of them on real runs."""

import math
import shutil
import time

import pytest
import torch

from lib.loops.train import train
from lib.params import Data, Detect, Params
from lib.run import Check, Run
from lib.tasks import build_task
from lib.watch import diagnose

GUESSING = math.log(100)


def step_rows(losses: list[float], seconds: float = 1.0, wait: float = 0.0, lr: float = 0.1):
    return [{"kind": "step", "stage": "train", "step": n, "loss": loss, "lr": lr, "images": 32,
             "seconds": seconds, "wait": wait} for n, loss in enumerate(losses, 1)]


def eval_rows(losses: list[float], every: int, **values: float) -> list[dict]:
    return [{"kind": "eval", "stage": "train", "step": (n + 1) * every, "val/loss": loss,
             "val/top1": 0.6, "val/top1_relabelled": 0.62} | values
            for n, loss in enumerate(losses)]


def event(name: str, **values) -> dict:
    return {"kind": "event", "stage": "train", "event": name} | values


def records(train_losses=None, val_losses=(3.0, 2.0, 1.5), reason: str = "finished", **evaluation):
    """A run of 100 steps that goes well unless told otherwise."""
    losses = train_losses or [4.6 - 0.03 * n for n in range(100)]
    return [
        event("train planned", steps=100, guessing={"loss": GUESSING, "top1": 0.01}),
        *step_rows(losses), *eval_rows(list(val_losses), 30, **evaluation),
        event("train ended", reason=reason, step=100, seconds=100.0),
    ]


def judged(rows: list[dict], params: Params | None = None) -> dict[str, Check]:
    checks = diagnose.train_checks(rows, params or Params())
    return {check.id: check for check in checks}


def test_a_run_that_goes_well_passes_every_rule():
    found = judged(records(**{"val/top1_raw": 0.59}))
    assert set(found) == {"finite", "completed", "learned", "val_agrees", "ema_follows",
                          "overfitting", "data_keeps_up"}
    assert all(check.passed for check in found.values())


def test_records_of_other_stages_are_not_judged():
    other = [row | {"stage": "overfit"} for row in records([4.6] * 100)]
    assert judged(other + records()) == judged(records())


@pytest.mark.parametrize("rows", [[], records()[:1], records()[:3]])
def test_a_run_that_has_just_begun_has_little_to_judge(rows):
    assert judged(rows)["finite"].passed
    assert not {"val_agrees", "overfitting", "data_keeps_up"} & judged(rows).keys()


# -- one rule at a time -----------------------------------------------------------------------


def test_numbers_that_are_none_name_step_term_rate_and_samples():
    rows = records(reason="non-finite") + [
        event("non-finite", step=58, terms=["loss", "grad_norm"], lr=3.0, samples=[17, 4])]
    check = judged(rows)["finite"]
    assert not check.passed and check.severity == "error"
    assert "step 58" in check.value and "grad_norm" in check.value and "3.00e+00" in check.value
    assert "optim.lr" in check.advice and "[17, 4]" in check.advice
    assert not judged(rows)["completed"].passed


@pytest.mark.parametrize("written", ["nan", "inf"])
def test_an_evaluation_without_a_number_is_named_and_breaks_no_other_rule(written):
    """Records write a loss that is no number as a text."""
    check = judged(records(val_losses=(3.0, 2.0, written)))["finite"]
    assert not check.passed and check.severity == "error" and "step 90" in check.advice


@pytest.mark.parametrize("reason, passed", [
    ("finished", True), ("target", True), ("patience", True), ("non-finite", False),
])
def test_how_the_training_ended(reason, passed):
    assert judged(records(reason=reason))["completed"].passed is passed


def test_a_run_that_died_did_not_end():
    check = judged(records()[:-1])["completed"]
    assert not check.passed and "did not end" in check.value and "same command" in check.advice


@pytest.mark.parametrize("losses", [[4.6] * 100, [4.6 + 0.01 * n for n in range(100)],
                                    [4.6 - 0.002 * n for n in range(100)]])
def test_a_run_that_learns_nothing_is_told_its_rate(losses):
    check = judged(records(losses))["learned"]
    assert not check.passed and check.severity == "error" and "1.00e-01" in check.advice


@pytest.mark.parametrize("val_loss, top1, relabelled, passed, cause", [
    (4.945, 0.012, 0.95, False, "permuted"),      # the failure on record: above ln 100 = 4.605
    (4.945, 0.012, 0.10, False, "No renaming"),
    (5.2, 0.50, 0.52, True, ""),                  # right half the time and too sure of itself
    (5.2, 0.50, 0.90, False, "permuted"),         # half of the folders renamed
    (4.5, 0.02, 0.05, True, ""),                  # weak, not contrary
    (1.5, 0.60, 0.62, True, ""),
])
def test_validation_worse_than_guessing_after_learning_means_other_labels(val_loss, top1,
                                                                          relabelled, passed,
                                                                          cause):
    """D4 of the failures: the author wrote "low accuracy is expected"."""
    rows = records(val_losses=(4.7, 4.8, val_loss),
                   **{"val/top1": top1, "val/top1_relabelled": relabelled})
    check = judged(rows)["val_agrees"]
    assert check.passed is passed and check.severity == "error"
    if not passed:
        assert "disagree with training labels" in check.advice and cause in check.advice
        assert ("permuted" in check.advice) is (cause == "permuted")


def test_a_network_that_learnt_nothing_is_not_blamed_on_the_labels():
    rows = records([4.6] * 100, val_losses=(4.7, 4.7, 4.7), **{"val/top1": 0.01})
    assert judged(rows)["val_agrees"].passed and not judged(rows)["learned"].passed


@pytest.mark.parametrize("average, passed", [(0.60, True), (0.585, True), (0.57, False),
                                             (0.001, False)])
def test_an_average_that_lags_is_named_as_such(average, passed):
    """C8 of the failures: val 0.10 %, BatchNorm was blamed and the average dropped."""
    check = judged(records(**{"val/top1": average, "val/top1_raw": 0.60}))["ema_follows"]
    assert check.passed is passed
    if not passed:
        assert "horizon" in check.advice and "train.ema.decay" in check.advice
    assert "ema_follows" not in judged(records())


@pytest.mark.parametrize("average, passed", [(0.585, True), (0.57, False)])
def test_an_average_that_lags_is_found_by_the_metric_of_detection_too(average, passed):
    rows = box_records(**{"val/mAP50": average, "val/mAP50_raw": 0.60, "val/loss_raw": 9.0})
    params = Params(task="detect", data=Data(format="coco"), detect=Detect(headline="mAP50"))
    check = judged(rows, params)["ema_follows"]
    assert check.passed is passed and check.title.startswith("val/mAP50 of the moving average")


def box_records(train_losses=None, val_losses=(3.0, 2.0, 1.5), **values: float) -> list[dict]:
    """A run of detection, for which guessing has no metric."""
    def as_boxes(row: dict) -> dict:
        kept = {key: value for key, value in row.items() if not key.startswith("val/top1")}
        if row["kind"] == "eval":
            kept |= {"val/mAP": 0.5, "val/mAP50": 0.7} | values
        return kept | ({"guessing": {}} if "guessing" in row else {})

    return [as_boxes(row) for row in records(train_losses, val_losses)]


def test_a_run_without_a_metric_of_guessing_is_judged_by_the_other_rules():
    found = judged(box_records())
    assert "val_agrees" not in found and {"finite", "completed", "overfitting"} <= set(found)
    assert all(check.passed for check in found.values())
    assert not judged(box_records(val_losses=(2.0, 1.0, 1.3)))["overfitting"].passed


@pytest.mark.parametrize("train_falls, val_losses, passed", [
    (True, (2.0, 1.0, 1.3), False), (True, (2.0, 1.0, 1.1), True), (True, (2.0, 1.0, 0.9), True),
    (False, (2.0, 1.0, 1.3), True),  # both rise: not memorised but unstable
])
def test_validation_rising_while_training_falls_is_overfitting(train_falls, val_losses, passed):
    losses = [4.6 - 0.04 * n if train_falls or n < 60 else 2.2 for n in range(100)]
    check = judged(records(losses, val_losses))["overfitting"]
    assert check.passed is passed and check.severity == "warning"
    assert "step 60" in check.value or passed


def test_a_run_that_waits_for_data_is_told_by_how_much_and_what_will_not_help():
    """S2 of the failures: 4.9 s of 5.2 s waiting, and the batch was doubled "for 2 x"."""
    rows = records()
    for row in rows:
        if row["kind"] == "step":
            row |= {"seconds": 5.2, "wait": 4.9}
    check = judged(rows)["data_keeps_up"]
    assert not check.passed and check.value == pytest.approx(4.9 / 5.2)
    assert "Data-bound" in check.advice and "larger batch will not help" in check.advice


def test_the_first_slow_steps_are_no_speed():
    """S6 of the failures."""
    rows = step_rows([1.0] * 20, seconds=60.0, wait=55.0) + step_rows([1.0] * 180, seconds=0.5)
    assert diagnose.wait_share(rows) == 0.0
    assert diagnose.images_per_second(rows) == 64.0
    assert judged(rows)["data_keeps_up"].passed


# -- the learning rate ------------------------------------------------------------------------

FALLS, STAYS, EXPLODES = [2.3, 2.2, 1.9, 1.5, 1.0], [2.3, 2.31, 2.3, 2.31, 2.32], [2.3, math.inf]


def lr_judged(lr, suggestion, diverged_at, trial, reason="flat") -> dict[str, Check]:
    params = Params().model_copy(update={"optim": Params().optim.model_copy(update={"lr": lr})})
    peak = suggestion if lr == "auto" else lr
    return {check.id: check
            for check in diagnose.lr_checks(params, suggestion, reason, diverged_at, peak, trial)}


@pytest.mark.parametrize("lr", ["auto", 0.1])
def test_a_sound_rate_passes(lr):
    assert all(check.passed for check in lr_judged(lr, 0.1, 3.0, FALLS).values())


def test_auto_without_a_suggestion_fails_with_the_reason():
    check = lr_judged("auto", None, None, [], reason="noisy: 0.3")["suggestion"]
    assert not check.passed and check.severity == "error" and "noisy: 0.3" in check.advice
    assert lr_judged(0.1, None, None, FALLS)["suggestion"].severity == "info"


def test_a_rate_beyond_divergence_is_too_high_and_told_a_better_one():
    check = lr_judged(50.0, 0.1, 3.0, EXPLODES)["below_divergence"]
    assert not check.passed and check.severity == "error"
    assert "5.00e+01 is too high" in check.advice and "1.0e-01" in check.advice
    assert "far below" in lr_judged(50.0, None, 3.0, EXPLODES)["below_divergence"].advice


@pytest.mark.parametrize("trial, passed", [(FALLS, True), (STAYS, False), (EXPLODES, False)])
def test_a_trial_that_does_not_fall_fails(trial, passed):
    assert lr_judged(0.1, 0.1, 3.0, trial)["trial"].passed is passed


@pytest.mark.parametrize("lr, passed", [(0.1, True), (1.0, True), (4e-6, False), (2.9, True),
                                        (3.1e-3, True), (2.9e-3, False)])
def test_a_rate_far_from_the_suggestion_is_a_warning(lr, passed):
    check = lr_judged(lr, 0.1, None, FALLS)["near_suggestion"]
    assert check.passed is passed and check.severity == "warning"


# -- the analysis -----------------------------------------------------------------------------


def analysed(target: float | None = None, estimated: float | None = 100.0, **metrics: float):
    params = Params().model_copy(update={"train": Params().train.model_copy(
        update={"target": target})})
    values = {"train/loss": 1.0, "val/loss": 1.2, "train/top1": 0.8, "val/top1": 0.75,
              "val/top1_relabelled": 0.75} | metrics
    found = diagnose.analysis_checks(params, "val/top1", values, {"loss": GUESSING, "top1": 0.01},
                                     estimated, 110.0)
    return {check.id: check for check in found}


def test_a_sound_analysis_passes_and_each_promise_broken_is_named():
    assert all(check.passed for check in analysed(target=0.75).values())
    missed = analysed(target=0.76)["target"]
    assert not missed.passed and missed.severity == "error" and missed.limit == ">= 0.76"
    assert not analysed(**{"train/top1": 0.96})["gap"].passed
    assert not analysed(estimated=50.0)["estimate"].passed
    assert "estimate" not in analysed(estimated=None) and "target" not in analysed()
    other = analysed(**{"val/loss": 5.0, "val/top1": 0.01, "val/top1_relabelled": 0.9})
    assert not other["val_agrees"].passed and "permuted" in other["val_agrees"].advice


def test_an_analysis_without_a_metric_of_guessing_keeps_its_other_promises():
    metrics = {"train/mAP50": 0.8, "val/mAP50": 0.7, "train/mAP": 0.9, "val/mAP": 0.5}

    def of(headline: str, target: float) -> dict[str, Check]:
        params = Params().model_copy(update={"train": Params().train.model_copy(
            update={"target": target})})
        found = diagnose.analysis_checks(params, headline, metrics, {}, None, 1.0)
        return {check.id: check for check in found}

    found = of("val/mAP50", 0.7)
    assert set(found) == {"target", "gap"} and all(check.passed for check in found.values())
    assert found["gap"].value == pytest.approx(0.1) and found["gap"].title.startswith("mAP50 ")
    strict = of("val/mAP", 0.6)
    assert not strict["target"].passed and not strict["gap"].passed


# -- real runs --------------------------------------------------------------------------------


def real_run(params, path, spoil=lambda task: None, lr: float = 0.05) -> dict[str, Check]:
    task, run = build_task(params, torch.device("cpu")), Run(path)
    path.mkdir()
    spoil(task)
    run.start("train")
    train(task, params, run, lr)
    return {check.id: check for check in diagnose.train_checks(run.rows("train"), params)}


SHORT = {"train.steps": 40, "train.batch_size": 32, "train.eval_every_epochs": 1.0}


@pytest.mark.parametrize("renamed", [False, True])
def test_cyclically_renamed_validation_folders_are_named_as_that(tmp_path, digits, tiny_params,
                                                                 renamed):
    """D4 of the failures, injected on disk: the network is good, its judge is not."""
    root = tmp_path / "digits"
    for label in "0123":
        shutil.copytree(digits / "train" / label, root / "train" / label)
        name = str((int(label) + 1) % 4) if renamed else label
        shutil.copytree(digits / "val" / label, root / "val" / name)
    found = real_run(tiny_params(tmp_path, data__root=str(root), **SHORT), tmp_path / "run")
    assert found["learned"].passed
    check = found["val_agrees"]
    assert check.passed is not renamed
    if renamed:
        assert "disagree with training labels" in check.advice
        assert "class folders are permuted" in check.advice and "accuracy" not in check.advice


def test_a_rate_that_is_much_too_high_fails_and_is_named(tmp_path, tiny_params):
    found = real_run(tiny_params(
        tmp_path, data__classes=["0", "1", "2"], optim__schedule="constant",
        **SHORT | {"train.steps": 15}), tmp_path / "run", lr=1e4)
    failed = [check for check in found.values() if not check.passed and check.severity == "error"]
    assert failed and any("1.00e+04" in f"{check.value}{check.advice}" for check in failed)


@pytest.mark.parametrize("slow", [False, True])
def test_slow_pictures_are_found_by_the_waiting(tmp_path, tiny_params, slow):
    def spoil(task):
        honest = task.train_data.open

        def crawl(index):
            time.sleep(0.01 if slow else 0)
            return honest(index)

        task.train_data.open = crawl

    params = tiny_params(tmp_path, data__classes=["0", "1"], data__num_workers=1, **{
        "train.steps": 12, "train.batch_size": 16, "train.image_sizes": [32] if slow else [64]})
    check = real_run(params, tmp_path / "run", spoil)["data_keeps_up"]
    assert check.passed is not slow, check.value


def test_a_network_that_is_only_too_sure_of_itself_is_not_told_that_labels_disagree():
    """Two classes, 78 % right, loss above guessing by a few very confident mistakes."""
    sound = diagnose.disagreement(0.05, 0.9, math.log(2), 0.78, 0.78, 0.5)
    swapped = diagnose.disagreement(0.05, 3.0, math.log(2), 0.02, 0.98, 0.5)
    assert sound.passed and not swapped.passed
