"""Manifests handed to a cluster, through a fake kubectl that is alone on PATH."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.jobset import render, write_manifests
from launch.kubectl import apply
from launch.tpu import Pods
from vlmscale.errors import UserError
from vlmscale.plan.slices import find_slice

KUBECTL = """#!/bin/sh
echo "$*" >> "$FAKE_LOG"
case "$*" in
  $FAKE_FAIL) printf '%s\\n' "$FAKE_SAYS" >&2; exit 1;;
esac
echo "jobset.jobset.x-k8s.io/$3 created"
"""


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    pods = Pods(find_slice("v5e-16"), "image:1")
    return write_manifests([render(f"demo-c{n}", ["x"], pods) for n in range(3)], tmp_path / "manifests")


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A fake kubectl that is alone on PATH: commands that match `fails` end with 1 and what it `says`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl").write_text(KUBECTL)
    (folder / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))

    def answer(fails: str = "", says: str = "") -> Path:
        monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
        monkeypatch.setenv("FAKE_FAIL", fails)
        monkeypatch.setenv("FAKE_SAYS", says)
        return tmp_path / "log"

    return answer


def test_all_manifests_are_tried_before_one_is_submitted(paths: list[Path], kubectl: Any) -> None:
    log = kubectl()
    said = apply(paths)
    assert len(said) == 3
    assert all(line.endswith("created") for line in said)
    tried = [f"apply --dry-run=server -f {path}" for path in paths]
    assert log.read_text().splitlines() == [
        "version --request-timeout=20s",
        *tried,
        *(f"apply -f {path}" for path in paths),
    ]


@pytest.mark.parametrize(
    "fails, says, line",
    [
        (
            "version*",
            "E1201 02:00:00.1 memcache.go:265] couldn't get current server API group list\n"
            "Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout",
            r"kubectl: the cluster does not answer; .*\(Unable to connect to the server: .*timeout\)",
        ),
        (
            "version*",
            "error: You must be logged in to the server (Unauthorized)",
            "kubectl: not logged in to the cluster; gcloud auth login",
        ),
        (
            "*--dry-run*c1.yaml",
            'Error from server (Forbidden): error when creating "x.yaml": jobsets.jobset.x-k8s.io is '
            'forbidden: User "me" cannot create resource "jobsets" in API group "jobset.x-k8s.io"',
            r"demo-c1.yaml: no permission; ask the cluster's owner .*User \"me\" cannot create",
        ),
        (
            "*--dry-run*c2.yaml",
            'Error from server (Forbidden): error when creating "x.yaml": jobsets "a" is forbidden: '
            "exceeded quota: jobs, requested: count/jobsets=1, used: 9, limited: 9",
            "demo-c2.yaml: over the namespace's quota; .*requested: count/jobsets=1",
        ),
        (
            "*--dry-run*c0.yaml",
            'error: resource mapping not found for name: "a" namespace: "" from "x.yaml": no matches for '
            'kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"\nensure CRDs are installed first',
            "the cluster has no JobSet; docs/tpu.md installs it",
        ),
        (
            "*--dry-run*c0.yaml",
            'Error from server (BadRequest): error when creating "x.yaml": JobSet in version "v1alpha2" '
            "cannot be handled: strict decoding error: unknown field "
            '"spec.failurePolicy.rules[0].onJobFailureMessagePatterns"',
            "the cluster's JobSet is older than 0.10",
        ),
        (
            "*--dry-run*c0.yaml",
            'The JobSet "a" is invalid: spec.failurePolicy: Invalid value: "object": Value is immutable',
            "a job of this name is there with other settings; .*kubectl delete jobset NAME",
        ),
        ("*--dry-run*c0.yaml", "error: something else", r"demo-c0.yaml: error: something else; nothing"),
        ("*--dry-run*c0.yaml", "", "kubectl said nothing"),
    ],
)
def test_what_a_cluster_refuses_is_one_line_and_submits_nothing(
    fails: str, says: str, line: str, paths: list[Path], kubectl: Any
) -> None:
    log = kubectl(fails, says)
    with pytest.raises(UserError, match=line) as caught:
        apply(paths)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; nothing was submitted")
    assert not [each for each in log.read_text().splitlines() if each.startswith("apply -f")]


def test_a_refusal_half_way_takes_back_what_was_made(paths: list[Path], kubectl: Any) -> None:
    log = kubectl("apply -f *c2.yaml", 'jobsets "x" is forbidden: exceeded quota: jobs')
    with pytest.raises(
        UserError, match=r"demo-c2.yaml: over the namespace's quota; .*nothing was submitted$"
    ):
        apply(paths)
    assert log.read_text().splitlines()[-2:] == [f"delete --wait=false -f {path}" for path in paths[:2]]


def test_no_kubectl_no_answer_no_manifests(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"kubectl: not found; .*--dry-run needs none"):
        apply(paths)
    with pytest.raises(UserError, match="no manifests to submit"):
        apply([])
    monkeypatch.setattr("shutil.which", lambda name: name)

    def slow(words: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(words, options["timeout"])

    with pytest.raises(UserError, match="kubectl: no answer from kubectl in 120 s; nothing was submitted"):
        apply(paths, slow)
    with pytest.raises(UserError, match="kubectl: kubectl cannot be started"):
        apply(paths)
