"""A job of a sweep as a JobSet, which Kueue admits and GKE runs on TPU slices; written as YAML.

What restarts a job follows from our exit codes. A pod that fails ends its Job by the first matching rule of
the Job's podFailurePolicy, with whose number the failure's message ends (kubernetes, pkg/controller/job/
pod_failure_policy.go). JobSet's rules read that message (onJobFailureMessagePatterns, JobSet 0.10 and newer):

    2                      the job fails for good
    42, or disrupted       all its pods start again, not counted
    anything else          all its pods start again, max_restarts times

GKE itself sets TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, for several slices, MEGASCALE_*.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.tpu import Machine, Pods, machine_of
from vlmscale.errors import EXIT_AGAIN, EXIT_USER, UserError
from vlmscale.records import make_directory, write_lines

_CONTAINER, _GROUP = "vlmscale", "slice"
_NAME, _SLICES = 40, 999  # characters (xpk's limit) and slices: NAME-slice-N-HOST-xxxxx has at most 63
_KEEP_S = 7 * 86400  # how long a finished JobSet can be looked at
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_JOB = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY", re.I)
_FROM_GKE = (
    "TPU_WORKER_ID",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


def job_name(sweep: str, cohort: str) -> str:
    """Name of a cohort's job: a DNS label of at most 40 characters.

    Where the sweep's name had to be changed or cut, a hash of it keeps names of different sweeps apart.

    Raises:
      UserError: the cohort's id cannot be part of a name.
    """
    if len(cohort) > 16 or not _LABEL.fullmatch(cohort):
        raise UserError(f"cohort {cohort}: no job can be named after it; at most 16 of a-z, 0-9 and -")
    slug = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")
    room = _NAME - 1 - len(cohort)
    if slug != sweep or len(slug) > room or not slug[:1].isalpha():
        mark = hashlib.sha256(sweep.encode()).hexdigest()[:6]
        head = slug if slug[:1].isalpha() else f"s-{slug}"
        slug = f"{head[: room - 7].rstrip('-')}-{mark}"
    return f"{slug}-{cohort}"


def render(name: str, command: Sequence[str], pods: Pods) -> dict[str, Any]:
    """The JobSet that runs a command on slices, one process a host.

    Args:
      name: as `job_name` makes it.
      command: of each process. It is process 1 of its container, so that SIGTERM reaches it.
      pods: where and how.

    Raises:
      UserError: something that Kubernetes, GKE or JobSet would refuse, or a secret among the variables.
    """
    machine = machine_of(pods.slice)
    check_pods(pods)
    _check(name, command)
    job = {
        "parallelism": machine.hosts,
        "completions": machine.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit_code(EXIT_USER)},
                {"action": "FailJob", "onExitCodes": _exit_code(EXIT_AGAIN)},
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"spec": _pod(command, pods, machine)},
    }
    metadata: dict[str, Any] = {"name": name, "labels": {"kueue.x-k8s.io/queue-name": pods.queue}}
    if machine.hosts > 1:
        # Such a slice is a node pool of its own; pools of single hosts may be shared by jobs.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": _KEEP_S,
            "failurePolicy": {
                "maxRestarts": pods.max_restarts,
                "rules": [
                    {
                        "name": "neverAgain",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": ["rule at index 0$"],
                    },
                    {
                        "name": "savedOrDisrupted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [{"name": _GROUP, "replicas": pods.slices, "template": {"spec": job}}],
        },
    }


def write_manifests(jobs: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Write each job as DIRECTORY/NAME.yaml, by atomic rename; return the paths in the order of the jobs.

    Raises:
      UserError: two jobs of one name, or the directory cannot be written.
    """
    names = [job["metadata"]["name"] for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"job {twice}: two jobs have this name; cohorts of a sweep have ids of their own")
    make_directory(directory)
    paths = [directory / f"{name}.yaml" for name in names]
    for path, job in zip(paths, jobs, strict=True):
        write_lines(path, _yaml(job))
    return paths


