"""How independent tasks are dealt to Ray tasks."""

from __future__ import annotations

import pytest

from pipeline.distributed.jobs import MAX_TASKS_PER_RAY_TASK, split_evenly


@pytest.mark.parametrize("cpus", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("tasks", [0, 1, 3, 48, 1000])
def test_all_are_dealt_in_shares_that_shrink(tasks: int, cpus: int) -> None:
    shares = split_evenly(tasks, cpus)
    assert sum(shares) == tasks and shares == sorted(shares, reverse=True)
    assert all(1 <= share <= MAX_TASKS_PER_RAY_TASK for share in shares)
    assert len(shares) >= min(tasks, 4 * cpus), "every CPU has several"


def test_the_last_end_together() -> None:
    assert split_evenly(48, 2) == [6, 5, 4, 4, 3, 3, 2, 2, 2, 2, *[1] * 15]
