"""Checkpoints: whole or not there, damage found, code never run, the right ones kept."""

import json
import os

import pytest
import torch
from torch import nn

from lib.errors import BadInput
from lib.loops import checkpoint
from lib.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def network(value: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model


def state(step: int) -> dict:
    return {"position": {"step": step, "best": 0.5, "ended": ""}, "top": [(0.5, step)],
            "optimizer": {"state": {0: {"momentum_buffer": torch.full((2,), float(step))}}}}


def save(run: Run, step: int, ema: bool = True) -> None:
    checkpoint.save(run, step, network(step), network(step + 0.5) if ema else None, state(step))


def test_what_was_saved_is_read_back_equal(run):
    save(run, 3)
    found = checkpoint.load(run, "last")
    assert found.model["0.weight"].eq(3).all() and found.ema["0.weight"].eq(3.5).all()
    assert found.model.keys() == network().state_dict().keys()
    assert found.state["position"] == state(3)["position"]
    assert found.state["optimizer"]["state"][0]["momentum_buffer"].eq(3).all()
    assert found.delivered is found.ema
    folder = run.checkpoints / "step_3"
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors", "ema.safetensors", "state.pt", "digest.json"}


def test_a_run_without_an_average_delivers_its_weights(run):
    save(run, 3, ema=False)
    found = checkpoint.load(run, "step_3")
    assert found.ema is None and found.delivered is found.model


def test_weights_are_in_plain_memory_order_whatever_the_network_uses(run):
    model = network()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(108.0).view(4, 3, 3, 3))
    checkpoint.save(run, 1, model, None, {})
    found = checkpoint.load(run, "last").model["0.weight"]
    assert found.is_contiguous() and torch.equal(found, torch.arange(108.0).view(4, 3, 3, 3))


def test_the_same_step_saved_again_holds_what_is_newer(run):
    """After its evaluation: else the run would evaluate there again at each resume."""
    save(run, 3)
    checkpoint.save(run, 3, network(3), network(3.5), state(3) | {"top": [(0.9, 3)]})
    assert checkpoint.load(run, "last").state["top"] == [(0.9, 3)]
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_3", "last"}


def test_nothing_there_is_none(run):
    assert checkpoint.load(run, "last") is None and checkpoint.load(run, "step_9") is None


@pytest.mark.parametrize("dies_in", ["model", "state", "sync", "rename"])
def test_a_save_that_dies_leaves_the_last_one_and_no_half_one(run, monkeypatch, dies_in):
    """A new checkpoint appears under its name only once it is whole and on the disk."""
    save(run, 1)

    def die(*args, **options):
        raise OSError(28, "No space left on device")

    where, what = {"model": (checkpoint, "save_file"), "state": (torch, "save"),
                   "sync": (os, "fsync"), "rename": (type(run.path), "rename")}[dies_in]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(where, what, die)
        save(run, 2)
    assert sorted(path.name for path in run.checkpoints.glob("step_*")) == ["step_1"]
    assert checkpoint.load(run, "last").state["position"]["step"] == 1
    save(run, 2)
    assert checkpoint.load(run, "last").state["position"]["step"] == 2


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["one byte", "truncated", "missing"])
def test_damage_is_refused_with_the_file_and_what_to_do(run, file, damage):
    save(run, 4)
    path = run.checkpoints / "step_4" / file
    content = bytearray(path.read_bytes())
    if damage == "one byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-8])
    else:
        path.unlink()
    with pytest.raises(BadInput) as caught:
        checkpoint.load(run, "last")
    assert file in str(caught.value) and "damaged" in str(caught.value)
    assert "remove" in str(caught.value)


def test_last_and_best_are_links_that_move(run):
    save(run, 1)
    checkpoint.point(run, "best", 1)
    save(run, 2)
    assert os.readlink(run.checkpoints / "last") == "step_2"
    assert os.readlink(run.checkpoints / "best") == "step_1"
    checkpoint.point(run, "best", 2)
    assert os.readlink(run.checkpoints / "best") == "step_2"
    assert {p.name for p in run.checkpoints.iterdir()} == {"step_1", "step_2", "last", "best"}


def test_links_survive_a_moved_run_folder(run, tmp_path):
    save(run, 1)
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert checkpoint.load(Run(moved), "last").state["position"]["step"] == 1


def test_prune_keeps_the_asked_ones_and_what_last_and_best_mean(run):
    for step in (1, 2, 3, 4, 5):
        save(run, step)
    checkpoint.point(run, "best", 1)
    checkpoint.prune(run, {3})
    assert sorted(p.name for p in run.checkpoints.glob("step_*")) == ["step_1", "step_3", "step_5"]
    for name in ("best", "last", "step_3"):
        assert checkpoint.load(run, name) is not None


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_refused_and_not_run(run, tmp_path):
    """A poisoned state.pt whose digest was made to fit."""
    save(run, 1)
    folder, trap = run.checkpoints / "step_1", tmp_path / "executed"
    torch.save(state(1) | {"extra": Payload(trap)}, folder / "state.pt")
    digests = json.loads((folder / "digest.json").read_text())
    digests["state.pt"] = checkpoint._digest(folder / "state.pt")
    (folder / "digest.json").write_text(json.dumps(digests))
    with pytest.raises(BadInput, match="state.pt"):
        checkpoint.load(run, "last")
    assert not trap.exists()


def test_state_that_only_code_could_restore_cannot_be_saved_unnoticed(run):
    """What a checkpoint holds must load with weights_only."""
    checkpoint.save(run, 1, network(), None, state(1))
    loaded = torch.load(run.checkpoints / "step_1" / "state.pt", weights_only=True)
    assert loaded["top"] == [(0.5, 1)]


def test_delivered_weights_are_the_best_evaluations(run):
    save(run, 1)
    checkpoint.point(run, "best", 1)
    save(run, 2)
    model = network(0.0).train()
    assert checkpoint.load_delivered(run, model) == 1
    assert model[0].weight.eq(1.5).all() and not model.training


def test_without_an_evaluation_nothing_can_be_delivered(run):
    save(run, 1)
    with pytest.raises(BadInput, match="03_train"):
        checkpoint.load_delivered(run, network())
