"""JobSets for TPU pods: held against the CRDs, golden files and xpk.

What xpk makes is written here as literals, from `xpk workload create --dry-run --output-manifest-file` of xpk
1.16.0. The CRDs are those of kubernetes-sigs/jobset and kubernetes-sigs/kueue (config/components/crd/bases,
Apache-2.0), looked for in tests/launch/schemas or the folder that VLMSCALE_CRDS names. The golden files are
what `write_manifests` wrote; `python -m tests.launch.test_tpu` writes them anew after an intended change.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch.jobset import job_name, render, write_manifests
from launch.tpu import Pods, machine_of, xpk_command
from launch.work import work as attempted
from vlmscale.errors import UserError
from vlmscale.plan.slices import GENERATIONS, find_slice

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CRDS = Path(os.environ.get("VLMSCALE_CRDS") or Path(__file__).parent / "schemas")
IMAGE = "us-docker.pkg.dev/PROJECT/vlmscale/vlmscale:1"
TPUS = [f"{key}-{n}" for key, kind in GENERATIONS.items() if not kind.gpu for n in kind.slices]
CASES = {
    "demo": ("demo", "v5e-16", {}),
    "paper_grid": (
        "paper-grid",
        "v5e-256",
        {"slices": 2, "spot": True, "cache": "gs://BUCKET/programs", "account": "vlmscale"},
    ),
    "long_name": (
        "Compressors at 7B: every method, every count, three seeds",
        "v6e-64",
        {"privileged": False, "environment": {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=98304"}},
    ),
}


def work(cohort: str) -> list[str]:
    return [
        "vlmscale",
        "sweep",
        "work",
        "gs://BUCKET/runs/grid1",
        "--cohort",
        cohort,
        "--distributed",
        "auto",
    ]


def job_of(case: str, cohort: str = "123456789e12") -> dict[str, Any]:
    sweep, name, more = CASES[case]
    return render(job_name(sweep, cohort), work(cohort), Pods(find_slice(name), IMAGE, **more))


def pods_of(**changes: Any) -> Pods:
    return Pods(**({"slice": find_slice("v5e-16"), "image": IMAGE} | changes))


def job_spec(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_spec(job: dict[str, Any]) -> dict[str, Any]:
    return job_spec(job)["template"]["spec"]


def validator(plural: str, version: str) -> jsonschema.Draft202012Validator:
    """Of a CRD's version, strict: no field that it does not name."""
    found = sorted(CRDS.glob(f"*_{plural}.yaml"))
    if not found:
        pytest.skip(f"no CRD of {plural} in {CRDS}; name a folder of CRDs by VLMSCALE_CRDS")
    crd = yaml.load(found[0].read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = {each["name"]: each["schema"]["openAPIV3Schema"] for each in crd["spec"]["versions"]}
    schema = strict(versions[version])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which no CRD spells out
    return jsonschema.Draft202012Validator(schema)


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    out = {key: strict(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not open_ended:
        out["additionalProperties"] = False
    return out


@pytest.fixture(scope="module")
def jobsets() -> jsonschema.Draft202012Validator:
    return validator("jobsets", "v1alpha2")


# --- manifests


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_golden_ones(case: str, tmp_path: Path) -> None:
    (path,) = write_manifests([job_of(case)], tmp_path / "manifests")
    assert path.read_text() == (GOLDEN / f"{case}.yaml").read_text()
    assert yaml.safe_load(path.read_text()) == job_of(case)
    assert [each.name for each in path.parent.iterdir()] == [f"{job_of(case)['metadata']['name']}.yaml"]


@pytest.mark.parametrize("name", TPUS)
def test_every_slice_makes_a_job_that_the_crd_takes(
    name: str, jobsets: jsonschema.Draft202012Validator
) -> None:
    for more in ({}, {"spot": True, "cache": "gs://b/c", "account": "a", "privileged": False}):
        job = render("grid-0123456789ab", work("0123456789ab"), pods_of(slice=find_slice(name), **more))
        assert not [error.message for error in jobsets.iter_errors(job)]
        chips = pod_spec(job)["containers"][0]["resources"]["limits"]["google.com/tpu"]
        assert job_spec(job)["parallelism"] * chips == find_slice(name).chips


@pytest.mark.parametrize("case", CASES)
def test_golden_files_pass_the_crd(case: str, jobsets: jsonschema.Draft202012Validator) -> None:
    jobsets.validate(yaml.safe_load((GOLDEN / f"{case}.yaml").read_text()))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda job: job_spec(job).update(backoffLimitt=0), "backoffLimitt"),
        (lambda job: job_spec(job).update(parallelism="64"), "'64' is not of type 'integer'"),
        (lambda job: pod_spec(job).update(nodeSelectors={}), "nodeSelectors"),
        (lambda job: job["spec"]["failurePolicy"]["rules"][0].update(action="Fail"), "'Fail' is not one of"),
        (lambda job: job["spec"]["failurePolicy"]["rules"][0].pop("name"), "'name' is a required"),
        (lambda job: job["spec"]["failurePolicy"].update(maxRestart=1), "maxRestart"),
    ],
)
def test_the_schema_is_strict(
    spoil: Callable[[Any], Any], said: str, jobsets: jsonschema.Draft202012Validator
) -> None:
    job = copy.deepcopy(job_of("demo"))
    spoil(job)
    assert any(said in error.message for error in jobsets.iter_errors(job))


