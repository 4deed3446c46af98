"""Text processing: counting, replacing, joining, logs."""

from __future__ import annotations

import random
from collections import Counter

from palaestra.tasks.terminal.content import files_of, names, sentence, tree
from palaestra.tasks.terminal.puzzle import Puzzle, Tree, file, lines
from palaestra.tasks.words import PEOPLE, PLACES, THINGS


def count_lines(level: int, r: random.Random) -> Puzzle:
    """How many lines hold a word, in all files of an ending."""
    before = tree(r, 2 + 2 * level, depth=level - 1, endings=("txt", "log"))
    word = r.choice(THINGS)
    texts = [before[path].text for path in files_of(before) if path.endswith(".txt")]
    count = sum(word in line.split() for content in texts for line in content.splitlines())
    prompt = f"Count the lines that hold the word {word} in the files below /work whose names end in .txt. Write the number to /work/count."
    script = f"find . -name '*.txt' -print0 | xargs -0 -r cat | grep -cw {word} > count; true"
    return Puzzle(prompt, before, {**before, "count": file(f"{count}\n")}, script)


def replace_word(level: int, r: random.Random) -> Puzzle:
    """A word becomes another in all files."""
    before = tree(r, 2 + 2 * level, depth=level)
    old, new = r.sample(THINGS, 2)
    after = {
        p: n.model_copy(update={"text": n.text.replace(old, new)}) if n.kind == "file" else n for p, n in before.items()
    }
    prompt = f"Replace {old} by {new} everywhere in the files below /work."
    return Puzzle(prompt, before, after, f"find . -type f -exec sed -i 's/{old}/{new}/g' {{}} +")


def sort_unique(level: int, r: random.Random) -> Puzzle:
    """The lines of some files, sorted, each once."""
    sources = names(r, 1 + level)
    pool = [sentence(r) for _ in range(4 + 2 * level)]
    before: Tree = {f"{name}.list": file(lines(r.choices(pool, k=3 + level))) for name in sources}
    found = sorted({line for node in before.values() for line in node.text.splitlines()})
    prompt = "Write the lines of all .list files in /work to /work/all, sorted in byte order, each line once."
    return Puzzle(prompt, before, {**before, "all": file(lines(found))}, "cat *.list | LC_ALL=C sort -u > all")


def _log(r: random.Random, count: int) -> list[tuple[str, str, int, int]]:
    """Requests: address, path, status, bytes."""
    addresses = [f"10.0.{r.randint(0, 9)}.{r.randint(1, 250)}" for _ in range(5)]
    paths = [f"/{place.lower()}" for place in r.sample(PLACES, 4)]
    return [
        (r.choice(addresses), r.choice(paths), r.choice((200, 200, 200, 301, 404, 500)), r.randint(100, 9999))
        for _ in range(count)
    ]


def access_log(level: int, r: random.Random) -> Puzzle:
    """A figure of a web server's log: by status, by address, or the bytes of a path."""
    log = _log(r, 15 * level)
    text = lines(f'{a} - - "GET {p} HTTP/1.1" {s} {b}' for a, p, s, b in log)
    kind = r.randrange(3 if level > 1 else 2)
    if kind == 0:
        status = r.choice((200, 301, 404, 500))
        answer = f"{sum(s == status for _, _, s, _ in log)}\n"
        prompt = f"Write to /work/answer how many requests in /work/access.log have the status {status}."
        script = f"awk '$7 == {status}' access.log | wc -l > answer"
    elif kind == 1:
        path = r.choice([p for _, p, _, _ in log])
        answer = f"{sum(b for _, p, _, b in log if p == path)}\n"
        prompt = f"Write to /work/answer the sum of the bytes (the last column) of the requests for {path} in /work/access.log."
        script = f"awk '$5 == \"{path}\" {{ n += $8 }} END {{ print n }}' access.log > answer"
    else:
        counts = Counter(a for a, _, s, _ in log if s >= 400)
        ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        answer = lines(f"{count} {address}" for address, count in ranked)
        prompt = "For each address in /work/access.log with requests of status 400 or more, write a line to /work/answer: their number, a space, the address. The most come first; addresses with equal numbers in byte order."
        script = "awk '$7 >= 400 { n[$1]++ } END { for (a in n) print n[a], a }' access.log | LC_ALL=C sort -k1,1nr -k2,2 > answer"
    before: Tree = {"access.log": file(text)}
    return Puzzle(prompt, before, {**before, "answer": file(answer)}, script)


def csv_groups(level: int, r: random.Random) -> Puzzle:
    """A column of a table summed by another."""
    rows = [(r.choice(PEOPLE[:6]), r.choice(PLACES[:5]), r.randint(1, 99)) for _ in range(5 + 6 * level)]
    before: Tree = {"sales.csv": file(lines(["person,place,amount", *(",".join(map(str, row)) for row in rows)]))}
    column = r.choice((0, 1))
    name = ("person", "place")[column]
    sums: Counter[str] = Counter()
    for row in rows:
        sums[str(row[column])] += row[2]
    chosen = sorted(sums.items())
    least = ""
    if level > 1:
        limit = sorted(sums.values())[len(sums) // 2]
        chosen = [entry for entry in chosen if entry[1] >= limit]
        least = f" Leave out those whose sum is below {limit}."
    condition = f" if (n[k] >= {limit})" if level > 1 else ""
    prompt = f"/work/sales.csv has the columns person, place, amount. Write /work/sums.csv: a first line {name},amount, then a line for each {name} with the sum of its amounts, in byte order of the {name}.{least}"
    script = f"(echo {name},amount; awk -F, 'NR > 1 {{ n[${column + 1}] += $3 }} END {{ for (k in n){condition} print k \",\" n[k] }}' sales.csv | LC_ALL=C sort) > sums.csv"
    wanted = lines([f"{name},amount", *(f"{key},{total}" for key, total in chosen)])
    return Puzzle(prompt, before, {**before, "sums.csv": file(wanted)}, script)


def join_tables(level: int, r: random.Random) -> Puzzle:
    """Two tables joined by their key."""
    people = sorted(r.sample(PEOPLE, 4 + 2 * level))
    ages = {who: r.randint(18, 90) for who in r.sample(people, 3 + level)}
    homes = {who: r.choice(PLACES) for who in r.sample(people, 3 + level)}
    before: Tree = {
        "ages": file(lines(f"{who} {age}" for who, age in r.sample(sorted(ages.items()), len(ages)))),
        "homes": file(lines(f"{who} {home}" for who, home in r.sample(sorted(homes.items()), len(homes)))),
    }
    wanted = lines(f"{who} {ages[who]} {homes[who]}" for who in people if who in ages and who in homes)
    prompt = "/work/ages and /work/homes hold lines of a name and a value. Write /work/joined: for each name in both, a line of name, age and home, separated by one space, in byte order of the names."
    script = "export LC_ALL=C; join <(sort ages) <(sort homes) > joined"
    return Puzzle(prompt, before, {**before, "joined": file(wanted)}, script)


TEMPLATES = (count_lines, replace_word, sort_unique, access_log, csv_groups, join_tables)
