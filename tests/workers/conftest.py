from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import tiny_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sequences may be so long that a generation does not end by itself."""
    directory = tmp_path_factory.mktemp("endless")
    return tiny_checkpoint(directory, max_position_embeddings=LONGEST)


LONGEST = 65536
