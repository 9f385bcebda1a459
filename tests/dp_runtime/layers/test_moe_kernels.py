"""Which kernels run the experts, and what they say they need."""

from __future__ import annotations

import pytest
import torch

from dp_runtime.layers import moe_kernels
from dp_runtime.layers.moe_kernels import choose_moe_backend, make_moe_kernels
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("_installed")
def test_auto_takes_triton_for_two_byte_types_on_a_gpu() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert choose_moe_backend("auto", dtype, GPU)[0] == "triton"
    assert choose_moe_backend("auto", torch.float32, GPU)[0] == "torch"
    assert choose_moe_backend("auto", torch.bfloat16, CPU)[0] == "torch"
    assert choose_moe_backend("torch", torch.bfloat16, GPU)[0] == "torch"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, CPU), (torch.float32, GPU)])
def test_triton_is_refused_where_it_can_not_run(dtype: torch.dtype, device: torch.device) -> None:
    with pytest.raises(ValueError, match="moe_backend: 'triton' is not allowed"):
        choose_moe_backend("triton", dtype, device)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (12, 0)])
def test_a_gpu_with_less_shared_memory_takes_torch(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_moe_backend("auto", torch.bfloat16, GPU)[0] == "torch"
    with pytest.raises(ValueError, match="moe_backend: 'triton' is not allowed"):
        choose_moe_backend("triton", torch.bfloat16, GPU)


@pytest.mark.parametrize("name", ["auto", "torch", "triton"])
def test_a_gpu_without_triton_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"device: 'cuda:0' is not allowed; .* package triton"):
        choose_moe_backend(name, torch.bfloat16, GPU)
    assert choose_moe_backend("auto", torch.float32, CPU)[0] == "torch"


def test_row_ranges_are_copied_once_for_a_plan() -> None:
    plan = PaddingPlan.for_mode(PaddingMode.MAX_LEN, (3, 1))
    copied = plan.row_ranges_on(CPU)
    assert copied.tolist() == [[0, 3], [3, 1]]
    assert plan.row_ranges_on(CPU) is copied
    assert PaddingPlan.for_mode(PaddingMode.MAX_LEN, (3, 1)).row_ranges_on(CPU) is not copied


def test_kernels_say_what_they_can_do() -> None:
    torch_moe, triton_moe = make_moe_kernels("torch"), make_moe_kernels("triton")
    assert (torch_moe.reads_fp8, torch_moe.capturable, torch_moe.compiled) == (False,) * 3
    assert (triton_moe.reads_fp8, triton_moe.capturable, triton_moe.compiled) == (True,) * 3
