"""The option `score` of the methods that keep some of the patches."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from vlmscale.compressors import COMPRESSORS, Features, parse_options
from vlmscale.compressors.selection import SCORES, read
from vlmscale.errors import UserError
from vlmscale.models.sizes import TOWERS

CLIP, SIGLIP = TOWERS["clip-vit-large-patch14-336"], TOWERS["siglip-base-patch16-224"]


@pytest.mark.parametrize(
    "name, class_field, others",
    [
        ("fastervlm", "class_attention", set()),
        ("prumerge", "class_query", {"keys"}),
        ("prumerge_plus", "class_query", {"keys"}),
    ],
)
def test_a_method_asks_for_what_its_score_is_read_from(name: str, class_field: str, others: set[str]) -> None:
    method = COMPRESSORS[name]
    wanted = {
        (CLIP, "auto"): class_field,
        (CLIP, "class"): class_field,
        (CLIP, "mean"): "mean_attention",
        (SIGLIP, "auto"): "mean_attention",
        (SIGLIP, "mean"): "mean_attention",
        (SIGLIP, "probe"): "probe_attention",
    }
    for (tower, score), field in wanted.items():
        options = parse_options(name, f"score={score}")
        assert method.needs(tower, options) == {field, *others}
        assert method.needs(tower, options) <= set(Features._fields)
    for tower, score, hint in ((SIGLIP, "class", "score=mean"), (CLIP, "probe", "score=class")):
        with pytest.raises(UserError, match=f"score={score} reads .*{hint}") as caught:
            method.needs(tower, {"score": score})
        assert "\n" not in str(caught.value)


def test_the_default_is_as_released() -> None:
    for name in ("fastervlm", "prumerge", "prumerge_plus"):
        assert COMPRESSORS[name].options["score"] == SCORES
        assert parse_options(name, "score=auto") == {}


def test_a_field_that_is_not_there_is_named() -> None:
    features = Features(jnp.zeros((1, 4, 3)))
    assert read(features, "selected", "FasterVLM") is features.selected
    with pytest.raises(ValueError, match="FasterVLM reads mean_attention"):
        read(features, "mean_attention", "FasterVLM")
