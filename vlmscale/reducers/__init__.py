"""Methods that drop visual tokens inside the LLM: one file a method, one interface, one static table.

A reducer is a Linen module as `vlmscale.models.cuts.Reducer` says: the layers in front of which it drops, how
much stays at most, and at each cut a score of every token. `cuts` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple

import jax

from vlmscale.errors import UserError
from vlmscale.models.cuts import Reducer
from vlmscale.options import label, parse
from vlmscale.reducers import atp
from vlmscale.reducers.fastv import SCORES, FastV
from vlmscale.reducers.schedule import Schedule
from vlmscale.reducers.sgl import SGL
from vlmscale.reducers.sparsity import SparsitySimilarity, similar_patches


class ReducerSpec(NamedTuple):
    """A reducer as a config names it.

    Attributes:
      name: of a row of `REDUCERS`.
      layer: in front of which tokens go, counted from 0: so many layers see all of them.
      keep: share of the visual tokens that stays.
      schedule: share in each layer, in place of the two.
      options: the choices of `parse`.
    """

    name: str
    layer: int
    keep: float
    schedule: tuple[float, ...]
    options: tuple[tuple[str, str], ...] = ()

    @property
    def score(self) -> str:
        """What ranks, of `vlmscale.reducers.fastv.SCORES`."""
        return dict(self.options).get("score", REDUCERS[self.name].score)

    @property
    def patches(self) -> Callable[[jax.Array], jax.Array] | None:
        """As `Method.patches`, where the options want it."""
        return None if dict(self.options).get("patches") == "all" else REDUCERS[self.name].patches

    @property
    def appended(self) -> int:
        """Compression tokens behind the visual tokens of each image."""
        method = REDUCERS[self.name]
        if not method.appends:
            return 0
        return int(dict(self.options).get(method.appends, method.options[method.appends][0]))

    @property
    def label(self) -> str:
        """What records call it."""
        reads = REDUCERS[self.name].reads
        shown: dict[str, str] = {key: str(getattr(self, key)) for key in ("layer", "keep") if key in reads}
        if "schedule" in reads:
            shown["schedule"] = ",".join(
                f"{float(share)}x{len(list(same))}" for share, same in groupby(self.schedule)
            )
        return label(self.name, shown | dict(self.options))


class SoftForm(NamedTuple):
    """What a method with cuts does in training.

    Attributes:
      soften: in place of a cut; also told how many visual tokens an image has.
      penalty: what is paid for the mean shares [cuts] that are left, in an LLM of so many layers, where the
        share `keep` is wanted.
    """

    soften: Callable[..., jax.Array]
    penalty: Callable[[jax.Array, int, float], jax.Array]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
      build: makes the module, in an LLM of so many layers, with so many visual tokens an image; None for a
        method without cuts.
      reads: the fields of the config that it reads.
      options: the user's choices: name to allowed values, the default first.
      first_layer: in front of which tokens may go.
      given: whether it ranks by scores [B, T] from elsewhere.
      patches: of tower outputs [N, P, C] those that go on to the LLM at all, [N, P] bool; None for all. The
        option "patches=all" leaves that away.
      score: what ranks, `vlmscale.reducers.fastv.SCORES`, where that is no option.
      adaptive: whether how many stay depends on the prompt.
      appends: the option that says how many compression tokens stand behind an image, if any do.
      soft: of a method with cuts that trains, what it does instead in training.
    """

    build: Callable[[ReducerSpec, int, int], Reducer] | None
    reads: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    first_layer: int = 1
    given: bool = False
    patches: Callable[[jax.Array], jax.Array] | None = None
    score: str = "last"
    adaptive: bool = False
    appends: str = ""
    soft: SoftForm | None = None

    @property
    def trained(self) -> bool:
        """Whether a model must be trained with it."""
        return bool(self.appends) or self.soft is not None


def _fastv(spec: ReducerSpec, num_layers: int, visual_tokens: int) -> Reducer:
    return FastV(spec.layer, spec.keep, **dict(spec.options))


def _schedule(spec: ReducerSpec, num_layers: int, visual_tokens: int) -> Reducer:
    return Schedule(spec.schedule, num_layers, **dict(spec.options))


def _sparsity(spec: ReducerSpec, num_layers: int, visual_tokens: int) -> Reducer:
    return SparsitySimilarity(spec.layer)


def _sgl(spec: ReducerSpec, num_layers: int, visual_tokens: int) -> Reducer:
    return SGL(spec.layer, spec.keep)


