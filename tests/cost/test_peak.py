"""Peak rates: figures of the datasheets, per jax device, and nothing for what is not known."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlmscale.cost.peak import find_device, peak_flops
from vlmscale.errors import UserError


@pytest.mark.parametrize(
    "kind, dtype, teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),  # dense: half of the 1,979 with sparsity
        ("NVIDIA H100 80GB HBM3", "float32", 494.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H100 NVL", "float16", 835.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "float32", 183),
        ("NVIDIA A10", "bfloat16", 125),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100S-PCIE-32GB", "float32", 16.4),
        ("TPU v2", "bfloat16", 23),  # a core; a chip has two
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU7x", "bfloat16", 1153.5),  # a core; a chip has two
    ],
)
def test_dense_rate_of_one_device(kind: str, dtype: str, teraflops: float) -> None:
    assert peak_flops(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("cpu", "float32"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),  # a slice has a part of the rate
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("Tesla V100-SXM2-16GB", "bfloat16"),  # it has none
        ("TPU v4", "float32"),  # not published
        ("", "bfloat16"),
    ],
)
def test_what_is_not_known(kind: str, dtype: str) -> None:
    assert peak_flops(kind, dtype) is None


@pytest.mark.parametrize(
    "name, kind, gigabytes",
    [
        ("a100-40gb", "NVIDIA A100-SXM4-40GB", 1555),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB", 2039),
        ("h100", "NVIDIA H100 80GB HBM3", 3350),
        ("H200", "NVIDIA H200", 4800),
        ("NVIDIA H200", "NVIDIA H200", 4800),
        ("b200", "NVIDIA B200", 8000),
        ("l4", "NVIDIA L4", 300),
        ("v100", "Tesla V100-SXM2-32GB", 900),
        ("v2", "TPU v2", 350),  # a core; a chip has two
        ("v5e", "TPU v5 lite", 819),
        ("v6e", "TPU v6 lite", 1640),
        ("7x", "TPU7x", 3690),
    ],
)
def test_a_device_by_its_name(name: str, kind: str, gigabytes: float) -> None:
    device = find_device(name)
    assert (device.kind, device.bandwidth) == (kind, gigabytes * 1e9)
    assert device.flops == peak_flops(kind, "float16" if "V100" in kind else "bfloat16")


def test_an_unknown_device() -> None:
    with pytest.raises(UserError, match=r"--device h300: unknown; there are a100-40gb, .*\(did you mean h"):
        find_device("h300")


def test_it_needs_no_jax() -> None:
    lines = "import sys\nimport vlmscale.cost.peak\nassert not {'jax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", lines], check=True)
