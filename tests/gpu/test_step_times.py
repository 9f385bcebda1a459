"""Times of steps by the GPU's own clock."""

from time import perf_counter

import pytest
import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.core.device_copy import HostCopy
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.serving import check_pages_free

CYCLES = 20_000_000  # 10 ms or so


def test_time_between_copies_is_the_devices_whenever_the_host_launched_them() -> None:
    tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    started = perf_counter()
    first = HostCopy(tokens)
    torch.cuda._sleep(CYCLES)
    second = HostCopy(tokens)
    torch.cuda._sleep(4 * CYCLES)
    third = HostCopy(tokens)
    for copy in (first, second, third):
        copy.wait()
    elapsed = perf_counter() - started
    one, four = second.seconds_since(first), third.seconds_since(second)
    assert 0 < 3 * one < four < elapsed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_steps_of_a_gpu_are_timed_and_hold_prompts_back(
    tmp_path_factory: pytest.TempPathFactory, num_steps: int
) -> None:
    model = add_mtp(
        tiny_checkpoint(
            tmp_path_factory.mktemp("times"), hidden_size=256, num_attention_heads=16,
            num_key_value_heads=2, head_dim=128, moe_intermediate_size=64,
        )
    )  # fmt: skip
    config = EngineConfig(
        str(model), launcher="local", device="cuda", max_model_len=512, num_pages=200,
        max_num_tokens=256, max_step_ms=1e-3, speculative_num_steps=num_steps,
    )  # fmt: skip
    with Engine(config) as engine:
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        engine.generate([[1 + n % 100] * (10 + 60 * (n % 7)) for n in range(30)], params)
        check_pages_free(engine)
        report, (rank,) = engine.report(), engine.flight_record().ranks
    assert report.prefill_budget == 32
    assert report.held_back_steps[0] > 0
    timed = [step.step_us for step in rank.steps if step.step_us]
    assert len(timed) > len(rank.steps) // 2
