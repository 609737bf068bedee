"""`detot serve`: one process that keeps embedded Valkey, API and worker running, and says how to use them.

The API stops first, then the worker, Valkey last, so that every outcome is written before the store goes.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack, suppress

import httpx
from rich.console import Console

from service.errors import ConfigError
from service.processes import Child, Say, Supervisor
from service.settings import Settings, child_environment
from service.store.embedded import EmbeddedValkey

_FLUSH = 10.0  # seconds a child gets beyond its drain time, to write outcomes and free its model
_QUESTION = "Mia has 5 boxes with 6 pencils in each box. She gives 8 pencils away. How many pencils does she have left?"


def supervise(settings: Settings) -> int:
    """Run the whole service until SIGINT or SIGTERM; a second SIGINT hurries. The last line printed is JSON.

    Returns:
        Exit status: 0 after a requested stop, 2 when a child cannot run with this configuration.

    Raises:
        ConfigError: a port is taken, or the data directory cannot be used.
        Unavailable: the embedded Valkey does not start.
    """
    ports = {name: free_port(settings, name) for name in ("port", "worker_port")}
    return asyncio.run(_supervise(settings.model_copy(update=ports)))


async def _supervise(settings: Settings) -> int:
    started, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    say = _printer(console)
    supervisor = Supervisor(say)
    base = settings.base_url
    _stop_on_signals(supervisor)
    async with AsyncExitStack() as stack:
        if settings.redis.url is None:
            valkey = await stack.enter_async_context(EmbeddedValkey(settings.data_dir))
            redis = settings.redis.model_copy(update={"url": valkey.url, "password": None, "password_file": None})
            settings = settings.model_copy(update={"redis": redis})
        stack.callback(asyncio.create_task(_announce(supervisor, settings, base, console, say)).cancel)
        code = await supervisor.run(_children(settings))
    reason = "as asked" if code == 0 else "wrong configuration"
    seconds = round(time.monotonic() - started, 1)
    say(json.dumps({"stopped": reason, "restarts": dict(supervisor.restarts), "seconds": seconds}))
    return code


def _children(settings: Settings) -> tuple[Child, ...]:
    env, grace = child_environment(settings), settings.limits.drain + _FLUSH
    python = (sys.executable, "-P", "-m", "service")  # -P: a folder `service` of the user's is not ours
    return Child("api", (*python, "api"), env, grace), Child("worker", (*python, "worker"), env, grace)


def free_port(settings: Settings, name: str) -> int | None:
    """The configured port if it is free, any free one for 0."""
    port = getattr(settings, name)
    if port is None:
        return None
    try:
        family, *_, address = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
            return s.getsockname()[1]
    except OSError as e:
        raise ConfigError(f"DETOT_{name.upper()}: cannot listen on {settings.host} port {port}: {e.strerror}") from e


def _stop_on_signals(supervisor: Supervisor) -> None:
    """SIGINT, SIGTERM and (unless ignored, as under nohup) SIGHUP stop; again SIGINT hurries."""
    loop = asyncio.get_running_loop()

    def signalled(sig: signal.Signals) -> None:
        supervisor.stop(hurry=sig == signal.SIGINT and supervisor.stopping.is_set())

    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if sig != signal.SIGHUP or signal.getsignal(sig) != signal.SIG_IGN:
            loop.add_signal_handler(sig, signalled, sig)


async def _announce(supervisor: Supervisor, settings: Settings, base: str, console: Console, say: Say) -> None:
    """Say what is going on until the API is ready, then what can be done with it, and later that it is back."""
    what = settings.model if settings.engine == "local" else f"the {settings.engine} engine"
    with console.status(f"loading {what}"):
        say(f"starting on {base}, loading {what}")
        model = await _ready(base)
    say("\n".join(welcome(settings, base, model)))
    seen = 0
    while True:
        await asyncio.sleep(0.2)
        if supervisor.restarts["api"] > seen:
            seen = supervisor.restarts["api"]
            await _ready(base)
            say("api is ready again")


async def _ready(base: str) -> str:
    """Wait until requests are answered; returns the model's id."""
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
        while True:
            with suppress(httpx.HTTPError, ValueError, KeyError):
                answer = await client.get(f"{base}/health/ready")
                if answer.status_code == 200:
                    return answer.json()["model"]
            await asyncio.sleep(0.2)


def welcome(settings: Settings, base: str, model: str) -> list[str]:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": _QUESTION}]})
    key = ' -H "authorization: Bearer $DETOT_KEY"' if settings.keys_file else ""
    url = settings.redis.url or ""
    redis = f"redis-cli -s {url.removeprefix('unix://')}" if url.startswith("unix://") else "as DETOT_REDIS__URL says"
    return [
        f"ready:   {base}  (Ctrl-C stops)",
        f"docs:    {base}/docs",
        f"metrics: {base}/metrics",
        f"redis:   {redis}",
        "try:",
        f"curl -s {base}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}",
    ]


def _printer(console: Console) -> Say:
    def say(text: str) -> None:
        with suppress(OSError, SystemExit):  # nobody reads any more
            console.out(text, highlight=False)

    return say
