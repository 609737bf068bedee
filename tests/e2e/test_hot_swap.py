"""Versions published every second under 200 requests in flight on two replicas: nothing fails, and nobody lies.

The engine says the digest of the soft prompt that it was given, so each answer shows which version produced it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.core.artifact import Artifact, decode, encode, soft_prompt
from tests.live import live_server
from tests.valkey import until

TASK = "yes_no"
IN_FLIGHT, STEPS, PAUSE = 200, 6, 1.0
BINARY = {"Content-Type": "application/octet-stream"}


def said(artifact: Artifact) -> str:
    """What the engine says under this version."""
    soft = soft_prompt(artifact)
    digest = hashlib.sha256(soft.tobytes()).hexdigest()[:16] if soft is not None else ""
    return f"It is {digest}."


class Load:
    """Keeps requests in flight; `seen` holds (status, version, arm, text) of each answer."""

    def __init__(self, replicas: list[httpx.AsyncClient]) -> None:
        self._replicas, self._stop = replicas, False
        self.seen: list[tuple[int, int, str, str]] = []

    async def run(self, number: int) -> None:
        client = self._replicas[number % len(self._replicas)]
        turn = 0
        while not self._stop:
            messages = [{"role": "user", "content": f"Is {number} larger than {turn}?"}]
            body = {"model": "default", "messages": messages, "detot": {"task": TASK, "samples": 2}}
            response = await client.post("/v1/chat/completions", json=body)
            detot = response.json().get("detot", {})
            text = response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else response.text
            self.seen.append((response.status_code, detot.get("version", -1), detot.get("arm", ""), text))
            turn += 1

    def stop(self) -> None:
        self._stop = True


async def step(client: httpx.AsyncClient, number: int, texts: dict[int, str]) -> None:
    """The next step of a rollout: new challengers go on trial and become champion, or champions come at once."""
    if number % 3 == 2:
        (await client.post(f"/v1/tasks/{TASK}/offsets/promote", json={})).raise_for_status()
        return
    zero = decode((await client.get(f"/v1/tasks/{TASK}/offsets/0")).content)
    offset = np.random.default_rng(number).normal(0, 0.02, zero.offset.shape).astype(np.float32)
    made = replace(zero, offset=offset)
    version = max(texts) + 1
    texts[version] = said(made)  # before it is published, for answers may come at once
    params: dict[str, str | float] = {"as": "challenger", "share": 0.5} if number % 3 == 1 else {}
    response = await client.post(f"/v1/tasks/{TASK}/offsets", content=encode(made), headers=BINARY, params=params)
    assert response.status_code == 201, response.text
    assert version in (response.json()["version"], response.json()["challenger"])


async def served(client: httpx.AsyncClient) -> tuple[int, int, float]:
    now = (await client.get(f"/v1/tasks/{TASK}/offsets")).json()
    return now["version"], now["challenger"], now["share"]


async def agreed(first: httpx.AsyncClient, second: httpx.AsyncClient) -> float:
    """Seconds until both replicas serve the same versions."""
    start = time.monotonic()
    while await served(first) != await served(second):
        assert time.monotonic() - start < 60, "the replicas never agreed"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


@pytest.mark.timeout(300)
async def test_hot_swap_under_load(redis_url: str, tmp_path: Path, capsys) -> None:
    url = f"{redis_url}?db=7"  # a head of its own
    env: dict[str, Any] = {"SCRIPTED__TEXT": "It is {soft}.", "SCRIPTED__LATENCY": "1.0", "LIMITS__CONCURRENCY": "256"}
    with live_server(url, tmp_path, **env) as a, live_server(url, tmp_path, **env) as b:
        # A connection per request: on a machine too busy to answer for seconds, a kept one may be closed as idle.
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(base_url=a.url, timeout=60, limits=limits) as one,
            httpx.AsyncClient(base_url=b.url, timeout=60, limits=limits) as two,
            httpx.AsyncClient(base_url=a.url, timeout=60, limits=limits) as operator,
            httpx.AsyncClient(base_url=b.url, timeout=60, limits=limits) as onlooker,
        ):
            load, texts, lags = Load([one, two]), {0: "It is ."}, []
            running = [asyncio.create_task(load.run(i)) for i in range(IN_FLIGHT)]
            for number in range(STEPS):
                await asyncio.sleep(PAUSE)
                await step(operator, number, texts)
                lags.append(await agreed(operator, onlooker))
                await until(lambda: any(v == max(texts) for _, v, *_ in load.seen), 60)
            load.stop()
            await asyncio.gather(*running)
            final = (await served(operator))[0]
    statuses, by_version = Counter(s for s, *_ in load.seen), Counter(v for _, v, *_ in load.seen)
    with capsys.disabled():
        print(f"\nhot swap: {len(load.seen)} requests {dict(statuses)}, by version {dict(sorted(by_version.items()))}")
        print(f"seconds until the replicas agreed, each step: {[round(s, 3) for s in lags]}")
    assert set(statuses) == {200}
    assert [found for found in load.seen if found[3] != texts[found[1]]] == [], (
        "a version that did not produce the text"
    )
    assert {arm for _, _, arm, _ in load.seen} == {"control", "champion", "challenger"}
    assert all((version == 0) for _, version, arm, _ in load.seen if arm == "control")
    assert set(by_version) == set(texts), "every version was served"
    assert final == max(texts)