def _atp(spec: ReducerSpec, num_layers: int, visual_tokens: int) -> Reducer:
    return atp.ATP(num_layers, visual_tokens)


_COUNTS = ("1", "2", "4", "8", "16", "32", "64", "128")  # of compression tokens, as in the paper's table

REDUCERS: dict[str, Method] = {
    "fastv": Method(_fastv, ("layer", "keep"), {"score": SCORES}),
    "g_search": Method(_schedule, ("schedule",), {"score": SCORES}),
    "sparsity_similarity": Method(
        _sparsity,
        ("layer",),
        {"patches": ("similar", "all")},
        patches=similar_patches,
        score="received",
        adaptive=True,
    ),
    "sgl": Method(_sgl, ("layer", "keep", "guide", "exit_above"), first_layer=0, given=True),
    "voco": Method(None, (), {"tokens": _COUNTS}, appends="tokens"),
    "atp": Method(_atp, ("keep",), adaptive=True, score="received", soft=SoftForm(atp.soften, atp.penalty)),
}


def make_reducer(spec: ReducerSpec, num_layers: int, visual_tokens: int = 0) -> Reducer | None:
    """The module of a method, in an LLM of so many layers; None for one without cuts.

    How many visual tokens an image has concerns only what the module computes, not where it cuts.
    """
    build = REDUCERS[spec.name].build
    return None if build is None else build(spec, num_layers, visual_tokens)


def cut_layers(spec: ReducerSpec, num_layers: int) -> tuple[int, ...]:
    """In front of which layers a method drops tokens."""
    reducer = make_reducer(spec, num_layers)
    return () if reducer is None else reducer.layers


def is_adaptive(spec: ReducerSpec) -> bool:
    """Whether how many visual tokens stay depends on the prompt."""
    return REDUCERS[spec.name].adaptive


def read_options(name: str, text: str) -> tuple[tuple[str, str], ...]:
    """The options of a method, for a spec.

    Raises:
      UserError: naming the method, the option or the value and what works.
    """
    return tuple(parse("reducer", REDUCERS, name, text).items())


def check_reducer(spec: ReducerSpec, num_layers: int, visual_tokens: int) -> None:
    """Refuse what cannot be done inside an LLM with so many visual tokens.

    Raises:
      UserError: naming the key and what works.
    """
    reads, first = REDUCERS[spec.name].reads, REDUCERS[spec.name].first_layer
    if not visual_tokens:
        raise UserError(f"reducer.name={spec.name}: a blind model has no visual tokens to drop")
    if "layer" in reads and not first <= spec.layer < num_layers:
        raise UserError(
            f"reducer.layer={spec.layer}: {first} to {num_layers - 1} in an LLM of {num_layers} layers"
        )
    if "keep" in reads:
        _check_share("keep", spec.keep)
    if "schedule" in reads:
        _check_schedule(spec.schedule, num_layers)
    if REDUCERS[spec.name].soft is not None:
        if num_layers < 2:
            raise UserError(f"reducer.name={spec.name}: needs an LLM of two layers or more")
        first = cut_layers(spec, num_layers)[0]
        if spec.keep <= first / num_layers:
            raise UserError(
                f"reducer.keep={spec.keep:g}: the mean share over {num_layers} layers, of which {first} see "
                f"all tokens; above {first / num_layers:g}"
            )
    if spec.appended >= visual_tokens:
        raise UserError(
            f"reducer.options: tokens={spec.appended}: fewer than compressor.visual_tokens={visual_tokens}, "
            "which they stand for"
        )


def _check_share(key: str, share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"reducer.{key}={share:g}: a share above 0 and at most 1")


def _check_schedule(schedule: tuple[float, ...], num_layers: int) -> None:
    if not 1 <= len(schedule) <= num_layers:
        raise UserError(
            f"reducer.schedule has {len(schedule)} shares: one a layer, 1 to {num_layers} of them; the last "
            "holds for all further layers"
        )
    for share in schedule:
        _check_share("schedule", share)
    if schedule[0] != 1:
        raise UserError(
            f"reducer.schedule starts with {schedule[0]:g}: layer 0 sees all tokens, start with 1"
        )
    if any(after > before for before, after in pairwise(schedule)):
        raise UserError("reducer.schedule: shares must not grow from layer to layer")


__all__ = [
    "REDUCERS",
    "Method",
    "Reducer",
    "ReducerSpec",
    "check_reducer",
    "cut_layers",
    "is_adaptive",
    "label",
    "make_reducer",
    "read_options",
]
