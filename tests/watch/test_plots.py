"""Plots show what the records hold, at any size of run, and wear both looks."""

import base64
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from lib.watch import plots


def train_records(num_steps, **changed):
    """Steps of a training whose loss falls from 2.3, `changed` naming what differs."""
    return [
        {"kind": "step", "stage": "train", "step": n, "time": n / 10, "lr": 0.1 / n,
         "loss": 2.3 / n**0.5, "epoch": n / 10, "images": 64, "seconds": 0.2, "wait": 0.05,
         "updated": True}
        | changed
        for n in range(1, num_steps + 1)
    ]


def evaluations(*values, **more):
    return [
        {"kind": "eval", "stage": "train", "step": 10 * n, "val/top1": value, "val/loss": 1 - value}
        | more
        for n, value in enumerate(values, 1)
    ]


def texts(figure):
    """Every text of a figure, in one string."""
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def line_lengths(figure):
    return [len(line.get_xdata()) for axes in figure.axes for line in axes.lines]


EMPTY = [
    lambda: plots.loss_curves([]),
    lambda: plots.metric_curves([]),
    lambda: plots.lr_curve([]),
    lambda: plots.overfit_curve([]),
    lambda: plots.speed([]),
    lambda: plots.image_grid([], []),
    lambda: plots.box_grid([], []),
]


@pytest.mark.parametrize("draw", EMPTY)
def test_a_run_that_died_before_its_first_record_still_has_a_figure(draw):
    figure = draw()
    assert isinstance(figure, Figure)
    assert re.search("no .* recorded|no picture", texts(figure))


def test_loss_of_a_hundred_thousand_steps_is_drawn_in_few_points():
    figure = plots.loss_curves(train_records(100_000))
    assert max(line_lengths(figure)) <= 2000


def test_decimation_keeps_every_outlier():
    values = np.zeros(50_000)
    values[[17, 31_234]] = 9.0, -9.0
    xs, ys = plots.decimate(np.arange(50_000.0), values)
    assert len(xs) <= 2000 and (np.diff(xs) > 0).all()
    assert {(17, 9.0), (31_234, -9.0)} <= set(zip(xs, ys, strict=True))


def test_smoothing_neither_lags_nor_bends_a_straight_line():
    line = np.linspace(5, 1, 400)
    assert plots._smooth(np.full(400, 3.0)) == pytest.approx(np.full(400, 3.0))
    assert plots._smooth(line)[20:-20] == pytest.approx(line[20:-20])


def test_loss_terms_are_drawn_and_bookkeeping_is_not():
    records = train_records(50, box=0.5, grad_norm=1.0)
    shown = texts(plots.loss_curves(records + evaluations(0.5, 0.9)))
    assert "box 0.5" in shown and "training" in shown and "validation 0.1" in shown
    assert "updated" not in shown and "grad" not in shown


def test_a_term_that_is_the_whole_loss_is_not_drawn_twice():
    records = [row | {"cross_entropy": row["loss"]} for row in train_records(50)]
    records[-1] |= {"loss": "nan", "cross_entropy": "nan"}
    assert "cross entropy" not in texts(plots.loss_curves(records))


def test_the_first_loss_that_is_not_finite_is_marked():
    records = train_records(30)
    for row in records[19:]:
        row["loss"] = "nan"  # as the records write it
    assert "not finite at step 20" in texts(plots.loss_curves(records))
    assert "not finite" not in texts(plots.loss_curves(records[:19]))


def test_other_stages_do_not_leak_into_the_training_curve():
    other = [row | {"stage": "overfit", "loss": 77.0} for row in train_records(5)]
    figure = plots.loss_curves(other + train_records(40))
    assert max(line.get_ydata().max() for line in figure.axes[0].lines) < 3


def test_metrics_read_as_per_cent_beside_the_raw_weights():
    shown = texts(plots.metric_curves(evaluations(0.5, 0.978, **{"val/top1_raw": 0.9})))
    assert "top-1 97.8 %" in shown and "top-1 raw 90.0 %" in shown


