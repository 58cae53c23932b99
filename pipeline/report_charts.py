"""Line charts as inline SVG: no script, no font, colours from the page's own style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WIDTH = 480  # in units of the drawing, which is scaled to its column: about pixels on a desktop
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 10, 42
_POINTS = 600  # what a line of this width can show
_LOG_FROM_RATIO = 4.0
_FEWEST_TICKS = 4
COLOURS = 6  # of lines in one drawing; the style sheet names them s0 to s5
_MANTISSAS = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8))


@dataclass(frozen=True)
class Axis:
    """Maps the values `low` to `high` to drawing units `start` to `end`, and says where its ticks stand."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, values: Floats | float) -> Floats:
        scale: Callable[[Floats | float], Floats] = np.log if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        return np.asarray(self.start + (scale(values) - low) / (high - low) * (self.end - self.start))


def loss_chart(steps: Floats, loss: Floats, title: str, y_label: str) -> Markup:
    """The loss [N] over the steps [N] as an `svg` element: raw values faint, their running mean on top of them.

    Steps are increasing, losses finite, N at least 1. The loss axis is logarithmic where `uses_log` says so. With few
    points there is nothing to smooth: they are marked and joined.
    """
    log, height = uses_log(loss), 250
    steps, loss = thin(steps, loss)
    low, high = float(loss.min()), float(loss.max())
    room = (high / low) ** 0.05 if log else (high - low) * 0.06
    low, high = (low / room, high * room) if log else (low - room, high + room)
    across = make_axis(0.0, float(steps.max()), _LEFT, _WIDTH - _RIGHT)
    up = make_axis(low, high, height - _BOTTOM, _TOP, log=log)
    parts = [_y_ticks(up), _x_ticks(across, height), _x_name("optimizer step", height)]
    parts.append(_y_name(f"{y_label}, log scale" if log else y_label, (_TOP + height - _BOTTOM) / 2))
    window = smoothing_window(len(loss))
    if window > 1:
        parts.append(_line(across(steps), up(loss), "raw"))
    parts.append(_line(across(steps), up(running_mean(loss, window)), "line"))
    if window == 1:
        parts.append(_dots(across(steps), up(loss)))
    return _svg(title, height, parts)


def level_chart(levels: Floats, scores: Floats, title: str, y_label: str) -> Markup:
    """A score [N] over levels of noise [N] as an `svg` element, marked and joined. Levels are increasing, N >= 1."""
    height, room = 250, float(np.ptp(scores)) * 0.06
    across = make_axis(0.0, float(levels.max()), _LEFT, _WIDTH - _RIGHT)
    up = make_axis(float(scores.min()) - room, float(scores.max()) + room, height - _BOTTOM, _TOP)
    parts = [_y_ticks(up), _x_ticks(across, height), _x_name("noise on the tokens", height)]
    parts.append(_y_name(y_label, (_TOP + height - _BOTTOM) / 2))
    return _svg(title, height, [*parts, _line(across(levels), up(scores), "line"), _dots(across(levels), up(scores))])


@dataclass(frozen=True)
class Spot:
    """A row of `spread_chart`: its label, a value for each seed, and what others published of it."""

    label: str
    values: tuple[float, ...]
    published: tuple[float, ...] = ()


def spread_chart(spots: Sequence[Spot], title: str, x_label: str) -> Markup:
    """Means with one standard deviation to each side as an `svg` element, a row each; faint dots are single seeds.

    Published values are rings.
    """
    left, row = 12 + 7 * min(26, max(len(spot.label) for spot in spots)), 24
    height = _TOP + row * len(spots) + _BOTTOM
    every = [value for spot in spots for value in (*spot.values, *spot.published)]
    low, high = min(every), max(every)
    room = (high - low) * 0.08
    across = make_axis(low - room, high + room, left, _WIDTH - _RIGHT)
    parts = [_x_ticks(across, height), _x_name(x_label, height)]
    for place, spot in enumerate(spots):
        y = _TOP + row * (place + 0.5)
        mean, spread = float(np.mean(spot.values)), float(np.std(spot.values, ddof=1)) if len(spot.values) > 1 else 0.0
        a, b = float(across(mean - spread)), float(across(mean + spread))
        each = "".join(f'<circle cx="{float(across(one)):.1f}" cy="{y:.1f}" r="2.5"/>' for one in spot.values)
        parts += [
            f'<text class="name" x="{left - 9}" y="{y + 4:.1f}" text-anchor="end">{escape(spot.label[:26])}</text>',
            f'<line class="whisker" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/><g class="each">{each}</g>',
            f'<g class="dots"><circle cx="{float(across(mean)):.1f}" cy="{y:.1f}" r="3.8"/></g>',
            *(
                f'<circle class="published" cx="{float(across(one)):.1f}" cy="{y:.1f}" r="4.5"/>'
                for one in spot.published
            ),
        ]
    return _svg(title, height, parts)


