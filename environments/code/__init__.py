"""The code environment: what it asks for and judges is in environment.py, how judgements run in judge.py."""

from palaestra.environments.code.environment import Code

__all__ = ["Code"]
