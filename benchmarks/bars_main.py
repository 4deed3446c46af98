"""The acceptance bars of the main job: `make bars GROUP=main`. What measures them lies in the modules beside."""

from __future__ import annotations

import failures
import learning
import newcomer
import real_model
import suite
from bars import bar

BARS = (
    bar(1, "make train: three seeds gain .10 in each environment (.08 with the terminal), .20 (.15) in the mean")(
        learning.three_seeds
    ),
    bar(2, "rewards permuted at random teach nothing")(learning.permuted_rewards),
    bar(3, "deterministic runs are equal, killed and resumed ones too")(learning.determinism),
    bar(4, "trainer's and sampler's log-probabilities differ by less than 1e-5 in the mean", quick=True)(
        learning.same_logprobs
    ),
    bar(5, "env check passes what is right and names what is broken", quick=True)(newcomer.checks),
    bar(6, "killed actors, crashed verifiers and failing tools cost no wrong reward")(failures.mid_run),
    bar(7, "bad input: one message that names place and fix")(failures.clear_errors),
    bar(8, "make test within 10 minutes, line coverage of 90 %")(suite.suite),
    bar(9, "real rows and a real model")(real_model.real_input),
    bar(10, "the core install works alone")(newcomer.core_install),
    bar(11, "an environment of one's own in 40 lines and 15 minutes")(newcomer.own_environment),
)
