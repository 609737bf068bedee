"""Subcommands that measure: `detot eval` on a running service, and the benchmarks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from service.commands.common import KeyOption, Url, err, figures, pull_model, service_url
from service.errors import InvalidRequest
from service.settings import load_settings

bench_app = typer.Typer(help="Benchmarks; each ends with one line of JSON.", no_args_is_help=True)

JsonOut = Annotated[Path | None, typer.Option("--json", help="write all figures here")]
Questions = Annotated[Path, typer.Argument(help="questions as JSON lines: id, task, question, answer")]


def evaluate(
    file: Questions,
    url: Url = None,
    key: KeyOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first N questions only")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="fixed number of samples")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256)] = 4,
    seed: Annotated[int | None, typer.Option(help="makes the run repeatable")] = None,
    compare: Annotated[
        str | None, typer.Option(help="also ask each question of: control, or greedy (one sample)")
    ] = None,
    json_out: JsonOut = None,
) -> None:
    """Run a question set against a running service: accuracy, samples, tokens, latency, by task."""
    from service.bench.evaluate import run_eval

    result = run_eval(
        file,
        url=service_url(url),
        key=key,
        limit=limit,
        samples=samples,
        concurrency=concurrency,
        seed=seed,
        compare=compare,
        json_out=json_out,
    )
    figures(result)
    raise typer.Exit(0 if result["answered"] else 1)


@bench_app.command("gateway")
def gateway(
    seconds: Annotated[float, typer.Option(min=1, max=60, help="seconds of each round")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, max=20)] = 3,
    connections: Annotated[int, typer.Option(min=1, max=512)] = 32,
    json_out: JsonOut = None,
) -> None:
    """Cost of the service itself: the real server with the scripted engine under load from another process."""
    from service.bench.gateway import bench_gateway

    result = bench_gateway(seconds=seconds, rounds=rounds, connections=connections)
    _finish(result, json_out, ok=result["errors"] == 0 and result["outcomes"]["complete"])


@bench_app.command("classifier")
def classifier(
    files: Annotated[list[Path], typer.Argument(help="question sets as JSON lines")],
    outside: Annotated[Path | None, typer.Option(help="requests of no task, JSON lines")] = None,
    json_out: JsonOut = None,
) -> None:
    """Accuracy, rejection and speed of the classifier on held-out questions."""
    from service.bench.classify import bench_classifier

    result = bench_classifier(files, outside)
    _finish(result, json_out, ok=result["ok"])


@bench_app.command("record")
def record(
    file: Questions,
    pool: Annotated[Path, typer.Option(help="pool file; what is in it already is not asked again")],
    limit: Annotated[int, typer.Option(min=1)] = 60,
    samples: Annotated[int, typer.Option(min=1, max=64)] = 16,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="questions at once")] = 1,
    seed: int = 0,
) -> None:
    """Record a pool of samples from the real model, for offline replay."""
    from service.bench.pool import record_questions

    settings = load_settings()
    pull_model(settings.model, settings)
    figures(asyncio.run(record_questions(settings, file, pool, limit, samples, concurrency, seed, err)))


@bench_app.command("replay")
def replay_pool(
    pool: Annotated[Path, typer.Argument(help="pool file made by `detot bench record`")],
    fixed: Annotated[int, typer.Option(min=1, help="samples of the fixed vote")] = 16,
    confidence: Annotated[float, typer.Option(min=0.5, max=1.0)] = 0.95,
    min_samples: Annotated[int, typer.Option(min=1)] = 3,
    orders: Annotated[int, typer.Option(min=1, help="random orders of each question's samples")] = 200,
    seed: int = 0,
    json_out: JsonOut = None,
) -> None:
    """Early stopping against a fixed number of samples, side by side on a recorded pool."""
    from service.bench.replay import read_pool, replay
    from service.core.types import Sampling

    plan = Sampling(min_samples=min_samples, max_samples=fixed, confidence=confidence)
    _finish(replay(read_pool(pool), plan, fixed=fixed, orders=orders, seed=seed), json_out)


def _finish(result: dict, json_out: Path | None, *, ok: bool = True) -> None:
    if json_out is not None:
        try:
            json_out.write_text(json.dumps(result, indent=1, default=str) + "\n")
        except OSError as e:
            raise InvalidRequest(f"--json {json_out}: {e.strerror}") from e
    figures(result)
    raise typer.Exit(0 if ok else 1)
