"""Every picture of a run in one house style, light and dark, wide and narrow.

A plot function takes records or arrays and returns a matplotlib Figure; `show` puts it into a
notebook. It draws the figure once for each look, and the page's CSS picks one: dark where the
reader's system or JupyterLab's theme is dark, narrow on a phone, always light on paper. Nothing
touches pyplot's state, so a plot may be drawn from any thread.
"""

import base64
import functools
import html as html_text
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDE, NARROW = 760, 350
"""Widths a figure is drawn at, CSS pixels: on a desk, and on a phone."""
MAX_POINTS = 1500
"""Most points of a drawn line: about two a pixel."""
NOT_TERMS = {"kind", "stage", "step", "time", "lr", "grad_norm", "epoch", "images", "seconds",
             "wait", "smoothed", "loss", "updated", "scale", "memory"}
"""Names in a step record that are not terms of the loss."""


# --------------------------------------------------------------------------------------------
# The house style
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    """Colours of one look; the series are Okabe and Ito's, told apart with any colour vision."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    """blue, vermillion, green, purple, amber, sky"""


LIGHT = Theme("light", "#ffffff", "#22262c", "#626a75", "#e7e9ec",
              ("#0068a8", "#c8501a", "#00805f", "#a2548a", "#9a6700", "#3b93cf"))
DARK = Theme("dark", "#14171b", "#e3e6ea", "#98a1ac", "#2a2f36",
             ("#62b1ec", "#f58f5b", "#45c9a1", "#dc9cc6", "#e3b54a", "#9bd2f7"))

_look: ContextVar[tuple[Theme, int]] = ContextVar("look", default=(LIGHT, WIDE))


def _style(theme: Theme) -> dict:
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 8.6,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 8.6,
        "axes.titlesize": 9.4,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "axes.titlepad": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.prop_cycle": matplotlib.cycler(color=theme.series),
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "lines.linewidth": 1.5,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 8.2,
        "ytick.labelsize": 8.2,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "xtick.major.size": 3,
        "xtick.minor.size": 0,
        "legend.frameon": False,
        "figure.constrained_layout.h_pad": 0.03,
        "figure.constrained_layout.w_pad": 0.03,
        "svg.fonttype": "none",
        "svg.hashsalt": "shakedown",
    }


@contextmanager
def _dressed(theme: Theme, width: int) -> Iterator[None]:
    """Figures made in here wear `theme` and are `width` CSS pixels wide."""
    token = _look.set((theme, width))
    try:
        with matplotlib.rc_context(_style(theme)):
            yield
    finally:
        _look.reset(token)


def _house(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """The house style for a plot function, also where it is called outside `show`."""

    @functools.wraps(draw)
    def dressed(*args, **named):
        with _dressed(*_look.get()):
            return draw(*args, **named)

    return dressed


def _theme() -> Theme:
    return _look.get()[0]


def _is_narrow() -> bool:
    return _look.get()[1] == NARROW


def _figure(height: float, width: float = 0) -> Figure:
    """An empty figure `height` CSS pixels high and as wide as the look says."""
    return Figure(figsize=((width or _look.get()[1]) / 100, height / 100), dpi=100,
                  layout="constrained")


def _axes(
    figure: Figure, title: str, xlabel: str = "", note: str = "", position: object = 111
) -> Axes:
    """Axes whose name stands above them at the figure's left edge, a muted note beneath it."""
    axes = figure.add_subplot(position)
    axes.margins(x=0.01)
    beneath = textwrap.wrap(note, _look.get()[1] // 6)
    # The layout keeps room for an empty title; the words start where the page's text starts.
    axes.set_title("\n" * len(beneath) or " ")
    for text, look in (
        ("\n".join([title, *[""] * len(beneath)]), {"fontsize": 9.4, "fontweight": "bold"}),
        ("\n".join(beneath), {"color": _theme().muted}),
    ):
        axes.annotate(text, (0, 1), (1, 9), xycoords=("figure points", "axes fraction"),
                      textcoords="offset points", annotation_clip=False, **look,
                      ).set_in_layout(False)
    axes.set_xlabel(xlabel)
    # Ticks are made when the figure is drawn, which may be after the style was left.
    for axis, size in (("x", 3), ("y", 0)):
        axes.tick_params(axis, color=_theme().grid, labelcolor=_theme().muted, labelsize=8.2,
                         length=size)
        axes.tick_params(axis, which="minor", length=0)
    return axes


def _nothing(title: str, message: str) -> Figure:
    """A figure that says what is missing."""
    figure = _figure(90)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title)
    axes.text(0, 0.5, message, color=_theme().muted, transform=axes.transAxes, va="center")
    return figure


# --------------------------------------------------------------------------------------------
# Into the page
# --------------------------------------------------------------------------------------------

FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


