"""The house stays small: whoever adds to it takes something away."""

import pytest
from helpers import REPOSITORY

MOST_LINES = {"lit_mnist": 5400, "benchmarks": 1200, "tests": 5200}


@pytest.mark.parametrize("room", MOST_LINES)
def test_the_house_is_small(room: str) -> None:
    files = [path for path in (REPOSITORY / room).rglob("*") if path.suffix in (".py", ".html")]
    lines = {str(path.relative_to(REPOSITORY)): path.read_text().count("\n") for path in files}
    assert sum(lines.values()) <= MOST_LINES[room], sorted(lines.items(), key=lambda item: -item[1])[:10]
