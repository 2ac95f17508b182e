"""The house stays small: whoever adds to it takes something away."""

from helpers import REPOSITORY

MOST_LINES = 5400


def test_the_package_is_small() -> None:
    files = [path for path in (REPOSITORY / "lit_mnist").rglob("*") if path.suffix in (".py", ".html")]
    lines = {str(path.relative_to(REPOSITORY)): path.read_text().count("\n") for path in files}
    assert sum(lines.values()) <= MOST_LINES, sorted(lines.items(), key=lambda item: -item[1])[:10]
