"""What the GPU backends refuse at start; the rules are read from flashinfer, no GPU is needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import pytest
import torch

from dp_runtime.attention.registry import BACKENDS, backend_class, choose_backend
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.support import check_native, check_trtllm
from dp_runtime.attention.trtllm.measured import MEASURED, Measured, MeasuredTiles
from dp_runtime.kernels.split_tile import SplitTile

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
GOOD = AttentionSpec(32, 4, 128, 64, BF16, BF16, frozenset({1, 4}))


@pytest.mark.parametrize(
    "spec",
    [
        GOOD,
        *(replace(GOOD, page_size=size) for size in (16, 32, 128)),
        *(replace(GOOD, head_dim=size) for size in (64, 256)),
        replace(GOOD, dtype=torch.float16, kv_dtype=torch.float16),
        replace(GOOD, kv_dtype=E4M3),
        replace(GOOD, num_heads=16, num_kv_heads=1, decode_query_lens=frozenset(range(1, 9))),
        replace(GOOD, num_heads=28, kv_dtype=E4M3, decode_query_lens=frozenset({1})),
    ],
)
@pytest.mark.parametrize("major", [9, 10])
def test_what_the_trtllm_kernels_serve(spec: AttentionSpec, major: int) -> None:
    check_trtllm(spec, major)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 8}, "page_size: 8 .*one of 16, 32, 64, 128.*=flashinfer"),
        ({"page_size": 256}, "page_size: 256 .*=flashinfer"),
        ({"head_dim": 96}, "head_dim: 96 .*one of 64, 128, 256.*=torch_ref"),
        ({"num_heads": 30}, "num_heads: 30 .*num_kv_heads 4.*=flashinfer"),
        ({"num_heads": 256}, "num_heads: 256 .*at most 32 times.*=flashinfer"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "dtype: 'float32' .*=torch_ref"),
        ({"kv_dtype": torch.float16}, "kv_cache_dtype: 'float16' .*=torch_ref"),
        ({"decode_query_lens": frozenset({1, 9})}, r"decode_query_lens: \[1, 9\] .*=flashinfer"),
        ({"num_heads": 28, "kv_dtype": E4M3}, "kv_cache_dtype: 'fp8_e4m3' .*here 7.*=flashinfer"),
    ],
)
def test_what_they_do_not_serve_is_named_with_the_alternative(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_trtllm(replace(GOOD, **changes), 9)  # type: ignore[arg-type]


def test_devices_that_have_no_kernels() -> None:
    with pytest.raises(
        ValueError, match=r"'trtllm' .*has 8\); or use attention_backend=flashinfer"
    ):
        check_trtllm(GOOD, 8)
    with pytest.raises(ValueError, match=r"'flashinfer' .*has 7\); or use attention_backend=torch"):
        check_native(GOOD, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 80}, "head_dim: 80 .*=torch_ref"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "dtype: 'float32' .*=torch_ref"),
    ],
)
def test_what_flashinfer_does_not_serve(changes: dict[str, object], message: str) -> None:
    check_native(replace(GOOD, page_size=3), 8)
    with pytest.raises(ValueError, match=message):
        check_native(replace(GOOD, **changes), 9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "chosen", "reasons"),
    [
        (
            {"num_heads": 16},
            "trtllm",
            ["not split: nowhere measured to be faster than XQA (head_dim 128, 4 q"],
        ),
        ({"page_size": 8}, "flashinfer", ["not trtllm: page_size: 8"]),
        (
            {"head_dim": 80},
            "torch_ref",
            ["not split: head_dim: 80", "not trtllm: head_dim: 80", "not flashinfer: head_dim"],
        ),
    ],
)
def test_auto_says_why(
    changes: dict[str, object], chosen: str, reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dp_runtime.attention.support.find_spec", lambda name: object())
    spec = replace(GOOD, **changes)  # type: ignore[arg-type]
    name, why = choose_backend("auto", spec, torch.device("cuda", 0))
    assert name == chosen
    assert all(reason in why for reason in reasons)
    assert choose_backend(chosen, spec, torch.device("cuda", 0))[1] == "chosen in the configuration"


def test_split_says_where_it_does_no_more_than_trtllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dp_runtime.attention.support.find_spec", lambda name: object())
    why = choose_backend("split", replace(GOOD, num_heads=16), torch.device("cuda", 0))[1]
    assert why.startswith("chosen in the configuration; nowhere measured to be faster than XQA")
    assert (
        choose_backend("split", GOOD, torch.device("cuda", 0))[1] == "chosen in the configuration"
    )


ROW = Measured(128, 8, 4, SplitTile(32), ((16, 20.0, 21.5), (64, 60.0, 45.5), (256, 200.0, 160.0)))


def test_auto_takes_the_split_kernel_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dp_runtime.attention.support.find_spec", lambda name: object())
    monkeypatch.setattr("dp_runtime.attention.trtllm.measured.MEASURED", (ROW,))
    device = torch.device("cuda", 0)
    assert choose_backend("auto", GOOD, device) == (
        "split",
        "measured to be faster than XQA at 4 rows a request: 64 requests 45.5 us for 60.0, 256 "
        "requests 160.0 us for 200.0",
    )
    for other in ({"head_dim": 256}, {"num_heads": 64}, {"kv_dtype": E4M3}, {"page_size": 32},
                  {"decode_query_lens": frozenset({1, 3})}):  # fmt: skip
        spec = replace(GOOD, **other)
        assert choose_backend("auto", spec, device)[0] == "trtllm"
        assert choose_backend("split", spec, device)[0] == "split"  # and XQA decodes
    longer = replace(GOOD, decode_query_lens=frozenset({1, 8}))
    assert choose_backend("auto", longer, device)[1].endswith("160.0 us for 200.0; 8 rows as 4")
    parts = (132 * 3 + 256 * 4) * 32 * 130 * 4
    assert backend_class("split").workspace_bytes(GOOD) == (256 << 20) + parts


def test_the_nearest_measurement_decides() -> None:
    tiles = MeasuredTiles.of(GOOD, (ROW,))
    found = {requests: tiles(4, requests) for requests in (1, 16, 31, 33, 200, 256, 257)}
    slower = dict.fromkeys((1, 16, 31, 257))  # more than 256 requests are more than it serves
    assert found == slower | dict.fromkeys((33, 200, 256), SplitTile(32))
    assert tiles(1, 64) is None
    slow = replace(ROW, times=((64, 60.0, 60.0),))
    assert MeasuredTiles.of(GOOD, (slow,)).used == ()


def test_few_requests_can_have_a_row_and_a_tile_of_their_own() -> None:
    few = replace(ROW, tile=SplitTile(64), times=((4, 9.0, 8.0), (16, 20.0, 21.0)))
    many = replace(ROW, times=((32, 30.0, 31.0), (64, 60.0, 45.0)))
    tiles = MeasuredTiles.of(GOOD, (few, many))
    found = [tiles(4, requests) for requests in (1, 2, 4, 8, 16, 32, 64, 256)]
    assert found == [SplitTile(64)] * 4 + [None] * 2 + [SplitTile(32)] * 2
    never = replace(few, times=((4, 9.0, 10.0), (16, 20.0, 21.0)))
    only = MeasuredTiles.of(GOOD, (never, replace(many, times=((64, 60.0, 45.0),))))
    assert [only(4, requests) for requests in (1, 8, 64)] == [None, None, SplitTile(32)]
    assert [row.tile for _, row in only.used] == [SplitTile(32)]


def test_lengths_between_go_as_the_longer_one_and_others_as_the_longest() -> None:
    one = replace(ROW, query_len=1, tile=SplitTile(64))
    spec = replace(GOOD, decode_query_lens=frozenset(range(1, 10)))
    tiles = MeasuredTiles.of(spec, (one, ROW))
    found = [tiles(query_len, 64) for query_len in range(1, 10)]
    assert found == [SplitTile(64), *[SplitTile(32)] * 7, None]  # 9 rows: 72 of a program
    assert [(query_len, row.query_len) for query_len, row in tiles.used] == [
        (1, 1), *((query_len, 4) for query_len in range(2, 9))
    ]  # fmt: skip


def test_the_kernel_takes_less_for_a_longer_length_than_xqa_for_the_next_shorter_one() -> None:
    """Or lengths between the two that were measured could be slower than by XQA."""
    compared = set()
    for longer, shorter in product(MEASURED, repeat=2):
        same = (longer.head_dim, longer.group_size) == (shorter.head_dim, shorter.group_size)
        if same and (longer.query_len, shorter.query_len) == (4, 1):
            by_xqa = {requests: xqa for requests, xqa, _ in shorter.times}
            for requests, _, split in longer.times:
                if requests in by_xqa:
                    assert split < by_xqa[requests], (longer, requests)
                    compared.add((longer.head_dim, longer.group_size, requests))
    assert len(compared) == 3 * 6


LARGEST = replace(GOOD, num_kv_heads=2, head_dim=256)  # Qwen3.5-397B-A17B
MIDDLE = replace(LARGEST, num_heads=16)  # Qwen3.5-35B-A3B
SERVED = 1, 4, 16, 31, 64, 256


@pytest.mark.parametrize(
    ("spec", "query_len", "xqa", "split"),
    [
        *(
            (replace(spec, decode_query_lens=frozenset({1, query_len})), query_len, (), SERVED)
            for spec, longest in ((GOOD, 8), (MIDDLE, 8), (LARGEST, 4))
            for query_len in (1, 2, 4, longest)
        ),
        (replace(LARGEST, decode_query_lens=frozenset({1, 5})), 5, SERVED, ()),
        (GOOD, 3, SERVED, ()),  # no decodes have so many
        (replace(GOOD, num_heads=16), 1, SERVED, ()),
        (replace(GOOD, head_dim=64), 1, SERVED, ()),
        (replace(GOOD, dtype=torch.float16, kv_dtype=torch.float16), 1, (64,), ()),
        (replace(GOOD, kv_dtype=E4M3), 1, (64,), ()),
    ],
    ids=str,
)
def test_numbers_of_requests_get_the_kernel_that_was_faster_for_them(
    spec: AttentionSpec, query_len: int, xqa: tuple[int, ...], split: tuple[int, ...]
) -> None:
    tiles = MeasuredTiles.of(spec)
    assert all(tiles(query_len, requests) is None for requests in (*xqa, 257))
    assert all(tiles(query_len, requests) is not None for requests in split)


def test_the_measured_kernel_names_its_figures_and_counts_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dp_runtime.attention.support.find_spec", lambda name: object())
    device = torch.device("cuda", 0)
    assert choose_backend("auto", GOOD, device) == (
        "split",
        "measured to be faster than XQA at 1 row a request: 4 requests 12.8 us for 16.7, 8 "
        "requests 18.0 us for 22.3, 16 requests 20.0 us for 29.6, 32 requests 28.3 us for 41.4, "
        "64 requests 44.4 us for 56.8, 128 requests 85.4 us for 103.9; 4 rows a request: 4 "
        "requests 15.8 us for 25.7, 8 requests 20.4 us for 31.1, 16 requests 22.2 us for 39.5, 32 "
        "requests 31.4 us for 53.3, 64 requests 49.4 us for 71.2, 128 requests 94.1 us for 129.2",
    )
    found = {
        spec: backend_class("split").workspace_bytes(spec) - (256 << 20)
        for spec in (GOOD, replace(GOOD, decode_query_lens=frozenset({1})), LARGEST)
    }
    assert list(found.values()) == [
        (132 * 2 + 256 * 4) * 4 * 8 * 130 * 4,
        (132 * 3 + 256 * 4) * 8 * 130 * 4,
        (132 + 256 * 2) * 4 * 16 * 258 * 4,
    ]


def test_without_flashinfer_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("dp_runtime.attention.support.find_spec", lambda name: None)
    device = torch.device("cuda", 0)
    name, why = choose_backend("auto", GOOD, device)
    assert (name, "flashinfer is not installed" in why) == ("torch_ref", True)
    missing = r"'trtllm' is not allowed; flashinfer is not installed: .*dp-runtime\[gpu\]"
    with pytest.raises(ValueError, match=missing):
        choose_backend("trtllm", GOOD, device)


def test_workspaces_are_known_before_anything_is_allocated() -> None:
    assert backend_class("torch_ref").workspace_bytes(GOOD) == 0
    assert backend_class("trtllm").workspace_bytes(GOOD) == 256 << 20
    assert backend_class("flashinfer").workspace_bytes(GOOD) == (272 << 20) + 131072


def test_who_can_be_captured_is_known_without_a_gpu_library() -> None:
    found = {name: backend_class(name).capturable for name in BACKENDS}
    assert found == {"torch_ref": False, "split": True, "trtllm": True, "flashinfer": False}
    assert "flashinfer" not in sys.modules