def _svg(figure: Figure) -> bytes:
    """The figure as SVG in the page's own font, coordinates cut to a hundredth of a point."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' (?:d|transform|x|y|points)="[^"]*"',
                  lambda hit: re.sub(r"(\.\d\d)\d+", r"\1", hit[0]), text)
    text = re.sub(r"('DejaVu Sans'[^;\"]*)", FONT_STACK, text)
    return re.sub(r"\n\s*", "\n", text).encode()


def _webp(figure: Figure) -> bytes:
    """The figure as WebP, two pixels a CSS pixel."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=200, pil_kwargs={"quality": 88, "method": 4})
    return buffer.getvalue()


def _encode(figure: Figure) -> tuple[str, bool]:
    """(data URI, whether it is a raster picture): SVG for lines, WebP where there are images."""
    raster = any(axes.images for axes in figure.axes)
    kind, data = ("webp", _webp(figure)) if raster else ("svg+xml", _svg(figure))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", raster


def html(draw: Callable[[], Figure], alt: str) -> str:
    """The figure as one HTML element that follows the reader's colour scheme and screen."""
    alt = html_text.escape(alt, quote=True)
    pictures = []
    for theme in (LIGHT, DARK):
        with _dressed(theme, WIDE):
            figure = draw()
            width, height = (round(100 * side) for side in figure.get_size_inches())
            wide, raster = _encode(figure)
        source = ""
        if not raster:
            with _dressed(theme, NARROW):
                narrow, _ = _encode(draw())
            if narrow != wide:
                source = f'<source media="(max-width: 600px)" srcset="{narrow}">'
        # `hidden` keeps the dark one away where the style sheet was stripped.
        hidden = "" if theme is LIGHT else " hidden"
        pictures.append(
            f'<picture class="sd-{theme.name}"{hidden}>{source}'
            f'<img src="{wide}" alt="{alt}" width="{width}" height="{height}"></picture>'
        )
    kind = "sd-figure sd-raster" if raster else "sd-figure"
    return f'<div class="sd {kind}">{"".join(pictures)}</div>'


def show(draw: Callable[[], Figure], alt: str) -> None:
    """Display a figure in the notebook; `alt` says in words what it shows."""
    from lib.watch.report import display_html

    display_html(html(draw, alt), alt)


# --------------------------------------------------------------------------------------------
# Numbers and labels
# --------------------------------------------------------------------------------------------


def _series(rows: Iterable[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have `key`; non-finite values stay."""
    pairs = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def _finite(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    good = np.isfinite(ys)
    return xs[good], ys[good]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Each value's mean over a fortieth of the line around it, twice, so that nothing lags."""
    half = len(values) // 80
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[last] - sums[first]) / (last - first)
    return values


def decimate(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, fewer on a phone: the lowest and highest of each stretch."""
    most = MAX_POINTS * _look.get()[1] // WIDE
    if len(xs) <= most:
        return xs, ys
    kept = []
    for stretch in np.array_split(np.arange(len(xs)), most // 2):
        kept += sorted({stretch[ys[stretch].argmin()], stretch[ys[stretch].argmax()]})
    return xs[kept], ys[kept]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float, _position: int = 0) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e5 else _power(value)


def _power(value: float, _position: int = 0) -> str:
    """10⁻³ in plain text."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    exponent = math.log10(value) if value > 0 else 0
    if abs(exponent - round(exponent)) > 1e-6:
        return f"{value:g}"
    return "10" + str(round(exponent)).translate(digits)


METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "knn": "k-NN", "knn_random_init":
                "k-NN of random weights", "loss": "loss"}
SPLIT_NAMES = {"val": "validation", "train": "training", "test": "test"}


def metric_name(key: str) -> str:
    """`val/top1` as people read it: validation top-1."""
    split, _, name = key.rpartition("/")
    raw = name.endswith("_raw")
    name = METRIC_NAMES.get(name.removesuffix("_raw"), name.removesuffix("_raw").replace("_", " "))
    return f"{SPLIT_NAMES.get(split, split)} {name}".strip() + (" without EMA" if raw else "")


def _thousands(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(4 if _is_narrow() else 8, integer=True))


def _percents(axis: object, values: Sequence[float]) -> None:
    """Ticks in per cent, with a decimal only where the range is small."""
    spread = max(values) - min(values) if len(values) else 1
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{100 * x:.{1 if spread < 0.03 else 0}f} %"))


def _log_axis(axes: Axes, which: str) -> None:
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if low > 0 and high / low < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=6 if _is_narrow() else 12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power if which == "x" else _plain))


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's label (x, y, text, colour) right of its end, none upon another."""
    if not ends:
        return
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    place = math.log10 if log else float
    low, high = place(low), place(high)
    pixels = 100 * axes.figure.get_size_inches()[1] * axes.get_position().height
    gap = 14 / max(pixels, 40) * (high - low)
    right = max(x for x, _, _, _ in ends)
    wanted = sorted(ends, key=lambda end: end[1])
    heights = [place(y) for _, y, _, _ in wanted]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    overflow = max(0.0, heights[-1] - high)
    heights = [height - overflow for height in heights]
    for (_, _, text, colour), height in zip(wanted, heights, strict=True):
        axes.annotate(text, (right, 10**height if log else height), (7, 0),
                      textcoords="offset points", color=colour, va="center", fontsize=8.4,
                      fontweight="bold", annotation_clip=False)


