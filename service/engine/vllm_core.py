"""The only place that touches vLLM's Python interface: versions, start, prompts, sampling parameters, figures.

Guarded here, by upstream issue: penalties with prompt embeddings crash the engine (#57719) and are never set; prompt
log-probabilities, speculative decoding and LoRA (#51121) are never asked for; the mask of a mixed prompt is missing
from its prefix-cache key (#56655), so `mixed` makes it part of the hashed embeddings. On CPU a prompt is never read in
chunks: a seeded sample whose prompt is cut by a full step kills 0.32 there ("CPU Generator does not use offset").
"""

# The environment that types are checked in has no vLLM.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.version import __version__

from service.core.types import Prompt, Sampling
from service.engine.base import Stats, sample_seed
from service.engine.vllm_versions import check_version
from service.errors import DetotError, EngineUnavailable, InvalidRequest, ModelError

check_version(__version__)  # before names are imported that another version may not have

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # noqa: E402
from vllm.v1.metrics.reader import Counter, Gauge, Histogram, get_metrics_snapshot  # noqa: E402

DEAD = "the vLLM process has died"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Options:
    """How vLLM runs a model; see the settings of the same names. `kv_cache_gib`: None lets vLLM measure."""

    context: int | None = None
    dtype: str = "auto"
    max_num_seqs: int = 128
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: float | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enforce_eager: bool = False


async def launch(folder: Path, options: Options) -> AsyncLLM:
    """Starts vLLM's processes and waits until the model is loaded, seconds to minutes, without holding up the loop.

    Raises:
        ModelError: vLLM cannot run this model with these options.
    """
    starting = asyncio.create_task(asyncio.to_thread(_launch, folder, options))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:  # a thread cannot be cancelled, and what it has started must be ended
        await asyncio.to_thread((await starting).shutdown)
        raise


def _launch(folder: Path, options: Options) -> AsyncLLM:
    gib = options.kv_cache_gib
    try:
        args = AsyncEngineArgs(
            model=str(folder),
            dtype=options.dtype,  # type: ignore[arg-type]
            max_model_len=_context(folder, options.context),
            max_num_seqs=options.max_num_seqs,
            gpu_memory_utilization=options.gpu_memory_utilization,
            kv_cache_memory_bytes=None if gib is None else int(gib * _GIB),
            tensor_parallel_size=options.tensor_parallel_size,
            pipeline_parallel_size=options.pipeline_parallel_size,
            enforce_eager=options.enforce_eager,
            enable_prompt_embeds=True,
            enable_prefix_caching=True,
            scheduling_policy="priority",
            logprobs_mode="raw_logprobs",
            enable_chunked_prefill=False if current_platform.is_cpu() else None,
            generation_config="vllm",  # the model's own may set penalties
        )
        return AsyncLLM.from_engine_args(args)
    except (ValueError, RuntimeError, OSError, MemoryError) as e:
        raise ModelError(f"vLLM cannot run {folder}: {str(e).strip() or type(e).__name__}") from e


def _context(folder: Path, wanted: int | None) -> int | None:
    positions = json.loads((folder / "config.json").read_bytes()).get("max_position_embeddings")
    return min(wanted, positions) if wanted and positions else wanted or positions


def engine_prompt(prompt: Prompt, dtype: torch.dtype) -> Any:
    """A prompt as vLLM takes it: token ids alone for the zero offset, else a mixed prompt.

    Raises:
        InvalidRequest: the soft prompt is not finite in the model's type.
    """
    ids = list(prompt.token_ids)
    return {"prompt_token_ids": ids} if prompt.soft is None else mixed(ids, prompt.span, prompt.soft, dtype)


def mixed(ids: list[int], span: tuple[int, int], soft: np.ndarray, dtype: torch.dtype) -> dict[str, Any]:
    """Token ids everywhere, embeddings on `span`: one `(len(ids), d)` tensor and a mask.

    vLLM keys its prefix cache by the block's embeddings and by ids that are 0 wherever the mask says embedding, but
    not by the mask (#56655). So ignored rows hold -0.0, which no embedded row does: equal bytes, equal mask.
    """
    start, stop = span
    rows = torch.from_numpy(np.ascontiguousarray(soft)).to(dtype) + 0.0  # makes +0.0 of -0.0
    if not torch.isfinite(rows).all():
        raise InvalidRequest(f"soft prompt holds a value that is not finite as {dtype}")
    embeds = torch.full((len(ids), soft.shape[1]), -0.0, dtype=dtype)
    embeds[start:stop] = rows
    mask = [not start <= i < stop for i in range(len(ids))]
    return {"prompt_token_ids": ids, "prompt_embeds": embeds, "prompt_is_token_ids": mask}


def sampling_params(plan: Sampling, index: int, *, max_tokens: int, eos: tuple[int, ...]) -> SamplingParams:
    """Parameters of one sample; the sampled tokens' log-probabilities come along, everything else stays neutral."""
    return SamplingParams(
        temperature=plan.temperature,
        top_p=plan.top_p,
        max_tokens=max_tokens,
        seed=sample_seed(plan.seed, index),
        stop=[s for s in plan.stop if s],
        stop_token_ids=list(eos),
        logprobs=0,
        output_kind=RequestOutputKind.DELTA if plan.stream else RequestOutputKind.FINAL_ONLY,
    )


def translated(error: Exception) -> DetotError:
    """Our error for what vLLM raised: EngineUnavailable when it has died or failed.

    Everything else is its refusal of the request, under types that differ between versions.
    """
    if isinstance(error, DetotError):
        return error
    if isinstance(error, EngineDeadError):
        return EngineUnavailable(DEAD)
    if isinstance(error, EngineGenerateError):
        return EngineUnavailable(f"vLLM failed: {error.__cause__ or error}")
    return InvalidRequest(f"vLLM refuses this request: {error}")


def token_logprobs(completion: Any) -> list[float]:
    """Log-probabilities of a completion's tokens under the untempered distribution, end-of-sequence included."""
    pairs = zip(completion.token_ids, completion.logprobs or (), strict=False)
    return [entry[token].logprob for token, entry in pairs]


def read_stats() -> Stats:
    """What vLLM's own metrics say, over all engines of this process."""
    values: dict[str, float] = {}
    for metric in get_metrics_snapshot():
        if isinstance(metric, (Counter, Gauge)):
            values[metric.name] = values.get(metric.name, 0) + metric.value
        elif isinstance(metric, Histogram):
            values[metric.name] = values.get(metric.name, 0) + metric.count
    read = {name: int(values.get(f"vllm:{key}", 0)) for name, key in _FIGURES.items()}
    read["prefill_tokens"] -= int(values.get("vllm:prefix_cache_hits", 0))
    return Stats(**read)


_FIGURES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "tokens": "generation_tokens",
    "prefill_tokens": "prompt_tokens",
    "steps": "iteration_tokens_total",
}
