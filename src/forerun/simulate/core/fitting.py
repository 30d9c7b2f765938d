"""Two estimators: a robust fit of positive constants around priors, and non-negative least squares.

`map_fit` is not `scipy.optimize.least_squares`, whose stopping rule would move the constants that ship.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NOISE = 0.06  # scatter of a good measurement about the best model, in logarithms
HUBER = 1.5  # residuals beyond this many scatters are weighted linearly
UNIDENTIFIED = 0.8  # posterior over prior standard deviation from which a constant counts as not identified


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants [P], and for each its posterior over its prior standard deviation (1: the data say nothing)."""

    values: Floats
    spread_left: Floats

    def unidentified(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the constants that the data did not identify."""
        return tuple(name for name, left in zip(names, self.spread_left, strict=False) if left > UNIDENTIFIED)


def map_fit(
    predict: Callable[[Floats], Floats],
    measured: Floats,
    prior: Floats,
    spread: Floats,
    noise: float = NOISE,
    steps: int = 15,
) -> Fit:
    """Maximum a posteriori of positive constants: Huber loss on log residuals, lognormal prior, damped Gauss-Newton.

    Args:
        predict: constants [P] to predictions [N], all positive.
        measured: [N], positive.
        prior: [P] typical values; `spread` [P] is their standard deviation in logarithms.
        noise: scatter of the log residuals; those beyond `HUBER` times it are weighted linearly.
    """
    target, centre = np.log(measured), np.log(prior)

    def residual(x: Floats) -> Floats:
        return np.log(predict(np.exp(x))) - target

    def loss(x: Floats) -> float:
        scaled = np.abs(residual(x)) / noise
        huber = np.where(scaled < HUBER, scaled**2 / 2, HUBER * scaled - HUBER**2 / 2)
        return float(huber.sum() + (((x - centre) / spread) ** 2).sum() / 2)

    def derivatives(x: Floats) -> tuple[Floats, Floats]:
        """Gradient [P] and Gauss-Newton curvature [P, P]."""
        at, h = residual(x), 1e-4
        jacobian = np.stack([(residual(x + h * unit) - at) / h for unit in np.eye(len(x))], axis=1)
        weight = np.minimum(1.0, HUBER * noise / np.maximum(np.abs(at), 1e-12)) / noise**2
        gradient = jacobian.T @ (weight * at) + (x - centre) / spread**2
        return gradient, jacobian.T @ (weight[:, None] * jacobian) + np.diag(1 / spread**2)

    x, damping = centre.copy(), 1e-3
    for _ in range(steps):
        gradient, curvature = derivatives(x)
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
    _, curvature = derivatives(x)
    return Fit(np.exp(x), np.sqrt(np.diag(np.linalg.inv(curvature))) / spread)


def nonnegative_least_squares(columns: Floats, target: Floats, scale: Floats | None = None) -> Floats:
    """Coefficients >= 0 [P] that minimise the squares of (`columns` [N, P] times them - `target` [N]) / `scale` [N].

    Args:
        scale: None: the target, so that relative errors are minimised.
    """
    from scipy.optimize import nnls

    scale = target if scale is None else scale
    # Of columns that the rows cannot tell apart, nnls takes the first: here the last, the most specific one.
    coefficients, _ = nnls((columns / scale[:, None])[:, ::-1], target / scale)
    return coefficients[::-1]


def relative_errors(predicted: Floats, measured: Floats) -> dict[str, float | int]:
    """Count, median, mean, 90th percentile and worst of the relative errors' sizes, and their signed median."""
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
