import pytest
import torch

from lib.models import yolo
from lib.models.boxes import cxcywh_to_xyxy, scale_boxes

torch.set_num_threads(1)

NUM_CLASSES = 5
# To the published rounding: millions of parameters at 80 classes.
PUBLISHED_MILLIONS = {"n": 3.2, "s": 11.2, "m": 25.9, "l": 43.7, "x": 68.2}


def pictures(num_images: int, height: int, width: int) -> torch.Tensor:
    """Random patches; in pure noise all images look alike to the deep layers."""
    patches = torch.rand(num_images, 3, height // 16, width // 16)
    return torch.nn.functional.interpolate(patches, size=(height, width), mode="bilinear")


@pytest.fixture(scope="module")
def model() -> yolo.YOLO:
    """Fresh weights, but batch norm has seen images: else eval outputs hardly depend on them."""
    torch.manual_seed(0)
    detector = yolo.build("n", NUM_CLASSES)
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        detector(pictures(8, 96, 96))
    for norm in norms:
        norm.momentum = 0.03
    return detector.eval()


def certain_of(distances: torch.Tensor) -> torch.Tensor:
    """Logits (..., 4 * 16) whose distributions have exactly these means, (..., 4) in strides."""
    left = distances.floor().clamp(max=yolo.NUM_BINS - 2)
    probs = torch.zeros(*distances.shape, yolo.NUM_BINS)
    probs.scatter_(-1, left.long().unsqueeze(-1), (1 - (distances - left)).unsqueeze(-1))
    probs.scatter_(-1, left.long().unsqueeze(-1) + 1, (distances - left).unsqueeze(-1))
    return probs.log().clamp(min=-1e4).flatten(-2)


@pytest.mark.parametrize("variant", yolo.VARIANTS)
def test_parameter_counts_are_the_published_ones(variant):
    with torch.device("meta"):
        detector = yolo.build(variant, num_classes=80)
    millions = sum(p.numel() for p in detector.parameters()) / 1e6
    assert round(millions, 1) == PUBLISHED_MILLIONS[variant]


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'q'.*n, s, m, l, x"):
        yolo.build("q", 3)


@pytest.mark.parametrize("variant", yolo.VARIANTS)
@pytest.mark.parametrize("size", [(640, 640), (832, 1440)])
def test_shapes_of_every_variant(variant, size):
    height, width = size
    with torch.device("meta"):
        outputs = yolo.build(variant, num_classes=80)(torch.empty(2, 3, height, width))
    num_anchors = sum((height // s) * (width // s) for s in yolo.STRIDES)
    assert outputs.cls.shape == (2, num_anchors, 80)
    assert outputs.box_dist.shape == (2, num_anchors, 64)
    assert outputs.anchors.shape == (num_anchors, 2)
    assert outputs.strides.shape == (num_anchors,)


@pytest.mark.parametrize("size", [(64, 64), (64, 160), (96, 32)])
def test_real_outputs_at_square_and_rectangular_sizes(model, size):
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, *size))
        scores, boxes = yolo.decode(outputs, size)
    assert scores.shape == (2, len(outputs.anchors), NUM_CLASSES)
    assert boxes.shape == (2, len(outputs.anchors), 4)
    assert boxes.dtype == torch.float32
    assert torch.isfinite(boxes).all() and (boxes[..., 2:] > 0).all()


def test_other_input_channels():
    outputs = yolo.build("n", 1, in_chans=1).eval()(torch.rand(1, 1, 32, 32))
    assert outputs.cls.shape == (1, 16 + 4 + 1, 1)


def test_padding_to_the_stride():
    assert yolo.padded_size((808, 1440)) == (832, 1440)
    assert yolo.padded_size((640, 640)) == (640, 640)
    assert yolo.padded_size((1, 33)) == (32, 64)


def test_unpadded_size_is_an_error_that_says_what_to_do(model):
    with pytest.raises(ValueError, match="808 x 1440 .* pad them to 832 x 1440"):
        model(torch.empty(1, 3, 808, 1440))


def test_anchors_are_cell_centers_in_pixels(model):
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 96))
    anchors, strides = outputs.anchors, outputs.strides
    assert anchors[:2].tolist() == [[4, 4], [12, 4]]  # x runs fastest
    assert anchors[12].tolist() == [4, 12]  # 96 / 8 cells a row
    assert anchors[-1].tolist() == [80, 48] and strides[-1] == 32
    assert anchors.amax(0).tolist() == [92, 60]


def test_anchors_are_in_the_order_of_the_flattened_cells():
    size = (64, 96)
    levels = []
    for stride in yolo.STRIDES:  # maps whose two channels hold the x and y of each cell's center
        x = (torch.arange(size[1] // stride) + 0.5) * stride
        y = (torch.arange(size[0] // stride) + 0.5) * stride
        levels.append(torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))))[None])
    anchors, _ = yolo.make_anchors(size, torch.device("cpu"))
    assert torch.equal(yolo.flatten_levels(levels)[0], anchors)


