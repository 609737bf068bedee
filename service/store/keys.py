"""Every Redis key, channel and bound in one place.

All keys of a task carry the hash tag `{task}`, so that each atomic step touches one cluster slot.
"""

from __future__ import annotations

TASKS = "detot:tasks"  # hash: task id -> JSON, and REVISION
REVISION = ":revision"  # field of TASKS; no task id can contain a colon
NOTICES = "detot:notices"  # pub/sub channel

GROUP = "monitor"  # consumer group of the worker
DEAD_LETTERS = 1_000  # dead letters kept per task
DECISIONS = 2_000  # decision records kept per task
EVIDENCE = 8_192  # bytes of evidence in one decision record
ROUND_STATE = 24_000_000  # bytes of a round's state: the largest offset, as text
DEDUP_MIN = 1_024  # outcome ids remembered per task at least, above any batch that may be sent twice


def outcomes(task: str) -> str:
    """Stream of outcomes and feedback; bounded by MAXLEN and by the retention."""
    return f"detot:{{{task}}}:outcomes"


def seen(task: str) -> str:
    """Sorted set: outcome id -> position of its stream entry; bounded like the stream. Dedup and lookup."""
    return f"detot:{{{task}}}:seen"


def feedback(task: str) -> str:
    """Hash: outcome id -> latest feedback body; an entry goes with its id in `seen`."""
    return f"detot:{{{task}}}:feedback"


def dead(task: str) -> str:
    """Stream of entries the worker could not use, with the reason."""
    return f"detot:{{{task}}}:dead"


def monitor(task: str) -> str:
    """JSON: the worker's state and what it publishes."""
    return f"detot:{{{task}}}:monitor"


def head(task: str) -> str:
    """Hash: the fields of `Head`, last (highest version), `parent:<version>`."""
    return f"detot:{{{task}}}:head"


def offsets(task: str) -> str:
    """Hash: version -> artifact bytes; never overwritten, no expiry."""
    return f"detot:{{{task}}}:offsets"


def decisions(task: str) -> str:
    """Stream of decision records."""
    return f"detot:{{{task}}}:decisions"


def round_state(task: str) -> str:
    """Hash: cursor and gate state of the task's refinement."""
    return f"detot:{{{task}}}:round"


def canaries(task: str) -> str:
    """JSON: the labelled canaries that users gave."""
    return f"detot:{{{task}}}:canaries"


def lease(task: str, name: str) -> str:
    """The token of the lease's holder; expires with the lease."""
    return f"detot:{{{task}}}:lease:{name}"


def fence(task: str, name: str) -> str:
    """Counter of the tokens ever given out for a lease; never reset."""
    return f"detot:{{{task}}}:fence:{name}"
