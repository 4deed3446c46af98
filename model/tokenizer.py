"""The byte-level BPE tokenizer of our presets, and how it was trained.

Digits stand alone. A capitalised word never carries its leading space, so that a name is the same token wherever it
stands: a small model copies by identity. Tags are single tokens that no text can spell: text is encoded with the tags
switched off.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
END = "<|im_end|>"
HEADS = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
THINK, END_THINK = "<think>", "</think>"
CALL, PARAMETER, NAMED, END_PARAMETER, END_CALL = (
    "<tool_call>\n<function=",
    "<parameter=",
    ">\n",
    "\n</parameter>\n",
    "</function>\n</tool_call>",
)
RESULT, END_RESULT = "<tool_response>\n", "\n</tool_response>"
TOOLS, END_TOOLS = "<tools>\n", "</tools>"
TAGS = (
    END_OF_TEXT, END, *HEADS.values(), THINK, END_THINK, CALL, PARAMETER, NAMED, END_PARAMETER, END_CALL,
    RESULT, END_RESULT, TOOLS, END_TOOLS,
)  # fmt: skip
PIECES = r"'s|[A-Z][a-z]+|\p{N}| ?[a-z]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s|\p{L}+"


class Tokenizer:
    """Text to ids and back; `id(tag)` for the tags."""

    def __init__(self, content: str) -> None:
        self._inner = tokenizers.Tokenizer.from_str(content)
        self._inner.encode_special_tokens = True
        self._ids: dict[str, int] = {tag: self._inner.token_to_id(tag) for tag in TAGS}  # type: ignore[misc]
        self._tags = {number: tag for tag, number in self._ids.items()}
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.size: int = self._inner.get_vocab_size()

    @classmethod
    @functools.cache
    def load(cls) -> Tokenizer:
        """The tokenizer that ships with the package."""
        return cls((resources.files("palaestra.model") / "assets" / "tokenizer.json").read_text(encoding="utf-8"))

    def id(self, tag: str) -> int:
        """The id of a tag. Raises KeyError."""
        return self._ids[tag]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what looks like a tag in it is text like any other."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, tags spelled out; bytes that are no UTF-8 become U+FFFD."""
        parts: list[str] = []
        run: list[int] = []
        for number in ids:
            if number in self._tags:
                parts += [self._text(run), self._tags[number]]
                run = []
            else:
                run.append(number)
        return "".join([*parts, self._text(run)])

    def _text(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=False)) if ids else ""


def train(texts: Iterable[str], path: Path) -> Tokenizer:
    """Train on texts and write tokenizer.json. The same texts in the same order give the same file."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    content = inner.to_str(pretty=False)
    path.write_text(content, encoding="utf-8")
    return Tokenizer(content)
