"""Any timm model as a classifier, and weights from files that may not be weights."""

import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lib.errors import BadInput
from lib.loops import checkpoint, optim
from lib.models import classifier, weights
from lib.params import Model, Optim
from lib.preflight import contracts
from lib.run import Run

# Small relatives of the families people train, and the side each is built for.
MODELS = {
    "test_resnet": 32, "test_efficientnet": 32, "test_byobnet": 32, "test_convnext": 32,
    "test_mambaout": 32, "test_nfnet": 32, "test_vit": 160, "test_coatnet": 160,
}


@pytest.mark.parametrize("name", MODELS)
def test_any_timm_model_learns_and_survives_a_checkpoint(tmp_path, name):
    """Logits of the asked width, a loss near ln K, one group a parameter, all gradients, reload."""
    torch.manual_seed(0)
    model = classifier.build(Model(name=name), 7, False)
    images, labels = torch.randn(2, 3, MODELS[name], MODELS[name]), torch.tensor([1, 6])
    logits = model(images)
    assert logits.shape == (2, 7)
    loss = classifier.cross_entropy(logits, labels, 0.1)
    assert abs(loss.item() - math.log(7)) < 1.0
    loss.backward()
    assert not [key for key, weight in model.named_parameters() if weight.grad is None]

    groups = optim.param_groups(model, Optim())
    grouped = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in model.parameters())
    assert contracts.all_grouped(model, groups).passed

    run = Run(tmp_path)
    checkpoint.save(run, 1, model, None, {})
    other = classifier.build(Model(name=name), 7, False)
    other.load_state_dict(checkpoint.load(run, "last").model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))


def test_the_params_reach_the_network():
    model = classifier.build(
        Model(name="test_vit", in_chans=1, drop_rate=0.25, drop_path_rate=0.5), 4, False
    )
    assert model.patch_embed.proj.in_channels == 1
    assert model.head.out_features == 4 and model.head_drop.p == 0.25
    assert max(getattr(m, "drop_prob", 0) or 0 for m in model.modules()) == 0.5


def message(model: Model, pretrained: bool = False) -> str:
    with pytest.raises(BadInput) as caught:
        classifier.build(model, 10, pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_model_is_refused_with_the_nearest_names():
    text = message(Model(name="resnt50"))
    assert "'resnt50'" in text and "did you mean" in text and "resnet50" in text.split("mean")[1]
    assert "did you mean" not in message(Model(name="zzzzqqqq"))


def test_an_unknown_tag_and_a_key_the_model_lacks_are_refused():
    assert "nothing_like_it" in message(Model(name="resnet18.nothing_like_it"))
    assert "drop_path_rate" in message(Model(name="vgg11", drop_path_rate=0.1))


# -- weights from a file ----------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, num_classes)


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model", "module", "ema.module"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_the_same_network_are_loaded_whole(tmp_path, suffix, wrapping):
    donor, model, file = Small(), Small(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(donor.state_dict(), file)
    else:
        state = donor.state_dict()
        for key in reversed(wrapping.split(".") if wrapping else []):
            state = {key: state, "epoch": 3}
        torch.save(state, file)
    report = weights.fill(model, weights.read_state_dict(file))
    assert (report.num_loaded, report.num_expected, report.share) == (8, 8, 1.0)
    assert not report.missing and not report.mismatched and not report.unused
    for name, tensor in donor.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    (check,) = contracts.weights_loaded(report)
    assert check.passed


def test_counters_of_batches_that_a_file_leaves_out_are_not_missed():
    state = {name: tensor for name, tensor in Small().state_dict().items()
             if not name.endswith("num_batches_tracked")}
    report = weights.fill(Small(), state)
    assert report.share == 1.0 and not report.missing and not report.unused


@pytest.mark.parametrize("with_average", [False, True])
def test_a_checkpoint_folder_gives_its_moving_average_where_there_is_one(tmp_path, with_average):
    raw, average = Small(), Small()
    folder = checkpoint.save(Run(tmp_path), 1, raw, average if with_average else None, {})
    found = weights.read_state_dict(folder)
    wanted = average if with_average else raw
    assert torch.equal(found["body.weight"], wanted.body.weight)
    assert weights.fill(Small(), found).share == 1.0


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no such weights file"):
        weights.read_state_dict(tmp_path)


def test_what_is_missing_of_another_shape_or_unused_is_listed_and_the_rest_loaded(tmp_path):
    donor, model, file = Small(num_classes=5), Small(), tmp_path / "weights.pth"
    state = donor.state_dict()
    del state["norm.weight"]
    state["neck.weight"] = torch.ones(2)
    torch.save(state, file)
    head = model.head.weight.clone()
    report = weights.fill(model, weights.read_state_dict(file))
    assert report.missing == ("norm.weight",) and report.unused == ("neck.weight",)
    assert set(report.mismatched) == {"head.weight", "head.bias"}
    assert (report.num_loaded, report.share) == (5, 5 / 8)
    assert torch.equal(model.body.weight, donor.body.weight)
    assert torch.equal(model.head.weight, head)


def test_a_file_of_another_network_fails_the_gate(tmp_path):
    """D13 of the failures: weights never loaded, and nobody noticed."""
    save_file({f"backbone.{k}": v for k, v in Small().state_dict().items()},
              tmp_path / "weights.safetensors")
    report = weights.fill(Small(), weights.read_state_dict(tmp_path / "weights.safetensors"))
    assert report.share == 0
    (check,) = contracts.weights_loaded(report)
    assert not check.passed and check.severity == "error"


ERROR_PAGE = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["error page", "truncated", "empty"])
def test_a_file_that_is_no_weights_file_is_refused_with_its_size_and_first_bytes(tmp_path, suffix,
                                                                                damage):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(Small().state_dict(), file)
    else:
        save_file(Small().state_dict(), file)
    content = {"error page": ERROR_PAGE, "truncated": file.read_bytes()[:-40], "empty": b""}[damage]
    file.write_bytes(content)
    model = Small()
    before = model.body.weight.clone()
    with pytest.raises(BadInput) as caught:
        weights.fill(model, weights.read_state_dict(file))
    text = str(caught.value)
    assert str(file) in text and f"{len(content):,} bytes" in text and repr(content[:16]) in text
    assert torch.equal(model.body.weight, before)


def test_a_missing_file_and_a_file_without_named_tensors_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such weights file"):
        weights.fill(Small(), weights.read_state_dict(tmp_path / "nowhere.pth"))
    torch.save(torch.ones(3), tmp_path / "one.pth")
    with pytest.raises(BadInput, match="not named tensors"):
        weights.fill(Small(), weights.read_state_dict(tmp_path / "one.pth"))


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path, writer):
    trap, file = tmp_path / "executed", tmp_path / "weights.pth"
    state = {"state_dict": Small().state_dict(), "extra": Payload(trap)}
    if writer == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    with pytest.raises(BadInput, match="not a readable weights file"):
        weights.fill(Small(), weights.read_state_dict(file))
    assert not trap.exists()
    if writer == "pickle":  # the trap works
        pickle.loads(file.read_bytes())["extra"].close()
        assert trap.exists()
