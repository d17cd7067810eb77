"""Detection with both families: batches, the way of the boxes, what is expected and refused."""

import numpy as np
import pytest
import torch

from lib.datasets import box_transforms
from lib.errors import BadInput
from lib.loops import checkpoint
from lib.loops.evaluate import evaluate
from lib.loops.overfit import OverfitResult
from lib.loops.schedule import Plan
from lib.preflight import contracts
from lib.run import Run
from lib.tasks import build_task, coco_metric
from lib.tasks.detectors import MOST_DETECTIONS, Found, family_of

CPU = torch.device("cpu")
MODELS = ["rtdetr_tiny", "yolo_n"]
NUM_TRAIN, NUM_VAL = 24, 20
AUGMENTED = {
    "rtdetr_tiny": {
        "data.boxes.hflip": 0.5, "data.boxes.zoom_out": 0.5, "data.boxes.iou_crop": 0.8,
        "data.boxes.hue": 0.1, "data.boxes.saturation": 0.3, "data.boxes.contrast": 0.2,
    },
    "yolo_n": {
        "data.boxes.scale": [0.5, 1.5], "data.boxes.translate": 0.1, "data.boxes.mosaic": 0.5,
        "data.boxes.mixup": 0.3, "data.boxes.plain_epochs": 0.5, "data.boxes.multi_scale": 0.4,
        "data.boxes.brightness": 0.3, "data.letterbox": True,
    },
}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def make(tmp_path, tiny_detect):
    """`make(**overrides)`: a task on the scenes, of the other model with `model__name`."""

    def go(**overrides):
        return build_task(tiny_detect(tmp_path, **overrides), CPU)

    return go