def test_a_check_s_own_metric_is_no_curve():
    assert "relabel" not in texts(plots.metric_curves(evaluations(0.5, **{
        "val/top1_relabelled": 0.6})))


@pytest.mark.parametrize("draw", [
    lambda steps, lrs: plots.schedule(steps, lrs, [step / 10 for step in steps]),
    lambda steps, lrs: plots.lr_curve(list(zip(steps, lrs, strict=True))),
])
def test_the_schedule_states_its_first_highest_and_last_value(draw):
    shown = texts(draw(range(4), [1e-4, 0.1, 0.05, 3e-7]))
    assert "initial 1.00e-04" in shown and "peak 1.00e-01" in shown and "final 3.00e-07" in shown


SWEEP = (np.logspace(-6, 1, 80), np.linspace(3, 1, 80), np.linspace(3, 1, 80))


def test_the_sweep_marks_its_suggestion():
    figure = plots.lr_sweep(*SWEEP, 1.3e-3, 2.0, used_lr=0.5)
    assert "suggestion 1.30e-03" in texts(figure)
    assert "diverges" in texts(figure) and "params 5.00e-01" in texts(figure)
    assert any(line.get_xdata()[0] == 1.3e-3 for line in figure.axes[0].lines)


def test_the_sweep_says_why_it_suggests_nothing():
    shown = texts(plots.lr_sweep(*SWEEP, None, None, reason="the curve is flat"))
    assert "no suggestion: the curve is flat" in shown
    assert "suggestion 1" not in shown and "diverges" not in shown


def test_a_sweep_that_exploded_at_once_is_still_drawn():
    broken = np.full(80, np.nan)
    assert "no suggestion" in texts(plots.lr_sweep(SWEEP[0], broken, broken, None, 1e-6))


def test_overfit_curve_states_both_ends():
    records = [row | {"stage": "overfit"} for row in train_records(100)]
    shown = texts(plots.overfit_curve(records))
    assert "initial 2.3" in shown and "final 0.23" in shown


def test_speed_leaves_out_warm_up_and_states_means():
    records = train_records(100)
    for row in records[:5]:
        row["seconds"] = 30.0
    shown = texts(plots.speed(records))
    assert "mean 320" in shown and "mean 25.0 %" in shown


def test_confusion_of_ten_classes_carries_names_and_counts():
    counts = np.diag(np.arange(31, 41))
    counts[8, 1] = 6
    shown = texts(plots.confusion(counts, [f"digit {n}" for n in range(10)]))
    assert "digit 8" in shown and "6" in shown.split() and "38" in shown and "39" in shown


def test_one_strong_confusion_of_a_thousand_classes_stays_visible():
    counts = np.diag(np.full(1000, 50))
    calm = plots.confusion(counts, [""] * 1000).axes[0].images[0].get_array()
    counts[700, 123] = 50
    figure = plots.confusion(counts, [f"class {n}" for n in range(1000)])
    marked = figure.axes[0].images[0].get_array()
    assert "class" not in texts(figure).replace("true class", "")
    assert np.abs(np.asarray(marked) - np.asarray(calm)).max() > 0.3


def test_of_many_classes_the_lowest_are_shown():
    values = np.linspace(1, 0, 1000)
    names = [f"class {n}" for n in range(1000)]
    shown = texts(plots.bars_with_intervals(names, values, values - 0.1, values + 0.1))
    assert "class 999" in shown and "class 970" in shown and "class 969" not in shown
    assert "30 of 1,000" in shown


def test_any_share_is_drawn_with_its_own_words():
    shown = texts(plots.bars_with_intervals(["a"], [0.5], [0.4], [0.6], "AP by class", "to AP50"))
    assert "AP by class" in shown and "to AP50" in shown and "Accuracy" not in shown


RECALLS = np.linspace(0, 1, 101)