def _step_label(rows: list[dict]) -> str:
    """`step`, with the epochs that the last one stands for."""
    epochs = next((row["epoch"] for row in reversed(rows) if row.get("epoch") is not None), None)
    return "step" if epochs is None else f"step  ({epochs:.3g} epochs)"


def _rows(records: Iterable[dict], kind: str, stage: str) -> list[dict]:
    return [row for row in records if row["kind"] == kind and row.get("stage") == stage]


def _mark_resumes(axes: Axes, records: Iterable[dict]) -> None:
    """A dotted line where the run was taken up again."""
    for row in _rows(records, "event", "train"):
        if row.get("event") == "resumed" and "step" in row:
            axes.axvline(row["step"], color=_theme().muted, linewidth=0.8, linestyle=":")
            axes.annotate("resumed", (row["step"], 1), (3, -2), xycoords=("data", "axes fraction"),
                          textcoords="offset points", fontsize=7.6, color=_theme().muted, va="top")


# --------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------


@_house
def loss_curves(records: Sequence[dict]) -> Figure:
    """The train stage's loss: each step pale, smoothed over it, its terms, and validation."""
    rows = _rows(records, "step", "train")
    if not rows:
        return _nothing("Loss", "no training step recorded")
    theme = _theme()
    figure = _figure(300)
    axes = _axes(figure, "Loss", _step_label(rows))
    steps, losses = _series(rows, "loss")
    lines, seen = [], [losses]
    good_steps, good = _finite(steps, losses)
    if len(good):
        axes.plot(*decimate(good_steps, good), color=theme.series[0], alpha=0.25, linewidth=0.8)
        lines.append(("training", theme.series[0], good_steps, _smooth(good), "-"))
    terms = sorted({key for row in rows for key in row if key not in NOT_TERMS})
    terms = [term for term in terms
             if not np.array_equal(_series(rows, term)[1], losses, equal_nan=True)]
    if any(term.endswith("_weighted") for term in terms):  # the parts that add up to the loss
        terms = [term for term in terms if term.endswith("_weighted") or term == "last_layer"]
    for term, colour in zip(terms, theme.series[2:], strict=False):
        xs, ys = _finite(*_series(rows, term))
        if len(ys):
            lines.append((term.replace("_", " "), colour, xs, _smooth(ys), "-"))
            seen.append(ys)
    xs, ys = _finite(*_series(_rows(records, "eval", "train"), "val/loss"))
    if len(ys):
        lines.append(("validation", theme.series[1], xs, ys, "o-"))
    for _, colour, xs, ys, style in lines:
        axes.plot(*decimate(xs, ys), style, color=colour, markersize=3)
    _thousands(axes)
    smoothed = np.concatenate([ys for _, _, _, ys, _ in lines]) if lines else np.ones(1)
    if smoothed.min() > 0 and smoothed.max() / smoothed.min() > 100:
        _log_axis(axes, "y")
    elif smoothed.min() >= 0:
        # A wild first step must not flatten all the rest.
        axes.set_ylim(0, 1.06 * max(smoothed.max(), np.quantile(np.nan_to_num(good), 0.99)
                                    if len(good) else 1))
    _label_ends(axes, [(xs[-1], ys[-1], f"{name} {_number(ys[-1])}", colour)
                       for name, colour, xs, ys, _ in lines])
    if len(good) < len(losses):
        first = steps[~np.isfinite(losses)][0]
        axes.axvline(first, color=theme.series[1], linewidth=1)
        axes.annotate(f"not finite at step {first:,.0f}", (first, 1), (-4, -2),
                      xycoords=("data", "axes fraction"), textcoords="offset points", ha="right",
                      va="top", color=theme.series[1], fontweight="bold")
    _mark_resumes(axes, records)
    return figure