def lines_chart(series: Sequence[tuple[Floats, Floats]], title: str, x_label: str, y_label: str) -> Markup:
    """Lines over one another as an `svg` element, each (x [N], y [N]) in a colour of its own, smoothed where dense.

    x is increasing, y finite, N at least 1, and there is at least one line.
    """
    height = 250
    drawn = [thin(x, running_mean(y, smoothing_window(len(y)))) for x, y in series]
    every = np.concatenate([y for _, y in drawn])
    log, low, high = uses_log(every), float(every.min()), float(every.max())
    room = (high / low) ** 0.05 if log else (high - low) * 0.06
    low, high = (low / room, high * room) if log else (low - room, high + room)
    across = make_axis(0.0, max(float(x.max()) for x, _ in drawn), _LEFT, _WIDTH - _RIGHT)
    up = make_axis(low, high, height - _BOTTOM, _TOP, log=log)
    parts = [_y_ticks(up), _x_ticks(across, height), _x_name(x_label, height)]
    parts.append(_y_name(f"{y_label}, log scale" if log else y_label, (_TOP + height - _BOTTOM) / 2))
    parts += [_line(across(x), up(y), f"s{place % COLOURS}") for place, (x, y) in enumerate(drawn)]
    return _svg(title, height, parts)


def rate_chart(steps: Floats, rate: Floats, title: str) -> Markup:
    """The learning rate [N] over the steps [N] as a low `svg` element, to stand below the loss and its step numbers."""
    steps, rate = thin(steps, rate)
    top, bottom = 12, 62
    across = make_axis(0.0, float(steps.max()), _LEFT, _WIDTH - _RIGHT)
    up = make_axis(0.0, float(rate.max()) or 1.0, bottom, top)
    ends = _y_ticks(replace(up, ticks=(0.0, up.ticks[-1]))) + _base(bottom)
    return _svg(
        title, bottom + 8, [ends, _y_name("lr", (top + bottom) / 2), _line(across(steps), up(rate), "line thin")]
    )


def uses_log(y: Floats) -> bool:
    """Whether a logarithmic axis shows more of these values."""
    return bool(y.min() > 0 and y.max() / y.min() > _LOG_FROM_RATIO)


def smoothing_window(count: int) -> int:
    """How many neighbouring points the running mean covers: a tenth of them, odd; 1 where there are few."""
    return 1 if count < 20 else count // 20 * 2 + 1


def running_mean(y: Floats, window: int) -> Floats:
    """The mean over `window` points around each [N]; at the ends, over as many as lie evenly around it."""
    if window == 1:
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    place = np.arange(len(y))
    reach = np.minimum(np.minimum(place, place[::-1]), window // 2)
    return np.asarray((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most `_POINTS` points: the means of equal runs of neighbours."""
    if len(x) <= _POINTS:
        return x, y
    runs = np.array_split(np.arange(len(x)), _POINTS)
    return np.array([x[run].mean() for run in runs]), np.array([y[run].mean() for run in runs])


def make_axis(low: float, high: float, start: float, end: float, *, log: bool = False) -> Axis:
    """An axis from `low` to `high`, which are pulled apart where they are one."""
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    return Axis(low, high, start, end, log, log_ticks(low, high) if log else linear_ticks(low, high))


def linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Four to seven round numbers from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / _FEWEST_TICKS))
    step = next(power * factor for factor in (5, 2.5, 2, 1) if power * factor * (_FEWEST_TICKS - 0.5) <= high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten between `low` and `high`, with the steps between them that are needed to make four."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        every = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
        ticks = tuple(tick for tick in every if low <= tick <= high)
        if len(ticks) >= _FEWEST_TICKS:
            return ticks if len(ticks) <= 2 * _FEWEST_TICKS else ticks[:: -(-len(ticks) // (2 * _FEWEST_TICKS))]
    return linear_ticks(low, high)


def tick_label(value: float) -> str:
    """`0.05`, `300`, `20k`, `1.5M`, `2e-05`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def _y_ticks(up: Axis) -> str:
    """Numbers at the left, and faint lines across the drawing."""
    drawn = []
    for tick in up.ticks:
        y = float(up(tick))
        if up.start - y > 3:  # the line at the very bottom is the other axis
            drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    return f'<g class="grid">{"".join(drawn)}</g>'


def _x_ticks(across: Axis, height: int) -> str:
    """The line below the drawing, with numbers under it."""
    bottom = height - _BOTTOM
    drawn = []
    for tick in across.ticks:
        x = float(across(tick))
        drawn.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick_label(tick)}</text>')
    return _base(bottom) + "".join(drawn)


def _base(y: float) -> str:
    return f'<g class="grid"><line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/></g>'


def _x_name(label: str, height: int) -> str:
    x = (_LEFT + _WIDTH - _RIGHT) / 2
    return f'<text x="{x:.1f}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>'


def _y_name(label: str, middle: float) -> str:
    return f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'


def _line(x: Floats, y: Floats, css_class: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{css_class}" points="{points}"/>'


def _dots(x: Floats, y: Floats) -> str:
    circles = (f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in zip(x, y, strict=True))
    return f'<g class="dots">{"".join(circles)}</g>'


def _svg(title: str, height: int, parts: Sequence[str]) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>")