def refusal(make, **overrides) -> str:
    with pytest.raises(BadInput) as caught:
        make(**overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_id(checks: list) -> dict:
    return {check.id: check for check in checks}


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


# -- batches --------------------------------------------------------------------------------------


def run_batches(make, name: str, num_workers: int, first_step: int = 0, **overrides) -> list[dict]:
    """Every training batch of 10 steps, as the network gets it."""
    task = make(model__name=name, data__num_workers=num_workers, train__steps=10,
                **AUGMENTED[name] | overrides)
    requests = Plan(task.params, task.num_train).requests(first_step)
    return [task.to_device(batch) for batch in task.train_batches(requests)]


def test_batches_are_the_same_bit_for_bit_with_any_number_of_workers(make, name):
    alone, threaded = (run_batches(make, name, workers) for workers in (0, 2))
    assert_same(alone, threaded)
    assert len({batch["images"].sum().item() for batch in alone}) == 10
    assert alone[0].keys() == {"images", "boxes", "labels", "indices", "sizes"}


@pytest.mark.parametrize("first_step", [1, 7])
def test_a_restarted_stream_gives_the_batches_it_would_have_given(make, name, first_step):
    """What resume rests on, within an epoch (of 6 steps) and across its end."""
    whole = run_batches(make, name, 0)
    assert_same(whole[first_step:], run_batches(make, name, 2, first_step))
    if name == "yolo_n":
        assert len({tuple(batch["images"].shape[-2:]) for batch in whole}) > 1


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone(make, name):
    """Alone or among others, at whichever step; another seed and another epoch are others."""
    task = make(model__name=name, **AUGMENTED[name])
    plan = Plan(task.params, task.num_train)
    request = next(plan.requests())

    def drawn(**changes) -> dict:
        asked = {**vars(request), **changes}
        (batch,) = task.train_batches([type(request)(**asked)])
        return batch

    whole = drawn()
    for i in range(4):
        alone = drawn(step=5, indices=request.indices[i : i + 1], positions=range(1))
        assert torch.equal(alone["images"][0], whole["images"][i])
        count = alone["labels"].shape[1]
        assert torch.equal(alone["labels"][0], whole["labels"][i, :count])
        assert torch.equal(alone["boxes"][0], whole["boxes"][i, :count])
        assert (whole["labels"][i, count:] == -1).all()
    assert not torch.equal(drawn(epoch=1)["images"], whole["images"])
    other = make(model__name=name, seed=1, **AUGMENTED[name])
    assert not torch.equal(next(other.train_batches([request]))["images"], whole["images"])


def test_the_last_epochs_go_without_mosaic_and_mixup(make):
    """A late sample has the objects of one picture, the whole of it, and no more."""
    task = make(data__boxes__mosaic=1.0, data__boxes__mixup=1.0, data__boxes__plain_epochs=1.0,
                train__steps=12)
    requests = list(Plan(task.params, task.num_train).requests())
    assert [request.is_late for request in requests] == [False] * 6 + [True] * 6
    batches = list(task.train_batches(requests))
    assert_same(batches[6:], list(task._plain_batches(task.train_data, requests[6:])))
    (early,) = task._plain_batches(task.train_data, requests[:1])
    assert not torch.equal(early["images"], batches[0]["images"])


def test_frozen_batches_prefer_pictures_with_objects(make):
    """Three of the 24 scenes hold nothing that could be memorised."""
    task = make(**AUGMENTED["yolo_n"] | {"data.boxes.multi_scale": 0.0})
    empty = {i for i in range(NUM_TRAIN) if not len(task.train_data.targets(i)[1])}
    assert len(empty) == 3
    frozen = task.frozen_batches(3, 7)
    indices = torch.cat([batch["indices"] for batch in frozen]).tolist()
    assert set(indices) == set(range(NUM_TRAIN)) - empty and len(indices) == 21
    everything = torch.cat([batch["indices"] for batch in task.frozen_batches(6, 4)])
    assert set(everything[-3:].tolist()) == empty  # the rest comes last
    assert_same(frozen, task.frozen_batches(3, 7))
    shown = {int(batch["indices"][i]): batch["images"][i]
             for batch in task.eval_batches("train") for i in range(len(batch["indices"]))}
    for batch in frozen:
        for index, image in zip(batch["indices"].tolist(), batch["images"], strict=True):
            assert torch.equal(image, shown[index])


def test_evaluation_takes_every_picture_once_whatever_the_augmentation(make, name):
    plain = list(make(model__name=name).eval_batches("val"))
    assert torch.cat([batch["indices"] for batch in plain]).tolist() == list(range(NUM_VAL))
    wild = make(model__name=name, **AUGMENTED[name] | {"data.letterbox": False})
    assert_same(plain, list(wild.eval_batches("val")))
    some = torch.cat([batch["indices"] for batch in wild.eval_batches("train", most=5)])
    assert some.tolist() == [0, 6, 12, 17, 23]


def test_grey_pictures_and_changes_of_colour_go_together(make):
    task = make(model__in_chans=1, data__mean=[0.0], data__std=[1.0], data__boxes__brightness=0.5)
    batch = next(task.train_batches(Plan(task.params, task.num_train).requests()))
    assert task.to_device(batch)["images"].shape == (4, 1, 64, 64)


def test_yolo_s_text_gives_the_batches_of_coco_s_json(make):
    """The crowd regions, which it does not know, are no targets either way."""
    as_json, as_text = (list(make(data__format=f).eval_batches("train"))
                        for f in ("scenes", "scenes_yolo"))
    for one, other in zip(as_json, as_text, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=1e-6)


# -- there and back -------------------------------------------------------------------------------


def test_yolo_pads_to_its_stride_on_the_right_and_at_the_bottom(make):
    task = make(model__name="yolo_n", data__image_size=[72, 104])
    batch = task.sample_batch("train", 4)
    assert batch["images"].shape == (4, 3, 72, 104)
    padded = task.to_device(batch)
    assert padded["images"].shape == (4, 3, 96, 128)
    assert task.network_size(task.params, (72, 104)) == (96, 128)
    grey = torch.tensor([box_transforms.FILL / 255])
    for margin in (padded["images"][:, :, 72:], padded["images"][:, :, :, 104:]):
        torch.testing.assert_close(margin.unique(), grey)
    torch.testing.assert_close(padded["images"][:, :, :72, :104], batch["images"].float() / 255)
    in_pixels = batch["boxes"] * torch.tensor([104, 72, 104, 72])
    torch.testing.assert_close(padded["boxes"] * torch.tensor([128, 96, 128, 96]), in_pixels)
    rtdetr = make(data__image_size=[72, 104])
    assert rtdetr.to_device(batch)["images"].shape == (4, 3, 72, 104)  # takes any size


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [[72, 104], [64, 64], [97, 333], [130, 70]])
def test_the_truth_fed_back_scores_one(make, name, size, letterbox):
    """D12 of the failures: at odd sizes, padded or not, letterboxed or stretched."""
    task = make(model__name=name, data__image_size=size, data__letterbox=letterbox)
    for split, batches in (("val", task.eval_batches("val")), ("train", task.frozen_batches(2, 8))):
        checks = task.target_checks(list(batches), split)
        assert [check.id for check in checks] == ["boxes_normalized", "labels_in_range",
                                                  "truth_scores_one"]
        assert all(check.passed and check.severity == "error" for check in checks)


