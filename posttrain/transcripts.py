"""What was said in a conversation, a line or more for each message: `user: 38+47=`."""

from collections.abc import Mapping, Sequence
from typing import Any


def told(messages: Sequence[Mapping[str, Any]]) -> str:
    """What was said, without what was thought: one message as it stands, several by their roles."""
    if len(messages) == 1 and not messages[0].get("tool_calls"):
        return str(messages[0]["content"])
    said = [{k: v for k, v in message.items() if k != "reasoning"} for message in messages]
    return "\n".join(line for message in said for line in lines_of(message))


def lines_of(message: Mapping[str, Any]) -> list[str]:
    """A message in a transcript: what was thought, said and called."""
    lines: list[str] = []
    if message.get("reasoning"):
        lines.append(f"{message['role']} thinks: {message['reasoning']}")
    calls = message.get("tool_calls", [])
    if message["content"] or not (calls or message.get("reasoning")):
        lines.append(f"{message['role']}: {message['content']}")
    for call in calls:
        arguments = ", ".join(f"{k}={v!r}" for k, v in call["arguments"].items())
        lines.append(f"{message['role']} calls {call['name']}({arguments})")
    return lines
