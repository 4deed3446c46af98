"""Questions whose answers stand in documents that only the tools reach."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from palaestra.environments.search_index import Index
from palaestra.gym.environment import Environment, ToolError, metric, reward, tool
from palaestra.gym.tasksets import rows
from palaestra.gym.types import Message, Task
from palaestra.tasks.real import hotpotqa
from palaestra.tasks.search import lookups

SOURCES = {"hotpotqa": hotpotqa}


def normalise(text: str) -> str:
    """HotpotQA's (SQuAD's) official normalisation: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(answer: str, gold: str) -> float:
    """The official token F1; yes, no and noanswer count only when equal."""
    given, wanted = normalise(answer), normalise(gold)
    if given != wanted and {given, wanted} & {"yes", "no", "noanswer"}:
        return 0.0
    common = sum((Counter(given.split()) & Counter(wanted.split())).values())
    if not common:
        return 0.0
    precision, recall = common / len(given.split()), common / len(wanted.split())
    return 2 * precision * recall / (precision + recall)


class Search(Environment):
    """Answer a question from documents: `search` finds them, `open` shows one whole. The reply is the answer alone."""

    class Config(BaseModel):
        """`source`: generator, hotpotqa, or a JSONL or Parquet file with prompt, answers and documents;
        `levels`: hops of the generated questions; `hits`: documents a search shows; `direct`: the share of
        demonstrations that give the answer without looking it up."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        source: str = "generator"
        levels: tuple[int, ...] = (1, 2)
        hits: int = Field(default=1, ge=1)
        tools: bool = True
        direct: float = 0.35

    _index: Index | None = None

    @classmethod
    def task_set(cls, config: Any) -> Any:
        """Generated tasks, real ones, or the rows of a file."""
        if config.source == "generator":
            return lookups(config.levels)
        if config.source in SOURCES:
            return SOURCES[config.source]()
        return rows(
            config.source,
            prompt="prompt",
            data={"answers": "answers", "documents": "documents"},
        )

    def setup(self, task: Task) -> None:
        """Index the task's documents."""
        self._index = Index(task.data["documents"])

    def close(self) -> None:
        """Drop the index."""
        if self._index is not None:
            self._index.close()
            self._index = None

    def tool_names(self) -> Sequence[str]:
        """Both tools, unless they were taken away."""
        return ("search", "open") if self.config.tools else ()

    @tool
    def search(self, query: str) -> str:
        """Find documents by words, the best first."""
        assert self._index is not None
        found = self._index.search(query, self.config.hits)
        return "\n".join(f"[{number}] {text.partition(chr(10))[0]}" for number, text in found) or "nothing found"

    @tool(name="open")
    def open_document(self, number: int) -> str:
        """Show a whole document by its number."""
        assert self._index is not None
        text = self._index.open(number)
        if text is None:
            raise ToolError(f"there is no document {number}; the numbers are 1 to {self._index.size}")
        return text

    @reward
    def exact_match(self, task: Task, answer: str) -> float:
        """1 if the reply equals one of the answers under the official normalisation."""
        return float(normalise(answer) in {normalise(gold) for gold in task.data["answers"]})

    @metric
    def f1(self, task: Task, answer: str) -> float:
        """The best token F1 over the answers."""
        return max(f1(answer, gold) for gold in task.data["answers"])

    def solution(self, task: Task) -> list[Message]:
        """A search a hop where the task knows its hops, then the answer."""
        answer = Message(role="assistant", content=task.data["answers"][0])
        if not self.config.tools:
            return [answer]
        queries = [f"{relation} of {who}" for relation, who in task.data.get("hops", [])]
        return [*(Message.calling("search", query=query) for query in queries), answer]

    def demonstrations(self, task: Task, generator: random.Random) -> list[Message]:
        """The solution, or for a share of the tasks its answer alone."""
        messages = self.solution(task)
        return messages[-1:] if generator.random() < self.config.direct else messages
