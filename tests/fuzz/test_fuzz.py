from __future__ import annotations

import pytest

from .cases import KINDS
from .loop import described, fuzz

SEED, CASES = 1, 150  # of each kind; `python -m tests.fuzz --cases 5000 --seed 7` tries others


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_given_ends_in_good_order(kind: str) -> None:
    results = list(fuzz([(kind, range(CASES))], SEED))
    assert len(results) == CASES
    failures = [described(result, SEED) for result, _ in results if result.problems]
    assert not failures, f"{len(failures)} of {CASES} cases:\n" + "\n".join(failures)
