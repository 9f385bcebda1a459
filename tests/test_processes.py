"""The whole runtime over real processes and over Ray, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from dp_runtime import Engine, SamplingParams
from tests.draws import check_drawn
from tests.product_cases import Case
from tests.reference import Reference
from tests.serving import check_load

ENGINES: dict[str, tuple[Case, dict[str, str]]] = {
    "local dp2 over torch.distributed": (
        Case("mixtral5", 2, "ep", "max_len", load="mixed", page_size=64),
        {"launcher": "local", "collective": "torch_distributed"},
    ),
    "local dp3": (
        Case("experts7", 3, "tp", "ragged", poison_padding=True, overlap=True, load="mixed"),
        {"launcher": "local", "collective": "shared_memory"},
    ),
    "local dp4": (
        Case("sparse_step", 4, "ep", "auto", load="uneven", max_num_tokens=16, few_pages=True),
        {"launcher": "local", "collective": "shared_memory"},
    ),
    "ray dp2": (
        Case("dense", 2, "tp", "auto", overlap=True, load="even", few_pages=True, page_size=4),
        {"launcher": "ray"},
    ),
    "ray dp4": (
        Case("experts2", 4, "ep", "max_len", poison_padding=True, load="mixed"),
        {"launcher": "ray"},
    ),
}
# The transport of "local dp3" is that of "local dp4", and "ray dp4" starts ranks as "ray dp2" does;
# what else they vary, test_product.py covers over threads.
SLOW = ("local dp3", "ray dp4")


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow] if name in SLOW else []
    return slow + ([pytest.mark.ray] if name.startswith("ray") else [])


PARAMS = [pytest.param(name, marks=marks_of(name), id=name) for name in ENGINES]


@pytest.fixture(scope="module", params=PARAMS)
def engine(
    request: pytest.FixtureRequest, reference_of: Callable[[str], Reference]
) -> Iterator[tuple[Engine, Case]]:
    """A running engine, which serves several loads, and the case it was made for."""
    case, where = ENGINES[request.param]
    if where["launcher"] == "ray":
        request.getfixturevalue("ray_cluster")
    path = reference_of(case.checkpoint).path
    with Engine(case.config(str(path), **where)) as running:
        yield running, case


def test_loads_over_processes(
    engine: tuple[Engine, Case], reference_of: Callable[[str], Reference]
) -> None:
    """One engine serves its own load, then others that its lengths and pages allow."""
    running, case = engine
    reference = reference_of(case.checkpoint)
    check_load(running, reference, case.items)
    if case.preempts:
        assert running.report().preemptions > 0
    for load, extra in (("idle_ranks", "prompt_logprobs"), ("one", "embeds"), ("even", "aborts")):
        check_load(running, reference, replace(case, load=load).items, extra)
    assert len({rank.pid for rank in running.health()}) == case.dp_size


def test_draws_over_processes(
    engine: tuple[Engine, Case], reference_of: Callable[[str], Reference]
) -> None:
    """Sampled tokens are those drawn from the oracle's logits, here too."""
    running, case = engine
    prompts = [item.prompt for item in replace(case, load="uneven").items]
    params = [
        SamplingParams(max_tokens=8, seed=seed, temperature=0.9, top_p=0.95, ignore_eos=True)
        for seed in range(len(prompts))
    ]
    outputs = running.generate(prompts, params)
    check_drawn(reference_of(case.checkpoint), outputs, params)
