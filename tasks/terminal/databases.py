"""SQLite: queries, changes, repairs. Python's own sqlite3 does in the box where there is no sqlite3 program."""

from __future__ import annotations

import random
from typing import Any

from palaestra.tasks.terminal.puzzle import Node, Puzzle, file, lines
from palaestra.tasks.words import PEOPLE, PLACES, THINGS

RUN = "python3 - <<'END'\nimport sqlite3\ndb = sqlite3.connect('shop.db')\n{}\ndb.commit()\nEND"


def database(tables: dict[str, Any]) -> Node:
    """A database; a table is {columns: [[name, type]], rows: [[...]]}. Checked by schema and rows, not by its bytes."""
    return Node(kind="sqlite", parts=tables)


def _orders(level: int, r: random.Random) -> list[list[Any]]:
    return [
        [n, r.choice(PEOPLE[:8]), r.choice(THINGS), r.randint(1, 50), r.choice(PLACES[:6])]
        for n in range(1, 8 * level + 3)
    ]


def _shop(rows: list[list[Any]], *more: list[str]) -> Node:
    columns = [
        ["id", "INTEGER"],
        ["customer", "TEXT"],
        ["item", "TEXT"],
        ["amount", "INTEGER"],
        ["city", "TEXT"],
        *more,
    ]
    return database({"orders": {"columns": columns, "rows": rows}})


TABLE = "The SQLite database /work/shop.db has a table orders (id, customer, item, amount, city)."


def query(level: int, r: random.Random) -> Puzzle:
    """A question to the table, its answer in a file."""
    rows = _orders(level, r)
    item = r.choice(rows)[2]
    before = {"shop.db": _shop(rows)}
    if level == 1:
        answer = f"{sum(row[3] for row in rows if row[2] == item)}\n"
        prompt = f"{TABLE} Write to /work/answer the sum of the amounts of all orders of {item}."
        code = f"(n,) = db.execute(\"SELECT sum(amount) FROM orders WHERE item = '{item}'\").fetchone()\nopen('answer', 'w').write(f'{{n}}\\n')"
    else:
        totals: dict[str, int] = {}
        for row in rows:
            totals[row[1]] = totals.get(row[1], 0) + row[3]
        ranked = sorted(totals.items(), key=lambda entry: (-entry[1], entry[0]))[: level + 1]
        answer = lines(f"{who}|{total}" for who, total in ranked)
        prompt = f"{TABLE} Write to /work/answer the {level + 1} customers with the largest sums of amounts, a line each: customer, |, sum. The largest comes first; equal sums in byte order of the customers."
        code = f"found = db.execute('SELECT customer, sum(amount) AS n FROM orders GROUP BY customer ORDER BY n DESC, customer LIMIT {level + 1}')\nopen('answer', 'w').write(''.join(f'{{a}}|{{b}}\\n' for a, b in found))"
    return Puzzle(prompt, before, {**before, "answer": file(answer)}, RUN.format(code))


def change_rows(level: int, r: random.Random) -> Puzzle:
    """Rows are changed and removed."""
    rows = _orders(level, r)
    city, other = r.sample(PLACES[:6], 2)
    least = r.randint(5, 20)
    prompt = f"{TABLE} Change the city {city} to {other} in all orders."
    code = f"db.execute(\"UPDATE orders SET city = '{other}' WHERE city = '{city}'\")"
    wanted = [[*row[:4], other if row[4] == city else row[4]] for row in rows]
    if level > 1:
        prompt += f" Then delete all orders whose amount is below {least}."
        code += f"\ndb.execute('DELETE FROM orders WHERE amount < {least}')"
        wanted = [row for row in wanted if row[3] >= least]
    return Puzzle(prompt, {"shop.db": _shop(rows)}, {"shop.db": _shop(wanted)}, RUN.format(code))


def add_column(level: int, r: random.Random) -> Puzzle:
    """A new column, computed from the others."""
    rows = _orders(level, r)
    limit = r.randint(10, 40)
    large, small = r.sample(("bulk", "retail", "big", "tiny"), 2)
    prompt = f"{TABLE} Add a column size of type TEXT: {large} for orders with an amount of at least {limit}, {small} for the others."
    code = f"db.execute('ALTER TABLE orders ADD COLUMN size TEXT')\ndb.execute(\"UPDATE orders SET size = CASE WHEN amount >= {limit} THEN '{large}' ELSE '{small}' END\")"
    wanted = [[*row, large if row[3] >= limit else small] for row in rows]
    return Puzzle(prompt, {"shop.db": _shop(rows)}, {"shop.db": _shop(wanted, ["size", "TEXT"])}, RUN.format(code))


TEMPLATES = (query, change_rows, add_column)