@_house
def metric_curves(records: Sequence[dict]) -> Figure:
    """Validation metrics over the train stage; the headline also without EMA, dashed."""
    rows = _rows(records, "eval", "train")
    keys = [key for key in dict.fromkeys(key for row in rows for key in row)
            if "/" in key and not key.endswith(("loss", "_raw", "_relabelled"))]
    if not keys:
        return _nothing("Validation", "no evaluation recorded")
    planned = [row["headline"] for row in _rows(records, "event", "train") if "headline" in row]
    keys.sort(key=lambda key: key not in planned)  # the headline first, the others as they come
    theme = _theme()
    figure = _figure(300)
    axes = _axes(figure, "Validation", _step_label(_rows(records, "step", "train")))
    ends, seen = [], []
    shares = all(0 <= float(row[key]) <= 1 for row in rows for key in keys if key in row)
    show_value = _percent if shares else _number
    for key, colour in zip(keys, theme.series, strict=False):
        name = metric_name(key).removeprefix("validation ")
        lines = [(key, name, "o-", 1.5)]
        if key == keys[0]:  # of the others, the raw line would only be one more
            lines.append((f"{key}_raw", f"{name} raw", "--", 1.0))
        for source, label, style, width in lines:
            xs, ys = _finite(*_series(rows, source))
            if len(ys):
                seen += list(ys)
                axes.plot(xs, ys, style, color=colour, markersize=3, linewidth=width)
                ends.append((xs[-1], ys[-1], f"{label} {show_value(ys[-1])}", colour))
    first_x, first_y = _finite(*_series(rows, keys[0]))
    if len(first_y) > 1:
        best = first_y.argmax()
        axes.plot(first_x[best], first_y[best], "o", markersize=7, markerfacecolor="none",
                  markeredgecolor=theme.ink, markeredgewidth=1)
    _thousands(axes)
    if shares:
        _percents(axes.yaxis, seen)
    _label_ends(axes, ends)
    _mark_resumes(axes, records)
    return figure


@_house
def lr_curve(records_or_pairs: Sequence) -> Figure:
    """The learning rate that was used: from the train stage's records, or (step, lr) pairs."""
    rows = list(records_or_pairs)
    if rows and isinstance(rows[0], dict):
        rows = _rows(rows, "step", "train")
        label = _step_label(rows)
        steps, lrs = _series(rows, "lr")
    else:
        label = "step"
        steps, lrs = (np.asarray(side, float) for side in (zip(*rows, strict=True) if rows
                                                            else ((), ())))
    if not len(steps):
        return _nothing("Learning rate", "no training step recorded")
    figure = _figure(230)
    axes = _axes(figure, "Learning rate", label, _schedule_note(lrs))
    _draw_schedule(axes, steps, lrs)
    return figure


@_house
def schedule(
    steps: Sequence[int], lrs: Sequence[float], epochs: Sequence[float] | None = None
) -> Figure:
    """The simulated learning-rate schedule, its first, highest and last value written out."""
    figure = _figure(240)
    label = "step" if epochs is None or not len(epochs) else f"step  ({epochs[-1]:.3g} epochs)"
    lrs = np.asarray(lrs, float)
    axes = _axes(figure, "Learning rate, simulated", label, _schedule_note(lrs))
    _draw_schedule(axes, np.asarray(steps, float), lrs)
    return figure


