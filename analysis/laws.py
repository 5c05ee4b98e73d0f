"""The two laws: error as a function of parameters N and visual tokens V through one index e = p1 ln N + p2 ln
V.

Both take V alone: the text tokens Q belong to the cost (`optimum.py`), never to the law. N is in billions
inside a law, so its first parameter is the level at one billion parameters and one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Law:
    """A law with parameters [..., 3]; the second and third are positive where more N and more V help."""

    name: str
    formula: str
    parameters: tuple[str, str, str]
    logistic: bool

    def predict(self, params: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Error [..., cells] for params [..., 3] and features [cells, 3] of `features()`."""
        if not self.logistic:
            return params @ (features * np.array([1.0, -1.0, -1.0])).T
        return 1.0 / (1.0 + np.exp(np.clip(params @ features.T, -500.0, 500.0)))

    def jacobian(self, params: np.ndarray, features: np.ndarray) -> np.ndarray:
        """d error / d params [..., cells, 3] at params [..., 3]."""
        if not self.logistic:
            slopes = features * np.array([1.0, -1.0, -1.0])
            return np.broadcast_to(slopes, (*params.shape[:-1], *features.shape))
        error = self.predict(params, features)
        return -(error * (1.0 - error))[..., None] * features


def features(n: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[cells, 3]: 1, ln(N in billions), ln V, from n (a parameter count) and v (>= 1), both [cells]."""
    return np.stack([np.ones_like(n), np.log(n / 1e9), np.log(v)], axis=-1)


LAWS = {
    law.name: law
    for law in (
        Law("log-linear", "error = c - a ln N - b ln V", ("c", "a", "b"), logistic=False),
        Law("logit-linear", "logit(error) = -(p0 + p1 ln N + p2 ln V)", ("p0", "p1", "p2"), logistic=True),
    )
}
