"""From a conversation to a Prompt: where the anchor goes, and how its tokens are kept apart from their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from service.core.types import Prompt
from service.errors import InvalidArtifact, InvalidRequest, ModelError

Message = Mapping[str, str]


class ChatFormat(Protocol):
    """A model's chat template and tokenizer.

    Attributes:
        mark: text that no caller can guess and no template alters; stands for the anchor while rendering.
        roles: roles that the template can render.
    """

    @property
    def mark(self) -> str: ...

    @property
    def roles(self) -> frozenset[str]: ...

    def mask(self, text: str) -> str:
        """`text` made safe to be put among template text: `encode` takes it for ordinary text, whatever it says."""
        ...

    def render(self, messages: Sequence[Message]) -> str:
        """The templated conversation up to where the assistant's turn begins, contents masked.

        Raises:
            InvalidRequest: the template refuses the conversation, with its message.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; control tokens are recognised, masked text is not one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids. Raises UnicodeDecodeError where they are no whole characters and the tokenizer minds."""
        ...


def anchor_ids(chat: ChatFormat, anchor: str) -> tuple[int, ...]:
    """Token ids of the anchor on its own: the `k` rows that an offset is added to."""
    return tuple(chat.encode(chat.mask(anchor)))


def compose(
    chat: ChatFormat, messages: Sequence[Message], anchor: str | None, soft: np.ndarray | None = None
) -> Prompt:
    """The prompt of a conversation, with the anchor at the end of its opening system message.

    The anchor is tokenised on its own and joined to the prefix and the suffix, whatever the offset, so that the zero
    offset is exactly the plain prompt. Without an anchor this is the plain conversation.

    Args:
        messages: `{"role", "content"}` in order; `developer` counts as `system`.
        anchor: instruction text; None or empty for none.
        soft: soft prompt, float32 `(k, d)` for an anchor of `k` tokens; None for the zero offset.

    Raises:
        InvalidRequest: no messages, an unknown role, content that is no text, or the template refuses them.
        InvalidArtifact: the soft prompt does not have one row per anchor token.
        ModelError: the template cannot take a system message.
    """
    turns = _turns(messages, chat.roles)
    if not anchor:
        if soft is not None:
            raise InvalidArtifact("a soft prompt needs an anchor to stand for")
        return Prompt(tuple(chat.encode(chat.render(turns))), turns=tuple(turns))
    head, found, tail = chat.render(_placed(turns, chat.mark)).partition(chat.mark)
    if not found or chat.mark in tail:
        raise ModelError("the model's chat template does not render a system message exactly once")
    ids = anchor_ids(chat, anchor)
    if soft is not None and len(soft) != len(ids):
        raise InvalidArtifact(f"the soft prompt has {len(soft)} rows; its anchor has {len(ids)} tokens")
    before = _before(chat, head, anchor, ids)
    start = len(before)
    span = (start, start + len(ids))
    return Prompt((*before, *ids, *chat.encode(tail)), span, soft, turns=tuple(_placed(turns, "")))


def forwarded(chat: ChatFormat, turns: Sequence[Mapping[str, Any]]) -> Prompt:
    """A conversation that the engine's server renders, with what this service's templates do not know: tools.

    Its token ids are those of the bare texts: good for a first check of the length, and nothing else.

    Raises:
        InvalidRequest: a text that holds one of the model's control tokens, which the server would not take for text.
    """
    ids: list[int] = []
    for i, turn in enumerate(turns):
        text = turn.get("content") or ""
        if chat.mask(text) != text:
            raise InvalidRequest(
                "content holds a control token of the model, which cannot be passed on together with tools",
                param=f"messages[{i}].content",
            )
        ids += chat.encode(text)
    return Prompt(tuple(ids), turns=tuple(turns))


def _before(chat: ChatFormat, head: str, anchor: str, ids: tuple[int, ...]) -> list[int]:
    """Ids of `head` as they come out in front of the anchor, or on its own where the two would melt together.

    A GPT-2 style tokenizer splits blank lines according to what follows them.
    """
    joined = chat.encode(head + chat.mask(anchor))
    if tuple(joined[-len(ids) :]) == ids:
        return joined[: -len(ids)]
    return chat.encode(head)


def _placed(turns: list[Message], mark: str) -> list[Message]:
    """The conversation with `mark` at the end of the last of its opening system messages."""
    opening = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    if opening == 0:
        return [{"role": "system", "content": mark}, *turns]
    own = turns[opening - 1]["content"]
    system = {"role": "system", "content": f"{own}\n\n{mark}" if own else mark}
    return [*turns[: opening - 1], system, *turns[opening:]]


def _turns(messages: Sequence[Message], roles: frozenset[str]) -> list[Message]:
    if not messages:
        raise InvalidRequest("messages is empty; at least one is needed", param="messages")
    turns: list[Message] = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if role not in roles:
            known = ", ".join(sorted(roles | {"developer"}))
            raise InvalidRequest(f"role {role!r} is not one of {known}", param=f"messages[{i}].role")
        if not isinstance(content, str):
            raise InvalidRequest(f"content is {type(content).__name__}, not text", param=f"messages[{i}].content")
        try:
            content.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequest(f"content is not Unicode text: {e.reason}", param=f"messages[{i}].content") from None
        turns.append({"role": role, "content": content})
    return turns
