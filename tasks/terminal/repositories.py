"""Git: commits, merges, what was lost. A repository is checked by its branches' subjects and trees, not its objects."""

from __future__ import annotations

import random
import shlex
from typing import Any

from palaestra.tasks.terminal.content import names, sentence, text
from palaestra.tasks.terminal.puzzle import Node, Puzzle, Tree, file

BEGIN = "git init -q -b main && git config user.name Worker && git config user.email worker@example.com"


def history(head: str, **branches: dict[str, Any]) -> Node:
    """What a repository must come to: `head` is checked out; a branch has {subjects: newest first, tree: path: text}, and
    perhaps `parents`, how many its last commit has, and `merged`, a branch whose commits it has, too."""
    return Node(kind="git", parts={"head": head, "branches": branches})


def _save(tree: dict[str, str], subject: str) -> str:
    """Commands that commit a tree of texts."""
    writes = [f"printf %s {shlex.quote(content)} > {path}" for path, content in tree.items()]
    return " && ".join([*writes, "git add -A", f"git commit -q -m {shlex.quote(subject)}"])


def _files(tree: dict[str, str], repository: Node) -> Tree:
    return {**{path: file(content) for path, content in tree.items()}, ".git": repository}


def commit_change(level: int, r: random.Random) -> Puzzle:
    """A change of one file is committed; from level 2 on a new branch."""
    one, *others = names(r, 2 + level)
    tree = {f"{name}.txt": text(r, 2) for name in (one, *others)}
    line, subject = sentence(r), f"Update {one}"
    changed = {**tree, f"{one}.txt": tree[f"{one}.txt"] + line + "\n"}
    append = f"echo {shlex.quote(line)} >> {one}.txt"
    setup = f"{BEGIN} && {_save(tree, 'Begin')}"
    old = {"subjects": ["Begin"], "tree": tree}
    new = {"subjects": [subject, "Begin"], "tree": changed}
    prompt = (
        f'/work is a git repository. Append the line "{line}" to {one}.txt and commit that with the message "{subject}"'
    )
    if level == 1:
        return Puzzle(
            f"{prompt}.",
            {},
            _files(changed, history("main", main=new)),
            f"{append} && git commit -qam {shlex.quote(subject)}",
            setup,
        )
    prompt += f" on a new branch {one} that begins at main. main stays as it is, and {one} stays checked out."
    script = f"git checkout -qb {one} && {append} && git commit -qam {shlex.quote(subject)}"
    return Puzzle(prompt, {}, _files(changed, history(one, main=old, **{one: new})), script, setup)


def merge_branch(level: int, r: random.Random) -> Puzzle:
    """A branch is merged; from level 2 both changed the same line."""
    one, two, branch = names(r, 3)
    tree = {f"{one}.txt": text(r, 1), f"{two}.txt": text(r, 1)}
    theirs = {**tree, f"{one}.txt": text(r, 1)}
    ours = {**tree, f"{two}.txt": text(r, 1), **({f"{one}.txt": text(r, 1)} if level > 1 else {})}
    merged = {**ours, f"{one}.txt": theirs[f"{one}.txt"]}
    setup = " && ".join(
        [
            BEGIN,
            _save(tree, "Begin"),
            f"git checkout -qb {branch}",
            _save(theirs, "Theirs"),
            "git checkout -q main",
            _save(ours, "Ours"),
        ]
    )
    subject = f"Merge {branch}"
    wanted = {"subjects": [subject, "Begin", "Ours", "Theirs"], "tree": merged, "parents": 2, "merged": branch}
    prompt = f'/work is a git repository. Merge the branch {branch} into main, with the message "{subject}".'
    script = f"git merge -q -m {shlex.quote(subject)} {branch}"
    if level > 1:
        prompt += f" Where both changed the same lines, take those of {branch}."
        script = f"git merge -q -X theirs -m {shlex.quote(subject)} {branch}"
    after = history("main", main=wanted, **{branch: {"subjects": ["Theirs", "Begin"], "tree": theirs}})
    return Puzzle(prompt, {}, _files(merged, after), script, setup)


def restore_file(level: int, r: random.Random) -> Puzzle:
    """A file that a commit removed comes back, as it last was."""
    lost, *others = names(r, 2 + level)
    tree = {f"{name}.txt": text(r, 2) for name in (lost, *others)}
    commits, subjects = [_save(tree, "Begin")], ["Begin"]
    for number in range(level - 1):
        tree = {**tree, f"{lost}.txt": text(r, 2)}
        subjects.insert(0, f"Version {number + 2}")
        commits.append(_save(tree, subjects[0]))
    whole = dict(tree)
    subjects.insert(0, "Clean up")
    commits.append(f"git rm -q {lost}.txt && git commit -q -m 'Clean up'")
    subjects.insert(0, f"Restore {lost}")
    prompt = f'/work is a git repository. {lost}.txt was deleted in an earlier commit. Bring it back as it was before its deletion, and commit that with the message "Restore {lost}".'
    script = f"git checkout $(git rev-list -n 1 HEAD -- {lost}.txt)^ -- {lost}.txt && git commit -q -m 'Restore {lost}'"
    after = _files(whole, history("main", main={"subjects": subjects, "tree": whole}))
    return Puzzle(prompt, {}, after, script, " && ".join([BEGIN, *commits]))


TEMPLATES = (commit_change, merge_branch, restore_file)
