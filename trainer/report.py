"""What a run leaves to look at: a PNG of the curves, and one static HTML page with the curves and episodes to read."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palaestra.gym.types import Episode, Message, Scored

SHOWN = 12
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100% }
details { border: 1px solid #ddd; border-radius: 6px; margin: .5em 0; padding: .4em .8em }
pre { white-space: pre-wrap; margin: .2em 0 .8em; background: #f6f6f6; padding: .4em .6em } .role { color: #777 }
"""


def curves(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Draw reward by environment, and loss-side measurements, over the steps of the metrics `rows`."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row if name.startswith("reward/")})
    panels = [("reward", names), ("entropy (nats)", ["entropy"]), ("gradient norm", ["grad_norm"]), ("loss", ["loss"])]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for place, (title, keys) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, place)
        for key in keys:
            points = [(index, row[key]) for index, row in enumerate(rows) if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), alpha=0.35 if place == 1 else 1.0, linewidth=1)
                if place == 1:
                    colour = axes.lines[-1].get_color()
                    axes.plot(*_smooth(points), color=colour, label=key.removeprefix("reward/"))
        axes.set_title(title)
        axes.set_xlabel("step")
        if place == 1 and axes.lines:
            axes.set_ylim(-0.02, 1.02)
            axes.legend()
    figure.savefig(target, dpi=110)


def _smooth(points: Sequence[tuple[int, float]], width: int = 5) -> tuple[list[int], list[float]]:
    """A trailing mean."""
    values = [value for _, value in points]
    means = [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]
    return [step for step, _ in points], means


def page(title: str, summary: Mapping[str, Any], picture: Path, episodes: Sequence[Episode], target: Path) -> None:
    """Write one HTML file that needs nothing else. Whatever a model or a task wrote is escaped."""
    image = base64.b64encode(picture.read_bytes()).decode()
    body = [
        f"<h1>{_text(title)}</h1>",
        _table(summary.get("environments", {})),
        *(f"<p>{_text(name)}: {part['steps']} of {part['of']} steps</p>" for name, part in summary["stages"].items()),
        f'<p><img alt="curves" src="data:image/png;base64,{image}"></p>',
        "<h2>Episodes after training</h2>",
        *(_episode(episode) for episode in _chosen(episodes)),
    ]
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    target.write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n")


def _table(environments: Mapping[str, Any]) -> str:
    rows = []
    for name, part in environments.items():
        gain = part["gain"]
        cells = [
            _text(name), str(part["tasks"]), f"{part['before']['mean']:.3f}", f"{part['after']['mean']:.3f}",
            f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
            f"{part['before']['greedy']:.3f}", f"{part['after']['greedy']:.3f}",
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("environment", "held-out tasks", "before", "after", "gain, 95 %", "greedy before", "greedy after")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


def _chosen(episodes: Sequence[Episode]) -> list[Episode]:
    """A few of each environment, right and wrong ones."""
    kinds: dict[tuple[str, bool], list[Episode]] = {}
    for episode in episodes:
        right = isinstance(episode.result, Scored) and episode.result.value > 0
        kinds.setdefault((episode.task.environment, right), []).append(episode)
    each = max(1, SHOWN // max(1, len(kinds)))
    return [episode for kind in sorted(kinds) for episode in kinds[kind][:each]]


def _episode(episode: Episode) -> str:
    score = f"{episode.result.value:g}" if isinstance(episode.result, Scored) else "unscored"
    head = f"{episode.task.environment} {episode.task.key}: {score} ({episode.outcome.cause.value})"
    parts = []
    for turn in episode.turns:
        parts += [_message(message) for message in (*turn.added, turn.completion.message)]
    gold = json.dumps(episode.task.data, default=str)[:400]
    return f"<details><summary>{_text(head)}</summary>{''.join(parts)}<p class=role>data: {_text(gold)}</p></details>"


def _message(message: Message) -> str:
    calls = "".join(f"\n[{call.name} {call.arguments}]" for call in message.tool_calls)
    text = "\n".join(part for part in (message.reasoning, message.content) if part) + calls
    return f'<div class="role">{_text(message.role)}</div><pre>{_text(text.strip())}</pre>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