def test_precision_recall_writes_each_curve_s_mean_beside_its_name():
    curves = {"IoU 0.50": np.where(RECALLS <= 0.5, 1.0, 0.0), "IoU 0.75": 0.25 * np.ones(101)}
    shown = texts(plots.precision_recall(RECALLS, curves))
    assert "IoU 0.50: 50.5 %" in shown and "IoU 0.75: 25.0 %" in shown and "thin" not in shown


def test_single_classes_are_thin_lines_and_those_without_ground_truth_are_left_out():
    classes = np.stack([np.ones(101), np.full(101, np.nan), np.zeros(101)])
    figure = plots.precision_recall(RECALLS, {"all": np.ones(101)}, classes)
    assert len(figure.axes[0].lines) == 3 and "thin: single classes" in texts(figure)
    assert len(plots.precision_recall(RECALLS, {"all": np.ones(101)}).axes[0].lines) == 1
    missing = plots.precision_recall(RECALLS, {"all": np.full(101, np.nan)}, classes * np.nan)
    assert "no object to measure it on" in texts(missing)


def test_histogram_counts_few_classes_and_outlines_many():
    assert "1,300" in texts(plots.histogram([1300, 7], ["a", "b"]))
    assert "median 50" in texts(plots.histogram([50] * 99 + [900], [str(n) for n in range(100)]))


def test_image_grid_takes_grey_and_colour_of_any_shape():
    images = [np.zeros((8, 8), np.uint8), np.zeros((9, 20, 3), np.uint8),
              np.zeros((30, 10, 1), np.uint8)]
    figure = plots.image_grid(images, ["zero", "a very long caption that has to be cut\nx", ""])
    assert len(figure.axes[0].images) == 3
    assert "zero" in texts(figure) and "…" in texts(figure) and "has to be cut" not in texts(figure)
    for image, pixels in zip(figure.axes[0].images, images, strict=True):
        left, right, bottom, top = image.get_extent()
        assert (right - left) / (bottom - top) == pytest.approx(pixels.shape[1] / pixels.shape[0])


def rectangles(figure, colour, hatched=False):
    """left, top, right, bottom of the boxes drawn as lines of one colour."""
    wanted = matplotlib.colors.to_rgba(colour)
    return [(*patch.get_xy(), patch.get_x() + patch.get_width(),
             patch.get_y() + patch.get_height())
            for patch in figure.axes[0].patches
            if not patch.get_fill() and patch.get_edgecolor() == wanted
            and bool(patch.get_hatch()) == hatched]


def test_boxes_lie_in_their_pictures_where_they_were_given():
    images = [np.zeros((100, 200, 3), np.uint8), np.zeros((300, 100, 1), np.uint8)]
    truths = [(np.array([[0.5, 0.5, 0.5, 0.5]]), ["cat"]), (np.zeros((0, 4)), [])]
    founds = [(np.zeros((0, 4)), []), (np.array([[0.25, 0.1, 0.5, 0.2]]), ["dog 0.90"])]
    crowds = [np.zeros((0, 4)), np.array([[0.5, 0.5, 1.0, 1.0]])]
    figure = plots.box_grid(images, truths, founds, ["one", "two"], crowds)
    (x0, x1, y1, y0), (u0, u1, v1, v0) = (image.get_extent() for image in figure.axes[0].images)
    assert (x1 - x0) / (y1 - y0) == pytest.approx(2) and (v1 - v0) / (u1 - u0) == pytest.approx(3)
    legend_and = rectangles(figure, plots.TRUTH)
    assert legend_and[0] == pytest.approx((
        x0 + (x1 - x0) / 4, y0 + (y1 - y0) / 4, x0 + 3 * (x1 - x0) / 4, y0 + 3 * (y1 - y0) / 4))
    edge = 0.8  # half a line: it is drawn inside
    assert rectangles(figure, plots.FOUND)[0] == pytest.approx((
        u0 + edge, v0 + edge, (u0 + u1) / 2, v0 + (v1 - v0) / 5))
    assert rectangles(figure, plots.TRUTH, hatched=True)[0] == pytest.approx(
        (u0 + edge, v0 + edge, u1 - edge, v1 - edge))
    assert {"cat", "dog 0.90", "one", "two", "annotated", "crowd region"} <= set(
        texts(figure).splitlines())


