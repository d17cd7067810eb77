"""Time and dollars: the arithmetic, and the budget that is held against it."""

import pytest

from lib.loops.schedule import Plan
from lib.preflight import estimate


@pytest.fixture
def plan(tmp_path, tiny_params):
    def make(**overrides) -> Plan:
        """36 epochs of 10 steps, an evaluation each."""
        return Plan(tiny_params(tmp_path, **{"train.steps": None, "train.epochs": 36} | overrides),
                    320)

    return make


def test_time_is_steps_and_evaluations_and_dollars_follow_from_the_price(plan):
    found = estimate.from_measured(plan(machine__dollars_per_hour=3.0), 10.0, 100.0)
    assert (found.train_seconds, found.eval_seconds) == (3600, 3600)
    assert found.seconds == 7200 and found.dollars == pytest.approx(6.0)
    assert estimate.from_measured(plan(), 10.0, 100.0).dollars == 0


def test_with_an_average_both_networks_are_evaluated(plan):
    found = estimate.from_measured(plan(train__ema__decay=0.9), 10.0, 100.0)
    assert (found.train_seconds, found.eval_seconds) == (3600, 7200)


def test_fewer_evaluations_cost_less(plan):
    assert estimate.from_measured(plan(train__eval_every_epochs=5), 1.0, 1.0).eval_seconds == 8


@pytest.mark.parametrize("key, within, beyond, shown", [
    ("hours", 2.01, 1.99, "2 h"), ("dollars", 6.01, 5.99, "$6.00"),
])
def test_an_estimate_beyond_the_budget_fails_before_a_dollar_is_spent(plan, key, within, beyond,
                                                                      shown):
    """S7 of the failures: an ETA by hope, $90 planned and $735 real."""
    price = {"machine.dollars_per_hour": 3.0}
    for limit, passed in ((within, True), (beyond, False)):
        made = plan(**price | {f"budget.{key}": limit})
        (check,) = estimate.checks(estimate.from_measured(made, 10.0, 100.0), made.params)
        assert check.id == f"budget_{key}" and check.passed is passed
        assert check.value == shown and check.severity == "error"


def test_without_a_budget_nothing_is_checked(plan):
    made = plan()
    assert estimate.checks(estimate.from_measured(made, 1e9, 1e9), made.params) == []


def test_facts_say_what_it_is_made_of(plan):
    made = plan(machine__dollars_per_hour=3.0)
    facts = estimate.facts(estimate.from_measured(made, 10.0, 100.0), made, 10.0, 3 * 2**20)
    assert facts["a step"] == "10 s (3.2 images/s)"
    assert facts["training"] == "1 h 0 min for 360 steps" and facts["in all"] == "2 h 0 min"
    assert facts["evaluation"] == "1 h 0 min for 36 evaluations"
    assert facts["cost"] == "$6.00 at $3 an hour" and facts["a checkpoint"] == "3.0 MiB"
    free = plan()
    assert "unknown" in estimate.facts(estimate.from_measured(free, 1, 1), free, 1, 1)["cost"]
