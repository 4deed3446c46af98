"""An evaluation's results for people: a table in the terminal, an HTML page, Parquet and JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palaestra.gym.evaluate import Interval, Row, Summary
from palaestra.gym.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 170
"""Columns of a terminal that takes the whole table."""
SHOWN = 3
"""Episodes of each policy and environment that the page shows."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em; margin: .2em 0 }
</style>
<h1>Evaluation</h1>
<table><tr>{% for title in titles %}<th>{{ title }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>Intervals are 95 %, over tasks. pass@k: any of k attempts right; pass^k: all of them.</p>
<h2>Episodes ({{ episodes|length }} of {{ count }})</h2>
{% for row in episodes %}<details>
<summary>{{ row.policy }} on {{ row.environment }}, task {{ row.key }}: {{ row.reward }} ({{ row.outcome }})</summary>
{% for message in row.messages %}<b>{{ message.role }}</b><pre>{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{ call.function.name }}({{ call.function.arguments }}){% endfor %}</pre>
{% endfor %}</details>
{% endfor %}</html>
"""


SHORT = ("policy", "environment", "tasks", "unscored", "reward", "turns")


def _titles(k: int) -> list[str]:
    plain = ["policy", "environment", "tasks", "unscored", "reward", f"pass@{k}", f"pass^{k}"]
    return [*plain, "turns", "calls", "call errors", "tokens in", "tokens out", "seconds"]


def _range(value: Interval | None) -> str:
    return "unscored" if value is None else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _line(summary: Summary) -> list[str]:
    means = (summary.turns, summary.tool_calls, summary.tool_errors)
    return [
        summary.policy,
        summary.environment,
        str(summary.tasks),
        str(summary.unscored),
        *map(_range, (summary.reward, summary.pass_at_k, summary.pass_hat_k)),
        *(f"{mean:.2f}" for mean in means),
        f"{summary.prompt_tokens:.0f}",
        f"{summary.completion_tokens:.0f}",
        f"{summary.seconds:.2f}",
    ]


def table(summaries: Sequence[Summary], short: bool = False) -> Table:
    """The results as a table for the terminal; `short`: the columns that 80 characters hold (the page has all)."""
    from rich.markup import escape
    from rich.table import Table

    out = Table()
    titles = _titles(summaries[0].k)
    chosen = [place for place, title in enumerate(titles) if not short or title in SHORT]
    for place in chosen:
        out.add_column(titles[place], overflow="fold")
    for summary in summaries:
        line = _line(summary)
        out.add_row(*(escape(line[place]) for place in chosen))
    return out


def page(summaries: Sequence[Summary], rows: Sequence[Row]) -> str:
    """The results as one HTML page; what a model wrote is escaped."""
    from jinja2 import Environment

    shown: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        shown.setdefault((row.policy, row.environment), []).append(row)
    episodes = [row for cell in shown.values() for row in cell[:SHOWN]]
    lines = [_line(summary) for summary in summaries]
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(titles=_titles(summaries[0].k), lines=lines, episodes=episodes, count=len(rows))


def write(folder: Path, summaries: Sequence[Summary], rows: Sequence[Row]) -> None:
    """Write summary.json, episodes.parquet and index.html, each whole or not at all."""
    text = json.dumps([summary.model_dump() for summary in summaries], indent=2)
    write_whole(folder / "summary.json", text.encode())
    write_whole(folder / "index.html", page(summaries, rows).encode())
    write_whole(folder / "episodes.parquet", parquet([row.model_dump() for row in rows]))


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A Parquet file of a column for each field; objects and lists become JSON text, and nothing but nulls float64."""
    import pyarrow
    from pyarrow.parquet import write_table

    names = list(rows[0]) if rows else []
    out = pyarrow.BufferOutputStream()
    write_table(pyarrow.table({name: _column([row[name] for row in rows]) for name in names}), out)
    content: bytes = out.getvalue().to_pybytes()
    return content


def _column(values: Sequence[Any]) -> Any:
    import pyarrow

    if isinstance(values[0], dict | list):
        return pyarrow.array([json.dumps(value, ensure_ascii=False) for value in values])
    return pyarrow.array(values, pyarrow.float64() if all(value is None for value in values) else None)