def test_labels_stay_in_the_picture_and_off_one_another():
    """Forty boxes at all edges with long names: some are left out, none lies upon another."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate((rng.uniform(0, 1, (40, 2)), rng.uniform(0.01, 0.4, (40, 2))), 1)
    words = [f"a long name {n}" for n in range(40)]
    figure = plots.box_grid([np.zeros((150, 200, 3), np.uint8)] * 5, [(boxes, words)] * 5)
    labels = [patch.get_extents().transformed(figure.axes[0].transData.inverted())
              for patch in figure.axes[0].patches if patch.get_fill()]
    assert len(labels) % 5 == 0 and 5 <= len(labels) // 5 < 40
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    first = [(min(b.y0, b.y1), max(b.y0, b.y1), b.x0, b.x1) for b in labels[: len(labels) // 5]]
    for index, (low, high, start, end) in enumerate(first):
        assert left <= start + 1e-6 and end <= right + 1e-6
        assert top <= low + 1e-6 and high <= bottom + 1e-6
        assert not any(start < e - 1e-6 and s < end - 1e-6 and low < h - 1e-6 and lo < high - 1e-6
                       for lo, h, s, e in first[:index])


def test_without_found_boxes_there_is_no_legend_and_an_empty_text_is_no_label():
    image, boxes = np.zeros((50, 50, 3), np.uint8), np.array([[0.5, 0.5, 0.2, 0.2]] * 2)
    figure = plots.box_grid([image], [(boxes, ["", "seven"])])
    assert texts(figure).split() == ["seven"]


def sources(page):
    return [(kind, base64.b64decode(data).decode("latin-1"))
            for kind, data in re.findall(r'data:image/([a-z+]+);base64,([^"]+)"', page)]


def test_a_figure_comes_light_and_dark_wide_and_narrow():
    page = plots.html(lambda: plots.loss_curves(train_records(30)), 'loss <falls> "fast"')
    found = sources(page)
    assert [kind for kind, _ in found] == ["svg+xml"] * 4
    assert len({image for _, image in found}) == 4
    for image, theme in zip(found, [plots.LIGHT] * 2 + [plots.DARK] * 2, strict=True):
        assert theme.paper in image[1]
    assert re.findall(r'<picture class="(sd-\w+)"( hidden)?>', page) == [
        ("sd-light", ""), ("sd-dark", " hidden")]
    assert page.count('alt="loss &lt;falls&gt; &quot;fast&quot;"') == 2
    assert page.count('media="(max-width: 600px)"') == 2


def test_pictures_are_compressed_and_lines_are_drawn():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    page = plots.html(lambda: plots.image_grid([noise] * 16, [""] * 16), "noise")
    assert [kind for kind, _ in sources(page)] == ["webp", "webp"]


def test_a_figure_of_a_long_run_stays_small():
    generator = np.random.default_rng(0)
    records = [row | {"loss": row["loss"] + generator.random()} for row in train_records(20_000)]
    assert len(plots.html(lambda: plots.loss_curves(records), "loss")) < 400_000


def test_numbers_in_labels_survive_the_shortening_of_coordinates():
    page = plots.html(lambda: plots.schedule([0, 1], [0.123456, 0.98765]), "schedule")
    assert "initial 1.23e-01" in sources(page)[0][1]


def test_drawing_leaves_matplotlib_as_it_was_and_pyplot_alone():
    code = (
        "import sys, matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "from lib.watch import plots\n"
        "plots.html(lambda: plots.schedule([0, 1], [0.1, 0.2]), 'x')\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
