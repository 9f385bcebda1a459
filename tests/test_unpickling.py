"""Nothing from the network is unpickled: docs/security.md names each file that could."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("dp_runtime", "workers", "collectives")
RUNS_WHAT_IT_READS = re.compile(
    r"\b(pickle|cloudpickle|dill|marshal|shelve|yaml)\b"
    r"|multiprocessing\.(connection|managers)|allow_pickle|\btorch\.load\(|\b(gather|send|recv|broadcast|scatter)_object"
    r"|(?<!\.)\b(eval|exec)\(|weights_only=False"
)


def test_files_that_unpickle_are_those_of_the_document() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if RUNS_WHAT_IT_READS.search(path.read_text())
    }
    text = (ROOT / "docs" / "security.md").read_text()
    section = text.partition("## What is unpickled")[2].partition("\n## ")[0]
    assert found == set(re.findall(r"`([\w/]+\.py)`", section))
