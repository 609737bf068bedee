"""The forms in which a prompt reaches a vLLM server (docs/decisions/0003). Three give the model the same tokens:

- `TOKENS`: token ids to `/v1/completions`; whatever has no offset.
- `PART`: the conversation to `/v1/chat/completions`, the soft prompt as a `prompt_embeds` part of the system message.
  The server templates and tokenises, so the prompt's ids in its first chunk are compared with ours.
- `ROWS`: embeddings of every token to `/v1/completions`; exact for any prompt, but large.

And `TOOLS`: a conversation with tools, which the server templates and parses on its own.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from typing import Any

import numpy as np

from service.core.types import Delta, Prompt, Sampling
from service.engine.base import Priority
from service.engine.embeddings import EmbeddingTable
from service.engine.text import ChatText
from service.engine.torchfile import torch_file

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_RESERVED = "<prompt_embeds>"  # refused by vLLM: it marks the place of a part
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})


class Form(Enum):
    """How a prompt is sent."""

    TOKENS = COMPLETIONS
    PART = CHAT
    ROWS = COMPLETIONS + "#rows"
    TOOLS = CHAT + "#tools"

    @property
    def path(self) -> str:
        return self.value.partition("#")[0]


class OtherPrompt(Exception):
    """The server made other tokens of the conversation than we did."""


@dataclass(slots=True)
class Call:
    """One call of `generate`. `other` is set once a server made other tokens of the conversation than we did."""

    prompt: Prompt
    plan: Sampling
    max_tokens: int
    priority: Priority = Priority.LIVE
    deliver: Callable[[Delta], None] | None = None
    other: bool = False
    blanks: int = 0
    contents: dict[tuple[Form, str], Any] = field(default_factory=dict)

    @property
    def own_text(self) -> str:
        """The text before the anchor in its system message: the caller's own."""
        return next((turn["content"] for turn in reversed(_opening(self.prompt))), "")

    @property
    def has_tools(self) -> bool:
        turns = self.prompt.turns
        return bool(self.plan.extra.keys() & TOOL_FIELDS) or any(
            turn["role"] == "tool" or "tool_calls" in turn for turn in turns
        )

    def compare(self, theirs: Sequence[int] | None) -> None:
        """Raises OtherPrompt unless the server's prompt is ours around the embeddings."""
        ours, (start, stop) = self.prompt.token_ids, self.prompt.span
        start -= self.blanks
        if theirs is None or (*theirs[:start], *theirs[stop:]) != (*ours[:start], *ours[stop:]):
            raise OtherPrompt


@dataclass(frozen=True, slots=True)
class Forms:
    """Puts prompts into forms, with the model's tokenizer and embedding table."""

    chat: ChatText
    table: EmbeddingTable

    def choose(self, call: Call, *, parts: bool, joint: str | None) -> Form:
        """The cheapest form that can be expected to be exact on a server.

        Args:
            parts: it makes the same tokens of a conversation as we do.
            joint: what it puts between a text and an embeddings part; None for something else than a line end.
        """
        if call.has_tools:
            return Form.TOOLS
        if call.prompt.soft is None:
            return Form.TOKENS
        fits = parts and not call.other and (joint is not None or not call.own_text)
        return Form.PART if fits and self._renderable(call.prompt) else Form.ROWS

    def content(self, call: Call, form: Form, joint: str | None) -> Any:
        """What stands for the prompt in a request (token ids, turns, or base64 embeddings); made once a call."""
        key = (form, joint or "")
        if key not in call.contents:
            call.contents[key] = self._made(call, form, joint or "")
        return call.contents[key]

    def _made(self, call: Call, form: Form, joint: str) -> Any:
        prompt, (start, stop) = call.prompt, call.prompt.span
        if form is Form.TOKENS:
            return prompt.token_ids
        if form is Form.TOOLS:
            return prompt.turns
        assert prompt.soft is not None
        if form is Form.ROWS:
            rows = self.table.rows(prompt.token_ids)
            rows[start:stop] = prompt.soft
            return _encoded(rows)
        call.blanks = self._blanks(call)
        ids = prompt.token_ids[start - call.blanks : start]
        part = {"type": "prompt_embeds", "data": _encoded(np.concatenate([self.table.rows(ids), prompt.soft]))}
        text = call.own_text.removesuffix(self.chat.decode(ids)).removesuffix(joint)
        parts = [{"type": "text", "text": text}, part] if call.own_text else [part]
        opening = _opening(prompt)
        return [*opening[:-1], {"role": "system", "content": parts}, *prompt.turns[len(opening) :]]

    def _renderable(self, prompt: Prompt) -> bool:
        """Whether a server can be expected to make the same tokens of the turns: it does not mask control tokens."""
        texts = [turn["content"] for turn in prompt.turns]
        return bool(texts) and all(self.chat.mask(text) == text and _RESERVED not in text for text in texts)

    def _blanks(self, call: Call) -> int:
        """How many tokens of the line ends between a caller's own system text and the anchor go as embeddings too.

        GPT-2 style tokenizers cut line ends according to what follows them, and on the server that is not the anchor:
        all tokens but the first of them.
        """
        count = 0
        if call.own_text:
            for token in reversed(call.prompt.token_ids[: call.prompt.span[0]]):
                text = self.chat.decode([token])
                if not text or text.strip("\n"):
                    break
                count += 1
        return max(0, count - 1)


def _opening(prompt: Prompt) -> list[Mapping[str, Any]]:
    """The opening system messages; the last of them ends where the anchor begins."""
    return list(takewhile(lambda turn: turn["role"] == "system", prompt.turns))


def _encoded(matrix: np.ndarray) -> str:
    """Embeddings as vLLM reads them: base64 of a PyTorch file."""
    return base64.b64encode(torch_file(matrix)).decode()