@pytest.mark.parametrize("letterbox", [False, True])
def test_true_boxes_come_back_to_the_pictures_they_are_annotated_in(make, name, letterbox):
    """Within a hundredth of a pixel; mirrored training inputs hold the mirrored boxes."""
    changes = {"model.name": name, "data.image_size": [72, 104], "data.letterbox": letterbox}
    task, mirrored = make(**changes), make(**changes, data__boxes__hflip=1.0)
    requests = list(Plan(task.params, task.num_train).requests())
    pairs = zip(task.train_batches(requests), mirrored.train_batches(requests), strict=True)
    for plain, flipped in pairs:
        if not letterbox:
            # A hair of a level where the resampling of the two directions rounds differently.
            difference = plain["images"].flip(3).float() - flipped["images"].float()
            assert difference.abs().max() <= 1
        turned = flipped["boxes"].clone()
        turned[..., 0] = torch.where(flipped["labels"] >= 0, 1 - turned[..., 0], 0.0)
        if letterbox:  # centred on whole pixels: off by one where the margins are odd
            assert (turned - plain["boxes"]).abs().max() < 1 / 100
        else:
            torch.testing.assert_close(turned, plain["boxes"], rtol=0, atol=1e-6)
        found = task._true_boxes([plain])
        truth = [task.train_data.targets(i) for i in plain["indices"].tolist()]
        boxes, labels = (np.concatenate(parts) for parts in zip(*truth, strict=True))
        assert found.labels.tolist() == labels.tolist()
        pixels = (found.boxes - boxes) * np.tile(task.train_data.sizes[found.images], 2)
        assert np.abs(pixels).max(initial=0) < 0.01
        if not letterbox:
            for check in task.target_checks([flipped], "train")[:2]:
                assert check.passed


def test_a_prediction_lands_where_it_was_seen(make, name):
    """Through `predict` itself: outputs that say the truth in the network's own coordinates."""
    task = make(model__name=name, data__image_size=[72, 104], data__letterbox=True)
    honest, seen = task.family, {}

    class Oracle(honest):
        @staticmethod
        def forward(model, batch):
            seen.update(batch)
            return honest.forward(model, batch)

        @staticmethod
        def found(outputs, size):
            assert size == task.network_size(task.params, (72, 104))
            real = seen["labels"] >= 0
            return [
                Found(torch.ones(int(mask.sum())), labels[mask], boxes[mask])
                for boxes, labels, mask in zip(seen["boxes"], seen["labels"], real, strict=True)
            ]

    task.family = Oracle
    detections = task.predict(task.model.eval(), task.eval_batches("val"))
    assert coco_metric.evaluate(detections, task.val_data).metrics["mAP"] > 0.9999


# -- targets that are wrong -----------------------------------------------------------------------


def test_d1_pixels_for_boxes_are_found_and_the_advice_says_so(make, name):
    task = make(model__name=name)
    clean = by_id(task.target_checks(task.frozen_batches(1, 8), "train"))
    assert all(check.passed for check in clean.values())
    owner = np.repeat(np.arange(NUM_TRAIN), np.diff(task.train_data.offsets))
    task.train_data.boxes *= np.tile(task.train_data.sizes[owner], 2).astype(np.float32)
    found = by_id(task.target_checks(task.frozen_batches(1, 8), "train"))
    check = found["boxes_normalized"]
    assert not check.passed and check.severity == "error"
    assert "normalized" in check.advice and "divide" in check.advice
    assert float(check.value.split(", ")[1]) > 50


def test_d2_a_label_outside_the_head_is_found(make, name):
    task = make(model__name=name)
    task.train_data.labels[:] += 1  # category ids taken for labels
    check = by_id(task.target_checks([task.sample_batch("train", NUM_TRAIN)], "train"))[
        "labels_in_range"]
    assert not check.passed and check.value.endswith(", 10, 10") and "category ids" in check.advice


