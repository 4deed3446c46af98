"""A full-text index over one task's documents: SQLite FTS5 in memory, ranked by BM25."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence


class Index:
    """Documents by number, from 1. Built in well under a millisecond for a task's handful of documents."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute("CREATE VIRTUAL TABLE documents USING fts5(text, tokenize='porter unicode61')")
        self._database.executemany("INSERT INTO documents(text) VALUES (?)", [(text,) for text in documents])
        self.size = len(documents)

    def search(self, query: str, hits: int) -> list[tuple[int, str]]:
        """The best documents, best first: those that hold the query as a phrase, then those with any of its words."""
        words = re.findall(r"\w+", query)
        if not words:
            return []
        quoted = [f'"{word}"' for word in words[:32]]
        found = dict(self._match(" + ".join(quoted), hits))
        if len(found) < hits:
            found |= {number: text for number, text in self._match(" OR ".join(quoted), hits) if number not in found}
        return list(found.items())[:hits]

    def open(self, number: int) -> str | None:
        """A whole document; None where there is none of that number."""
        if not 1 <= number <= self.size:
            return None
        with self._lock:
            row = self._database.execute("SELECT text FROM documents WHERE rowid = ?", (number,)).fetchone()
        return None if row is None else str(row[0])

    def _match(self, expression: str, hits: int) -> list[tuple[int, str]]:
        sql = "SELECT rowid, text FROM documents WHERE documents MATCH ? ORDER BY rank, rowid LIMIT ?"
        with self._lock:
            return self._database.execute(sql, (expression, hits)).fetchall()

    def close(self) -> None:
        """Give the memory back."""
        self._database.close()
