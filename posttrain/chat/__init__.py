"""Conversations as token ids: encoding messages, reading the turns that a model writes."""

from posttrain.chat.conversations import Conversation, parse_conversation, parse_tool_results
from posttrain.chat.encoding import (
    Effort,
    Message,
    encode_example,
    encode_prompt,
    encode_tool_results,
    is_v4,
    tools_text,
)
from posttrain.chat.turns import ToolCall, Turn, parse_turn

__all__ = [
    "Conversation",
    "Effort",
    "Message",
    "ToolCall",
    "Turn",
    "encode_example",
    "encode_prompt",
    "encode_tool_results",
    "is_v4",
    "parse_conversation",
    "parse_tool_results",
    "parse_turn",
    "tools_text",
]