def test_d8_boxes_moved_on_their_way_do_not_score_one(make, name, monkeypatch):
    """Letterboxed on the way in, taken for stretched on the way back."""
    task = make(model__name=name, data__letterbox=True)
    batches = task.frozen_batches(1, 8)
    data = task.params.data.model_copy(update={"letterbox": False})
    task.params = task.params.model_copy(update={"data": data})
    found = by_id(task.target_checks(batches, "train"))
    assert not found["truth_scores_one"].passed and found["boxes_normalized"].passed


def test_batches_without_an_object_have_nothing_to_learn_from(make, name):
    task = make(model__name=name)
    empty = np.array([i for i in range(NUM_TRAIN) if not len(task.train_data.targets(i)[1])])
    (check,) = task.target_checks([task.pictures("train", empty)], "train")
    assert not check.passed and "nothing to learn" in check.advice


# -- the network ----------------------------------------------------------------------------------


def test_scores_are_per_image(make, name):
    """The leak check reads one image's outputs: the first axis is the batch."""
    task = make(model__name=name)
    model = task.model.eval()
    batch = task.sample_batch("train", 4)
    images = task.to_device(batch)["images"]
    with torch.no_grad():
        scores = task.scores(model, images)
        alone = torch.cat([task.scores(model, images[i : i + 1]) for i in range(4)])
    assert len(scores) == 4 and scores.shape[-1] == 10
    torch.testing.assert_close(scores, alone, rtol=1e-3, atol=1e-4)
    assert contracts.no_leakage(task, batch).passed


def test_a_leak_across_the_batch_is_found(make, name):
    task = make(model__name=name)
    honest = task.family.forward

    class Leaking(task.family):
        @staticmethod
        def forward(model, batch):
            mixed = batch["images"] + 0.1 * batch["images"].mean(0, keepdim=True)
            return honest(model, batch | {"images": mixed})

    task.family = Leaking
    check = contracts.no_leakage(task, task.sample_batch("train", 4))
    assert not check.passed and check.value > 0


METRICS = {"loss", "mAP", "mAP50", "mAP75", "AR1", "AR10", "AR100", "mAP_small", "mAP_medium",
           "false_alarms"}


def test_evaluation_gives_all_metrics_and_leaves_the_network_alone(make, name):
    """No scene holds an object of 96 x 96 pixels: mAP_large cannot be measured."""
    task = make(model__name=name)
    model = task.model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = evaluate(task, model, "val")
    assert set(found) == {f"val/{metric}" for metric in METRICS} | {"seconds"}
    assert all(np.isfinite(value) for value in found.values())
    assert all(0 <= found[f"val/{metric}"] <= 1 for metric in METRICS - {"loss", "false_alarms"})
    assert task.headline in found
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_evaluation_does_not_depend_on_batch_size_or_workers(make, name):
    found = []
    for batch_size, workers in ((4, 0), (7, 2)):
        task = make(model__name=name, train__batch_size=batch_size, data__num_workers=workers)
        found.append(task.predict(task.model.eval(), task.eval_batches("val")))
    one, other = found
    assert one.images.tolist() == other.images.tolist()
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    counts = np.bincount(one.images, minlength=NUM_VAL)
    assert counts.max() <= MOST_DETECTIONS and counts.min() > 0


@pytest.mark.parametrize("key, headline", [("mAP", "val/mAP"), ("mAP50", "val/mAP50")])
def test_the_headline_is_that_of_the_params(make, key, headline):
    assert make(detect__headline=key).headline == headline


# -- the first losses -----------------------------------------------------------------------------


def first_checks(task, batch) -> dict:
    torch.manual_seed(0)
    with torch.no_grad():
        losses = task.losses(task.model.train(), task.to_device(batch))
    result = OverfitResult({term: value.item() for term, value in losses.items()}, {}, (), 1, True)
    return by_id(contracts.initial_losses(task, result, batch))


TERMS = {"rtdetr_tiny": {"initial_vfl", "initial_aux_vfl", "initial_l1", "initial_giou"},
         "yolo_n": {"initial_box", "initial_cls", "initial_dfl"}}
CLASS_TERM = {"rtdetr_tiny": "initial_vfl", "yolo_n": "initial_cls"}


