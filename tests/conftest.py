"""What all tests share: eight fake CPU devices, no network, hypothesis without a clock or files."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.environment import PROGRAMS  # isort: skip  (before jax: it sets what jax reads)

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import settings

from tests.absent import refuse
from vlmscale.layers import abstract_params

# Through jax's own config, not the environment, so that programs started by a test see the machine as it is.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_unconfigure() -> None:
    """The programs of a run go with it."""
    if PROGRAMS:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


settings.register_profile("vlmscale", deadline=None, derandomize=True, database=None)
settings.load_profile("vlmscale")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_forgotten() -> Iterator[None]:
    """Behind each module: thousands of them would hold gigabytes and slow every collection of garbage."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """Parameters of a Linen module without compiling its init: `random_params(module, *inputs)["params"]`.

    Biases and norm scales are random too; at 0 and 1, where they start, a missing one would not show.
    """

    def make(module: Any, *inputs: Any) -> Any:
        shapes = {"params": nn.meta.unbox(abstract_params(module, *inputs))}
        rng = np.random.default_rng(0)

        def draw(path: Any, leaf: Any) -> jax.Array:
            around = 1.0 if path[-1].key == "scale" else 0.0
            fan_in = {"kernel": -2, "weight": -1}.get(path[-1].key)
            spread = leaf.shape[fan_in] ** -0.5 if fan_in else 0.3
            return jax.numpy.asarray(around + spread * rng.standard_normal(leaf.shape), leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make


@pytest.fixture(scope="session")
def bucket_requests() -> Iterator[list[str]]:
    """What was asked of the bucket of this session, which is an emulator on loopback."""
    from tests.bucket import serve

    with serve() as requests:
        yield requests


@pytest.fixture
def bucket(bucket_requests: list[str]) -> str:
    """An address of a bucket, of this test alone."""
    from tests.bucket import NAME

    bucket_requests.clear()
    return f"gs://{NAME}/{uuid.uuid4().hex}"


@pytest.fixture
def libtpu() -> None:
    """The TPU compiler; where it is not installed the test is skipped, but fails in CI, which installs it."""
    if importlib.util.find_spec("libtpu") is None:
        refuse("needs libtpu: install vlmscale[tpu]")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a small disk; skips where that is not allowed."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("mounting a small disk needs root")
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
