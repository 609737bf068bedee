"""Traffic for benchmarks: word problems whose names and numbers vary, so that no cache can answer, as HTTP requests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

_NAMES = ("Ada", "Bruno", "Chen", "Dilara", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jana", "Kofi", "Lena", "Mateo")
_THINGS = ("apples", "stickers", "marbles", "books", "tickets", "eggs", "pencils", "shells", "stamps", "muffins")
_PROBLEMS = (
    "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
    "{n} had {a} {t}, gave {b} to {m} and then found {c}. How many {t} are left?",
    "A shop sells {t} in boxes of {b}. {n} buys {c} boxes and already has {a} {t}. How many {t} is that in total?",
    "{n} and {m} share {a} {t} equally and each gives away {c}. How many {t} does each of them keep?",
    "Each of {a} children gets {b} {t}. {n} brought {c} {t} too many. How many {t} did {n} bring?",
    "{n} reads {b} pages a day. The book has {a} pages and {m} has read {c} of them. How many days does {n} need?",
    "On Monday {n} sold {a} {t}, on Tuesday {b} fewer and on Wednesday {c} more than on Monday. "
    "How many {t} did {n} sell in three days?",
    "{t} cost ${b} each. {n} pays for {c} of them with ${a}. How much change does {n} get in dollars?",
)


def word_problems(seed: int, count: int) -> Iterator[str]:
    """`count` short word problems, each with its own numbers, all different for practical purposes."""
    rng = random.Random(seed)
    for _ in range(count):
        n, m = rng.sample(_NAMES, 2)
        a, b, c = rng.randint(100, 9_999), rng.randint(2, 99), rng.randint(2, 99)
        yield rng.choice(_PROBLEMS).format(n=n, m=m, t=rng.choice(_THINGS), a=a, b=b, c=c)


def chat_requests(host: str, seed: int, count: int) -> list[bytes]:
    """HTTP/1.1 requests for chat completions, three samples each put to the vote; nothing else is asked for."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    requests = []
    for question in word_problems(seed, count):
        body = json.dumps(chat_body(question))
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return requests


def chat_body(question: str) -> dict[str, Any]:
    """A request body: three samples of the task's plan, classified by the service."""
    message = {"role": "user", "content": question}
    return {"model": "default", "messages": [message], "detot": {"samples": 3}}
