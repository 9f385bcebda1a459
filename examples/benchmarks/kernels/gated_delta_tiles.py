"""Candidate tiles of the gated delta kernels: each one's time and how its results differ.

    python -m examples.benchmarks.kernels.gated_delta_tiles          # about 60 s on one GPU
    python -m examples.benchmarks.kernels.gated_delta_tiles --fla    # fla-core's chunks, on another

Processes compile the candidates at once, or one configuration of each of fla-core's kernels. The
first candidate of a kernel is in use, and what the others' results are compared with.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dp_runtime.kernels.gated_delta import chunked, convolution, gated_norm, recurrent
from dp_runtime.kernels.gated_delta.rows import HeadShape
from dp_runtime.kernels.triton_launch import launch
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import describe_gpu, graph_us, read_rate
from examples.benchmarks.harness.kernel_profile import Profile
from examples.benchmarks.kernels.gated_delta import Layer, call_one, fla_call, host_us

SHAPE = HeadShape(16, 64, 128, 128)
WORKERS, FLA_CONFIGS, END_S, PROFILED = 14, 24, 58, 5
MODULES = {"_step_kernel": recurrent, "_convolve_kernel": convolution, "_solve_kernel": chunked}
MODULES |= {"_state_kernel": chunked, "_gated_rms_norm_kernel": gated_norm}
CALLS = {"_step_kernel": "delta rule", "_convolve_kernel": "convolution"}
CALLS |= {"_solve_kernel": "delta rule", "_state_kernel": "delta rule"}


@dataclass(frozen=True)
class Tiles:
    kernel: str
    constants: dict[str, int]
    options: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        words = (
            f"{name.lower()} {value}" for name, value in (self.constants | self.options).items()
        )
        return f"{self.kernel.strip('_')}: {', '.join(words)}"

    def launch(
        self, kernel: Any, grid: Any, arguments: Any, constants: Any, **options: Any
    ) -> None:
        """Launch as the kernel's own caller would with these tiles."""
        if kernel.__name__ == self.kernel:
            constants, options = constants | self.constants, options | self.options
            grid = (self._programs(constants), *grid[1:])
        launch(kernel, grid, arguments, constants, **options)

    def _programs(self, of: dict[str, int]) -> int:
        match self.kernel:
            case "_step_kernel":
                return -(-of["V_DIM"] // of["BLOCK_V"])
            case "_state_kernel":
                return -(-of["V_DIM"] // of["BLOCK_V"]) * of["HEADS"]
            case "_convolve_kernel":
                return -(-of["CHANNELS"] // of["BLOCK_CHANNELS"]) + 1
            case _:
                return of["HEADS"]

    @contextmanager
    def used(self) -> Iterator[None]:
        module: Any = MODULES[self.kernel]
        module.launch = self.launch
        try:
            yield
        finally:
            module.launch = launch


def _steps() -> list[Tiles]:
    sizes = ((32, 1, 0), (32, 1, 168), (16, 1, 0), (32, 2, 0))
    return [
        Tiles("_step_kernel", {"BLOCK_V": v}, _options(num_warps, registers))
        for v, num_warps, registers in sizes
    ]


def _options(num_warps: int, registers: int) -> dict[str, int]:
    return {"num_warps": num_warps} | ({"maxnreg": registers} if registers else {})


def _convolutions(*sizes: tuple[int, int, int]) -> list[Tiles]:
    return [
        Tiles("_convolve_kernel", {"ROWS": r, "BLOCK_CHANNELS": c}, {"num_warps": n})
        for r, c, n in sizes
    ]


def _chunks() -> list[Tiles]:
    states = ((64, 4, 3), (64, 4, 2), (32, 4, 3))
    limits = (4, 0), (4, 168), (4, 128), (8, 128)
    solves = [Tiles("_solve_kernel", {}, _options(*limit)) for limit in limits]
    return solves + [
        Tiles("_state_kernel", {"BLOCK_V": v}, {"num_warps": n, "num_stages": s})
        for v, n, s in states
    ]


DECODES = _steps() + _convolutions((1, 512, 2), (1, 512, 1))
DRAFTS = _steps() + _convolutions((2, 512, 2), (8, 256, 2), (2, 256, 1))
LONG = (4, 512, 2), (4, 1024, 4), (4, 512, 4), (2, 512, 2)
PROMPTS = _convolutions(*LONG) + _chunks()
EACH = [(of, 0, False) for of in DECODES] + [(of, 3, False) for of in DRAFTS]
EACH += [(of, 0, True) for of in PROMPTS]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--compile", type=int, help="of the processes, the number of this one")
    parser.add_argument("--fla", action="store_true", help="time fla-core alone")
    parser.add_argument("--compile-fla", type=int, help="the number of a configuration")
    args = parser.parse_args()
    if args.compile is not None:
        compile_some(args.compile)
    elif args.compile_fla is not None:
        compile_fla(args.compile_fla)
    elif args.fla:
        time_fla(monotonic())
    else:
        time_all(monotonic())


def compile_some(number: int) -> None:
    for tiles, drafts, is_prompt in EACH[number::WORKERS]:
        try:
            layer = Layer.make(SHAPE, [100] if is_prompt else [1 + drafts], drafts, is_prompt)
            with tiles.used():
                layer.calls()[CALLS[tiles.kernel]](0)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{tiles}: {type(error).__name__} {str(error)[:200]}", flush=True)


def compile_fla(number: int) -> None:
    """Run fla-core's chunks with one configuration of each kernel, which it tunes by itself."""
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    prune = tuner.prune_configs

    def prune_to_one(self: Any, *arguments: Any, **named: Any) -> list[Any]:
        configs = list(prune(self, *arguments, **named))
        return [configs[number % len(configs)]]

    tuner.prune_configs = prune_to_one
    fla_call(Layer.make(SHAPE, [100], 0, fresh=True))


def time_fla(begin: float) -> None:
    processes = [_start("--compile-fla", i) for i in range(FLA_CONFIGS)]
    for process in processes:
        process.wait()
    print(f"fla-core is compiled after {monotonic() - begin:.0f} s", flush=True)
    call = fla_call(Layer.make(SHAPE, [8192], 0, fresh=True))
    print(f"and tuned after {monotonic() - begin:.0f} s", flush=True)
    print(f"a prompt of 8192 rows: {graph_us(call, 2):.1f} us, host {host_us(call):.0f} us")


def time_all(begin: float) -> None:
    processes = [_start("--compile", i) for i in range(WORKERS)]
    for process in processes:
        process.wait()
    print(f"compiled after {monotonic() - begin:.0f} s;", describe_gpu(), flush=True)
    rate = read_rate()
    time_prompt(begin)
    for requests, drafts in ((32, 0), (32, 3), (128, 0), (128, 3), (8, 0), (8, 3)):
        floor = 2 * requests * 64 * 128 * 128 * 4 / rate * 1e6
        print(f"{requests} requests, {drafts} drafts; floor {floor:.1f} us", flush=True)
        count = max(2, min(8, 256 // requests))  # data sets: the L2 holds none of them
        layers = [Layer.make(SHAPE, [1 + drafts] * requests, drafts, False) for _ in range(count)]
        time_tiles(layers, DRAFTS if drafts else DECODES, begin)
    print(f"ended after {monotonic() - begin:.0f} s", flush=True)


def time_prompt(begin: float) -> None:
    layer = Layer.make(SHAPE, [8192], 0, fresh=True)
    print("a prompt of 8192 rows", flush=True)
    calls = layer.calls()
    for name, call in calls.items():
        print(f"  {name}: {graph_us(call, 2):.1f} us, host {host_us(call):.0f} us", flush=True)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            calls["all"](0)
        torch.cuda.synchronize()
    print(Profile.from_profiler(profiler, PROFILED), flush=True)
    time_tiles([layer], PROMPTS, begin)


def time_tiles(layers: list[Layer], candidates: list[Tiles], begin: float) -> None:
    first: dict[str, list[Tensor]] = {}
    for tiles in candidates:
        if monotonic() - begin > END_S:
            return
        try:
            with tiles.used():
                calls = [layer.calls()[CALLS[tiles.kernel]] for layer in layers]
                results = _results(layers[0])
                took = graph_us(partial(call_one, calls), len(calls))
            due = first.setdefault(CALLS[tiles.kernel], results)
            apart = max(_apart(*pair) for pair in zip(results, due))
            same = all(torch.equal(*pair) for pair in zip(results, due))
            words = "same bits" if same else f"apart {apart:.1e}"
            print(f"  {tiles}: {took:.1f} us; {words}", flush=True)
        except Exception as error:
            print(f"  {tiles}: {type(error).__name__} {str(error)[:200]}", flush=True)


def _results(layer: Layer) -> list[Tensor]:
    """Run a layer from one same state -> its outputs, states and windows afterwards."""
    torch.manual_seed(0)
    layer.states.normal_()
    layer.windows.normal_()
    if layer.draft_gates is not None:
        layer.draft_gates.zero_()
    torch.manual_seed(1)
    calls = layer.calls()
    calls["all"](0)
    out = calls["gated norm"](0)  # of the same outputs
    assert isinstance(out, Tensor)
    return [out, layer.states.clone(), layer.windows.clone()]


def _apart(found: Tensor, due: Tensor) -> float:
    return float((found - due).abs().max() / due.abs().max())


def _start(option: str, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "examples.benchmarks.kernels.gated_delta_tiles"]
    return subprocess.Popen([*command, option, str(number)])


if __name__ == "__main__":
    main()