def _yaml(value: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    """Lines of YAML in which every string is quoted.

    PyYAML leaves an id such as 123456789e12 bare, which for kubectl is a number.
    """
    lines: list[str] = []
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in pairs:
        head = "-" if key is None else f"{key}:"
        if not isinstance(item, Mapping | list) or not item:
            lines.append(f"{head} {json.dumps(item, ensure_ascii=False)}")
        elif key is None:
            first, *others = _yaml(item)
            lines += [f"- {first}", *(f"  {line}" for line in others)]
        else:
            lines += [head, *(f"  {line}" for line in _yaml(item))]
    return lines


def _exit_code(code: int) -> dict[str, Any]:
    return {"containerName": _CONTAINER, "operator": "In", "values": [code]}


def _pod(command: Sequence[str], pods: Pods, machine: Machine) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": machine.accelerator,
        "cloud.google.com/gke-tpu-topology": pods.slice.topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if pods.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        tolerations.append({"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": pods.image,
        "command": [_literal(word) for word in command],
        "env": [{"name": key, "value": _literal(value)} for key, value in pods.variables.items()],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of TPU hosts, and of several slices
        "resources": {"limits": {"google.com/tpu": machine.chips}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if pods.privileged:
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # which podFailurePolicy needs
        "nodeSelector": selector,
        "tolerations": tolerations,
        "terminationGracePeriodSeconds": pods.grace,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],  # else 64 MB, too few for loaders
    }
    if pods.account:
        spec["serviceAccountName"] = pods.account
    else:  # faster between slices; but there GKE gives pods the node's rights, whatever their account
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return spec


def _literal(text: str) -> str:
    """Text that Kubernetes leaves as it is: it would replace $(NAME) by a variable."""
    return text.replace("$(", "$$(")


def _check(name: str, command: Sequence[str]) -> None:
    if len(name) > _NAME or not _JOB.fullmatch(name):
        raise UserError(f"job {name}: no name for a job; at most {_NAME} of a-z, 0-9 and -, a letter first")
    if not command or not all(command):
        raise UserError("the job's command is empty, or a word of it; give what the container runs")


def check_pods(pods: Pods) -> None:
    """Refuse what Kubernetes, GKE or JobSet would, and secrets.

    Raises:
      UserError: with the option.
    """
    machine = machine_of(pods.slice)
    if not 1 <= pods.slices <= _SLICES:
        raise UserError(f"--slices {pods.slices}: give a number from 1 to {_SLICES}")
    if pods.slices > 1 and machine.hosts == 1:
        raise UserError(
            f"--slices {pods.slices}: {pods.slice.name} is a single host, and GKE joins slices of several "
            "hosts alone; give --slices 1 or a larger --topology"
        )
    if not pods.image or re.search(r"\s", pods.image):
        raise UserError(
            f"--image {pods.image!r}: give the container's image, such as REGION-docker.pkg.dev/..."
        )
    for option, label in (("--queue", pods.queue), ("--service-account", pods.account)):
        if not _LABEL.fullmatch(label) and (label or option == "--queue"):
            raise UserError(f"{option} {label!r}: no name in Kubernetes; at most 63 of a-z, 0-9 and -")
    if pods.max_restarts < 0:
        raise UserError(f"--max-restarts {pods.max_restarts}: give 0 or more")
    if pods.grace < 1:
        raise UserError(f"--grace {pods.grace}: give seconds, 1 or more; 30 to 120 for a checkpoint")
    if pods.cache and not re.match(r"[a-z0-9]+://[^/]", pods.cache):
        raise UserError(
            f"--cache {pods.cache}: pods share no disk; give an object store such as gs://BUCKET/cache"
        )
    for key in pods.environment:
        if not _VARIABLE.fullmatch(key):
            raise UserError(f"--env {key}: no name of a variable; letters, digits and _")
        if key in _FROM_GKE:
            raise UserError(f"--env {key}: GKE sets it in each pod; leave it out")
        if _SECRET.search(key):
            raise UserError(
                f"--env {key}: manifests hold no secrets; give a --service-account the rights instead"
            )
