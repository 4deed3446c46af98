"""`palaestra env play`: one episode, shown as it was played and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from palaestra.gym.agent import Loop
from palaestra.gym.episode import run_episode
from palaestra.gym.policies import bound, build, roles, shut
from palaestra.gym.registry import EnvironmentSpec
from palaestra.gym.types import Episode, Sampling, Task
from palaestra.gym.wire import judged, transcript


async def play(
    spec: EnvironmentSpec, task: Task, policy: str, further: Sequence[str], echo: Callable[[str], object]
) -> Episode:
    """Play `task` with the policy of a reference (and `ROLE=POLICY` ones), and tell how it went."""
    kind, settings = spec.environment(), spec.settings()
    main, others = build(policy), roles(further)
    resources = await kind.open(settings)
    try:
        environment = kind(settings, resources)
        policies = {**others, "main": bound(main, environment, task)}
        episode = await run_episode(environment, Loop(), policies, task, Sampling(), f"play-{task.key}")
    finally:
        await kind.shut(resources)
        await shut([main, *others.values()])
    for message in transcript(episode):
        calls = [
            f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())
        ]
        echo("\n".join([f"[{message['role']}] {message['content']}", *calls]))
    echo(judged(episode).model_dump_json())
    return episode
