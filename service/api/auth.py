"""Bearer keys: scopes, hashes at rest, rate limits. Keys are random, so a plain SHA-256 of one is safe to store."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from fastapi import Request
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter

from service.errors import ConfigError, Forbidden, RateLimited, Unauthorized
from service.metrics import REJECTED

log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a key may do. Admin includes the other two."""

    CALL = "call"
    FEEDBACK = "feedback"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """One issued key, as kept in the keys file: its SHA-256, never the key itself."""

    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    rate: str | None = None
    created: str = ""

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


OPEN = Key("local", "", (Scope.ADMIN,))  # everyone, while the service has no keys and listens on loopback only


def parse_rate(text: str) -> RateLimitItem:
    """A limit such as `600/minute`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return parse(text)
    except ValueError:
        raise ConfigError(f"rate limit {text!r} is not of the form '600/minute'") from None


def load_keys(path: Path) -> dict[str, Key]:
    """Keys by hash.

    Raises:
        ConfigError: the file cannot be read or a key in it is malformed, with its number.
    """
    try:
        entries = json.loads(path.read_text())["keys"]
    except FileNotFoundError:
        raise ConfigError(f"keys file {path} does not exist; make one with `detot keys add NAME`") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"keys file {path} cannot be read: {e!r}") from e
    keys = {}
    for number, entry in enumerate(entries, 1):
        try:
            key = Key(**{**entry, "scopes": tuple(Scope(s) for s in entry["scopes"])})
            if len(key.sha256) != 64:
                raise ValueError("sha256 must have 64 hex digits")
        except (TypeError, ValueError, KeyError) as e:
            raise ConfigError(f"keys file {path}: key {number}: {e}") from e
        if key.rate:
            parse_rate(key.rate)
        keys[key.sha256] = key
    return keys


def add_key(path: Path, name: str, scopes: Iterable[Scope], rate: str | None = None) -> str:
    """Issue a key and write its hash to the file (mode 0600, replaced atomically). Returns the key, seen only once."""
    keys = load_keys(path) if path.exists() else {}
    if any(k.name == name for k in keys.values()):
        raise ConfigError(f"there is a key named {name!r} already; remove it first or choose another name")
    if rate:
        parse_rate(rate)
    plain = "dt-" + secrets.token_urlsafe(32)
    key = Key(name, _digest(plain), tuple(scopes), rate, datetime.now(UTC).isoformat(timespec="seconds"))
    _write(path, [*keys.values(), key])
    return plain


def remove_key(path: Path, name: str) -> None:
    """Take a key back; running services notice within a second."""
    keys = load_keys(path)
    rest = [k for k in keys.values() if k.name != name]
    if len(rest) == len(keys):
        raise ConfigError(f"there is no key named {name!r}; known: {', '.join(k.name for k in keys.values())}")
    _write(path, rest)


class Keyring:
    """Checks requests against the keys file, which is read again when it changes."""

    def __init__(self, path: Path | None, default_rate: str | None, storage: Storage | None = None) -> None:
        self._path, self._default = path, default_rate
        self._limiter = MovingWindowRateLimiter(storage or MemoryStorage())
        self._rates: dict[str, RateLimitItem] = {}
        self._stamp: tuple[int, int] = (0, 0)
        self._looked = 0.0
        self._keys: dict[str, Key] = {}
        if path is not None:
            self._stamp = _stamp(path)
            self._keys = load_keys(path)
        if default_rate:
            parse_rate(default_rate)

    @property
    def open(self) -> bool:
        """No keys are configured: everyone on loopback may do everything."""
        return self._path is None

    async def admit(self, authorization: str | None, scope: Scope) -> Key:
        """The caller's key, one request of its rate limit spent.

        Raises:
            Unauthorized, Forbidden, RateLimited.
        """
        key = OPEN if self._path is None else self._find(authorization)
        if not key.allows(scope):
            raise Forbidden(f"key {key.name!r} has scopes {', '.join(key.scopes)}; this needs {scope}")
        rate = key.rate or self._default
        if rate is not None:
            await self._spend(key, rate)
        return key

    def _find(self, authorization: str | None) -> Key:
        self._reload()
        kind, _, plain = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not plain.strip():
            raise Unauthorized("this service needs a key: send the header 'Authorization: Bearer <key>'")
        key = self._keys.get(_digest(plain.strip()))
        if key is None:
            raise Unauthorized("the key is not known here")
        return key

    async def _spend(self, key: Key, rate: str) -> None:
        item = self._rates.get(rate) or self._rates.setdefault(rate, parse_rate(rate))
        if await self._limiter.hit(item, key.name):
            return
        REJECTED.labels("rate_limit").inc()
        reset, _ = await self._limiter.get_window_stats(item, key.name)
        raise RateLimited(f"key {key.name!r} is limited to {rate}", retry_after=max(1.0, reset - time.time()))

    def _reload(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._looked < 0.5:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            self._keys, self._stamp = load_keys(self._path), stamp
        except ConfigError as e:
            log.error("the keys stay as they were: %s", e.message)


class Require:
    """FastAPI dependency: the caller's key must have this scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Key:
        keyring: Keyring = request.app.state.keyring
        return await keyring.admit(request.headers.get("authorization"), self.scope)


def _digest(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


def _write(path: Path, keys: list[Key]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:  # mode 0600 by itself
        json.dump({"keys": [asdict(k) for k in keys]}, f, indent=1)
    Path(f.name).replace(path)
