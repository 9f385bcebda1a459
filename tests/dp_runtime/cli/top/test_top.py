"""The table on terminals of two widths, and the command against a server."""

from collections.abc import Iterator

import pytest
from rich.console import Console, RenderableType

from dp_runtime.cli.main import main
from dp_runtime.cli.top.rates import Interval
from dp_runtime.cli.top.scrape import Scrape
from dp_runtime.cli.top.view import View
from dp_runtime.cli.top.watcher import Watched, Watcher
from dp_runtime.errors import ServerSilent
from tests.dp_runtime.cli.top.pages import after
from tests.dp_runtime.server.served import Served, serving

URL = "http://127.0.0.1:8000"


def shown(picture: RenderableType, width: int) -> list[str]:
    console = Console(width=width, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(picture)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_its_terminal_and_has_titles_and_units(width: int) -> None:
    last = after(2.0, 9000)
    view = View(URL, Interval(after(0.0, 1000), last), Interval(None, last))
    lines = shown(view, width)
    assert lines[0] == f"tiny at {URL}: ok, 2 ranks, epoch 0"
    assert len(lines) == 5 + 2 + 2, "nothing is wrapped"
    assert max(map(len, lines)) <= width
    titles, units = lines[5].split(), lines[6].split()
    hits = "hit" if width == 80 else "cached"
    assert {"rank", "state", "output", "wait", "KV", hits} <= set(titles)
    assert {"ms", "%", "rank"} <= set(units)
    cells = lines[7].split()
    assert cells[:4] == ["0", "running", "3", "0"]
    assert cells[4:10] == ["8,000", "20.0", "25", "1", "25", "38"]


def test_warm_standbys_are_told() -> None:
    last = after(2.0, 9000, num_standbys=2)
    view = View(URL, Interval(None, last), Interval(None, last))
    assert shown(view, 80)[0] == f"tiny at {URL}: ok, 2 ranks, 2 standbys, epoch 0"


def test_errors_of_ranks_stand_below_the_table() -> None:
    view = View(
        URL, Interval(None, after(2.0, 5, error="rank 0: it broke")), Interval(None, after(2.0, 5))
    )
    assert shown(view, 140)[-2:] == ["rank 0: it broke", "rank 1: rank 0: it broke"]


def test_a_server_that_goes_and_comes_back_is_asked_again() -> None:
    answers: list[Scrape | ServerSilent] = [
        after(0.0, 1), ServerSilent("it does not answer"), after(4.0, 3), after(6.0, 5),
    ]  # fmt: skip

    def scrape(url: str) -> Scrape:
        answer = answers.pop(0)
        if isinstance(answer, ServerSilent):
            raise answer
        return answer

    watcher = Watcher(Watched(URL, 2.0), scrape)
    first, gone, back, again = (shown(watcher.look(), 140) for _ in range(4))
    assert "- output" in first[2]
    assert gone == ["it does not answer; asking again every 2 s"]
    assert "- output" in back[2], "rates begin anew"
    assert "5.0 output" in again[2]
    assert "last 2 s" in again[3]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


def test_one_table_of_a_running_server(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.post("/v1/completions", prompt=[1, 2, 3], max_tokens=5, ignore_eos=True)
    assert main(["top", "--once", "--url", f"{served.url}/", "--interval", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"tiny_model at {served.url}: ok, 2 ranks")
    assert [line.split()[:2] for line in lines[-2:]] == [["0", "idle"], ["1", "idle"]]


@pytest.mark.parametrize(
    ("url", "status", "why"),
    [
        ("http://127.0.0.1:1", 1, "does not answer"),
        ("ftp://127.0.0.1", 2, "url: 'ftp://127.0.0.1' is not allowed; such as"),
        ("http://", 2, "url: 'http:' is not allowed"),
    ],
)
def test_without_a_server_one_line_says_so(
    url: str, status: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--once", "--url", url]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_another_path_of_the_server_is_not_watched(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--once", "--url", f"{served.url}/v1"]) == 1
    assert "/v1/health answers 404: Not Found" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
def test_an_interval_has_bounds(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--interval", interval]) == 2
    assert "seconds in 0.1..3600" in capsys.readouterr().err
