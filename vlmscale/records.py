"""What a run writes: the row schema, status, metrics, environment. No jax: analysis tools read these files.

The directory layout and every field are explained in docs/records.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vlmscale import __version__
from vlmscale.errors import UserError

CHECKPOINTS = "checkpoints"  # folder of a run
ADDRESS = "checkpoints.url"  # file of a run whose checkpoints lie in a bucket: the address


@dataclass(frozen=True)
class ResultRow:
    """One row of result.jsonl: the score of one cell on one task."""

    run_id: str
    cell_id: str
    cohort_id: str
    sweep: str
    seed: int
    llm_name: str
    n_total: int
    n_nonembed: int
    vision_tower: str
    tower_flops: int
    compressor: str
    compressor_params: int
    compressor_flops: int
    query_pass_flops: int
    reducer: str | None
    tokens_per_layer: float
    kv_bytes: int
    visual_tokens: float  # whole but for methods whose count depends on the image: there the mean
    text_tokens_mean: float
    gen_tokens_mean: float
    image_size: int
    data_mix: str
    data_samples: int
    stage_steps: list[int]
    lr: float
    train_flops: int
    infer_flops: int
    latency_ms: float | None
    device: str
    dtype: str
    task: str
    task_group: str
    split: str
    prompt_id: str
    scorer: str
    metric: str
    score_raw: float
    score: float
    stderr: float
    n_items: int
    n_failed: int
    details: dict[str, float]
    chance: float | None
    blind_score: float | None
    heldout_loss: float | None
    wall_s: float
    vlmscale_version: str
    git_commit: str | None
    finished_at: str
    status: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Write JSON by atomic rename, so that a reader or a crash never sees half a file."""
    _write(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a .jsonl file by atomic rename."""
    _write(path, "".join(line + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only when the disk was full


def read_json(path: Path, absent: str = "") -> Any:
    """Read a JSON file that we wrote.

    Args:
      path: of the file.
      absent: the message where there is none; "" for that of a file of a run.

    Raises:
      UserError: absent or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(absent or f"{path}: not found; is this a run directory?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file that came with a download; None where there is no such file.

    Raises:
      UserError: unreadable, no JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    return data


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_directory(path: Path) -> None:
    """Make an output directory with its parents.

    Raises:
      UserError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        try:
            probe.write_text("x")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output directory {path}: {error.strerror or error}") from error


class Status:
    """status.json of a cell: state, attempts, where it resumed, its last error line."""

    def __init__(self, run: Path) -> None:
        self.path = run / "status.json"

    def read(self) -> dict[str, Any]:
        """What is on disk; a cell without a file is pending."""
        fresh = {"state": "pending", "attempts": 0, "resumed_from": [], "last_error": None}
        return fresh | (json.loads(self.path.read_text()) if self.path.exists() else {})

    def update(self, **changes: Any) -> dict[str, Any]:
        """Change some fields by atomic rename and return the whole."""
        status = self.read() | changes | {"updated_at": now()}
        write_json(self.path, status)
        return status


class Metrics:
    """metrics.jsonl: one line a logged step, each step once, also after a resume."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open for appending behind `resume_step`; later lines and a torn last line are dropped."""
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError):
                    continue  # the line that a kill cut in two; its step is run again
                if step <= resume_step:
                    kept.append(line)
        write_lines(path, kept)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: float) -> None:
        """Append one line; it is on disk after `flush`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def flush(self) -> None:
        """Force all lines to disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and close; closed even when the disk is full."""
        try:
            self.flush()
        finally:
            self.file.close()


def now() -> str:
    """UTC time as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def git_commit() -> str | None:
    """Commit of the checkout that the code runs from ("-dirty" where files differ), else None."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not just any repository around an install
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(device: str) -> dict[str, Any]:
    """What env.json says: commit, versions, device kind."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
    return {
        "vlmscale_version": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "device": device,
        "platform": platform.platform(),
    }
