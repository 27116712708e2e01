"""Student's interval of a mean over seeds."""

import statistics

from scipy.stats import t


def interval(values: list[float]) -> list[float]:
    """Mean and Student's 95% interval; no interval (NaN) for a single value."""
    mean, n = statistics.fmean(values), len(values)
    half = float("nan")
    if n > 1:
        half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return [mean, mean - half, mean + half]
