"""Manifests handed to a cluster by kubectl: all of them are accepted before one is submitted."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmscale.errors import UserError

Runner = Callable[..., "subprocess.CompletedProcess[str]"]

_ANSWER_S, _TIMEOUT_S = 20, 120
# What kubectl and API servers say, and what to do; the first that matches.
_REASONS = (
    (
        r"unable to connect|connection refused|was refused|i/o timeout|deadline exceeded|no such host|"
        r"no configuration has been provided|current-context|no route to host",
        "the cluster does not answer; gcloud container clusters get-credentials CLUSTER makes kubectl's "
        "config, kubectl config current-context says which it is",
    ),
    (
        r"unauthorized|must be logged in|auth-plugin|getting credentials",
        "not logged in to the cluster; gcloud auth login, gcloud components install gke-gcloud-auth-plugin",
    ),
    (r"exceeded quota|quota exceeded", "over the namespace's quota; kubectl describe quota shows it"),
    (r"forbidden", "no permission; ask the cluster's owner for the role that makes JobSets"),
    (
        r'no matches for kind "jobset"|ensure crds are installed',
        "the cluster has no JobSet; docs/tpu.md installs it",
    ),
    (r"unknown field", "the cluster's JobSet is older than 0.10; docs/tpu.md installs a newer one"),
    (
        r"immutable",
        "a job of this name is there with other settings; look whether it still runs, then "
        "kubectl delete jobset NAME",
    ),
)


def apply(paths: Sequence[Path], runner: Runner = subprocess.run) -> list[str]:
    """Submit manifests to the cluster that kubectl's config names; return kubectl's line about each.

    Submitting one again that has not changed does nothing.

    Args:
      paths: of manifests.
      runner: what runs kubectl, as subprocess.run does.

    Raises:
      UserError: no kubectl, a cluster that does not answer, or a manifest that it refuses, at the trial or
        later: what was made is deleted again, so that nothing is submitted.
    """
    if not paths:
        raise UserError("no manifests to submit")
    check_cluster(runner)
    nothing = "nothing was submitted"
    for path in paths:
        _kubectl(runner, ["apply", "--dry-run=server", "-f", str(path)], str(path), nothing)
    said: list[str] = []
    for path in paths:
        try:
            said.append(_kubectl(runner, ["apply", "-f", str(path)], str(path), nothing))
        except UserError:
            new = [made for made, line in zip(paths, said, strict=False) if line.endswith("created")]
            for made in new:
                left = f"these are submitted: {', '.join(path.stem for path in new)}"
                _kubectl(runner, ["delete", "--wait=false", "-f", str(made)], str(made), left)
            raise
    return said


def check_cluster(runner: Runner = subprocess.run) -> None:
    """Ask whether there is a cluster to submit to.

    Raises:
      UserError: no kubectl, or a cluster that does not answer.
    """
    if shutil.which("kubectl") is None:
        raise UserError(
            "kubectl: not found; gcloud components install kubectl here, where the data is prepared; "
            "--dry-run needs none"
        )
    words = ["version", f"--request-timeout={_ANSWER_S}s"]
    _kubectl(runner, words, "kubectl", "nothing was submitted")


def _kubectl(runner: Runner, words: list[str], about: str, state: str) -> str:
    """What kubectl says.

    Raises:
      UserError: it fails; the line begins with `about` and ends with `state`.
    """
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": _TIMEOUT_S}
    try:
        done = runner(["kubectl", *words], **options)
    except subprocess.TimeoutExpired:
        raise UserError(f"{about}: no answer from kubectl in {_TIMEOUT_S} s; {state}") from None
    except OSError as error:
        raise UserError(f"{about}: kubectl cannot be started ({error.strerror or error}); {state}") from None
    if done.returncode:
        raise UserError(f"{about}: {_reason(done.stderr)}; {state}")
    return done.stdout.strip()


def _reason(stderr: str) -> str:
    """One line about what went wrong: what to do, where that is known, and kubectl's own words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # Ahead of the error stand client-go's log lines (E1201 ...) and warnings.
    own = [line for line in lines if not re.match(r"[EWI]\d{4} |Warning:", line)]
    words = (own or lines or ["kubectl said nothing"])[-1]
    known = next((text for pattern, text in _REASONS if re.search(pattern, stderr, re.I)), None)
    return f"{known} ({words})" if known else words
