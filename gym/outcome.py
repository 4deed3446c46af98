"""Every way an episode can end, and what follows from it."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Cause(StrEnum):
    """Why an episode ended."""

    OK = "ok"
    LIMIT_TURNS = "limit:turns"
    LIMIT_TOKENS = "limit:tokens"
    LIMIT_TIME = "limit:time"
    LIMIT_CONTEXT = "limit:context"
    POLICY_PARSE = "policy:parse"
    POLICY_ACTION = "policy:invalid-action"
    POLICY_CRASH = "policy:crash"
    ENVIRONMENT = "environment"
    TOOLS = "tools"
    SANDBOX = "sandbox"
    VERIFIER = "verifier"
    MODEL_SERVER = "model-server"
    CANCELLED = "cancelled"


class Rule(NamedTuple):
    """What is done with an episode: how often it is tried again, and whether it is graded and trained on."""

    retries: int
    graded: bool
    trained: bool


_KEPT = Rule(retries=0, graded=True, trained=True)
_INFRASTRUCTURE = Rule(retries=2, graded=False, trained=False)

RULES: dict[Cause, Rule] = {
    Cause.OK: _KEPT,
    Cause.LIMIT_TURNS: _KEPT,
    Cause.LIMIT_TOKENS: _KEPT,
    Cause.LIMIT_TIME: _KEPT,
    Cause.LIMIT_CONTEXT: _KEPT,
    Cause.POLICY_PARSE: _KEPT,
    Cause.POLICY_ACTION: _KEPT,
    Cause.POLICY_CRASH: _KEPT,
    Cause.ENVIRONMENT: _INFRASTRUCTURE,
    Cause.TOOLS: _INFRASTRUCTURE,
    Cause.SANDBOX: _INFRASTRUCTURE,
    Cause.VERIFIER: _INFRASTRUCTURE,
    Cause.MODEL_SERVER: _INFRASTRUCTURE,
    Cause.CANCELLED: Rule(retries=0, graded=False, trained=False),
}


class Failure(Exception):
    """An error whose cause is known. Raised anywhere under an episode; the episode's outcome takes the cause."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(f"{cause.value}: {detail}")
        self.cause = cause
        self.detail = detail

    def __reduce__(self) -> tuple[type[Failure], tuple[Cause, str]]:
        return type(self), (self.cause, self.detail)
