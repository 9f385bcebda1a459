"""Kernels of experts, routing, attention, gates, products compile for a GPU that is not there."""

from __future__ import annotations

import pytest

from tests.dp_runtime.kernels.compilation import lines_of

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_compile_for_sm90() -> None:
    lines = lines_of(f"{__package__}.compile_experts")
    for kernel in ("gate_up_kernel", "down_kernel"):
        assert sum(line.startswith(f"{kernel}: ") for line in lines) == 28
    for kernel, count in (("_product_kernel", 11), ("_route_kernel", 15)):
        assert sum(line.startswith(f"{kernel}: ") for line in lines) == count
    for kernel in ("split_kernel", "combine_kernel"):  # of 30B, 35B and 397B
        assert sum(line.startswith(f"{kernel}: ") for line in lines) == 3 + 6 + 4
    for kernel, count in (("_multiply_gate_kernel", 4), ("_add_gated_kernel", 2)):
        assert sum(line.startswith(f"{kernel}: ") for line in lines) == count


@pytest.mark.slow
def test_products_with_e4m3_matrices_compile_for_sm90() -> None:
    lines = lines_of(f"{__package__}.compile_fp8_linear")
    assert sum(line.startswith("product_kernel: ") for line in lines) == 8
    assert sum(line.startswith("widen_kernel: ") for line in lines) == 1


@pytest.mark.slow
def test_products_of_few_rows_compile_for_sm90() -> None:
    lines = lines_of(f"{__package__}.compile_dense_linear")
    assert sum(line.startswith("product_kernel: ") for line in lines) == 5
