"""Peak dense matrix-product rates and memory bandwidths of accelerators, as their vendors publish them.

Figures are FLOP/s of one jax device, two per multiply-add, without structured sparsity: where a datasheet
gives the sparse rate alone, half of it. Keys are what jax calls the device: CUDA's name of a GPU, exactly (a
slice of a GPU has a name of its own and is not in the table), and libtpu's name of a TPU.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from vlmscale.errors import UserError

_T = 1e12


def _gpu(half: float, tf32: float) -> dict[str, float]:
    """Rates from Ampere on, in TFLOP/s; jax multiplies float32 in TF32 there unless told otherwise."""
    return {"bfloat16": half * _T, "float16": half * _T, "float32": tf32 * _T}


def _volta(half: float, single: float) -> dict[str, float]:
    """Rates of V100, in TFLOP/s: no bfloat16, no TF32; float32 on its ordinary cores."""
    return {"float16": half * _T, "float32": single * _T}


def _tpu(chip: float, devices: int = 1) -> dict[str, float]:
    """Rate of a device of a TPU, of whose chip jax makes `devices`, in TFLOP/s; float32 is not published."""
    return {"bfloat16": chip / devices * _T}


# NVIDIA A100 datasheet (1758950): SXM and PCIe the same.
_A100 = _gpu(312, 156)
# NVIDIA H100 datasheet: with sparsity 1,979 and 989 (SXM), 1,671 and 835 (NVL). H200 datasheet: the same.
_H100_SXM = _gpu(1979 / 2, 989 / 2)
_H100_NVL = _gpu(1671 / 2, 835 / 2)
# NVIDIA V100 datasheet (1165301): SXM2, PCIe, V100S. DGX-2 datasheet, of SXM3: 2 PFLOPS of 16 GPUs.
_V100_SXM = _volta(125, 15.7)
_V100_PCIE = _volta(112, 14)

_PEAKS: dict[str, dict[str, float]] = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _gpu(1513 / 2, 756 / 2),  # H100 datasheet of 2022, with sparsity 1,513 and 756
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA B200": _gpu(4500 / 2, 2200 / 2),  # Blackwell datasheet, HGX B200: 4,500 and 2,200 with sparsity
    "NVIDIA L4": _gpu(242 / 2, 120 / 2),  # L4 datasheet: with sparsity 242 and 120
    "NVIDIA L40S": _gpu(362.05, 183),  # L40S datasheet
    "NVIDIA A10": _gpu(125, 62.5),  # A10 datasheet
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-SXM3-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": _volta(130, 16.4),
    # Each core of v2 and v3 is a device. Jouppi et al., CACM 63(7), 2020: 46 and 123 a chip; the latter also
    # cloud.google.com/tpu/docs/v3.
    "TPU v2": _tpu(46, devices=2),
    "TPU v3": _tpu(123, devices=2),
    "TPU v4": _tpu(275),  # cloud.google.com/tpu/docs/v4; a chip is a device, as libtpu has it by default
    "TPU v5 lite": _tpu(197),  # .../v5e
    "TPU v5e": _tpu(197),
    "TPU v5": _tpu(459),  # .../v5p
    "TPU v5p": _tpu(459),
    "TPU v6 lite": _tpu(918),  # .../v6e
    "TPU v6e": _tpu(918),
    "TPU7x": _tpu(2307, devices=2),  # .../tpu7x
}

_GB = 1e9
# Bytes/s of one jax device. GPUs: the datasheets named above, but of B200 that of DGX B200 (64 TB/s of 8
# GPUs). TPUs: the pages named above, a chip; v2 and v3: Jouppi et al., 700 and 900 GB/s a chip of two
# devices.
_BANDWIDTHS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 1555 * _GB,
    "NVIDIA A100-SXM4-80GB": 2039 * _GB,
    "NVIDIA A100-PCIE-40GB": 1555 * _GB,
    "NVIDIA A100 80GB PCIe": 1935 * _GB,
    "NVIDIA H100 80GB HBM3": 3350 * _GB,
    "NVIDIA H100 PCIe": 2000 * _GB,
    "NVIDIA H100 NVL": 3900 * _GB,
    "NVIDIA H200": 4800 * _GB,
    "NVIDIA H200 NVL": 4800 * _GB,
    "NVIDIA B200": 64_000 / 8 * _GB,
    "NVIDIA L4": 300 * _GB,
    "NVIDIA L40S": 864 * _GB,
    "NVIDIA A10": 600 * _GB,
    "Tesla V100-SXM2-16GB": 900 * _GB,
    "Tesla V100-SXM2-32GB": 900 * _GB,
    "Tesla V100-PCIE-16GB": 900 * _GB,
    "Tesla V100-PCIE-32GB": 900 * _GB,
    "Tesla V100S-PCIE-32GB": 1134 * _GB,
    "TPU v2": 700 / 2 * _GB,
    "TPU v3": 900 / 2 * _GB,
    "TPU v4": 1228 * _GB,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 819 * _GB),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 2765 * _GB),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 1640 * _GB),
    "TPU7x": 7380 / 2 * _GB,
}

# What people call them; of a GPU with several boards the name alone is the SXM one.
_NAMES = {
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "a100-pcie-40gb": "NVIDIA A100-PCIE-40GB",
    "a100-pcie-80gb": "NVIDIA A100 80GB PCIe",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h100-nvl": "NVIDIA H100 NVL",
    "h200": "NVIDIA H200",
    "h200-nvl": "NVIDIA H200 NVL",
    "b200": "NVIDIA B200",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "a10": "NVIDIA A10",
    "v100": "Tesla V100-SXM2-32GB",
    "v100s": "Tesla V100S-PCIE-32GB",
    "v2": "TPU v2",
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "7x": "TPU7x",
    "v5litepod": "TPU v5 lite",
    "tpu7x": "TPU7x",
}


class Device(NamedTuple):
    """What one jax device does at most: FLOP/s of half precision, and bytes/s from its memory."""

    kind: str
    flops: float
    bandwidth: float


def find_device(name: str) -> Device:
    """The device of a short name such as h200 or v5e, or of what jax calls it.

    Raises:
      UserError: there is none; the line lists what there is.
    """
    kind = _NAMES.get(name.strip().lower(), name.strip())
    if kind not in _BANDWIDTHS:
        near = difflib.get_close_matches(name.strip().lower(), _NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--device {name}: unknown; there are {', '.join(_NAMES)}{hint}")
    half = peak_flops(kind, "bfloat16") or _PEAKS[kind]["float16"]  # V100 has no bfloat16
    return Device(kind, half, _BANDWIDTHS[kind])


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak rate of dense matrix products on one device.

    Args:
      device_kind: `device_kind` of a jax device.
      dtype: of the factors: "bfloat16", "float16" or "float32".

    Returns:
      FLOP/s; None where the device is unknown, or nothing is published for that type.
    """
    return _PEAKS.get(device_kind, {}).get(dtype)
