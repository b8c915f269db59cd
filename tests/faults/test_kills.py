"""SIGKILL while a checkpoint is written, and at any moment. `python -m tests.faults.kills` does it at length."""

import pytest

from tests.faults.kills import plan, run_case


@pytest.mark.faults
@pytest.mark.parametrize("case", plan(12), ids=lambda case: f"{case.number}-{case.recipe}")
def test_a_run_that_is_killed_goes_on_to_the_bit(case, tmp_path):
    result = run_case(case, tmp_path)
    assert result["exit"] == 0 and result["same"]


def test_the_plan_has_all_kinds_of_cases():
    cases = plan(40)
    assert sum(case.several for case in cases) == 20 and sum(case.saving for case in cases) >= 40 / 3
    kinds = {(case.recipe, case.several, case.saving) for case in cases}
    assert len(kinds) == 12
