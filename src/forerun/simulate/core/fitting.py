"""Two small estimators: a robust fit of positive constants around prior values, and least squares without negatives.

Conventions: residuals are logarithms of predicted over measured, so 0.08 is eight percent; constants are positive and
fitted in their logarithms. Left out: more than a handful of constants, correlated priors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NOISE = 0.06  # scatter of a good measurement about the best model, in logarithms
HUBER = 1.5  # residuals beyond this many scatters pull linearly
UNIDENTIFIED = 0.8  # posterior spread over prior spread from which a constant counts as not identified


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants, and for each the share of its prior spread that the data left (1 = learnt nothing)."""

    values: Floats
    spread_left: Floats


def map_fit(
    predict: Callable[[Floats], Floats],
    measured: Floats,
    prior: Floats,
    spread: Floats,
    noise: float = NOISE,
    steps: int = 15,
) -> Fit:
    """Most probable positive constants: Huber loss on log residuals plus a lognormal prior, by damped Gauss-Newton.

    Args:
        predict: constants [P] to predictions [N], all positive.
        measured: [N], positive.
        prior: [P] typical values; `spread` [P] is their standard deviation in logarithms.
        noise: scatter from which a residual is large; residuals beyond 1.5 of it pull linearly.
    """
    target, centre = np.log(measured), np.log(prior)

    def residual(x: Floats) -> Floats:
        return np.log(predict(np.exp(x))) - target

    def loss(x: Floats) -> float:
        scaled = np.abs(residual(x)) / noise
        huber = np.where(scaled < HUBER, scaled**2 / 2, HUBER * scaled - HUBER**2 / 2)
        return float(huber.sum() + (((x - centre) / spread) ** 2).sum() / 2)

    x, damping = centre.copy(), 1e-3
    for _ in range(steps):
        gradient, curvature = _newton(residual, x, centre, spread, noise)
        before = loss(x)
        while damping < 1e6:
            step = np.clip(np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -gradient), -1, 1)
            if loss(x + step) < before:
                break
            damping *= 5
        else:
            break
        x, damping = x + step, damping / 5
        if before - loss(x) < 1e-6:
            break
    _, curvature = _newton(residual, x, centre, spread, noise)
    left = np.sqrt(np.diag(np.linalg.inv(curvature))) / spread
    return Fit(np.exp(x), left)


def _newton(
    residual: Callable[[Floats], Floats], x: Floats, centre: Floats, spread: Floats, noise: float
) -> tuple[Floats, Floats]:
    """Gradient and Gauss-Newton curvature of the loss."""
    at, h = residual(x), 1e-4
    jacobian = np.stack([(residual(x + h * unit) - at) / h for unit in np.eye(len(x))], axis=1)
    weight = np.minimum(1.0, HUBER * noise / np.maximum(np.abs(at), 1e-12)) / noise**2
    gradient = jacobian.T @ (weight * at) + (x - centre) / spread**2
    return gradient, jacobian.T @ (weight[:, None] * jacobian) + np.diag(1 / spread**2)


def positive_least_squares(columns: Floats, target: Floats) -> Floats:
    """Coefficients >= 0 [P] that minimise the relative squared error of `columns` [N, P] against `target` [N] > 0.

    All subsets of columns are tried: exact, and fast for the four or five columns of an engine.
    """
    scaled, ones = columns / target[:, None], np.ones(len(target))
    best, best_error = np.zeros(columns.shape[1]), np.inf
    for chosen in product([False, True], repeat=columns.shape[1]):
        use = np.flatnonzero(chosen)
        candidate = np.zeros(columns.shape[1])
        if use.size:
            candidate[use] = np.linalg.lstsq(scaled[:, use], ones, rcond=None)[0]
        error = float(((scaled @ candidate - 1) ** 2).sum())
        if (candidate >= 0).all() and error < best_error - 1e-12:
            best, best_error = candidate, error
    return best


def errors(predicted: Floats, measured: Floats) -> dict[str, float | int]:
    """Relative errors in short: count, median, mean, 90th percentile and worst of their size, and the signed median."""
    signed = np.asarray(predicted) / np.asarray(measured) - 1.0
    size = np.abs(signed)
    if not size.size:
        return {"rows": 0}
    return {
        "rows": int(size.size),
        "median": float(np.median(size)),
        "mean": float(size.mean()),
        "p90": float(np.quantile(size, 0.9)),
        "worst": float(size.max()),
        "bias": float(np.median(signed)),
    }
