"""How methods that keep some of the patches are told which: the scores of the user's option `score`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax

from vlmscale.compressors.features import Features
from vlmscale.errors import UserError
from vlmscale.models.sizes import TowerSize

# "auto" is the class token's attention where the tower has one, as released. SigLIP has none: there it is the
# attention that a patch receives from all tokens, which FasterVLM's authors advise for such towers.
SCORES = ("auto", "class", "mean", "probe")


def score_field(score: str, class_field: str, has_class: bool) -> str:
    """The field of `Features` that the score is read from.

    Args:
      score: one of `SCORES`.
      class_field: what the method's score by the class token is read from.
      has_class: whether the tower has a class token.
    """
    if score == "auto":
        score = "class" if has_class else "mean"
    return class_field if score == "class" else f"{score}_attention"


def score_needs(class_field: str, *others: str) -> Callable[[TowerSize, Mapping[str, str]], frozenset[str]]:
    """`Method.needs` of a method with the option `score`: the score's field and `others`.

    What it returns raises UserError for a score that the tower cannot give.
    """

    def needs(tower: TowerSize, options: Mapping[str, str]) -> frozenset[str]:
        score, has_class = options.get("score", "auto"), bool(tower.class_tokens)
        if score == "class" and not has_class:
            raise UserError(
                "compressor.options: score=class reads a class token, which this tower lacks; "
                "take score=mean, or leave it out"
            )
        if score == "probe" and has_class:
            raise UserError(
                "compressor.options: score=probe reads SigLIP's pooling head, which this tower lacks; "
                "take score=class or score=mean, or leave it out"
            )
        return frozenset({score_field(score, class_field, has_class), *others})

    return needs


def read(features: Features, field: str, method: str) -> jax.Array:
    """One of the fields that may be None.

    Raises:
      ValueError: it is.
    """
    value = getattr(features, field)
    if value is None:
        raise ValueError(f"{method} reads {field} of the tower")
    return value