def test_strings_stay_strings_for_yaml_readers_of_every_version(tmp_path: Path) -> None:
    words = [
        "123456789e12",
        "yes",
        "0x1f",
        "null",
        "1_000",
        "a: b # c",
        'say "hi"\n',
        "~",
        "ä",
        "$(HOME)",
        "- x",
    ]
    (path,) = write_manifests([render("a-b", words, pods_of(environment={"A": "1e3"}))], tmp_path)
    container = pod_spec(yaml.safe_load(path.read_text()))["containers"][0]
    assert container["command"] == [word.replace("$(", "$$(") for word in words]
    values = re.findall(r"^ *- (?!\w+:)(.*)$|: (.*)$", path.read_text(), re.M)
    bare = {first or second for first, second in values if (first or second)[0] != '"'}
    assert all(re.fullmatch(r"\d+|true", word) for word in bare), bare


# --- what restarts a job


def action_after(job: dict[str, Any], exit_code: int = 0, condition: str = "") -> str:
    """What JobSet does when a pod ends so: the rules of Kubernetes' Jobs and of JobSet, by hand."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_spec(job)["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": []})
        if exit_code and codes["values"]:
            assert codes["operator"] == "In"
            assert codes["containerName"] == pod_spec(job)["containers"][0]["name"]
        wanted = [each["type"] for each in rule.get("onPodConditions", [])]
        what = f"Container vlmscale for pod default/x failed with exit code {exit_code}"
        if exit_code in codes["values"] or condition in wanted:
            what = what if exit_code in codes["values"] else f"Pod default/x has condition {condition}"
            reason, message = "PodFailurePolicy", f"{what} matching {rule['action']} rule at index {index}"
            break
    for rule in job["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(each, message) for each in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes_decide_what_restarts() -> None:
    job = job_of("demo")
    assert action_after(job, 2) == "FailJobSet"
    assert action_after(job, 42) == "RestartJobSetAndIgnoreMaxRestarts"
    for code in (1, 3, 127, 134, 137, 139, 143, 255):
        assert action_after(job, code) == "RestartJobSet"
    assert action_after(job, 143, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert action_after(job, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert job_spec(job)["backoffLimit"] == 0
    assert pod_spec(job)["restartPolicy"] == "Never"
    for rule in job["spec"]["failurePolicy"]["rules"]:  # the CRD's own rule for names
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


# --- against xpk 1.16.0

# Ours, xpk's, slices; then what xpk's manifest has: accelerator, topology, google.com/tpu, parallelism,
# completions, replicas.
XPK = [
    ("v5e-16", "v5litepod-16", 1, "tpu-v5-lite-podslice", "4x4", 4, 4, 4, 1),
    ("v5e-256", "v5litepod-256", 2, "tpu-v5-lite-podslice", "16x16", 4, 64, 64, 2),
    ("v6e-8", "v6e-8", 1, "tpu-v6e-slice", "2x4", 4, 2, 2, 1),
    ("v6e-64", "v6e-64", 1, "tpu-v6e-slice", "8x8", 4, 16, 16, 1),
    ("7x-32", "tpu7x-32", 1, "tpu7x", "2x2x4", 4, 4, 4, 1),
]
# Table UserFacingNameToSystemCharacteristics: topology, hosts, chips of a host, machine type.
XPK_TABLE = {
    "v4-8": ("v4-8", "2x2x1", 1, 4, "ct4p-hightpu-4t"),
    "v4-1024": ("v4-1024", "8x8x8", 128, 4, "ct4p-hightpu-4t"),
    "v5e-8": ("v5litepod-8", "2x4", 2, 4, "ct5lp-hightpu-4t"),
    "v5p-16": ("v5p-16", "2x2x2", 2, 4, "ct5p-hightpu-4t"),
    "v5p-2048": ("v5p-2048", "8x8x16", 256, 4, "ct5p-hightpu-4t"),
    "v6e-1": ("v6e-1", "1x1", 1, 1, "ct6e-standard-1t"),
    "v6e-4": ("v6e-4", "2x2", 1, 4, "ct6e-standard-4t"),
    "7x-512": ("tpu7x-512", "4x8x8", 64, 4, "tpu7x-standard-4t"),
}


@pytest.mark.parametrize("ours, theirs, slices, accelerator, topology, chips, hosts, ends, replicas", XPK)
def test_manifests_agree_with_xpk(
    ours: str,
    theirs: str,
    slices: int,
    accelerator: str,
    topology: str,
    chips: int,
    hosts: int,
    ends: int,
    replicas: int,
) -> None:
    pods = pods_of(slice=find_slice(ours), slices=slices, max_restarts=5)
    job = render("cell-0001", work("c"), pods)
    assert find_slice(theirs).topology == topology
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    assert job["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert job["spec"]["replicatedJobs"][0]["replicas"] == replicas
    spec, pod = job_spec(job), pod_spec(job)
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (hosts, ends, 0)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert {(each["key"], each["operator"]) for each in pod["tolerations"]} == {("google.com/tpu", "Exists")}
    assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"
    assert container["securityContext"]["privileged"] is True
    assert not [each for each in container["env"] if each["name"].startswith(("MEGASCALE", "TPU_WORKER"))]
    # Of the codes that xpk restarts on, and of those that end a job there, none is told otherwise here.
    assert "FailJobSet" not in {action_after(job, code) for code in (42, *range(127, 256))}
    assert action_after(job, 2) == "FailJobSet"


@pytest.mark.parametrize("name", XPK_TABLE)
def test_machines_agree_with_xpk(name: str) -> None:
    machine = machine_of(find_slice(name))
    found = (machine.xpk, find_slice(name).topology, machine.hosts, machine.chips, machine.kind)
    assert found == XPK_TABLE[name]


def test_the_xpk_command_says_the_same() -> None:
    pods = pods_of(
        slice=find_slice("v5e-256"), slices=2, spot=True, cache="gs://b/c", environment={"A": "x y"}
    )
    line = xpk_command("grid-c", work("c"), pods)
    words = shlex.split(line)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--cluster=CLUSTER",
        "--project=PROJECT",
        "--workload=grid-c",
        "--tpu-type=v5litepod-256",
        "--num-slices=2",
        f"--docker-image={IMAGE}",
        "--max-restarts=10",
        "--spot",
        "--env=A=x y",
        "--env=JAX_COMPILATION_CACHE_DIR=gs://b/c",
        f"--command={' '.join(work('c'))}",
    } <= set(words)
    with pytest.raises(UserError, match=r"v5e-4: xpk has no such slice; its smallest of v5e is v5e-8"):
        xpk_command("a", work("c"), pods_of(slice=find_slice("v5e-4")))


# --- names


@pytest.mark.parametrize("cohort", ["0123456789ab", "a", "9" * 16])
@pytest.mark.parametrize(
    "sweep", ["demo", "x" * 300, "7B grid", "ä/ö", "", "-", "a_b", "a b", "A-B", "a.b.c" * 20]
)
def test_names_are_dns_labels_with_room_for_the_pods(sweep: str, cohort: str) -> None:
    name = job_name(sweep, cohort)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)  # RFC 1035, which JobSet asks for
    assert len(name) <= 40
    assert name.endswith(f"-{cohort}")
    assert len(f"{name}-slice-998-255-abcde") <= 63
    render(name, work(cohort), pods_of(slice=find_slice("v5p-2048"), slices=999))


def test_names_of_different_sweeps_differ() -> None:
    sweeps = ["a b", "a_b", "A-b", "a-b", "x" * 40, "x" * 41, "", "-", "7b", "s-7b"]
    names = {job_name(sweep, cohort) for sweep in sweeps for cohort in ("0123456789ab", "0123456789ac")}
    assert len(names) == 2 * len(sweeps)
    assert job_name("paper-grid", "0123456789ab") == "paper-grid-0123456789ab"


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="job demo-123456789e12: two jobs have this name"):
        write_manifests([job_of("demo"), job_of("demo")], tmp_path / "manifests")
    assert not (tmp_path / "manifests").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output directory"):
        write_manifests([job_of("demo")], tmp_path / "file")


# --- what is refused


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"slice": find_slice("h100-8")},
            r"--topology h100-8: is no TPU slice; .* v4-N, v5e-N, v5p-N, v6e-N, 7x-N",
        ),
        ({"slices": 0}, "--slices 0: give a number from 1 to 999"),
        ({"slices": 1000}, "--slices 1000: give a number from 1 to 999"),
        (
            {"slice": find_slice("v5e-4"), "slices": 2},
            "--slices 2: v5e-4 is a single host.* larger --topology",
        ),
        ({"image": ""}, "--image '': give the container's image"),
        ({"image": "a b"}, "--image 'a b'"),
        ({"queue": ""}, "--queue '': no name in Kubernetes; at most 63"),
        ({"queue": "My_Queue"}, "--queue 'My_Queue'"),
        ({"account": "me@project"}, "--service-account 'me@project'"),
        ({"max_restarts": -1}, "--max-restarts -1: give 0 or more"),
        ({"grace": 0}, "--grace 0: give seconds"),
        ({"cache": "/tmp/cache"}, r"--cache /tmp/cache: pods share no disk; .*gs://BUCKET/cache"),
        ({"environment": {"A-B": "1"}}, "--env A-B: no name of a variable"),
        ({"environment": {"HF_TOKEN": "hf_x"}}, "--env HF_TOKEN: manifests hold no secrets"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "--env WANDB_API_KEY: manifests hold no secrets"),
        ({"environment": {"TPU_WORKER_ID": "0"}}, "--env TPU_WORKER_ID: GKE sets it"),
    ],
)
def test_bad_input_is_one_clear_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        render("grid-c", work("c"), pods_of(**changes))
    assert "\n" not in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_bad_names_and_commands_are_refused() -> None:
    for name in ("", "a" * 41, "7a", "a-", "A"):
        with pytest.raises(UserError, match="no name for a job; at most 40"):
            render(name, work("c"), pods_of())
    for command in ([], [""], ["vlmscale", ""]):
        with pytest.raises(UserError, match="command is empty"):
            render("a", command, pods_of())
    for cohort in ("", "a" * 17, "A", "a/b"):
        with pytest.raises(UserError, match="no job can be named after it"):
            job_name("demo", cohort)
    render("a", ["x"], pods_of(environment={"TOKENIZERS_PARALLELISM": "false"}))  # holds TOKEN, is no secret


# --- the recipe and the page


def test_the_image_is_built_from_the_checkout_without_secrets_as_no_root() -> None:
    text = (ROOT / "launch" / "Dockerfile").read_text()
    users = re.findall(r"^USER (.*)$", text, re.M)
    assert users
    assert users[-1] not in ("root", "0")
    assert not re.search(r"token|secret|password|api_?key", text, re.I)
    assert "[tpu,gcs]" in text
    for line in re.findall(r"^COPY (?:--\S+ )*(.*)$", text, re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name


def test_the_page_says_how_often_an_exception_starts_a_job_again(tmp_path: Path) -> None:
    run, job, actions = tmp_path / "cells" / "c", job_of("demo"), list[str]()
    run.mkdir(parents=True)

    def broken(commit: Any) -> None:
        raise RuntimeError("broken")

    while "FailJobSet" not in actions:
        actions.append(action_after(job, attempted(run, [run], broken)))
    [row] = re.findall(r"^\| 1: an exception \| (.*) \|$", (ROOT / "docs" / "tpu.md").read_text(), re.M)
    assert f"starts again on all hosts, {len(actions) - 1} times at most" in row
    assert len(actions) - 1 < pods_of().max_restarts


def test_the_queue_of_the_page_passes_kueues_crds() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tpu.md").read_text(), re.S)
    objects = list(yaml.safe_load_all(block))
    assert [each["kind"] for each in objects] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
    for each in objects:
        version = each["apiVersion"].partition("/")[2]
        validator(f"{each['kind'].lower()}s", version).validate(each)
    assert objects[2]["metadata"]["name"] == pods_of().queue


if __name__ == "__main__":
    for key in CASES:
        (written,) = write_manifests([job_of(key)], GOLDEN)
        written.replace(GOLDEN / f"{key}.yaml")
        print(json.dumps(str(GOLDEN / f"{key}.yaml")))
