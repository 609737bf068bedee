"""Redis killed under load: no request fails, drops are counted, everything recovers by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace

import httpx
import numpy as np

from service.core.artifact import decode, encode
from service.store.embedded import EmbeddedValkey
from tests.live import live_server

BODY = {
    "model": "default",
    "messages": [{"role": "user", "content": "Ann has 5 pears and buys 7 more. How many pears has she?"}],
}


async def test_requests_are_answered_while_redis_is_dead(tmp_path):
    valkey = EmbeddedValkey(tmp_path / "valkey")
    valkey.start()
    statuses: list[int] = []
    stop = asyncio.Event()

    async def client(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            statuses.append((await http.post("/v1/chat/completions", json=BODY)).status_code)

    try:
        with live_server(valkey.url, tmp_path, RECORD__BUFFER="40") as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
                load = [asyncio.create_task(client(http)) for _ in range(8)]
                await asyncio.sleep(1)
                assert valkey.pid is not None
                os.kill(valkey.pid, signal.SIGKILL)
                killed_at = len(statuses)
                await asyncio.sleep(2)
                ready = await http.get("/health/ready")
                feedback = await http.post(
                    "/v1/feedback", json={"request_id": f"chatcmpl-general-{'0' * 32}", "score": 1}
                )
                during = len(statuses) - killed_at
                await asyncio.to_thread(valkey.stop)
                await asyncio.to_thread(valkey.start)
                await asyncio.sleep(2)
                stop.set()
                await asyncio.gather(*load)
                assert set(statuses) == {200}
                assert during > 20
                assert ready.status_code == 200
                assert ready.json()["store"] != "ok"
                assert feedback.status_code == 503
                dropped = server.metric("detot_outcomes_dropped_total")
                assert dropped > 0
                for _ in range(100):
                    if server.metric("detot_outcomes_pending") == 0:
                        break
                    await asyncio.sleep(0.1)
                written = server.metric("detot_outcomes_written_total")
                assert written + dropped == len(statuses)
                assert (await http.get("/health/ready")).json()["store"] == "ok"
                rows = (await http.get("/v1/tasks/math_word_problem/outcomes", params={"limit": 5})).json()["outcomes"]
                assert len(rows) == 5
    finally:
        valkey.stop()


def test_the_last_snapshot_serves_while_redis_is_dead(tmp_path):
    valkey = EmbeddedValkey(tmp_path / "valkey")
    valkey.start()
    try:
        with live_server(valkey.url, tmp_path) as server, httpx.Client(base_url=server.url, timeout=20) as http:
            path = "/v1/tasks/math_word_problem/offsets"
            zero = decode(http.get(f"{path}/0").content)
            made = encode(replace(zero, offset=np.full_like(zero.offset, 0.001)))
            assert http.post(path, content=made).json()["version"] == 1
            assert valkey.pid is not None
            os.kill(valkey.pid, signal.SIGKILL)
            body = {**BODY, "detot": {"arm": "champion"}}
            for _ in range(20):
                assert http.post("/v1/chat/completions", json=body).json()["detot"]["version"] == 1
                time.sleep(0.1)
            assert server.metric("detot_snapshot_age_seconds") > 1
    finally:
        valkey.stop()
