"""A model's tokenizer and chat template, read from its folder without PyTorch.

Text from outside can never turn into control tokens: strings such as `<|im_end|>` in a message are masked before the
template sees them, and what is between the template's own control tokens is tokenised as ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from service.errors import InvalidRequest, ModelError

_CACHED_CHARS = 4_096  # longer pieces of text are not worth keeping
_CACHED_PIECES = 2_048


class ChatText:
    """Renders and tokenises conversations as the model expects them.

    Attributes:
        hash: see `tokenizer_hash`.
        eos_ids: ids that end a completion.
        mark: text that no caller can guess; no template alters it.
        roles: roles that the template can render.
    """

    def __init__(
        self, tokenizer: bytes, template: str, variables: Mapping[str, str] | None = None, eos_ids: Sequence[int] = ()
    ) -> None:
        spec = json.loads(tokenizer)
        added = spec.get("added_tokens", [])
        special = [t["content"] for t in added if t["special"]]
        control = [t for t in added if t["content"] and (t["special"] or t["content"] in template)]
        for token in control:
            token.update(special=True, normalized=False)
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True  # "as text": control tokens are split off by `_split` alone
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = ((t["content"], self._tokenizer.token_to_id(t["content"])) for t in added)
        ids = {content: i for content, i in known if i is not None}
        self._special = frozenset(ids[content] for content in special)
        self._ids = {t["content"].strip(): ids[t["content"]] for t in control}
        self._split = _alternatives(control, flags=True)
        self._tokens = _alternatives(control, flags=False)
        nonce = f"\ue000{secrets.token_hex(12)}"
        self.mark = f"{nonce}\ue002"
        self._nonce = nonce
        self._masks = {t["content"]: f"{nonce}:{i}\ue001" for i, t in enumerate(control)}
        self._texts = [t["content"] for t in control]
        self._masked = re.compile(rf"{nonce}:(\d+)\ue001")
        self._template, self._variables = _compile(template), dict(variables or {})
        self._cached = lru_cache(_CACHED_PIECES)(self._tokenise)
        self.roles = frozenset(
            {"system", "user", "assistant"} | ({"tool"} if re.search("['\"]tool['\"]", template) else set())
        )
        self.eos_ids = tuple(eos_ids)
        self.hash = _digest(tokenizer, template)

    @classmethod
    def open(cls, folder: Path) -> ChatText:
        """Reads `tokenizer.json`, the chat template and the stop ids of a model folder.

        Raises:
            ModelError: a file is missing or cannot be read.
        """
        config = _json(folder / "tokenizer_config.json")
        named = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        variables = {k: v for k, v in named.items() if isinstance(v, str)}  # `add_bos_token` is none
        try:
            return cls(_tokenizer_bytes(folder), _template_of(folder), variables, eos_ids(folder))
        except (TemplateError, ValueError, KeyError, TypeError) as e:
            raise ModelError(f"{folder}: the tokenizer or chat template cannot be read: {e}") from e
        except Exception as e:  # the tokenizers library raises bare Exception
            if type(e) is not Exception:
                raise
            raise ModelError(f"{folder / 'tokenizer.json'} cannot be read: {e}") from e

    def mask(self, text: str) -> str:
        """`text` with every control-token string replaced by something that `encode` turns back into plain text."""
        return self._tokens.sub(lambda found: self._masks[found[0]], text)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The templated conversation up to where the assistant's turn begins, contents masked.

        Raises:
            InvalidRequest: the template refuses the conversation, with its message.
        """
        turns = [{**message, "content": self.mask(message["content"])} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._variables)
        except (TemplateError, TypeError) as e:
            raise InvalidRequest(f"the model's chat template refuses this conversation: {e}", param="messages") from e

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text. Control tokens are recognised, except where `mask` has hidden them."""
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._ids[piece.strip()])
            elif piece:
                ids.extend(self._cached(piece) if len(piece) <= _CACHED_CHARS else self._tokenise(piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode([i for i in ids if i not in self._special], skip_special_tokens=False)

    def _tokenise(self, piece: str) -> list[int]:
        if self._nonce in piece:
            piece = self._masked.sub(lambda found: self._texts[int(found[1])], piece)
        return self._tokenizer.encode(piece, add_special_tokens=False).ids


def tokenizer_hash(folder: Path) -> str:
    """sha256 (hex) of a model folder's `tokenizer.json` and chat template.

    Raises:
        ModelError: one of them is missing.
    """
    return _digest(_tokenizer_bytes(folder), _template_of(folder))


def eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a completion, ascending: those of `generation_config.json` and `config.json` together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(sorted(found))


def _digest(tokenizer: bytes, template: str) -> str:
    return hashlib.sha256(tokenizer + b"\0" + template.encode()).hexdigest()


def _alternatives(control: Sequence[Mapping[str, Any]], *, flags: bool) -> re.Pattern[str]:
    """One group that matches any control token, longest first; with `flags` also the white space that it swallows."""
    tokens = sorted(control, key=lambda t: -len(t["content"]))
    parts = [
        (r"\s*" if flags and t["lstrip"] else "") + re.escape(t["content"]) + (r"\s*" if flags and t["rstrip"] else "")
        for t in tokens
    ]
    return re.compile(f"({'|'.join(parts) or '(?!)'})")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> Template:
    """The template in the environment that transformers gives it (`utils/chat_template_utils.py`)."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda value, **kw: json.dumps(value, **{"ensure_ascii": False, **kw})
    env.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return env.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tokenizer_bytes(folder: Path) -> bytes:
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as e:
        raise ModelError(f"{folder / 'tokenizer.json'}: {e.strerror}") from e


def _template_of(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    if not isinstance(found, str):
        raise ModelError(f"{folder} has no chat template; an instruct model is needed")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as e:
        raise ModelError(f"{path} is not JSON: {e}") from e
