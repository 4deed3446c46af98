"""The harness's side of a code judgement: tests run here, in a worker process, the reply in a process of its own.

Where that is, `fresh` decides: forks.py or boxes.py. Every process that a reply started is gone when a judgement ends.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from palaestra.environments.code.boxes import boxed
from palaestra.environments.code.forks import Carry, forked
from palaestra.environments.code.kinds import completed, filled, kind_of
from palaestra.environments.code.plain import Broken, Message, Proxy, packed, unpacked
from palaestra.gym.outcome import Failure

SECONDS = 10.0
"""How long a judgement waits for the reply, all its answers together."""
RIGHT_RUNS, MUTANT_RUNS = 4, 2
"""How often a reply's tests meet the right implementation, and each wrong one."""

Data = Mapping[str, Any]
Fresh = Callable[[], AbstractContextManager[Carry]]


class Verdict(NamedTuple):
    """Whether a reply passed, what stopped it if not, and of written tests the share of the mutants that they found."""

    passed: bool
    detail: str = ""
    share: float | None = None


class ReplyFailed(Exception):
    """What the reply is to be blamed for, tests that fail aside."""


def judge(data: Data, code: str) -> Verdict:
    """Judge a reply's code in forked processes."""
    return _judged(data, code, forked)


def judge_in_boxes(ask: Callable[[bytes], bytes], data: Data, code: str) -> Verdict:
    """Judge a reply's code in boxes that `ask` gives."""
    return _judged(data, code, partial(boxed, ask))


def _judged(data: Data, code: str, fresh: Fresh) -> Verdict:
    judgement = _Judgement(data, code, fresh)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            share = JUDGES[kind_of(data)](judgement)
    except Failure:
        raise
    except (Exception, Broken) as error:
        return Verdict(False, f"{type(error).__name__}: {str(error)[:300]}")
    return Verdict(share in (None, 1.0), "" if share in (None, 1.0) else "some mutants pass its tests", share)


class _Judgement:
    """A reply to be judged, and the time that is left to it."""

    def __init__(self, data: Data, code: str, fresh: Fresh) -> None:
        self.data, self.code, self.fresh = data, code, fresh
        self._left = SECONDS

    def ask(self, carry: Carry, request: Message) -> Message:
        """What a process answers. Raises Broken."""
        began = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            answer = unpacked(carry(packed(request), self._left))
        except TimeoutError as error:
            self._left = 0.0
            raise Broken(f"the reply took longer than {SECONDS:g} s") from error
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise Broken("the reply's process ended before it answered") from error
        finally:
            self._left -= time.monotonic() - began
        if not isinstance(answer, dict):
            raise Broken("the answer is no plain data")
        return answer

    def load(self, carry: Carry, source: str) -> None:
        """Have a process load a source. Raises ReplyFailed with what it raised."""
        answer = self.ask(carry, {"do": "load", "source": source})
        if answer.get("ready") is not True:
            raise ReplyFailed(f"{answer.get('error')}: {answer.get('text')}")

    @property
    def in_time(self) -> bool:
        """Whether time is left."""
        return self._left > 0


def _functions(judgement: _Judgement) -> None:
    """The tests pass against the reply's function; what the prefix defines besides it, they see here."""
    data = judgement.data
    _test(judgement, completed(data.get("prefix", ""), data["entry_point"], judgement.code))


def _infilling(judgement: _Judgement) -> None:
    """The same, of the program that the reply completes."""
    _test(judgement, filled(judgement.data["prefix"], judgement.data["suffix"], judgement.code))


def _test(judgement: _Judgement, source: str) -> None:
    data = judgement.data
    with judgement.fresh() as carry:
        if data.get("one_process", False):
            judgement.load(carry, f"{source}\n\n{data['tests']}\n")
            return
        space: dict[str, Any] = {"__name__": "tests"}
        with contextlib.suppress(SyntaxError):
            exec(compile(data.get("prefix", ""), "prefix", "exec"), space)
        judgement.load(carry, source)
        space[data["entry_point"]] = Proxy(partial(judgement.ask, carry), data["entry_point"])
        exec(compile(data["tests"], "tests", "exec"), space)


def _stdio(judgement: _Judgement) -> None:
    """For every case, the program prints what it should; blanks at the ends of lines and of the whole aside."""
    if not judgement.data["cases"]:
        raise ReplyFailed("a task without cases proves nothing")
    for case in judgement.data["cases"]:
        with judgement.fresh() as carry:
            answer = judgement.ask(carry, {"do": "run", "source": judgement.code, "stdin": case["stdin"]})
        if answer.get("status") != 0:
            raise ReplyFailed(f"the program ended with status {answer.get('status')}")
        if _lines(str(answer.get("stdout"))) != _lines(case["stdout"]):
            raise ReplyFailed(f"for {case['stdin'][:60]!r} the program printed {str(answer.get('stdout'))[:60]!r}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _testwriting(judgement: _Judgement) -> float:
    """The share of the mutants that the reply's tests find. Raises ReplyFailed where the right one does not pass.

    The runs know nothing of each other and come in no order, so that only what the calls return can tell them apart.
    """
    mutants = list(judgement.data["mutants"])
    runs = [(judgement.data["right"], -1)] * RIGHT_RUNS
    runs += [(source, number) for number, source in enumerate(mutants)] * MUTANT_RUNS
    random.SystemRandom().shuffle(runs)
    survived = set()
    for implementation, number in runs:
        passed = _passes(judgement, implementation)
        if number < 0 and not passed:
            raise ReplyFailed("the right implementation does not pass the tests")
        if number >= 0 and passed:
            survived.add(number)
    return 1 - len(survived) / len(mutants)


def _passes(judgement: _Judgement, implementation: str) -> bool:
    """Whether the reply's tests pass against an implementation, which has a process of its own: here, the arguments
    that they choose could have it take all the memory there is. Raises ReplyFailed where they never call it."""
    name = judgement.data["entry_point"]
    called = passed = False
    with forked() as other, judgement.fresh() as carry, contextlib.suppress(Broken):
        judgement.load(other, implementation)
        answer = judgement.ask(carry, {"do": "test", "source": judgement.code, "name": name})
        while answer.get("do") == "call":
            called = True
            call = {"do": "call", "name": name, "args": answer.get("args"), "named": answer.get("named")}
            answer = judgement.ask(carry, judgement.ask(other, call))
        passed = answer.get("passed") is True
    if not called:
        raise ReplyFailed("the tests do not call the function")
    if not judgement.in_time:
        raise ReplyFailed(f"the tests took longer than {SECONDS:g} s")
    return passed


JUDGES: dict[str, Callable[[_Judgement], float | None]] = {
    "functions": _functions,
    "repair": _functions,
    "infilling": _infilling,
    "stdio": _stdio,
    "testwriting": _testwriting,
}
