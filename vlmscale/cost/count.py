"""FLOPs of a function by reading its jaxpr: two per multiply-add of every matrix product and convolution.

Elementwise work, norms and softmax are not counted, as in `vlmscale.cost.flops`. What no result needs is not
either, for compilers leave it out. Nothing is computed, so that arguments may be `jax.ShapeDtypeStruct`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of one call.

    Args:
      function: of arrays or trees of them.
      *arguments: arrays or their shapes.

    Raises:
      ValueError: it has a loop whose length is only known when it runs.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    read, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(read)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        shapes: list[Any] = [variable.aval for variable in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += _products(equation) * math.prod(shapes[0].shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.params["dimension_numbers"].rhs_spec  # (out, in, *space)
            total += _products(equation) * math.prod(shapes[1].shape[axis] for axis in kernel[1:])
        elif name == "while":
            raise ValueError("cannot count a loop whose length is only known when it runs")
        elif name == "cond":
            total += max(map(_count, jaxprs_in_params(equation.params)))
        else:
            times = equation.params["length"] if name == "scan" else 1
            total += times * sum(map(_count, jaxprs_in_params(equation.params)))
    return total


def _products(equation: Any) -> int:
    """FLOPs for each term of the sums: two an element of the result."""
    return 2 * int(equation.outvars[0].aval.size)
