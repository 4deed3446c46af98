"""Configuration files: INI, JSON, crontabs, environment files."""

from __future__ import annotations

import json
import random

from palaestra.tasks.terminal.content import names
from palaestra.tasks.terminal.puzzle import Puzzle, Tree, file, lines

SECTIONS = ("server", "cache", "mail", "queue", "auth")
KEYS = ("port", "timeout", "size", "workers", "retries", "level")


def ini_value(level: int, r: random.Random) -> Puzzle:
    """Values of an INI file, whose keys stand in several sections."""
    sections = {name: {key: r.randint(1, 99) for key in r.sample(KEYS, 4)} for name in r.sample(SECTIONS, 2 + level)}
    before: Tree = {"app.ini": file(_ini(sections))}
    asked, commands = [], []
    for name in r.sample(sorted(sections), level):
        key, value = r.choice(sorted(sections[name])), r.randint(100, 999)
        sections[name][key] = value
        asked.append(f"{key} in section {name} to {value}")
        commands.append(f"sed -i '/^\\[{name}\\]/,/^\\[/ s/^{key} = .*/{key} = {value}/' app.ini")
    prompt = f"In /work/app.ini set {' and '.join(asked)}. Change nothing else."
    return Puzzle(prompt, before, {"app.ini": file(_ini(sections))}, "; ".join(commands))


def _ini(sections: dict[str, dict[str, int]]) -> str:
    parts = [
        f"[{name}]\n" + lines(f"{key} = {value}" for key, value in values.items()) for name, values in sections.items()
    ]
    return "# settings\n" + "\n".join(parts)


def json_settings(level: int, r: random.Random) -> Puzzle:
    """A JSON file is changed and written again in one form."""
    before = {name: {key: r.randint(1, 99) for key in r.sample(KEYS, 3)} for name in r.sample(SECTIONS, 2 + level)}
    after = json.loads(json.dumps(before))
    asked, code = [], []
    for name in r.sample(sorted(before), level):
        key, value = r.choice(sorted(before[name])), r.randint(100, 999)
        after[name][key] = value
        asked.append(f"{name}.{key} to {value}")
        code.append(f"d['{name}']['{key}'] = {value}")
    if level > 1:
        gone = r.choice([name for name in sorted(before) if after[name] == before[name]])
        del after[gone]
        asked.append(f"{gone} away")
        code.append(f"del d['{gone}']")
    script = f"python3 -c \"import json; d = json.load(open('settings.json')); {'; '.join(code)}; open('settings.json', 'w').write(json.dumps(d, indent=2, sort_keys=True) + chr(10))\""
    verbs = [f"take {what.removesuffix(' away')} out" if what.endswith(" away") else f"set {what}" for what in asked]
    prompt = f"In /work/settings.json {', '.join(verbs)}. Write the file with its keys sorted, indented by 2, with a line break at its end (as Python's json.dumps(..., indent=2, sort_keys=True))."
    return Puzzle(
        prompt,
        {"settings.json": file(json.dumps(before) + "\n")},
        {"settings.json": file(json.dumps(after, indent=2, sort_keys=True) + "\n")},
        script,
    )


def environment_files(level: int, r: random.Random) -> Puzzle:
    """Later files override earlier ones; the result is sorted."""
    sources = [f"{number}-{name}.env" for number, name in enumerate(names(r, 1 + level), 1)]
    keys = [f"{a.upper()}_{b.upper()}" for a in SECTIONS[:3] for b in KEYS[:3]]
    before: Tree = {}
    merged: dict[str, str] = {}
    for source in sources:
        values = {key: str(r.randint(1, 999)) for key in r.sample(keys, 3 + level)}
        before[source] = file("# " + source + "\n" + lines(f"{key}={value}" for key, value in values.items()))
        merged |= values
    wanted = lines(f"{key}={value}" for key, value in sorted(merged.items()))
    prompt = "Merge the .env files of /work into /work/merged: a line KEY=VALUE for each key, sorted in byte order. Of a key that several files set, the value of the file whose name comes last counts. Comments (#) are left out."
    script = "cat *.env | grep -v '^#' | awk -F= '{ v[$1] = $2 } END { for (k in v) print k \"=\" v[k] }' | LC_ALL=C sort > merged"
    return Puzzle(prompt, before, {**before, "merged": file(wanted)}, script)


def crontab(level: int, r: random.Random) -> Puzzle:
    """Jobs of a crontab are moved to another hour; comments stay."""
    jobs = [(r.randint(0, 59), r.randint(0, 11), name) for name in names(r, 3 + level)]
    moved = {name for _, _, name in r.sample(jobs, level)}
    hour = r.randint(12, 23)

    def written(late: set[str]) -> str:
        return "# m h dom mon dow command\n" + lines(
            f"{m} {hour if name in late else h} * * * /usr/bin/run {name}" for m, h, name in jobs
        )

    which = " and ".join(sorted(moved))
    script = "; ".join(f"sed -i -E 's#^([0-9]+) [0-9]+ (.* {name})$#\\1 {hour} \\2#' crontab" for name in sorted(moved))
    prompt = f"In /work/crontab let {which} run at hour {hour} instead, at the same minute. Change nothing else."
    return Puzzle(prompt, {"crontab": file(written(set()))}, {"crontab": file(written(moved))}, script)


TEMPLATES = (ini_value, json_settings, environment_files, crontab)
