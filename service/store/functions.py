"""The library of Redis Functions (functions.lua) and the one place where redis exceptions become ours."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from service.errors import Conflict, NotFound, StoreUnavailable

_SOURCE = resources.files("service.store").joinpath("functions.lua").read_text("utf-8")
LIBRARY = "detot_" + hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]
CODE = _SOURCE.replace("LIBRARY", LIBRARY)

_OURS = {"CONFLICT": Conflict, "NOTFOUND": NotFound}


@contextmanager
def redis_errors() -> Iterator[None]:
    """Maps what redis-py raises.

    Raises:
        Conflict, NotFound: refused by one of our functions.
        StoreUnavailable: everything else (no connection, timeout, loading, out of memory, no permission).
    """
    try:
        yield
    except ResponseError as e:
        code, _, text = str(e).partition(" ")
        if code in _OURS:
            raise _OURS[code](text) from None
        raise StoreUnavailable(f"Redis refused: {e}", retry_after=1.0) from e
    except (RedisError, OSError) as e:
        raise StoreUnavailable(f"Redis cannot be reached: {e or type(e).__name__}", retry_after=1.0) from e


async def reply(pending: Awaitable[Any]) -> Any:
    """What one redis command returns, untyped as redis-py types it loosely. Raises as `redis_errors`."""
    with redis_errors():
        return await pending


def function_name(name: str) -> str:
    """Full name of one of our functions, for FCALL."""
    return f"{LIBRARY}_{name}"


def is_missing(error: object) -> bool:
    """Whether a reply says that the library is not loaded (a new or restarted Redis)."""
    return isinstance(error, ResponseError) and "function not found" in str(error).lower()


async def load(redis: Redis) -> None:
    """Loads the library; harmless when it is there. Raises StoreUnavailable."""
    await reply(redis.function_load(CODE, replace=True))


async def call(redis: Redis, name: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
    """Calls one of our functions, loading the library first where it is missing. Raises as `redis_errors`."""
    command = (function_name(name), len(keys), *keys, *args)
    with redis_errors():
        try:
            return await redis.fcall(*command)
        except ResponseError as e:
            if not is_missing(e):
                raise
        await load(redis)
        return await redis.fcall(*command)