def _draw_schedule(axes: Axes, steps: np.ndarray, lrs: np.ndarray) -> None:
    colour = _theme().series[0]
    axes.plot(*decimate(steps, lrs), color=colour, linewidth=1.7)
    axes.set_ylim(0, max(lrs.max() * 1.08, 1e-12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _thousands(axes)
    peak = int(lrs.argmax())
    for index in (0, peak, len(lrs) - 1):
        axes.plot(steps[index], lrs[index], "o", color=colour, markersize=5, clip_on=False,
                  zorder=3)


def _schedule_note(lrs: np.ndarray) -> str:
    return f"initial {lrs[0]:.2e} · peak {lrs.max():.2e} · final {lrs[-1]:.2e}"


@_house
def lr_sweep(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestion: float | None,
    divergence: float | None,
    used_lr: float | None = None,
    reason: str = "",
) -> Figure:
    """The LR finder's sweep: the suggestion marked, or why there is none."""
    theme = _theme()
    lrs, losses, smoothed = (np.asarray(side, float) for side in (lrs, losses, smoothed))
    figure = _figure(320)
    missing = f"no suggestion{': ' if reason else ''}{reason}" if suggestion is None else ""
    axes = _axes(figure, "Loss over the learning rate", "learning rate", missing)
    axes.plot(*decimate(*_finite(lrs, losses)), color=theme.series[0], alpha=0.28, linewidth=0.9)
    xs, ys = _finite(lrs, smoothed)
    axes.plot(*decimate(xs, ys), color=theme.series[0], linewidth=1.9)
    _log_axis(axes, "x")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    if len(ys):  # the explosion at the end is cut off: the valley is what is read
        low, start = ys.min(), ys[: max(1, len(ys) // 10)].max()
        room = max(start - low, 0.05 * abs(start), 1e-6)
        axes.set_ylim(low - 0.16 * room, start + 0.42 * room)
        axes.set_xlim(lrs.min(), lrs.max())
    if divergence is not None:
        axes.axvspan(divergence, lrs.max(), color=theme.series[1], alpha=0.09, linewidth=0)
        axes.annotate("diverges", (divergence, 0), (5, 7), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color=theme.series[1], fontsize=8.2)
    if suggestion is not None:
        height = np.interp(math.log(suggestion), np.log(xs), ys)
        axes.plot([suggestion] * 2, [axes.get_ylim()[0], height], color=theme.ink, linewidth=1)
        axes.plot(suggestion, height, "o", color=theme.ink, markersize=6)
        left = math.log(suggestion / lrs.min()) > 0.4 * math.log(lrs.max() / lrs.min())
        axes.annotate(f"suggestion {suggestion:.2e}", (suggestion, 0), (-7 if left else 7, 8),
                      xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="right" if left else "left", fontweight="bold")
    if used_lr is not None and (suggestion is None or abs(math.log(used_lr / suggestion)) > 0.01):
        axes.axvline(used_lr, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(f"params {used_lr:.2e}", (used_lr, 1), (4, -4),
                      xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
                      color=theme.muted, fontsize=8.2)
    return figure


@_house
def overfit_curve(records: Sequence[dict]) -> Figure:
    """The overfit stage's loss on its frozen batches, logarithmic."""
    rows = _rows(records, "step", "overfit")
    steps, losses = _finite(*_series(rows, "loss"))
    if not len(losses):
        return _nothing("Loss on the frozen batches", "no step recorded")
    theme = _theme()
    figure = _figure(280)
    axes = _axes(figure, "Loss on the frozen batches", "step")
    axes.plot(*decimate(steps, losses), color=theme.series[0], linewidth=1.7)
    if losses.min() > 0:
        _log_axis(axes, "y")
    _thousands(axes)
    axes.annotate(f"initial {_number(losses[0])}", (steps[0], losses[0]), (8, 2),
                  textcoords="offset points", fontweight="bold", fontsize=8.4)
    _label_ends(axes, [(steps[-1], losses[-1], f"final {_number(losses[-1])}", theme.series[0])])
    return figure


@_house
def speed(records: Sequence[dict]) -> Figure:
    """Images a second after warm-up, and below it the share of each step spent waiting."""
    rows = [row for row in _rows(records, "step", "train") if row.get("seconds", 0) > 0]
    from lib.watch.diagnose import num_warmup

    rows = rows[num_warmup(len(rows)):]
    if not rows:
        return _nothing("Speed", "no training step recorded")
    theme = _theme()
    steps = np.array([row["step"] for row in rows], float)
    seconds = np.array([row["seconds"] for row in rows])
    rate = np.array([row["images"] for row in rows]) / seconds
    waiting = np.array([row.get("wait", 0.0) for row in rows]) / seconds
    figure = _figure(350)
    grid = figure.add_gridspec(2, 1, height_ratios=(2, 1), hspace=0.12)
    axes = _axes(figure, "Images a second, after warm-up", "", position=grid[0])
    axes.plot(*decimate(steps, rate), color=theme.series[0], alpha=0.25, linewidth=0.8)
    axes.plot(*decimate(steps, _smooth(rate)), color=theme.series[0])
    axes.set_ylim(0, 1.08 * np.quantile(rate, 0.99))
    median = sum(row["images"] for row in rows) / seconds.sum()
    _label_ends(axes, [(steps[-1], median, f"mean {_number(median)}", theme.series[0])])
    axes.tick_params("x", labelbottom=False)
    _thousands(axes)
    below = _axes(figure, "Share of the step spent waiting for data", _step_label(rows),
                  position=grid[1])
    below.fill_between(*decimate(steps, _smooth(waiting)), color=theme.series[4], alpha=0.55,
                       linewidth=0)
    share = waiting @ seconds / seconds.sum()
    below.set_ylim(0, max(0.1, min(1.0, 1.5 * float(np.quantile(waiting, 0.98)))))
    below.yaxis.set_major_locator(MaxNLocator(2))
    _percents(below.yaxis, (0, 1))
    _label_ends(below, [(steps[-1], share, f"mean {_percent(share)}", theme.series[4])])
    _thousands(below)
    return figure


# --------------------------------------------------------------------------------------------
# Classes
# --------------------------------------------------------------------------------------------


def _short(name: str, most: int = 22) -> str:
    name = str(name)
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


@_house
def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Which class (row) was taken for which (column); colour is the share of the row.

    Right answers are blue, mistakes vermillion. Up to 20 classes carry their counts, up to 60
    their names; more are pooled by maximum, so that a single strong confusion stays visible.
    """
    theme = _theme()
    counts = np.asarray(matrix, float)
    count = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(count, dtype=bool)
    pool = math.ceil(count / 240)
    if pool > 1:
        share, right = _pool(share, right, pool)
    colours = np.empty((*share.shape, 4))
    for mask, colour in ((right, theme.series[0]), (~right, theme.series[1])):
        ramp = LinearSegmentedColormap.from_list("", [theme.paper, colour])
        # The root lifts small shares; a mistake of 1 in 20 must be seen.
        colours[mask] = ramp(np.sqrt(share[mask]))
    named, numbered = count <= 60, count <= 20
    side = min(WIDE, 200 + 44 * count) if numbered else 620
    figure = _figure(side * 0.92, side)
    axes = figure.add_subplot()
    axes.grid(False)
    axes.imshow(colours, interpolation="nearest", extent=(-0.5, count - 0.5, count - 0.5, -0.5))
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")
    axes.tick_params(length=0, labelsize=8.2 if numbered else 6.4, labelcolor=theme.ink)
    if named:
        labels = [_short(name, 16) for name in class_names]
        long = max(map(len, labels)) > 4
        axes.set_xticks(range(count), labels, rotation=55 if long else 0,
                        ha="right" if long else "center", rotation_mode="anchor")
        axes.set_yticks(range(count), labels)
    if numbered:
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = share[row, column] > 0.35
            axes.text(column, row, f"{counts[row, column]:,.0f}", ha="center", va="center",
                      color=theme.paper if dark else theme.ink, fontsize=8.4,
                      fontweight="bold" if row == column else "normal")
        for edge in np.arange(0.5, count - 1):
            axes.axhline(edge, color=theme.grid, linewidth=0.5)
            axes.axvline(edge, color=theme.grid, linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(theme.grid)
    return figure


def _pool(share: np.ndarray, right: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of `size` x `size` cells: their largest mistake, or the diagonal's mean."""
    count = len(share)
    blocks = math.ceil(count / size)
    padding = [(0, blocks * size - count)] * 2
    mistakes = np.pad(np.where(right, 0, share), padding)
    pooled = mistakes.reshape(blocks, size, blocks, size).max((1, 3))
    diagonal = [np.diag(share)[start: start + size].mean() for start in range(0, count, size)]
    np.fill_diagonal(pooled, diagonal)
    return pooled, np.eye(blocks, dtype=bool)


@_house
def bars_with_intervals(
    names: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    title: str = "Accuracy by class, with its 95 % interval",
    note: str = "",
) -> Figure:
    """A share for each name, with a range around it; of many names, the 30 lowest."""
    theme = _theme()
    order = list(range(len(names)))
    if len(order) > 40:
        note = f"{note}{'; ' * bool(note)}the lowest 30 of {len(order):,}"
        order = sorted(order, key=lambda index: values[index])[:30]
    figure = _figure(70 + 21 * len(order))
    axes = _axes(figure, title, note=note)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    for place, index in enumerate(order):
        axes.plot([lows[index], highs[index]], [place, place], color=theme.series[0], alpha=0.35,
                  linewidth=5, solid_capstyle="round")
        axes.plot(values[index], place, "o", color=theme.series[0], markersize=5, clip_on=False,
                  zorder=3)
        axes.annotate(_percent(values[index]), (1, place), (8, 0), va="center", fontsize=8.2,
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      color=theme.ink, annotation_clip=False)
    axes.set_yticks(range(len(order)), [_short(names[index]) for index in order])
    axes.tick_params("y", labelcolor=theme.ink)
    axes.invert_yaxis()
    chosen = [lows[index] for index in order]
    axes.set_xlim(max(0.0, min(chosen, default=0) - 0.02), 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if _is_narrow() else 7))
    _percents(axes.xaxis, axes.get_xlim())
    return figure


@_house
def precision_recall(
    recalls: Sequence[float],
    curves: dict[str, np.ndarray],
    class_curves: np.ndarray | None = None,
) -> Figure:
    """Precision at each recall; a curve's mean, written beside its name, is its AP.

    recalls: (R,) rising from 0 to 1. curves: (R,) each, over all classes. class_curves: (K, R),
    drawn thin and pale; NaN for a class without ground truth.
    """
    theme = _theme()
    if not any(np.isfinite(curve).any() for curve in curves.values()):
        return _nothing("Precision over recall", "no object to measure it on")
    figure = _figure(400 if _is_narrow() else 340)
    thin = class_curves is not None and np.isfinite(class_curves).any()
    axes = _axes(figure, "Precision over recall", "recall",
                 "thin: single classes at IoU 0.5" if thin else "")
    if thin:
        for curve in class_curves[np.isfinite(class_curves).all(1)]:
            axes.plot(recalls, curve, color=theme.muted, alpha=0.4, linewidth=0.8)
    lines = []
    for (label, curve), colour, style in zip(curves.items(), theme.series, ("-", "--", "-."),
                                             strict=False):
        lines += axes.plot(recalls, curve, style, color=colour, linewidth=2, clip_on=False,
                           label=f"{label}: {_percent(np.nanmean(curve))}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        _percents(axis, (0, 1))
    # Below the axes: a curve may lie anywhere on them.
    figure.legend(handles=lines, loc="outside lower left", ncols=1 if _is_narrow() else len(lines),
                  handlelength=2.6, fontsize=8.4, labelcolor="linecolor")
    return figure


@_house
def histogram(counts: Sequence[float], names: Sequence[str]) -> Figure:
    """Images in each class: a bar a class, or for many classes their sorted outline."""
    theme = _theme()
    counts = np.asarray(counts, float)
    if len(counts) <= 30:
        figure = _figure(56 + 19 * len(counts))
        axes = _axes(figure, "Images by class")
        axes.grid(False)
        axes.barh(range(len(counts)), counts, color=theme.series[0], height=0.66)
        for place, count in enumerate(counts):
            axes.annotate(f"{count:,.0f}", (count, place), (5, 0), va="center", fontsize=8.2,
                          textcoords="offset points", annotation_clip=False)
        axes.set_yticks(range(len(counts)), [_short(name) for name in names])
        axes.tick_params("y", labelcolor=theme.ink)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return figure
    figure = _figure(240)
    axes = _axes(figure, "Images by class, sorted", f"{len(counts):,} classes")
    ranked = np.sort(counts)[::-1]
    axes.fill_between(np.arange(len(ranked)), ranked, step="mid", color=theme.series[0],
                      alpha=0.8, linewidth=0)
    axes.set_ylim(0)
    axes.set_xlim(0, len(ranked) - 1)
    axes.set_xticks([])
    _label_ends(axes, [(len(ranked) - 1, ranked[0], f"most {ranked[0]:,.0f}", theme.muted),
                       (len(ranked) - 1, np.median(ranked), f"median {np.median(ranked):,.0f}",
                        theme.ink),
                       (len(ranked) - 1, ranked[-1], f"least {ranked[-1]:,.0f}", theme.muted)])
    return figure


# --------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------

TRUTH, FOUND, CASING = DARK.series[0], DARK.series[4], "#14171b"
"""Blue and amber, told apart with any colour vision; on a photograph both need a dark edge."""
LABEL_SIZE, LABEL_HEIGHT = 6.4, 11  # points; CSS pixels of the box around a label


@_house
def image_grid(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8
) -> Figure:
    """Pictures (height, width[, 3]) uint8 in a grid, a small caption under each."""
    if not len(images):
        return _nothing("", "no picture")
    figure, _ = _pictures(images, captions, min(columns, max(4, len(images))))
    return figure


def _pictures(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int, header: int = 0
) -> tuple[Figure, list[tuple[float, float, float, float]]]:
    """The grid, and where each picture lies: left, top, width, height on its one axes.

    The axes' coordinates are CSS pixels from the upper left; `header` of them stay free there.
    """
    theme = _theme()
    lines = max((str(caption).count("\n") + 1 for caption in captions if caption), default=0)
    gap, line_height = 12, 13
    side = (WIDE - gap * (columns - 1)) / columns
    shapes = [np.shape(image)[:2] for image in images]
    sizes = [(side * wide / max(tall, wide), side * tall / max(tall, wide))
             for tall, wide in shapes]
    heights = [max(tall for _, tall in sizes[first: first + columns])
               for first in range(0, len(images), columns)]  # of each row of the grid
    below = lines * line_height + gap
    figure_height = header + sum(heights) + below * len(heights)
    figure = Figure(figsize=(WIDE / 100, figure_height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    places = []
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        pixels = np.asarray(image)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        wide, tall = sizes[index]
        left = column * (side + gap)
        bottom = header + sum(heights[: row + 1]) + below * row
        places.append((left, bottom - tall, wide, tall))
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255,
                    extent=(left, left + wide, bottom, bottom - tall),
                    interpolation="nearest" if side > max(shapes[index]) else "antialiased")
        axes.add_patch(Rectangle((left, bottom - tall), wide, tall, fill=False, linewidth=0.7,
                                 edgecolor=theme.grid))
        caption = str(captions[index]) if index < len(captions) else ""
        for line, words in enumerate(caption.splitlines()):
            axes.text(left, bottom + 4 + line_height * line, _short(words, int(side / 5.6)),
                      va="top", fontsize=7.3, color=theme.muted if line else theme.ink)
    axes.set_xlim(-0.5, WIDE + 0.5)
    axes.set_ylim(figure_height, -0.5)
    axes.set_aspect("auto")
    return figure, places


Labelled = tuple[np.ndarray, Sequence[str]]
"""Boxes (n, 4), cxcywh normalized by their picture, and a short text for each."""


@_house
def box_grid(
    images: Sequence[np.ndarray],
    truths: Sequence[Labelled],
    founds: Sequence[Labelled] | None = None,
    captions: Sequence[str] = (),
    crowds: Sequence[np.ndarray] | None = None,
) -> Figure:
    """Pictures (height, width[, 1 or 3]) uint8 of any sizes, with boxes drawn in them.

    True boxes are solid, found ones dashed, crowd regions (n, 4) hatched. A box with an empty text
    has no label, nor one whose label finds no free place in its picture.
    """
    if not len(images):
        return _nothing("", "no picture")
    columns = 2 if len(images) <= 4 else 3 if len(images) <= 12 else 4
    figure, places = _pictures(images, captions, columns, header=22 if founds is not None else 0)
    axes = figure.axes[0]
    for index, place in enumerate(places):
        for box in () if crowds is None else crowds[index]:
            _draw_box(axes, _inside(box, place), TRUTH, hatch="////")
        taken: list[tuple[float, float, float, float]] = []
        kinds = [(*truths[index], TRUTH, False)]
        if founds is not None:
            kinds.append((*founds[index], FOUND, True))
        for boxes, _, colour, dashed in kinds:
            for box in boxes:
                _draw_box(axes, _inside(box, place), colour, dashed)
        # Found boxes, the fewer, choose first: their labels hang below, true ones' stand above.
        for boxes, words, colour, below in reversed(kinds):
            for box, text in zip(boxes, words, strict=True):
                if text:
                    _label_box(axes, _inside(box, place), text, colour, place, taken, below)
    if founds is not None:
        _box_legend(axes, crowds is not None and any(map(len, crowds)))
    return figure


def _inside(box: np.ndarray, place: tuple) -> tuple[float, float, float, float]:
    """A normalized cxcywh box as left, top, right, bottom on the axes, its line in the picture."""
    left, top, wide, tall = place
    cx, cy, w, h = map(float, box)
    xs = (np.clip((cx - w / 2, cx + w / 2), 0, 1) * wide).clip(0.8, wide - 0.8) + left
    ys = (np.clip((cy - h / 2, cy + h / 2), 0, 1) * tall).clip(0.8, tall - 0.8) + top
    return float(xs[0]), float(ys[0]), float(xs[1]), float(ys[1])


def _draw_box(
    axes: Axes, corners: tuple, colour: str, dashed: bool = False, hatch: str = ""
) -> None:
    left, top, right, bottom = corners
    for edge, width, alpha, inner in ((CASING, 2.4, 0.6, ""), (colour, 1.3, 1.0, hatch)):
        # Dashes count in line widths: these end in the same places, and leave a box below visible.
        style = (0, (4.5 / width, 2.6 / width)) if dashed else "-"
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False,
                                 edgecolor=edge, linewidth=width, alpha=alpha, linestyle=style,
                                 hatch=inner, capstyle="butt"))


def _label_box(
    axes: Axes, corners: tuple, text: str, colour: str, picture: tuple, taken: list, below: bool
) -> None:
    """Write a label at its box, inside the picture and upon no other; where none fits, nothing."""
    text = _short(text, 26)
    font = FontProperties(family="DejaVu Sans", size=LABEL_SIZE, weight="bold")
    # Points to CSS pixels, and room at both sides.
    width = text_to_path.get_text_width_height_descent(text, font, False)[0] * 100 / 72 + 4
    (left, top, right, bottom), height = corners, LABEL_HEIGHT
    heights = [bottom, bottom - height, top, top - height]
    x0, y0, wide, tall = picture
    for y in [*(heights if below else heights[::-1]), (top + bottom - height) / 2]:
        for x in (left, right - width):
            x = min(max(x, x0), x0 + wide - width)
            if x < x0 or y < y0 or y + height > y0 + tall:
                continue
            if any(x < other[2] and other[0] < x + width and y < other[3] and other[1] < y + height
                   for other in taken):
                continue
            taken.append((x, y, x + width, y + height))
            axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0,
                                     alpha=0.88))
            axes.text(x + 2, y + height / 2, text, va="center_baseline", fontproperties=font,
                      color=CASING)
            return


def _box_legend(axes: Axes, with_crowds: bool) -> None:
    """What the lines mean, above the pictures."""
    x = 0
    for words, colour, dashed, hatch in (
        ("annotated", TRUTH, False, ""), ("found, with its score", FOUND, True, ""),
        ("crowd region", TRUTH, False, "////"),
    )[: 3 if with_crowds else 2]:
        _draw_box(axes, (x + 1, 2, x + 21, 13), colour, dashed, hatch)
        axes.text(x + 28, 7.5, words, va="center", fontsize=8.2, color=_theme().ink)
        x += 60 + 5.6 * len(words)