def class_heads(task) -> list[torch.nn.Parameter]:
    """The biases that the prior sits in."""
    if task.params.model.name == "yolo_n":
        return [head.predict.bias for head in task.model.cls_heads]
    return [head.bias for head in (task.model.decoder.enc_score_head,
                                   *task.model.decoder.dec_score_head)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [64, [96, 128]])
def test_the_first_losses_are_in_the_ranges_that_theory_gives(make, name, seed, size):
    task = make(model__name=name, seed=seed, data__image_size=size)
    (batch,) = task.frozen_batches(1, 8)
    found = first_checks(task, batch)
    assert set(found) == TERMS[name]
    assert all(check.passed for check in found.values()), found


def test_m1_a_class_head_without_its_prior_bias_is_found(make, name):
    """Every query or anchor starts at probability 0.5, and the background drowns the loss."""
    task = make(model__name=name)
    (batch,) = task.frozen_batches(1, 8)
    with torch.no_grad():
        for bias in class_heads(task):
            bias.zero_()
    check = first_checks(task, batch)[CLASS_TERM[name]]
    assert not check.passed and check.severity == "error"
    assert "prior bias" in check.advice and "log(p / (1 - p))" in check.advice


def test_d1_pixels_for_boxes_are_seen_in_the_first_losses_too(make, name):
    task = make(model__name=name)
    (batch,) = task.frozen_batches(1, 8)
    batch["boxes"] = batch["boxes"] * 64
    bad = {check.id: check for check in first_checks(task, batch).values() if not check.passed}
    assert {"rtdetr_tiny": "initial_l1", "yolo_n": "initial_dfl"}[name] in bad
    assert all("normalized" in check.advice and check.severity == "error"
               for check in bad.values())


def test_a_network_that_starts_from_weights_may_know_the_classes(make, name, tmp_path):
    donor = make(model__name=name)
    folder = checkpoint.save(Run(tmp_path / "run"), 1, donor.model, None, {})
    task = make(model__name=name, model__weights=str(folder))
    batch = task.sample_batch("train", 4)
    ranges, fresh = task.expected_initial(batch), donor.expected_initial(batch)
    assert ranges == {term: (0.0, high) for term, (_, high) in fresh.items()}


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_average", [False, True])
def test_weights_come_from_a_run_s_checkpoint(make, name, tmp_path, with_average):
    """Of its moving average where there is one: that is what the run delivers."""
    raw, average = make(model__name=name, seed=1), make(model__name=name, seed=2)
    folder = checkpoint.save(Run(tmp_path / "run"), 1, raw.model,
                             average.model if with_average else None, {})
    task = make(model__name=name, model__weights=str(folder))
    wanted = (average if with_average else raw).model.state_dict()
    for key, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    assert task.weights_report.share == 1.0 and not task.weights_report.unused
    assert task.read_weights(task.params).keys() == wanted.keys()


def test_a_head_of_other_classes_leaves_the_rest_loaded(make, name, tmp_path):
    donor = make(model__name=name)
    folder = checkpoint.save(Run(tmp_path / "run"), 1, donor.model, None, {})
    task = make(model__name=name, model__weights=str(folder), data__single_class=True)
    report = task.weights_report
    assert report.mismatched and not report.missing and 0.9 < report.share < 1.0
    (check,) = contracts.weights_loaded(report)
    assert check.passed


def test_weights_of_the_other_family_fail_the_gate(make, name, tmp_path):
    (other,) = set(MODELS) - {name}
    folder = checkpoint.save(Run(tmp_path / "run"), 1, make(model__name=other).model, None, {})
    task = make(model__name=name, model__weights=str(folder))
    (check,) = contracts.weights_loaded(task.weights_report)
    assert not check.passed and check.severity == "error"


