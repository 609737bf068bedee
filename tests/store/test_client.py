from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.core.types import Feedback, Head
from service.errors import ConfigError, StoreUnavailable
from service.store import keys
from service.store.client import Store, open_store
from service.store.embedded import EmbeddedValkey
from service.store.functions import LIBRARY, function_name


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "", "redis://localhost:port"])
def test_a_wrong_url_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="Redis URL"):
        Store(url)


async def test_redis_away_at_start_is_no_error_and_every_call_says_so(tmp_path: Path) -> None:
    async with open_store(f"unix://{tmp_path}/none.sock") as store:
        for call in (
            store.ping(),
            store.offsets.heads(["math"]),
            store.offsets.publish("math", 1, b"", expect=Head(), actor="a"),
            store.outcomes.feedback(Feedback("r", "math", correct=True)),
            store.outcomes.read("math"),
            store.outcomes.get("math", "r"),
            store.tasks.list(),
            store.tasks.register("quiz", {}),
            store.lease.acquire("math", "refine", 1),
            store.monitors.read_monitor("math"),
            store.monitors.backlog("math"),
        ):
            with pytest.raises(StoreUnavailable, match="cannot be reached"):
                await call


async def test_it_reconnects_by_itself(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        url = server.url
        async with open_store(url) as store:
            await store.ping()
            server.stop()
            with pytest.raises(StoreUnavailable):
                await store.ping()
            server.start()
            await store.ping()
            assert await store.offsets.next_version("math") == 1


async def test_a_server_that_hangs_is_given_up(valkey: EmbeddedValkey) -> None:
    async with open_store(valkey.url) as store:
        await store.ping()
        assert valkey.pid
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await store.ping()
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        await store.ping()


async def test_a_password_may_be_given_apart_from_the_url(valkey: EmbeddedValkey) -> None:
    async with Redis.from_url(valkey.url) as client:
        await client.config_set("requirepass", "s3cret")
    async with open_store(valkey.url, password="s3cret") as store:
        await store.ping()
    async with open_store(valkey.url) as store:
        with pytest.raises(StoreUnavailable) as refused:
            await store.ping()
        assert "s3cret" not in str(refused.value)


async def test_a_server_without_our_rights_is_unavailable_not_a_crash(valkey: EmbeddedValkey) -> None:
    async with Redis.from_url(valkey.url) as client:
        await client.acl_setuser("guest", enabled=True, nopass=True, commands=["+ping", "+hello"])
    async with open_store(valkey.url.replace("unix://", "unix://guest:x@")) as store:
        await store.ping()
        with pytest.raises(StoreUnavailable, match="permission"):
            await store.offsets.heads(["math"])


async def test_two_libraries_live_side_by_side(store: Store, raw: Redis) -> None:
    await raw.function_load(
        "#!lua name=detot_older\nredis.register_function('detot_older_append', function() return 7 end)", replace=True
    )
    assert await store.lease.acquire("math", "refine", 1) == 1
    assert await raw.fcall("detot_older_append", 0) == 7
    assert function_name("append").startswith(LIBRARY)


async def test_many_calls_at_once_share_few_connections(store: Store, raw: Redis) -> None:
    await asyncio.gather(*(store.ping() for _ in range(300)))
    assert len(await raw.client_list()) < 64


def test_keys_of_a_task_share_one_slot() -> None:
    of_task = [keys.outcomes, keys.seen, keys.feedback, keys.dead, keys.monitor, keys.head, keys.offsets]
    names = [make("math") for make in (*of_task, keys.decisions)]
    names += [keys.lease("math", "refine"), keys.fence("math", "refine")]
    assert len(set(names)) == len(names)
    assert all(name.startswith("detot:{math}:") for name in names)
