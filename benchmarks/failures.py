"""Bars 6 and 7: what fails in mid-run costs no wrong score, and what was wrong is named in one line.

The measurements are the tests of `tests/test_failures.py`, slow ones included, run as a user would run them; what they
record is what is reported.
"""

from __future__ import annotations

from bars import Measured
from cases import measured

FILE = "tests/test_failures.py"
MID_RUN = {
    "actors killed in training": "test_actors_killed_in_training_cost_retries_and_no_zero",
    "actors killed in an evaluation": "test_actors_killed_in_an_evaluation_cost_no_score",
    "code that crashes its judge": "test_code_that_crashes_its_judge_is_scored_zero_and_the_next_reply_is_judged",
    "reply that kills a careless verifier": "test_a_reply_that_kills_a_careless_verifier_is_the_policys_doing",
    "tool failing 3 % of its calls, pool": "test_a_tool_that_fails_3_percent_of_its_calls_costs_retries_and_no_reward",
    "tool failing 3 % of its calls, eval": "test_an_evaluation_over_a_failing_tool_is_right_everywhere",
    "tool that is down": "test_a_tool_that_is_down_costs_scores_and_gives_none",
}
CLEAR = {
    "wrong recipe, data or model": "test_a_wrong_recipe_is_refused_in_one_line_and_nothing_is_left",
    "no recipe, no TOML": "test_no_recipe_and_no_toml_are_refused",
    "corrupt checkpoint": "test_a_corrupt_checkpoint_is_named_and_not_resumed",
    "advice for a corrupt checkpoint": "test_the_advice_for_a_corrupt_checkpoint_helps",
    "full disk at the head": "test_a_full_disk_at_the_head_of_a_run",
    "full disk at the metrics": "test_a_full_disk_at_the_first_row_of_metrics",
    "full disk at a checkpoint": "test_a_full_disk_at_a_checkpoint_in_mid_run",
    "full disk at the end": "test_a_full_disk_at_the_end_of_a_run",
}


def mid_run() -> Measured:
    """Bar 6: killed actors, replies that crash their verifier, a tool that fails."""
    return measured(_placed(MID_RUN))


def clear_errors() -> Measured:
    """Bar 7: bad recipes, missing data, corrupt checkpoints, a full disk."""
    return measured(_placed(CLEAR))


def _placed(tests: dict[str, str]) -> dict[str, str]:
    return {part: f"{FILE}::{test}" for part, test in tests.items()}
