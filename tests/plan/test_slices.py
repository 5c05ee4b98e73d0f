"""Names of TPU slices: what they are, and what is said of those that are none."""

from __future__ import annotations

import re

import pytest

from vlmscale.cost.peak import peak_flops
from vlmscale.errors import UserError
from vlmscale.plan.slices import GENERATIONS, find_slice, joined


@pytest.mark.parametrize(
    "name, topology, chips, devices, hosts",
    [
        ("v5e-256", "16x16", 256, 256, 64),
        ("v5litepod-16", "4x4", 16, 16, 4),
        ("v6e-64", "8x8", 64, 64, 16),
        ("v6e-1", "1x1", 1, 1, 1),
        # Numbers that count cores.
        ("v4-16", "2x2x2", 8, 8, 2),
        ("v5p-1024", "8x8x8", 512, 512, 128),
        ("7x-32", "2x2x4", 16, 32, 4),
        ("tpu7x-8", "2x2x1", 4, 8, 1),
        ("h200-8", "8", 8, 8, 1),
        ("A100-80GB-64", "64", 64, 64, 8),
        ("2xv5e-16", "4x4", 32, 32, 8),
        ("3xv5litepod-4", "2x2", 12, 12, 3),
        ("4xv5p-16", "2x2x2", 32, 32, 8),
    ],
)
def test_a_slice(name: str, topology: str, chips: int, devices: int, hosts: int) -> None:
    """As xpk's table of accelerator types has them."""
    found = find_slice(name)
    assert (found.topology, found.chips, found.devices, found.hosts) == (topology, chips, devices, hosts)


def test_every_slice_has_the_chips_of_its_name() -> None:
    for name, generation in GENERATIONS.items():
        for number in generation.slices:
            assert find_slice(f"{name}-{number}").chips == number / (2 if generation.cores else 1)
        assert peak_flops(generation.device.kind, "bfloat16") == generation.device.flops


@pytest.mark.parametrize(
    "name, told",
    [
        ("v5e-17", "v5e has 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v4-4", "v4 has 8, 16,"),
        ("v4-4", "cores"),
        ("v5f-8", "did you mean v5"),
        ("a300-8", "there are v4-N, v5e-N, v5p-N, v6e-N, 7x-N, a100-40gb-N"),
        ("h200-3", "h200 has 1, 2, 4, 8, 16,"),
        ("h200-3", "GPUs"),
        ("v5e", "no such slice"),
        ("2xv5e-17", "v5e has 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("0xv5e-16", "0 slices of v5e-16: give 1 or more"),
        ("2xh200-8", "2 slices of h200-8: GPUs have none"),
        ("2x7x-8", "2 slices of 7x-8: how fast they are joined is not known; it is of v5e, v5p, v6e"),
        ("16x16", "no such slice"),
        ("", "no such slice"),
    ],
)
def test_what_is_no_slice(name: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        find_slice(name)
    assert "\n" not in str(caught.value)


def test_the_slowest_link_is_that_between_hosts() -> None:
    """GPUs of one host have NVLink, those of several the network; a TPU's wires lead everywhere."""
    assert find_slice("h200-8").slowest_link == 450e9
    assert find_slice("h200-16").slowest_link == 50e9
    assert find_slice("v5e-4").slowest_link == find_slice("v5e-256").slowest_link == 100e9


def test_a_slice_has_one_name() -> None:
    """By which prices and compiled programs are found."""
    assert {find_slice(name).name for name in ("v5e-16", "V5E-16", "v5litepod-16")} == {"v5e-16"}
    assert find_slice("tpu7x-8").name == "7x-8"
    assert find_slice("1xv5e-16") == find_slice("v5e-16")
    assert find_slice("2xV5litepod-16") == joined(find_slice("v5e-16"), 2)
    assert [find_slice(name).kind for name in ("2xv6e-64", "7x-32", "a100-80gb-8")] == [
        "v6e",
        "7x",
        "a100-80gb",
    ]
