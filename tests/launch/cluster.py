"""A real Slurm on this machine: a controller and two nodes on loopback, in a directory of its own.

From Debian's slurm-wlm and munge, without systemd, cgroups or a database. Debian's build lets several slurmd
run on one host, so the two nodes are real to Slurm: srun starts tasks on both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/ctld/pid
SlurmctldLogFile={folder}/log/ctld.log
StateSaveLocation={folder}/ctld
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/log/%n.log
SlurmdSpoolDir={folder}/spool.%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=30
OverTimeLimit=0
SlurmdTimeout=60
MinJobAge=300
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=brief Nodes=n1,n2 MaxTime=5
PartitionName=hi Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here, or ""."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd runs as root here"


class Cluster:
    """A running cluster; its commands find it through SLURM_CONF.

    Attributes:
      folder: of everything it writes.
      env: the environment with which its commands and those that submit to it run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """What one of its commands says; commands of a broken Slurm try for minutes, hence the limit."""
        done = subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def logs(self) -> str:
        """The end of every daemon's log, for a failure."""
        paths = sorted((self.folder / "log").glob("*"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)


@contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[Cluster]:
    """Two idle nodes of so many CPUs each, that may be more than the machine has; all ends with the block."""
    made = Cluster(folder)
    for name in ("munge", "ctld", "log"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    conf = _CONF.format(folder=folder, host=host, ports=_ports(3), cpus=cpus)
    (folder / "slurm.conf").write_text(conf)
    # slurmd looks for cgroups at its start even where nothing uses them.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    pids = [folder / "munge" / "pid", folder / "ctld" / "pid", folder / "n1.pid", folder / "n2.pid"]
    try:
        made.ask("munged", *munge, f"--socket={folder}/munge/sock", "--force")
        for words in (["slurmctld", "-i", "-c"], ["slurmd", "-N", "n1", "-c"], ["slurmd", "-N", "n2", "-c"]):
            made.ask(*words)
        _wait_until_idle(made)
        yield made
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            made.ask("scancel", "--signal=KILL", "--full", "--user=root")
            made.ask("scancel", "--user=root")
            _wait(lambda: not made.ask("squeue", "-h", "-t", "R,CG", "-o", "%i"), 30)
        _stop(pids)


def _wait_until_idle(made: Cluster) -> None:
    idle = lambda: len(set(made.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) == 2  # noqa: E731
    assert _wait(idle, 30), f"no two idle nodes\n{made.logs()}"


def _wait(condition: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.2)
    return False


def _ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return found


def _stop(pids: list[Path]) -> None:
    """End the daemons, the nodes first, and wait until they are gone."""
    for path in reversed(pids):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            os.kill(pid, signal.SIGTERM)
            if not _wait(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 15):
                os.kill(pid, signal.SIGKILL)
