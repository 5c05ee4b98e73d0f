"""Checkpoints with Orbax: async, atomic, parameters and optimiser state as separate items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlmscale.errors import UserError
from vlmscale.train.step import TrainState

_KEEP = 2


class Checkpoints:
    """The checkpoints/ folder of one run. A step that was not completely written does not exist here."""

    def __init__(self, run: Path) -> None:
        self.path = (run / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.path, options=options)

    @staticmethod
    def any_in(run: Path) -> bool:
        """Whether a run has a checkpoint; looks at names alone."""
        return any(path.name.isdigit() for path in (run / "checkpoints").glob("*"))

    def latest(self) -> int | None:
        """Last good step."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Start saving in the background; an earlier failed save is raised here."""
        self.manager.check_for_errors()
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), opt_state=ocp.args.StandardSave(state.opt_state)
        )
        if not self.manager.save(step, args=items):
            raise RuntimeError(f"{self.path}: step {step} was not saved although it was due")

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Bring a step back onto the shardings of `abstract` (ShapeDtypeStructs).

        Raises:
          UserError: the checkpoint holds other parameters, as one of another version of vlmscale may.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        restored = self._read(step, items)
        where = abstract.step.sharding
        return TrainState(jax.device_put(np.int32(step), where), restored["params"], restored["opt_state"])

    def restore_params(self, abstract: Any) -> Any:
        """Parameters alone, of the last good step.

        Raises:
          UserError: there is no checkpoint, or it holds other parameters.
        """
        step = self.latest()
        if step is None:
            raise UserError(f"{self.path}: no checkpoint to read; train the run first")
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self._read(step, items)["params"]

    def _read(self, step: int, items: Any) -> Any:
        try:
            return self.manager.restore(step, args=items)
        except ValueError as error:  # Orbax lists every parameter, on hundreds of lines
            if "structures do not match" not in str(error):
                raise
            raise UserError(
                f"{self.path}: its checkpoint holds other parameters than this version of vlmscale has; "
                "read it with the version that wrote it, or train again into another directory"
            ) from error

    def wait(self) -> None:
        """Block until every started save is on disk, and raise if one failed."""
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def close(self) -> None:
        """Wait and release the background thread, also when a save failed."""
        try:
            self.wait()
        finally:
            self.manager.close()
