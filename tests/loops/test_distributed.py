"""Starting and going on: what a stopped run may meet when it is launched again."""

import shutil
from pathlib import Path

import pytest

from lib.errors import BadInput, BudgetReached
from lib.loops.distributed import launch
from lib.run import Check, open_run

SHORT = {"train.steps": 6, "train.batch_size": 16, "train.eval_every_epochs": 0.01,
         "train.keep_best": 9, "optim.lr": 0.05}


@pytest.fixture
def own_digits(tmp_path, digits) -> Path:
    """A few of the digits, in a folder that a test may change."""
    root = tmp_path / "own"
    for split in ("train", "val"):
        for label in ("0", "1"):
            (root / split / label).mkdir(parents=True)
            for file in sorted((digits / split / label).iterdir())[:20]:
                shutil.copy(file, root / split / label / file.name)
    return root


@pytest.fixture
def launched(tmp_path, tiny_params, own_digits):
    """Opens the run folder and launches the training, as the notebook does."""

    def go(**overrides):
        params = tiny_params(tmp_path, **SHORT | {"data.root": str(own_digits)} | overrides)
        run = open_run(params, tmp_path / "run", owner="test")
        run.start("train")
        try:
            return run, launch(params, run)
        finally:
            run.close_records()
            run.unlock()

    return go


def resumed(run) -> list[dict]:
    return [row for row in run.rows("train") if row.get("event") == "resumed"]


def test_a_larger_budget_goes_on_where_the_smaller_one_stopped(launched):
    with pytest.raises(BudgetReached, match="raise it to go on"):
        launched(**{"budget.hours": 1e-9})
    run, ended = launched(**{"budget.hours": 10.0})
    assert ended == "finished" and resumed(run)[-1]["step"] >= 1
    assert run.params().budget.hours == 10.0
    steps = [row["step"] for row in run.rows("train") if row["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_damaged_last_checkpoint_falls_back_to_the_newest_whole_one(launched, tmp_path):
    with pytest.raises(BudgetReached):
        for _ in range(6):
            launched(**{"budget.hours": 1e-9})
    folder = tmp_path / "run" / "checkpoints"
    steps = sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))
    assert len(steps) == 1, "a run stopped at once keeps what last means"
    shutil.copytree(folder / f"step_{steps[-1]}", folder / f"step_{steps[-1] + 1}")
    (folder / f"step_{steps[-1] + 1}" / "model.safetensors").write_bytes(b"torn")
    run, ended = launched()
    assert ended == "finished" and resumed(run)[-1]["step"] == steps[-1]
    assert "model.safetensors" in resumed(run)[-1]["damaged"][0]


def test_all_checkpoints_damaged_is_refused_and_never_started_over(launched, tmp_path):
    with pytest.raises(BudgetReached):
        launched(**{"budget.hours": 1e-9})
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.glob("step_*"):
        (path / "state.pt").write_bytes(b"torn")
    with pytest.raises(BadInput, match="no whole checkpoint left"):
        launched()
    assert list(folder.glob("step_*")), "what is left is the user's to judge"


def test_changed_data_is_refused_with_what_was_and_what_is_there(launched, own_digits):
    with pytest.raises(BudgetReached):
        launched(**{"budget.hours": 1e-9})
    next((own_digits / "train" / "0").iterdir()).unlink()
    with pytest.raises(BadInput, match="train data changed .* 40 files.* 39"):
        launched()


def test_a_rate_whose_own_trial_failed_is_not_trained_with(tmp_path, tiny_params):
    params = tiny_params(tmp_path, **SHORT | {"optim.lr": "auto"})
    run = open_run(params, tmp_path / "run", owner="test")
    run.start("lr_finder")
    run.record("event", event="suggestion", lr=0.3)
    run.write_verdict("lr_finder", [Check("trial", "trial", "2 to 9", "falls", False)])
    assert run.suggested_lr() is None
    run.write_verdict("lr_finder", [Check("trial", "trial", "2 to 1", "falls", True)])
    assert run.suggested_lr() == 0.3
