"""An agent of another make, a script around the openai package in an environment of its own, repairs a program."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from boxes import ISOLATING
from loopback import Server, in_turn

from palaestra.environments.swe.environment import Swe
from palaestra.gym.environment import gold_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "agents.md"
TASK = "gcd"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a virtual environment with openai in it, which sees this one's packages as well."""
    folder = tmp_path_factory.mktemp("agent")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", "openai"], check=True, timeout=300)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin" / "python"


def replies(messages):
    """Messages as an OpenAI-compatible endpoint gives them."""
    for number, message in enumerate(messages):
        calls = [
            {"id": f"call-{number}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
        said = {"role": "assistant", "content": message.content or None, **({"tool_calls": calls} if calls else {})}
        choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": said}
        yield 200, {"Content-Type": "application/json"}, {
            "id": f"chat-{number}", "object": "chat.completion", "created": 0, "model": "any", "choices": [choice],
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif("native" not in ISOLATING, reason="no native sandbox on this machine")
@pytest.mark.parametrize(("right", "expected"), [(True, "ok 1.0 2 tool calls"), (False, "ok 0.0 1 tool calls")])
def test_an_openai_script_is_judged_by_what_it_leaves_in_the_box(python, tmp_path, right, expected):
    config = Swe.Config(source="quixbugs")
    messages = gold_of(Swe(config), Swe.task_set(config).get(TASK))
    script = re.search(r"^```python openai_agent.py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "openai_agent.py").write_text(script)
    with Server(in_turn(replies(messages if right else messages[-1:]))) as server:
        command = [python, tmp_path / "openai_agent.py", server.url, TASK]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == expected, done.stderr
        assert len(server.requests) == (2 if right else 1)
        offered = {tool["function"]["name"] for tool in server.requests[0]["tools"]}
        assert offered == {"bash", "view", "edit", "submit"}