def test_frozen_norms_and_stem_of_the_backbone_stay(make, tmp_path):
    donor = make()
    folder = checkpoint.save(Run(tmp_path / "run"), 1, donor.model, None, {})
    task = make(model__weights=str(folder), detect__freeze_norms=True)
    before = {key: t.clone() for key, t in task.model.backbone.state_dict().items()}
    model = task.model.train()
    losses = task.losses(model, task.to_device(task.sample_batch("train", 4)))
    losses["loss"].backward()
    assert all(torch.equal(before[key], t) for key, t in model.backbone.state_dict().items())
    frozen = {key for key, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen and all(key.startswith("backbone.") for key in frozen)
    assert any(key.startswith("backbone.conv1.") for key in frozen)
    assert any(not key.startswith("backbone.") and module.training
               for key, module in model.named_modules()
               if isinstance(module, torch.nn.BatchNorm2d))


# -- classes, and what is refused -----------------------------------------------------------------


def test_one_class_for_all(make, name):
    task = make(model__name=name, data__single_class=True)
    assert task.class_names == ("object",) and task.num_classes == 1
    batch = task.sample_batch("train", NUM_TRAIN)
    assert set(batch["labels"].unique().tolist()) == {-1, 0}
    many = make(model__name=name)
    assert torch.equal((many.sample_batch("train", NUM_TRAIN)["labels"] >= 0), batch["labels"] >= 0)
    assert all(check.passed for check in task.target_checks([batch], "train"))
    assert task.scores(task.model.eval(), task.to_device(batch)["images"][:2]).shape[-1] == 1
    assert set(task.census()[0]["mapping"].values()) == {"0"}


def test_a_head_narrower_than_the_labels_is_refused_and_a_wider_one_judged(make, name):
    text = refusal(make, model__name=name, model__num_classes=7)
    assert "label 7 ('7')" in text and "model.num_classes" in text and "10 classes" in text
    task = make(model__name=name, model__num_classes=12)
    metrics = task.evaluate(task.model.eval(), task.eval_batches("val", most=4), "val")
    assert 0 <= metrics["mAP"] <= 1


def test_a_rate_of_the_backbone_is_refused_where_there_is_none(make):
    assert "yolo_n has no separate backbone" in refusal(
        make, model__name="yolo_n", optim__backbone_lr=0.1)
    assert make(optim__backbone_lr=0.1).params.optim.backbone_lr == 0.1


def test_published_weights_and_frozen_norms_are_refused_where_there_are_none(make, tmp_path):
    text = refusal(make, model__name="yolo_n", model__pretrained=True)
    assert "yolo_n has no published weights" in text and "model.weights" in text
    donor = make(model__name="yolo_n")
    folder = checkpoint.save(Run(tmp_path / "run"), 1, donor.model, None, {})
    assert "no pretrained backbone to freeze" in refusal(
        make, model__name="yolo_n", model__weights=str(folder), detect__freeze_norms=True)


def test_one_image_a_forward_pass_is_too_few_for_batch_norm(make, name):
    text = refusal(make, model__name=name, train__batch_size=4, train__accumulate=4)
    assert f"BatchNorm of {name}" in text and "one image" in text


@pytest.mark.parametrize("wrong", ["resnet50", "yolo", "yolo_z", "rtdetr", "yolo_n_tiny", "YOLO_n"])
def test_an_unknown_detector_is_refused_with_those_there_are(make, wrong):
    text = refusal(make, model__name=wrong)
    assert f"no detector {wrong!r}" in text and "rtdetr_r50" in text and "yolo_x" in text
    with pytest.raises(BadInput):
        family_of(wrong)


# -- as the gates see it --------------------------------------------------------------------------


def test_memorised_means_map50_of_nine_tenths(make):
    task = make()
    for metrics, passed in (({"mAP50": 0.9}, True), ({"mAP50": 0.89}, False), ({}, False)):
        assert task.memorised(metrics).passed is passed


def test_a_batch_is_drawn_with_its_boxes(make, name):
    from matplotlib import pyplot

    task = make(model__name=name, data__image_size=[72, 104])
    figure = task.figure(task.to_device(task.sample_batch("train", NUM_TRAIN)))
    assert figure.axes
    pyplot.close(figure)


def test_the_network_is_a_function_of_the_seed(make, name):
    one, same, other = (make(model__name=name, seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["rtdetr_tiny", "yolo_n"])
def test_the_weighted_terms_add_up_to_the_loss(make, name):
    """M2: weights that are not applied would show here."""
    task = make(model__name=name)
    (batch,) = task.frozen_batches(1, 4)
    with torch.no_grad():
        losses = task.losses(task.model.train(), task.to_device(batch))
    weighted = [term for key, term in losses.items() if key.endswith("_weighted")]
    assert len(weighted) == 3
    torch.testing.assert_close(sum(weighted), losses["loss"])
