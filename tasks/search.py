"""Look-ups of one or more hops over a knowledge base that each task brings along."""

from __future__ import annotations

import random

from palaestra.tasks.generated import Drawn, Generated
from palaestra.tasks.words import PEOPLE, PLACES

BETWEEN = ("boss", "friend", "mother", "teacher", "neighbour", "cousin")
VALUES = ("city", "birthplace", "school town", "office")
DISTRACTORS = 4


def lookups(levels: tuple[int, ...]) -> Generated:
    """Questions of `level` hops; the facts stand in `data.documents`, never in the prompt."""
    return Generated("lookups", _question, levels)


def fact(relation: str, who: str, value: str) -> str:
    """The document that states a fact."""
    return f"The {relation} of {who} is {value}."


def _question(level: int, generator: random.Random) -> Drawn:
    """`data`: answers, documents, hops (relation and person of each look-up in order)."""
    people = generator.sample(PEOPLE, level + DISTRACTORS)
    chain = [*generator.sample(BETWEEN, level - 1), generator.choice(VALUES)]
    values = [*people[1:level], generator.choice(PLACES)]
    hops = [[relation, who] for relation, who in zip(chain, people, strict=False)]
    documents = {(relation, who): value for (relation, who), value in zip(hops, values, strict=True)}
    for stranger in people[level:]:
        documents.setdefault((chain[-1], stranger), generator.choice(PLACES))
        documents.setdefault((generator.choice(BETWEEN), generator.choice(people[:level])), stranger)
    texts = [fact(relation, who, value) for (relation, who), value in documents.items()]
    generator.shuffle(texts)
    what = " of the ".join(chain[::-1])
    question = f"What is the {what} of {people[0]}?"
    return Drawn(question, {"answers": [values[-1]], "documents": texts, "hops": hops})
