"""Jobs for Slurm without one: arrays, scripts, what waits for what, refusals; a fake sbatch records all."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.cohorts import Cohort, make_cohort
from launch.sbatch import program
from launch.site import Site, read_site
from launch.slurm import Array, arrays, plan, script, submit
from launch.state import directories, open_sweep
from tests.integration.tiny import DATA, steps
from vlmscale.cli import main
from vlmscale.config import MeshConfig, Sweep
from vlmscale.errors import UserError
from vlmscale.loading import load_cell
from vlmscale.records import Status, read_json, write_json

MAX_ARRAY = 4


class Slurm:
    """A cluster that numbers jobs; `queue` holds its tasks, `refuses` says which job it does not take."""

    def __init__(self, refuses: int | None = None, says: str = "sbatch: error: invalid partition") -> None:
        self.said: list[list[str]] = []
        self.queue: list[str] = []
        self.refuses, self.says, self.jobs = refuses, says, 100

    def __call__(self, words: Sequence[str]) -> str:
        self.said.append(list(words))
        if words[0] == "squeue":
            return "\n".join(self.queue)
        if words[0] == "scontrol":
            return f"MaxArraySize            = {MAX_ARRAY}\n"
        if words[0] == "sbatch" and "--test-only" not in words:
            if self.refuses is not None and len(self.submitted) > self.refuses:
                raise UserError(self.says)
            self.jobs += 1
            return f"{self.jobs};cluster"
        return ""

    @property
    def submitted(self) -> list[list[str]]:
        """Calls of sbatch that were meant."""
        return [w for w in self.said if w[0] == "sbatch" and "--test-only" not in w]

    @property
    def tried(self) -> list[list[str]]:
        """Calls that only ask."""
        return [w for w in self.said if w[0] == "sbatch" and "--test-only" in w]


def cohorts(
    out: Path, count: int, *overrides: str, mesh: dict[int, MeshConfig] | None = None
) -> list[Cohort]:
    """A sweep that was opened, each cell a cohort of its own."""
    cells = [
        load_cell(
            "configs/scenes_tiny.py:toy-14k,4", [*DATA, *steps(20), f"--config.train.seed={n}", *overrides]
        )
        for n in range(count)
    ]
    for number, own in (mesh or {}).items():
        cells[number].mesh = own
    opened = open_sweep(Sweep("six", cells), out)
    path = out / "sweep.json"
    write_json(path, read_json(path) | {"cohorts": [[cell.id] for cell in opened]})
    for cell in opened:
        cell.path.mkdir(parents=True, exist_ok=True)
        write_json(cell.path / "spec.json", {"cell_id": cell.id})
    return [make_cohort([cell], out) for cell in opened]


def test_a_sweep_is_submitted_as_arrays_with_a_report_behind(tmp_path: Path) -> None:
    out, slurm = tmp_path / "out", Slurm()
    made = cohorts(out, 6, mesh={5: MeshConfig(data=2)})
    Status(made[1].path).update(state="done")
    done = submit(made, out, "six", Site(), 3, print, slurm)
    assert [w[2:] for w in slurm.submitted] == [
        ["--array=0,2-3%3", str(out / "slurm" / "array-0.sh")],
        ["--array=0%3", str(out / "slurm" / "array-1.sh")],  # a cluster's arrays have at most 4 indices
        ["--array=1%3", str(out / "slurm" / "array-2.sh")],
        ["--dependency=afterany:101:102:103", str(out / "slurm" / "report.sh")],
    ]
    assert len(slurm.tried) == 4
    assert slurm.said.index(slurm.tried[-1]) < slurm.said.index(slurm.submitted[0])
    assert done.jobs == {"101": [made[n].id for n in (0, 2, 3)], "102": [made[4].id], "103": [made[5].id]}
    assert done.report == "104"
    rows = [json.loads(line) for line in (out / "slurm" / "jobs.jsonl").read_text().splitlines()]
    assert rows[1:] == [
        {"job": "102", "first": 4, "places": [4]},
        {"job": "103", "first": 4, "places": [5]},
        {"job": "104"},
    ]
    wide = (out / "slurm" / "array-2.sh").read_text()
    assert "#SBATCH --nodes=2\n" in wide
    assert f"launch.shepherd {out} --first 4 --signal-s 120 -- " in wide


def test_what_is_queued_is_not_submitted_again_and_the_report_waits_for_it(tmp_path: Path) -> None:
    out, slurm = tmp_path / "out", Slurm()
    made = cohorts(out, 4)
    submit(made, out, "six", Site(), None, print, slurm)
    slurm.queue = ["101 0", "101 2", "102 N/A", "77 1"]
    again = submit(made, out, "six", Site(), None, print, slurm)
    assert again.queued == [made[0].id, made[2].id]
    assert again.jobs == {"103": [made[1].id, made[3].id]}
    assert slurm.submitted[-1][2] == "--dependency=afterany:101:103"
    assert slurm.said[-1] == ["scancel", "102"]  # the report of the first launch
    slurm.queue = ["101 0", "101 2", "103 1", "103 3", "104 N/A"]
    before = len(slurm.said)
    none = submit(made, out, "six", Site(), None, print, slurm)
    assert (none.jobs, none.report, len(none.queued)) == ({}, "", 4)
    assert all(words[0] in ("squeue", "scontrol") for words in slurm.said[before:])


def test_a_second_stage_waits_for_the_tasks_of_its_own_cells(tmp_path: Path) -> None:
    first, second, slurm = tmp_path / "first", tmp_path / "second", Slurm()
    made = cohorts(first, 4)
    submit(made, first, "one", Site(), None, print, slurm)
    slurm.queue = [f"101 {index}" for index in range(4)]
    write_json(made[3].path / "done.json", {})

    def behind(number: int, of: int) -> Cohort:
        cell = load_cell("configs/scenes_tiny.py:toy-14k,4", [*DATA, f"--config.train.seed={number}"])
        cell.train.init_from = str(made[of].path)
        return make_cohort(directories(Sweep("two", [cell]), second), second)

    own = [behind(0, 0), behind(1, 1), behind(2, 0), behind(3, 3)]
    planned, queued = plan(own, [cohort.id for cohort in own], second, Site(), print, slurm)
    assert not queued
    assert [(array.indices, array.after) for array in planned] == [
        ("0-1", "aftercorr:101"),
        ("2", "afterok:101_0"),  # of another index
        ("3", ""),  # trained already
    ]
    assert planned[0].words(None) == [
        "--array=0-1",
        "--dependency=aftercorr:101",
        "--kill-on-invalid-dep=yes",
    ]
    slurm.queue = ["101 0"]  # the other cells of the first stage failed
    told: list[str] = []
    planned, _ = plan(own, [cohort.id for cohort in own], second, Site(), told.append, slurm)
    assert [(array.indices, array.after) for array in planned] == [
        ("0", "aftercorr:101"),
        ("2", "afterok:101_0"),
        ("3", ""),
    ]
    assert len(told) == 1
    assert f"({own[1].id}) is left out: train.init_from={made[1].path}: is neither trained nor" in told[0]
    with pytest.raises(UserError, match=rf"init_from={made[1].path}: is neither .*; nothing is submitted"):
        plan(own[1:2], [own[1].id], second, Site(), print, slurm)


def test_what_was_cancelled_is_left_out_and_told(tmp_path: Path) -> None:
    out, slurm, told = tmp_path / "out", Slurm(), []
    made = cohorts(out, 2)
    Status(made[0].path).update(state="cancelled")
    done = submit(made, out, "six", Site(), None, told.append, slurm)
    assert done.jobs == {"101": [made[1].id]}
    assert len(told) == 1
    assert f"({made[0].id}) is left out: {made[0].id} is cancelled; vlmscale sweep retry" in told[0]


def test_of_many_waiting_tasks_ten_are_in_an_array(tmp_path: Path) -> None:
    made = dict(enumerate(cohorts(tmp_path / "out", 12)))
    planned = arrays(made, Site(), 1001, {place: [("7", place)] for place in made})
    assert [(array.indices, array.after) for array in planned] == [
        ("0-9", "aftercorr:7"),  # Slurm looks at no more of them one by one
        ("10-11", "aftercorr:7"),
    ]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_all_is_submitted_or_nothing(tmp_path: Path, at: int) -> None:
    out = tmp_path / "out"
    slurm = Slurm(refuses=at)
    with pytest.raises(UserError, match="invalid partition; nothing is submitted"):
        submit(cohorts(out, 6), out, "six", Site(), None, print, slurm)
    assert len(slurm.submitted) == at + 1
    cancelled = [words for words in slurm.said if words[0] == "scancel"]
    assert cancelled == ([["scancel", *map(str, range(101, 101 + at))]] if at else [])
    path = out / "slurm" / "jobs.jsonl"
    assert not path.exists() or not path.read_text()


def test_jobs_are_known_at_once_and_named_where_they_cannot_be_taken_back(tmp_path: Path) -> None:
    out, slurm = tmp_path / "out", Slurm(refuses=1)

    def run(words: Sequence[str]) -> str:
        if words[0] == "scancel":
            raise UserError("scancel: the controller does not answer")
        return slurm(words)

    with pytest.raises(UserError, match=r"invalid partition; cancel these yourself: scancel 101$"):
        submit(cohorts(out, 6), out, "six", Site(), None, print, run)
    assert json.loads((out / "slurm" / "jobs.jsonl").read_text())["job"] == "101"


def test_a_job_for_nodes_that_are_down_now_waits_in_the_queue(tmp_path: Path) -> None:
    out, slurm, told = tmp_path / "out", Slurm(), []

    def run(words: Sequence[str]) -> str:
        if "--test-only" in words and "array-1" in words[-1]:
            raise UserError("sbatch: Requested node configuration is not available")
        return slurm(words)

    done = submit(cohorts(out, 5), out, "six", Site(), None, told.append, run)
    assert len(done.jobs) == 2
    assert told == [
        "sbatch: Requested node configuration is not available; array-1.sh waits until there are such nodes"
    ]


def test_the_callers_environment_asks_nothing_of_slurm(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SBATCH_PARTITION", "SLURM_JOB_ID", "SQUEUE_STATES", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/a/slurm.conf")
    seen = [line for line in program(["sbatch"]).splitlines() if line.startswith("S")]
    assert [line for line in seen if re.match("SLURM|SBATCH|SQUEUE", line)] == ["SLURM_CONF=/a/slurm.conf"]


@pytest.mark.parametrize(
    "said, told",
    [
        ("sbatch: error: invalid partition specified: nope", "sinfo shows the partitions of this cluster"),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination",
            "sacctmgr",
        ),
        (
            "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates "
            "accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "over a limit of the cluster",
        ),
        ("sbatch: error: Batch job submission failed: Access/permission denied", "no permission"),
        ("sbatch: error: Invalid generic resource (gres) specification", "no such gres"),
        ("allocation failure: Requested node configuration is not available", "no node has this"),
        ("sbatch: error: Invalid --time specification", "not a time as sbatch reads it"),
        ("squeue: fatal: Could not establish a configuration source", "not set up on this machine"),
        (
            "sbatch: error: Unable to contact slurm controller (connect failure)",
            "the controller does not answer",
        ),
        ("sbatch: error: Socket timed out on send/recv operation", "the controller does not answer"),
        ("sbatch: error: Requested partition configuration not available now", "no node has this"),
        ("sbatch: error: Requested time limit is invalid (missing or exceeds some limit)", "too long here"),
        ("sbatch: error: something new", "sbatch: something new"),
        ("", "sbatch: it said nothing"),
    ],
)
def test_what_slurm_refuses_is_told_in_one_line(said: str, told: str, monkeypatch: Any) -> None:
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr("launch.sbatch.subprocess.run", lambda *_, **__: done)
    with pytest.raises(UserError) as refused:
        program(["sbatch", "x.sh"])
    line = str(refused.value)
    assert told in line
    assert line.startswith("sbatch: ")
    assert "\n" not in line
    assert "error: " not in line


def test_without_a_slurm_nothing_is_prepared(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("vlmscale.train.prepared.prepare", lambda *_: pytest.fail("prepared"))
    words = ["sweep", "run", "configs/sweeps/demo.py", "--on", "slurm", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "vlmscale sweep: scontrol: not found; --on slurm submits from a login node of a Slurm cluster"
    ]
    assert main([*words, "--dry-run"]) == 0  # needs none
    shown = capsys.readouterr().out
    assert "sbatch --array=0-" in shown
    assert "exec " in shown
    assert not (tmp_path / "out" / "slurm").exists()


def test_a_program_that_hangs_is_given_up(monkeypatch: Any) -> None:
    def hang(words: Sequence[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(list(words), options["timeout"])

    monkeypatch.setattr("launch.sbatch.subprocess.run", hang)
    with pytest.raises(UserError, match="squeue: no answer in 120 s"):
        program(["squeue"])


@pytest.mark.parametrize(
    "places, first, indices",
    [((0, 1, 2), 0, "0-2"), ((4, 6, 7, 9), 4, "0,2-3,5"), ((3,), 0, "3"), ((0, 2), 0, "0,2")],
)
def test_indices(places: tuple[int, ...], first: int, indices: str) -> None:
    assert Array((1, 1), first, places).indices == indices


@pytest.mark.parametrize(
    "mesh, site, shape",
    [
        (MeshConfig(), Site(devices_per_node=8), (1, 8)),
        (MeshConfig(), Site(devices_per_node=8, nodes=2), (2, 8)),
        (MeshConfig(data=1), Site(devices_per_node=8), (1, 1)),
        (MeshConfig(data=2, fsdp=2), Site(devices_per_node=8), (1, 4)),
        (MeshConfig(data=4, fsdp=8), Site(devices_per_node=8), (4, 8)),
        (MeshConfig(fsdp=16), Site(devices_per_node=8), (2, 8)),
        (MeshConfig(fsdp=4), Site(devices_per_node=8), (1, 8)),
        (MeshConfig(data=2), Site(), (2, 1)),
    ],
)
def test_the_mesh_decides_how_many_nodes_a_cell_takes(
    mesh: MeshConfig, site: Site, shape: tuple[int, int]
) -> None:
    assert site.shape(mesh, "cell") == shape


def test_a_mesh_that_no_nodes_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 and mesh\.tensor=0 do not divide 8 devices"):
        Site(devices_per_node=8).shape(MeshConfig(fsdp=3), "cell")
    with pytest.raises(UserError, match="its mesh has 12 devices, which are no whole nodes of 8"):
        Site(devices_per_node=8).shape(MeshConfig(data=12), "cell")


def test_a_site_file_reaches_the_script(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(
        """
        account = "lab a"
        partition = "gpu,gpu2"
        time = "2:00:00"
        gres = "gpu:h100"
        devices_per_node = 8
        cpus_per_node = 64
        mem = "800G"
        signal_s = 300
        sbatch = ["--mail-type=FAIL"]
        setup = ["module load cuda", "export A='b c'"]
        srun = ["--container-image=x y.sqsh", "--mpi=none"]
        container = ["apptainer", "exec", "--nv", "my image.sif"]
        command = ["vlmscale"]
        """
    )
    site = read_site(path)
    out = tmp_path / "with blank"
    [array] = arrays({0: cohorts(out, 1)[0]}, site, 9, {})
    found = script(out, "six", array, site)
    assert found[0] == "#!/bin/bash"
    for line in (
        '#SBATCH --account="lab a"',
        "#SBATCH --partition=gpu,gpu2",
        "#SBATCH --gres=gpu:h100:8",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --mem=800G",
        "export JAX_PLATFORMS=cuda,cpu",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --mail-type=FAIL",
        f'#SBATCH --output="{out}/slurm/%A_%a.txt"',
        "module load cuda",
        "export A='b c'",
    ):
        assert line in found
    assert found[-1].endswith(
        f" -P -m launch.shepherd '{out}' --first 0 --signal-s 300 '--srun=--container-image=x y.sqsh' "
        "--srun=--mpi=none -- apptainer exec --nv 'my image.sif' vlmscale"
    )


def test_a_part_of_a_node_is_asked_for_with_its_share() -> None:
    site = Site(devices_per_node=8, cpus_per_node=64, mem="800G", gres="gpu")
    assert site.share(2) == (16, "204800M")
    assert site.share(8) == (64, "800G")
    assert Site(mem="0", devices_per_node=8).share(1) == (0, "0")
    found = script(Path("out"), "six", Array((1, 2), 0, (0,)), site)
    for line in ("#SBATCH --gres=gpu:2", "#SBATCH --cpus-per-task=16", "#SBATCH --mem=204800M"):
        assert line in found


@pytest.mark.parametrize(
    "mem, share",
    [("2T", "262144M"), ("4G", "512M"), ("4g", "512M"), ("4000", "500M"), ("20M", "2M"), ("9000K", "1M")],
)
def test_a_share_of_memory_is_no_more_than_that(mem: str, share: str) -> None:
    assert Site(devices_per_node=8, mem=mem).share(1) == (0, share)


def test_where_there_are_no_accelerators_a_mesh_is_of_cpu_devices() -> None:
    found = script(Path("out"), "six", Array((1, 4), 0, (0,)), Site(devices_per_node=4))
    assert "export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4" in found


def test_the_site_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = Path("docs/slurm.md").read_text(encoding="utf-8")
    path = tmp_path / "site.toml"
    path.write_text(text.partition("```toml\n")[2].partition("```")[0])
    site = read_site(path)
    assert (site.devices_per_node, site.signal_s, site.gres) == (8, 300, "gpu:h100")
    path.write_text(path.read_text().replace("# container", "container").replace("# command", "command"))
    assert read_site(path).vlmscale[-2:] == ["vlmscale.sif", "vlmscale"]


@pytest.mark.parametrize(
    "text, told",
    [
        ("acount = 'x'", "unknown key acount; the nearest is account"),
        ("account = 3", "account = 3: must be a string"),
        ("setup = 'module load'", "must be a list of strings"),
        ('setup = ["a\\nb"]', "has a line break; give a list of lines"),
        ("nodes = 0", "nodes = 0: must be 1 or more"),
        ("cpus_per_node = -1", "cpus_per_node = -1: must be 0 or more"),
        ("container = ['apptainer']", "container needs command"),
        ("time = '2'", "leaves no time to work before cells are told to save; it must be signal_s=120"),
        ("time = '1:30'", "leaves no time"),
        ("time = '0-0:02'", "leaves no time"),
        ("nodes = true", "nodes = True: must be a whole number"),
        ("a b", "is no TOML"),
    ],
)
def test_a_wrong_site_file_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"--site {path}: .*{told}"):
        read_site(path)


def test_a_site_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_site(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "words, told",
    [
        (["--site", "x.toml"], "--site is for --on slurm; here it is --on local"),
        (["--on", "slurm", "--workers", "2"], "give --memory GIB as well"),
    ],
)
def test_options_that_do_not_belong_together(
    words: list[str], told: str, tmp_path: Path, capsys: Any
) -> None:
    assert main(["sweep", "run", "configs/sweeps/demo.py", "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "time", ["", "3", "3:00", "1:00:00", "2-0", "1-2:3:4", "0", "0-0:00", "UNLIMITED", "soon"]
)
def test_times_that_are_long_enough_or_sbatchs_to_judge(time: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(f"time = '{time}'")
    assert read_site(path).time == time


def test_a_quotation_mark_is_refused() -> None:
    with pytest.raises(UserError, match="a quotation mark cannot be passed on"):
        script(Path("out"), "six", Array((1, 1), 0, (0,)), Site(sbatch=['--comment=a "b"']))


@pytest.mark.parametrize("name", ["100%", 'a"b', "a\\b"])
def test_a_path_that_slurm_would_read_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which Slurm reads otherwise"):
        script(tmp_path / name, "six", Array((1, 1), 0, (0,)), Site())
