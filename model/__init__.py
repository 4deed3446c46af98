"""The policy network: the Nemotron 3 family, its checkpoints, tokenizer and renderer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palaestra.model.checkpoint import load, save

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    """`load` and `save`, imported when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no {name}")
    from palaestra.model import checkpoint

    return getattr(checkpoint, name)
