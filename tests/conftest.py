"""What all tests share: eight fake CPU devices, no network, hypothesis without a clock or files."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))

import jax
from hypothesis import settings

# Through jax's own config, not the environment, so that programs started by a test see the machine as it is.
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("vlmscale", deadline=None, derandomize=True, database=None)
settings.load_profile("vlmscale")
