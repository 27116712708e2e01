"""Student's interval of a mean over seeds, and questions decided by it."""

import statistics

from scipy.stats import t


def interval(values: list[float]) -> list[float]:
    """Mean and Student's 95% interval; no interval (NaN) for a single value."""
    mean, n = statistics.fmean(values), len(values)
    half = float("nan")
    if n > 1:
        half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return [mean, mean - half, mean + half]


def figure(row: dict, name: str) -> float:
    """A figure of an arm of one seed.

    Without more words it was measured after the last step; "start, NAME" is the base's, and "NAME
    over the steps" the mean of a curve's values.
    """
    if name.startswith("start, "):
        return row["start"][name.removeprefix("start, ")]
    curve = name.removesuffix(" over the steps")
    if curve == name:
        return row["after"][name]
    return statistics.fmean(value for _, value in row["curves"][curve])


def differences(rows: list[dict], arm: str, control: str, name: str) -> list[float]:
    """Of a figure, arm minus control, of each seed that has both."""
    of = {(row["arm"], row["seed"]): row for row in rows}
    seeds = [seed for arm_of, seed in of if arm_of == arm and (control, seed) in of]
    return [figure(of[arm, seed], name) - figure(of[control, seed], name) for seed in seeds]


def verdict(low: float, high: float) -> str:
    """Whether the interval of a difference lies above 0, below it, or holds it.

    >>> verdict(0.1, 0.3), verdict(-0.1, 0.3), verdict(-0.3, -0.1)
    ('an effect', 'no effect', 'harm')
    """
    if low > 0:
        return "an effect"
    return "harm" if high < 0 else "no effect"


def decided(rows: list[dict], question: dict, planned: int) -> dict:
    """A question with its difference, paired by seed, its interval, its seeds and its verdict.

    It is open until the planned number of seeds is there: whoever looks at every seed and stops at
    the first interval that pleases finds an effect too often.
    """
    pairs = differences(rows, question["arm"], question["control"], question["figure"])
    found = interval(pairs)
    said = (
        verdict(*found[1:]) if len(pairs) >= planned else f"open, {len(pairs)} of {planned} seeds"
    )
    return question | {"difference": found, "verdict": said}
