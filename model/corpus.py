"""What the tokenizer was trained on: the task suite, and the Python, JSON and bash that agents read and write."""

from __future__ import annotations

import inspect
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

from palaestra.gym import agent, environment, episode, types
from palaestra.gym import tools as toolbox
from palaestra.gym.registry import spec

SUITE: dict[str, dict[str, Any]] = {
    "math": {},
    "code": {},
    "search": {},
    "terminal": {"families": ["first"], "levels": [1, 2]},
}
TASKS = 8000
WORDS_AGAIN = 3
BASH = """\
ls -la | grep -v total && cd /tmp && mkdir -p out/logs && find . -name "*.py" -type f | xargs wc -l | sort -n | tail -5
for file in *.txt; do cat "$file" | sed -e 's/old/new/g' | awk '{print $1, $2}' >> result.txt; done; echo "done: $?"
git status && git add -A && git commit -m "message" && git log --oneline | head -n 10; tar -czf out.tar.gz out/
if [ -f config.json ]; then python3 -m pytest -q tests/test_main.py; else exit 1; fi; chmod +x run.sh; export PATH=$PATH
"""


def texts() -> Iterator[str]:
    """The corpus, always the same."""
    for name, config in SUITE.items():
        known = spec(name, config)
        settings = known.settings()
        player = known.environment()(settings)
        declared = [tool["function"] for tool in toolbox.Tools(player, 1.0, 1.0).declarations]
        for task in itertools.islice(known.tasks("train", 0), TASKS):
            yield from _of_task(player, task)
            for function in declared:
                yield from (function["name"], *function["parameters"]["properties"])
    for module in (agent, environment, episode, toolbox, types):
        yield inspect.getsource(module)
    yield from [BASH] * 20


def _of_task(player: environment.Environment, task: types.Task) -> Iterator[str]:
    """Prompt, data and a demonstration; names among the data again, so that each becomes one token."""
    yield "\n".join(message.content for message in task.messages())
    yield from (text for text in task.data.get("documents", []) for _ in range(WORDS_AGAIN))
    styles = getattr(player, "demonstrations", None)
    told = environment.gold_messages(player.solution(task)) if styles is None else styles(task, random.Random(task.key))
    for message in told or []:
        yield message.content
        for call in message.tool_calls:
            yield call.name
            yield from (str(value) for value in json.loads(call.arguments).values())
    if task.seed % 100 == 0:
        yield json.dumps(task.data)
