"""TPU slices as GKE knows them: labels, machines, hosts; and the same job as an xpk command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmscale.errors import UserError
from vlmscale.plan.slices import Slice


@dataclass(frozen=True)
class Machine:
    """What GKE calls the hosts of a slice.

    Attributes:
      accelerator: the node label cloud.google.com/gke-tpu-accelerator.
      kind: the machine type of a node pool.
      chips: of a host.
      hosts: of a slice, one pod each.
      xpk: the slice's name there; "" where xpk has none.
    """

    accelerator: str
    kind: str
    chips: int
    hosts: int
    xpk: str


@dataclass(frozen=True)
class Pods:
    """What the jobs of a sweep have in common.

    Attributes:
      slice: of TPUs, such as v5e-16.
      image: of the container.
      slices: that one job spans.
      queue: the LocalQueue of Kueue; the default is the one that xpk makes.
      spot: on machines that may be taken away.
      max_restarts: after faults; those after preemption are not counted. So many are for faults that no
        process could note, such as a lost host: one that was noted takes one of three tries of its cells
        (`launch.outcome`), and without one left the job fails for good.
      grace: seconds between SIGTERM and SIGKILL, in which a checkpoint is written.
      cache: object-store folder of compiled programs, which a restarted job finds there; "" for none.
      account: Kubernetes service account, to which workload identity gives rights to the bucket; "" for the
        rights of the nodes, and their network.
      privileged: as root with the host's devices, as xpk runs its jobs; else as the image's user.
      environment: further variables, such as LIBTPU_INIT_ARGS.
    """

    slice: Slice
    image: str
    slices: int = 1
    queue: str = "multislice-queue"
    spot: bool = False
    max_restarts: int = 10
    grace: int = 120
    cache: str = ""
    account: str = ""
    privileged: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """Of the container: ours, and over them what was asked for."""
        own = {
            "JAX_PLATFORMS": "tpu,cpu",  # where no TPU is found a CPU would take days and say nothing
            "PYTHONUNBUFFERED": "1",
        }
        if self.cache:
            own["JAX_COMPILATION_CACHE_DIR"] = self.cache
        return own | dict(self.environment)


# accelerator, machine type without its chips, and xpk's name of the generation, by libtpu's: the table
# UserFacingNameToSystemCharacteristics of xpk 1.16.0. v5e-1 and v5e-4 are not in it, but in Google's own,
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
_KINDS = {
    "v4": ("tpu-v4-podslice", "ct4p-hightpu", "v4"),
    "v5e": ("tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod"),
    "v5p": ("tpu-v5p-slice", "ct5p-hightpu", "v5p"),
    "v6e": ("tpu-v6e-slice", "ct6e-standard", "v6e"),
    "tpu7x": ("tpu7x", "tpu7x-standard", "tpu7x"),
}
_NOT_IN_XPK = ("v5litepod-1", "v5litepod-4")


def machine_of(part: Slice) -> Machine:
    """The hosts of a slice.

    Google also rents 8 chips of v5e and v6e as one host; here, as in xpk, v5e-8 and v6e-8 are two of four.

    Raises:
      UserError: it is made of GPUs, or is several slices.
    """
    if part.generation.gpu:
        known = ", ".join(f"{key.removeprefix('tpu')}-N" for key in _KINDS)
        raise UserError(f"--topology {part.name}: is no TPU slice; JobSets are made for {known}")
    if part.count > 1:
        own = part.name.removeprefix(f"{part.count}x")
        raise UserError(f"--topology {part.name}: give one slice, --topology {own} --slices {part.count}")
    accelerator, kind, prefix = _KINDS[part.generation.libtpu]
    chips = part.chips // part.hosts
    name = f"{prefix}-{int(part.name.rpartition('-')[2])}"
    return Machine(accelerator, f"{kind}-{chips}t", chips, part.hosts, "" if name in _NOT_IN_XPK else name)


def xpk_command(name: str, command: Sequence[str], pods: Pods) -> str:
    """The `xpk workload create` that comes closest to a rendered job; for xpk 1.16.0.

    PROJECT, ZONE and CLUSTER are left to be filled in.

    xpk ends a job on exit codes that are not named, and counts every restart, those after preemption too.

    Args:
      name: of the job.
      command: what its containers run.
      pods: where.

    Raises:
      UserError: xpk knows no such slice.
    """
    machine = machine_of(pods.slice)
    if not machine.xpk:
        raise UserError(f"--topology {pods.slice.name}: xpk has no such slice; its smallest of v5e is v5e-8")
    words = [
        *("xpk", "workload", "create"),
        *("--project=PROJECT", "--zone=ZONE", "--cluster=CLUSTER"),
        *(f"--workload={name}", f"--tpu-type={machine.xpk}", f"--num-slices={pods.slices}"),
        *(f"--docker-image={pods.image}", f"--max-restarts={pods.max_restarts}"),
        "--restart-on-exit-codes=1",  # Python's; 42 and those of signals restart by default
        f"--termination-grace-period-seconds={pods.grace}",
        *(["--spot"] if pods.spot else []),
        *(f"--env={key}={value}" for key, value in pods.variables.items()),
        f"--command={shlex.join(command)}",
    ]
    return shlex.join(words)
