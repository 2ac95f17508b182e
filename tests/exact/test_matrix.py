"""Whatever torch, Lightning and torchmetrics offer is exact after three kills, or refused before the first step."""

import re

import matrix
import pytest

PLAIN = {name for found in matrix.names().values() for name in found}
CASES = [
    pytest.param(case, id=case.name, marks=[] if case.name.removesuffix(" / step") in PLAIN else pytest.mark.slow)
    for case in matrix.cases()
]


@pytest.mark.parametrize("case", CASES)
def test_exact_or_refused(case: matrix.Case) -> None:
    verdict, why = matrix.verdict(case.make, longer=case.longer, **case.settings)
    assert verdict == ("refused" if case.name.startswith(matrix.REFUSED) else "exact"), why
    assert "\n" not in why


@pytest.mark.slow
def test_metrics() -> None:
    verdicts = list(matrix.verdicts(list(matrix.metric_classes())))
    assert [row for row in verdicts if row[2] not in ("exact", "not tried")] == []
    assert [row[2] for row in verdicts].count("exact") >= 200


def test_the_page_has_every_class() -> None:
    page = matrix.TABLE.read_text()
    assert [name for name in PLAIN if f"`{name}" not in page] == []
    assert f"torchmetrics' {len(matrix.metric_classes())} classes" in page
    assert set(re.findall(r"\| ([\w ]+) \| \d+ \|", page)) == {"exact", "refused", "not tried"}