def test_images_do_not_influence_each_other_in_eval(model):
    images = pictures(3, 64, 96)
    with torch.no_grad():
        together = model(images)
        alone = model(images[1:2])
    assert not torch.allclose(together.box_dist[0], together.box_dist[1], atol=1e-3)
    torch.testing.assert_close(together.cls[1:2], alone.cls, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.box_dist[1:2], alone.box_dist, rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    detector = yolo.build("n", NUM_CLASSES)
    outputs = detector(torch.rand(2, 3, 64, 64))
    (outputs.cls.square().sum() + outputs.box_dist.square().sum()).backward()
    without = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_backbone_bottlenecks_are_residual_and_those_of_the_neck_are_not():
    detector = yolo.build("n", NUM_CLASSES)
    x = torch.rand(2, 32, 8, 8)
    for split_block, residual in ((detector.stage8[1], True), (detector.down8, False)):
        bottleneck = split_block.bottlenecks[0]
        torch.nn.init.zeros_(bottleneck.conv2.norm.weight)  # the convolutions now give zero
        assert torch.equal(bottleneck(x), x * residual)


def test_batch_norm_settings():
    modules = yolo.build("n", NUM_CLASSES).modules()
    norms = [module for module in modules if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_fresh_network_is_at_its_prior():
    """Class scores at the prior, boxes one stride wide: small objects are taught at once."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = yolo.build("n", NUM_CLASSES)(pictures(4, 96, 96))
        scores, boxes = yolo.decode(outputs, (96, 96))
    prior = yolo.class_prior_bias(outputs.strides, NUM_CLASSES).sigmoid()
    torch.testing.assert_close(scores.mean((0, 2)), prior, rtol=0.1, atol=0)
    sizes = boxes[..., 2:] * 96 / outputs.strides.view(1, -1, 1)
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0.3, atol=0)


def test_exact_distributions_decode_to_exact_boxes():
    size = (64, 96)
    anchors, strides = yolo.make_anchors(size, torch.device("cpu"))
    torch.manual_seed(0)
    distances = torch.rand(1, len(anchors), 4) * 14.9
    outputs = yolo.YOLOOutputs(
        torch.zeros(1, len(anchors), 1), certain_of(distances), anchors, strides
    )
    _, boxes = yolo.decode(outputs, size)
    corners = scale_boxes(cxcywh_to_xyxy(boxes), *size)[0]
    torch.testing.assert_close(corners[:, :2], anchors - distances[0, :, :2] * strides[:, None])
    torch.testing.assert_close(corners[:, 2:], anchors + distances[0, :, 2:] * strides[:, None])


def test_decoding_stays_exact_under_autocast():
    anchors, strides = yolo.make_anchors((64, 64), torch.device("cpu"))
    box_dist = torch.randn(len(anchors), 64)
    exact = yolo.decode_distances(box_dist, anchors, strides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(yolo.decode_distances(box_dist, anchors, strides), exact)


def hand_made_outputs(size: tuple[int, int], predictions: list) -> yolo.YOLOOutputs:
    """Outputs for one image that say only (anchor, label, score, distances in strides)."""
    anchors, strides = yolo.make_anchors(size, torch.device("cpu"))
    cls = torch.full((1, len(anchors), 2), -20.0)
    distances = torch.ones(1, len(anchors), 4)
    for anchor, label, score, sides in predictions:
        cls[0, anchor, label] = torch.logit(torch.tensor(score))
        distances[0, anchor] = torch.tensor(sides)
    return yolo.YOLOOutputs(cls, certain_of(distances), anchors, strides)


def test_postprocess_suppresses_within_a_class_only():
    size = (64, 64)
    outputs = hand_made_outputs(
        size,
        [
            (9, 0, 0.9, [1.0, 1.0, 1.0, 1.0]),  # anchor 9 is at (12, 12): box 4, 4, 20, 20
            (10, 0, 0.8, [2.0, 1.0, 0.0, 1.0]),  # anchor 10 is at (20, 12): the same box
            (17, 1, 0.7, [1.0, 2.0, 1.0, 0.0]),  # anchor 17 is at (12, 20): again, another class
            (54, 1, 0.6, [2.0, 2.0, 2.0, 2.0]),  # anchor 54 is at (52, 52): box 36 to 68
        ],
    )
    (found,) = yolo.postprocess(outputs, size, score_threshold=0.5, iou_threshold=0.7, top_k=10)
    assert found["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7, 0.6]))
    corners = scale_boxes(cxcywh_to_xyxy(found["boxes"]), *size)
    expected = torch.tensor([[4.0, 4, 20, 20], [4, 4, 20, 20], [36, 36, 64, 64]])  # cut at 64
    torch.testing.assert_close(corners, expected)


def test_postprocess_keeps_the_best_k_and_both_classes_of_an_anchor():
    size = (64, 64)
    predictions = [
        (9, 0, 0.9, [1.0, 1.0, 1.0, 1.0]),
        (9, 1, 0.8, [1.0, 1.0, 1.0, 1.0]),
        (54, 1, 0.6, [2.0, 2.0, 2.0, 2.0]),
    ]
    outputs = hand_made_outputs(size, predictions)
    (found,) = yolo.postprocess(outputs, size, score_threshold=0.5, iou_threshold=0.7, top_k=2)
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8]))


def test_postprocess_of_nothing_and_of_no_images(model):
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, 64, 64))
        no_images = model(torch.rand(0, 3, 64, 64))
    for found in yolo.postprocess(outputs, (64, 64), score_threshold=1.1):
        assert found["scores"].shape == (0,)
        assert found["labels"].shape == (0,)
        assert found["boxes"].shape == (0, 4)
    assert yolo.postprocess(no_images, (64, 64)) == []
