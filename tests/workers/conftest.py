from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import tiny_checkpoint
from tests.workers.disturbed import Tokens, Undisturbed, alike, recovering, served


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sequences may be so long that a generation does not end by itself."""
    directory = tmp_path_factory.mktemp("endless")
    return tiny_checkpoint(directory, max_position_embeddings=LONGEST)


LONGEST = 65536


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> Undisturbed:
    """The tokens of a load as one rank makes them that nothing disturbs."""

    @cache
    def make(seed: int, num_drafts: int = 0) -> Tokens:
        fields = {"dp_size": 1, "speculative_num_steps": num_drafts}
        with recovering(model, "thread", **fields) as engine:
            return alike(served(engine, seed, lambda: None))

    make(1)  # before a test changes what engines do
    return make
