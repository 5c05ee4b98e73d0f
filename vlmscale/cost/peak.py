"""Peak dense matrix-product rates of accelerators, as their vendors publish them.

Figures are FLOP/s of one jax device, two per multiply-add, without structured sparsity: where a datasheet
gives the sparse rate alone, half of it. Keys are what jax calls the device: CUDA's name of a GPU, exactly (a
slice of a GPU has a name of its own and is not in the table), and libtpu's name of a TPU.
"""

from __future__ import annotations

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


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak rate of dense matrix products on one device.

    Args:
      device_kind: `device_kind` of a jax device.
      dtype: of the factors: "bfloat16", "float16" or "float32".

    Returns:
      FLOP/s; None where the device is unknown, or nothing is published for that type.
    """
    return _PEAKS.get(device_kind, {}).get(dtype)
