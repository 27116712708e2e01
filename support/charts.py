"""Charts as SVG: a value by step as a line or single dots with intervals; shares as stacked bars.

Each step has a strip whose title tells its values, and alarms, [(step, text), ...], lie over all.
Titles, notes and names go in as they are; only the texts of alarms are escaped.
"""

import math
from html import escape
from itertools import chain

WIDTH, HEIGHT = 400, 190  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 44, 390, 10, 166  # the sides of the frame in it


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers from one to the other.

    >>> ticks(0, 1), ticks(3, 61)
    ([0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0], [20.0, 40.0, 60.0])
    """
    least = (high - low) / 5.01
    power = 10.0 ** math.floor(math.log10(least))
    size = next(times * power for times in (1, 2, 5, 10) if times * power >= least)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [i * size for i in range(first, last + 1)]


class Axes:
    """Steps from left to right, with half a step around, and values from low to high."""

    def __init__(self, steps: list[int], low: float, high: float):
        self.first, self.last, self.low, self.high = steps[0] - 0.5, steps[-1] + 0.5, low, high

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def point(self, step: float, value: float) -> str:
        return f"{self.x(step):.1f} {self.y(value):.1f}"

    def strip(self, step: int, low: float, high: float) -> str:
        """The path round what lies at a step between two values."""
        right, bottom, top = self.x(step + 0.5), self.y(low), self.y(high)
        return f"M{self.point(step - 0.5, low)}V{top:.1f}H{right:.1f}V{bottom:.1f}"

    def grid(self) -> list[str]:
        """Lines and labels at round values, and labels at round steps."""
        parts = []
        for value in ticks(self.low, self.high):
            y, text = self.y(value), f"{value:.4g}"
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for step in filter(float.is_integer, ticks(self.first, self.last)):
            place = f'x="{self.x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle"'
            parts.append(f"<text {place}>{step:.0f}</text>")
        return parts


def figure(title: str, note: str, axes: Axes, marks: list[str], tips: dict, alarms: list) -> str:
    """A chart: grid, marks, over them {step: what its strip tells}, and the alarms."""
    parts = axes.grid() + marks
    for step, told in tips.items():
        tip = f"<title>step {step}: {', '.join(told)}</title>"
        parts.append(f'<path class="hit" d="{axes.strip(step, axes.low, axes.high)}">{tip}</path>')
    for step, text in alarms:
        arrow = f"M{axes.x(step):.1f} {TOP + 8}l-5 -9h10l-5 9V{BOTTOM}"
        tip = f"<title>step {step}: {escape(text)}</title>"
        parts.append(f'<path class="alarm" d="{arrow}">{tip}</path>')
    ends = [f"{', '.join(tips[step])} at step {step}" for step in (min(tips), max(tips))]
    return (
        f'<figure><figcaption><b>{title}</b> <span class="soft">{note}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: {"; ".join(ends)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def interval(value: float, low: float, high: float) -> str:
    """ "0.5 [0.4, 0.6]", or the value alone where the interval has no length."""
    return f"{value:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low < high else "")


def curve(
    title: str,
    note: str,
    steps: list[int],
    alarms: list[tuple[int, str]],
    points: dict[int, tuple],
    bounds: tuple = (),
    dots: dict[int, tuple] | None = None,
) -> str:
    """One metric by step: points on a line and single dots, both {step: (value, low, high)} with
    the ends of an interval. The values of `bounds` are always in sight."""
    dots = dots or {}
    if not points and not dots:
        return ""
    values = [*bounds, *chain(*points.values(), *dots.values())]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or max(abs(high), 1) * 0.05
    if low not in bounds:
        low -= margin
    if high not in bounds or high == low:
        high += margin

    axes, line, band, tips = Axes(steps, low, high), "", "", {}
    for step, (value, bottom, top) in points.items():
        start = "L" if step - 1 in points else "M"  # a step without a value leaves a gap
        line += f"{start}{axes.point(step, value)}h.1"  # so that a point alone is seen
        if bottom < top:
            band += axes.strip(step, bottom, top)
        tips[step] = [interval(value, bottom, top)]
    marks = [f'<path class="band" d="{band}"/><path class="curve" d="{line}"/>']
    for step, (value, bottom, top) in dots.items():
        x, y = axes.point(step, value).split()
        marks.append(f'<path class="dev" d="M{axes.point(step, bottom)}V{axes.y(top):.1f}"/>')
        marks.append(f'<circle class="dev" cx="{x}" cy="{y}" r="3.5"/>')
        tips.setdefault(step, []).append(f"on dev {interval(value, bottom, top)}")
    return figure(title, note, axes, marks, tips, alarms)


def stack(title: str, steps: list[int], alarms: list, shares: dict, colours: dict) -> str:
    """{step: {name: share}} as bars, the shares of a step one on the other, the first below."""
    if not shares:
        return ""
    axes, legend, marks = Axes(steps, 0, 1), "", []
    bottoms, tips = dict.fromkeys(shares, 0.0), {step: [] for step in shares}
    for name, colour in colours.items():
        bars = ""
        for step, found in shares.items():
            if share := found.get(name):
                bars += axes.strip(step, bottoms[step], bottoms[step] + share)
                bottoms[step] += share
                tips[step].append(f"{name} {share:.0%}")
        marks.append(f'<path class="bars" fill="{colour}" d="{bars}"/>')
        legend += f'<span><i style="background:{colour}"></i>{name}</span> '
    return figure(title, legend, axes, marks, tips, alarms)
