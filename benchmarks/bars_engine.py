"""The acceptance bars of model and engine: `make bars GROUP=engine`. What is not listed yet is not measured yet."""

from __future__ import annotations

from bars import Measured, bar
from cases import measured

PARITY = {
    "logits, and loading both ways": "_parity.py::test_logits_are_those_of_transformers_"
    "and_what_either_saves_the_other_loads",
    "128 greedy tokens": "_parity.py::test_greedy_generations_are_those_of_transformers_until_two_tokens_tie",
    "gradients": "_parity.py::test_gradients_are_those_of_transformers",
    "the clamp as a switch": "_parity.py::test_the_clamp_of_transformers_prefill_is_a_switch",
    "prediction head": "_mtp.py::test_every_depth_is_the_one_block_again_on_what_the_depth_before_found",
    "prediction head's names": "_mtp.py::test_its_names_and_shapes_are_the_published_ones_and_survive",
}
DAMAGE = {
    "one file": "_checkpoint.py::test_a_corrupt_or_foreign_checkpoint_is_refused_by_file_and_tensor",
    "many files": "_checkpoint.py::test_damage_to_one_of_many_files_is_refused_by_its_name",
}


def parity() -> Measured:
    """The network against transformers', over 32 random configurations."""
    return measured(_placed(PARITY))


def damage() -> Measured:
    """Checkpoints that cannot be used."""
    return measured(_placed(DAMAGE))


def _placed(tests: dict[str, str]) -> dict[str, str]:
    return {part: f"tests/test_model{test}" for part, test in tests.items()}


BARS = (
    bar(
        1,
        "32 random configurations in float32: logits within 1e-5 of transformers' largest, 128 greedy tokens equal "
        "until two tie, gradients within 1e-4, either loads what the other saves; the prediction head too",
    )(parity),
    bar(
        8, "a corrupt or foreign checkpoint gives one error that names file and tensor; no pickle is loaded", quick=True
    )(damage),
)
