"""Programs: a build that fails, a script with a bug, a script to write. Judged by what they print in a fresh box."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from palaestra.tasks.terminal.puzzle import ANY, MAYBE, Puzzle, Tree, file, lines


def prints(command: str, output: str) -> dict[str, Any]:
    """A check: in a fresh box that holds what /work then holds, the command prints the output."""
    return {"kind": "fresh", "command": command, "output": output}


def given(texts: Iterable[object]) -> str:
    """A command that prints the texts, a line each."""
    return "printf '%s\\n' " + " ".join(f"'{text}'" for text in texts)


MAKEFILE = """CC = gcc
CFLAGS = {flags}

tool: main.o {objects}
\t$(CC) -o tool main.o {linked}{libraries}

%.o: %.c
\t$(CC) $(CFLAGS) -c $<

clean:
\trm -f tool *.o
"""
MAIN = """#include <stdio.h>
#include <stdlib.h>
#include "parts.h"

int main(int argc, char **argv) {
    printf("%d\\n", combine(atoi(argv[1]), atoi(argv[2])));
    return 0;
}
"""


def repair_build(level: int, r: random.Random) -> Puzzle:
    """A Makefile with one fault or more."""
    a, b = r.randint(2, 9), r.randint(2, 9)
    whole = {"flags": "-O1 -Iinclude", "objects": "parts.o", "linked": "parts.o", "libraries": " -lm"}
    faults = {"flags": "-O1", "linked": "", "libraries": ""}
    broken = {**whole, **{key: faults[key] for key in r.sample(sorted(faults), min(level, 3))}}
    parts = f'#include <math.h>\n#include "parts.h"\n\nint combine(int x, int y) {{\n    return {a} * x + (int) floor(pow(y, 1.0 + x % 2)) + {b};\n}}\n'
    before: Tree = {
        "Makefile": file(MAKEFILE.format(**broken)), "main.c": file(MAIN), "parts.c": file(parts),
        "include/parts.h": file("int combine(int x, int y);\n"),
    }  # fmt: skip
    x, y = r.randint(2, 20), r.randint(2, 20)
    expected = a * x + y ** (1 + x % 2) + b
    prompt = "`make` fails in /work. Repair the Makefile, and nothing else, so that `make` builds the program tool."
    fixed = MAKEFILE.format(**whole).replace("$", "\\$")
    after = {**before, "Makefile": ANY, "main.o": MAYBE, "parts.o": MAYBE, "tool": MAYBE}
    return Puzzle(
        prompt,
        before,
        after,
        f"cat > Makefile <<END\n{fixed}END\nmake -s",
        "",
        (prints(f"make -s clean && make -s && ./tool {x} {y}", f"{expected}\n"),),
    )


BUGS: tuple[tuple[str, str, str], ...] = (
    (
        "sum of the even numbers",
        "print(sum(n for n in numbers if n % 2 == 1))",
        "print(sum(n for n in numbers if n % 2 == 0))",
    ),
    ("largest number", "print(sorted(numbers)[0])", "print(sorted(numbers)[-1])"),
    ("number of distinct numbers", "print(len(numbers))", "print(len(set(numbers)))"),
    ("second number", "print(numbers[2])", "print(numbers[1])"),
    ("numbers in reverse order, separated by a space", "print(*numbers)", "print(*numbers[::-1])"),
)


def repair_script(level: int, r: random.Random) -> Puzzle:
    """A Python script that prints the wrong thing."""
    what, wrong, right = r.choice(BUGS)
    name = f"{r.choice(('stats', 'numbers', 'report'))}.py"
    reading = "import sys\n\nnumbers = [int(line) for line in sys.stdin]\n"
    inputs = [_numbers(r) for _ in range(1 + level)]
    checks = tuple(
        prints(
            f"{given(numbers)} | python3 {name}",
            _output(right, numbers),
        )
        for numbers in inputs
    )
    prompt = f"/work/{name} should read numbers, a line each, from its standard input and print the {what}. It prints something else. Repair it."
    return Puzzle(
        prompt,
        {name: file(f"{reading}{wrong}\n")},
        {name: ANY},
        f"cat > {name} <<'END'\n{reading}{right}\nEND",
        "",
        checks,
    )


def _numbers(r: random.Random) -> list[int]:
    """Numbers on which every bug shows: one comes twice, the evens and the odds have other sums, and so on."""
    drawn = r.sample(range(-99, 100), r.randint(4, 8))
    drawn.append(drawn[0])
    odd = sum(n for n in drawn if n % 2)
    shows = sum(drawn) != 2 * odd and drawn != drawn[::-1] and drawn[1] != drawn[2]
    return drawn if shows else _numbers(r)


def _output(code: str, numbers: list[int]) -> str:
    """What the right line prints, by code of our own."""
    values: dict[str, Any] = {
        BUGS[0][2]: sum(n for n in numbers if not n % 2), BUGS[1][2]: max(numbers), BUGS[2][2]: len({*numbers}),
        BUGS[3][2]: numbers[1], BUGS[4][2]: " ".join(str(n) for n in reversed(numbers)),
    }  # fmt: skip
    return f"{values[code]}\n"


def write_script(level: int, r: random.Random) -> Puzzle:
    """A shell script is written; hidden inputs judge it."""
    column, least = r.randint(1, 3), r.randint(20, 60)
    tables = [[[r.randint(1, 99) for _ in range(3)] for _ in range(r.randint(3, 4 + level))] for _ in range(2)]
    checks = tuple(
        prints(
            f"{given(' '.join(map(str, row)) for row in table)} > /tmp/table; sh select.sh /tmp/table",
            lines(" ".join(map(str, row)) for row in table if row[column - 1] >= least),
        )
        for table in tables
    )
    prompt = f"Write a shell script /work/select.sh (run as `sh select.sh FILE`). FILE holds lines of three numbers, separated by one space. The script prints those lines whose column {column} is at least {least}, in their order, and nothing else."
    return Puzzle(
        prompt,
        {},
        {"select.sh": ANY},
        f'echo "awk \'\\${column} >= {least}\' \\"\\$1\\"" > select.sh',
        "",
        checks,
    )


TEMPLATES = (repair_build, repair_script, write_script)
