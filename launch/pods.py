"""The jobs of a sweep on TPU slices: one JobSet a cohort, each working on the sweep in an object store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.devices import mesh_devices
from launch.jobset import check_pods, job_name, render, write_manifests
from launch.tpu import Pods
from vlmscale.errors import UserError

if TYPE_CHECKING:
    from launch.cohorts import Cohort
    from launch.state import CellDirectory


@dataclass(frozen=True)
class Jobs:
    """What each job runs, by its name, and where."""

    commands: dict[str, list[str]]
    pods: Pods

    def write(self, directory: Path) -> list[Path]:
        """Write each as DIRECTORY/NAME.yaml; the paths."""
        return write_manifests(
            [render(name, command, self.pods) for name, command in self.commands.items()], directory
        )


def check_cells(cells: Sequence[CellDirectory], bucket: str, pods: Pods) -> None:
    """Refuse what could not run there.

    Args:
      cells: of the sweep.
      bucket: the sweep's directory in an object store.
      pods: where and how.

    Raises:
      UserError: something that Kubernetes, GKE or JobSet would refuse, no object store, or a mesh that is not
        of the slices' devices.
    """
    if not re.fullmatch(r"gs://\w[-\w.]*/[^\s/][^\s]*", bucket):
        raise UserError(
            f"--bucket {bucket}: pods share no disk; give an object store such as gs://BUCKET/runs/x"
        )
    check_pods(pods)
    devices = pods.slice.devices * pods.slices
    for cell in cells:
        whole = mesh_devices(cell.cell.mesh, devices, cell.label)
        if whole != devices:
            raise UserError(
                f"{cell.label}: its mesh has {whole} devices, {pods.slices} x {pods.slice.name} have "
                f"{devices}; choose another mesh or --topology, or mesh.data=0"
            )


def jobs(cohorts: Sequence[Cohort], sweep: str, bucket: str, pods: Pods) -> Jobs:
    """The jobs of cohorts of a sweep whose name this is."""
    work = ["vlmscale", "sweep", "work", bucket.rstrip("/"), "--cohort"]
    commands = {job_name(sweep, c.id): [*work, c.id, "--distributed", "auto"] for c in cohorts}
    return Jobs(commands, pods)
