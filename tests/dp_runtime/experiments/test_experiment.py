"""Experiments as documents: points, orders, and mistakes by their dotted names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.experiments import Experiment
from dp_runtime.experiments.input_paths import digests

ENGINE = {"model": "./m", "dp_size": 2, "device": "cpu", "launcher": "thread"}


def made(**tables: Any) -> Experiment:
    return Experiment.from_document({"engine": ENGINE} | tables, Path("/lab"))


def test_points_are_cases_times_the_grid() -> None:
    experiment = made(
        grid={"engine": {"padding": ["max_len", "ragged"]}, "workload.skew.exponent": [0, 2]},
        workload={"skew": {"kind": "zipf"}, "num_requests": 8},
        cases=[
            {"name": "plain"},
            {"name": "drafts", "engine": {"speculative_num_steps": 2, "max_num_requests": 8}},
        ],
    )
    assert [dict(point.varied) for point in experiment.points] == [
        {"case": case, "engine.padding": padding, "workload.skew.exponent": exponent}
        for case in ("plain", "drafts") for padding in ("max_len", "ragged") for exponent in (0, 2)
    ]  # fmt: skip
    last = experiment.points[-1]
    assert (last.config.padding, last.config.speculative_num_steps) == ("ragged", 2)
    assert len({point.key for point in experiment.points}) == 8
    assert last.config.model == "/lab/m"
    ranks = [c.dp_rank for c in last.workload.conversations(2)]
    assert sorted(rank or 0 for rank in ranks) == [0] * 6 + [1] * 2


def test_every_point_is_run_once_before_any_is_run_again() -> None:
    for order in ("random", "interleaved"):
        experiment = made(repeats=3, order=order, grid={"engine.seed": [*range(9)]})
        runs = experiment.runs()
        assert [run.repeat for run in runs] == [0] * 9 + [1] * 9 + [2] * 9
        seeds = [[run.point.config.seed for run in runs[at : at + 9]] for at in (0, 9, 18)]
        assert all(sorted(each) == [*range(9)] for each in seeds)
        assert (seeds[0] == seeds[1] == [*range(9)]) == (order == "interleaved")
        assert [run.name for run in experiment.runs()] == [run.name for run in runs]


def test_all_points_have_the_same_load_where_the_grid_leaves_it_alone() -> None:
    experiment = made(grid={"engine.routing": ["round_robin", "least_tokens"]})
    one, other = (point.workload.conversations(2) for point in experiment.points)
    assert one == other


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"engin": {}}, "^engin: {} is not allowed; known here: name, repeats"),
        ({"repeats": 0}, "^repeats: 0 is not allowed; an integer >= 1"),
        ({"engine": {"model": "tiny_moon"}}, "^engine.model: 'tiny_moon' .* or one of tiny_hybrid"),
        ({"engine": {"model": "./m", "paddin": 1}}, "^engine.paddin: 1 is not allowed; known here"),
        ({"engine": {"dp_size": 2}}, "^engine.model: None is not allowed; it is needed"),
        ({"engine": ENGINE | {"padding": "most"}}, "^engine.padding: 'most' is not allowed"),
        ({"grid": {"engine.dp_size": 2}}, "^grid.engine.dp_size: 2 is not allowed; a list"),
        ({"grid": {"engine.dp_size": []}}, r"^grid.engine.dp_size: \[\] is not allowed; a list"),
        ({"grid": {"dp_size": [2]}}, r"^grid.dp_size: \[2\] .* a dotted name"),
        ({"grid": {"engine.dp_siz": [2]}}, "^engine.dp_siz: 2 is not allowed; known here"),
        ({"grid": {"workload.skew.rank.x": [2]}}, "^workload.skew.kind: None is not allowed"),
        ({"grid": {"engine.seed": [*range(200)], "workload.seed": [*range(200)]}}, "10000"),
        ({"cases": [{"engine": {}}]}, "^cases.0.name: None is not allowed"),
        ({"cases": [{"name": "a"}, {"name": "a"}]}, "^cases.1.name: 'a' is not allowed"),
        ({"cases": [{"name": "a", "slo": 1}]}, "^cases.0.slo: 1 is not allowed"),
        (
            {
                "workload": {"skew": {"kind": "zipf"}},
                "grid": {"engine.routing": ["round_robin", "least_tokens"]},
            },
            "^workload.skew: 'pinned' is not allowed; routed, where engine.routing differs",
        ),
        ({"slo": {"ttft_ms": 0}}, "^slo.ttft_ms: 0 is not allowed; None or a number above 0"),
        (
            {"workload": {"skew": {"kind": "one_hot", "rank": 2}}},
            "^workload.skew.rank: 2 is not allowed; a rank of 0..1",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_before_anything_starts(
    tables: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(**tables)


def test_paths_are_seen_from_the_file_and_their_contents_are_known(tmp_path: Path) -> None:
    text = "class Own:\n def choose(self, ranks, demand):\n  return 0\n"
    (tmp_path / "own.py").write_text(text)
    tables = {"engine": ENGINE, "grid": {"engine.routing": ["round_robin", "own.py:Own"]}}
    builtin, own = Experiment.from_document(tables, tmp_path).points
    assert digests(builtin.document) == {}
    assert digests(own.document) == {
        str(tmp_path / "own.py"): hashlib.sha256(text.encode()).hexdigest()
    }
    assert own.config.routing == f"{tmp_path}/own.py:Own"
    assert own.varied == {"engine.routing": "own.py:Own"}


def test_a_model_has_the_names_of_the_command_line(tmp_path: Path) -> None:
    """Seen from the file, a directory goes before the model of an example."""
    grid = {"engine.model": ["tiny_moe", "../tiny_moe", "/models/other"]}
    tables = {"engine": ENGINE, "grid": grid}
    checkpoint = Path(__file__).parents[3] / "examples" / "tiny_moe" / "checkpoint"
    others = [str(tmp_path.parent / "tiny_moe"), "/models/other"]

    def models() -> list[str]:
        points = Experiment.from_document(tables, tmp_path).points
        return [point.config.model for point in points]

    assert models() == [str(checkpoint), *others]
    (tmp_path / "tiny_moe").mkdir()
    assert models() == [str(tmp_path / "tiny_moe"), *others]


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file: .*a TOML file"):
        Experiment.from_file(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[engine\n")
    with pytest.raises(ValueError, match=r"bad.toml: not TOML: Expected ']'"):
        Experiment.from_file(tmp_path / "bad.toml")
