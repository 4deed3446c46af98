"""The judges of mathematics: gold answers pass, hedges do not; and the page of all judges is whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from palaestra.environments.equivalence import equivalent
from palaestra.gym.registry import spec


@pytest.mark.parametrize("reply", ["3, or maybe 4", r"\boxed{3} or \boxed{4}", "4"])
def test_a_hedge_or_a_wrong_number_earns_nothing(reply: str) -> None:
    assert not equivalent("3", reply)


def test_the_last_box_counts() -> None:
    assert equivalent(r"\frac{1}{2}", r"So it is \boxed{0.5}")


@pytest.mark.parametrize("reply", [r"\boxed{\$15,\!000}", r"\boxed{15000}", "$15,000", r"\$15000"])
def test_currency_and_grouped_digits_are_a_number(reply: str) -> None:
    assert equivalent(r"\$15,\!000", reply)


@pytest.mark.parametrize(
    ("gold", "reply"),
    [("0,1", "1"), ("0,1", "01"), ("111", r"111, \! 111, \! 111"), ("25_{6}", "25_7"), ("-221_3", "-221_4")],
)
def test_a_list_is_no_number_and_a_base_is_compared(gold: str, reply: str) -> None:
    assert equivalent(gold, rf"\boxed{{{gold}}}")
    assert not equivalent(gold, rf"\boxed{{{reply}}}")


@pytest.mark.parametrize("name", ["math", "code", "search"])
def test_the_page_names_every_field_of_a_row(name: str) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "verifiers.md").read_text()
    kind = spec(name).environment()
    sources = ["generator", *sys.modules[kind.__module__].SOURCES]
    tasks = [next(spec(name, {"source": source}).tasks("train", 0)) for source in sources]
    assert not {field for task in tasks for field in task.data if f"`{field}`" not in page}
