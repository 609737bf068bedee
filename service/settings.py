"""All settings, typed and range-checked. This module is the only reader of the environment.

Every value is `DETOT_<NAME>`, nested ones `DETOT_<GROUP>__<NAME>` (`DETOT_LIMITS__BODY_BYTES=1000000`).
The value `none` switches an optional setting off.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import limits
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import ConfigError

# Before PyTorch loads OpenMP: threads that spin for milliseconds while they wait for each other take the cores that
# the server, Redis and the worker need, and decoding slows down several times over; threads that sleep at once wake
# too late for the short steps of decoding. So they spin briefly (docs/decisions/0002).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

# Before vLLM is imported: its processes are spawned (a fork of a process with threads may hang), what it logs stays out
# of standard output, and it reports nothing to anybody.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

_NOT_OURS = ("url", "key")  # of the command line's client commands
_FOREIGN = ("bench_", "test_")  # of `detot bench gateway` and of the tests

DEFAULT_MODEL = "Qwen2.5-Coder-0.5B-Instruct"


def _redis_url(value: str) -> str:
    if (scheme := urlsplit(value).scheme) not in ("redis", "rediss", "unix"):
        raise ValueError(f"the scheme is {scheme!r}; redis://, rediss:// or unix:// is needed")
    return value


def _rate(value: str) -> str:
    try:
        limits.parse(value)
    except ValueError:
        raise ValueError("not of the form 600/minute") from None
    return value


def _file(value: Path) -> Path:
    if not value.expanduser().is_file():
        raise ValueError("there is no such file")
    return value.expanduser()


Seconds = Annotated[float, Field(gt=0, le=86_400)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
Rate = Annotated[str, AfterValidator(_rate)]
ExistingFile = Annotated[Path, AfterValidator(_file)]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RedisSettings(Group):
    """Where outcomes and offsets live. Without `url` an embedded Valkey is started on a private unix socket."""

    url: RedisUrl | None = Field(None, description="redis://, rediss:// or unix:// URL; none starts an embedded Valkey")
    password: SecretStr | None = Field(None, description="password, if it is not part of the URL")
    password_file: Path | None = Field(None, description="file that holds the password (a mounted secret)")
    poll: Seconds = Field(0.5, le=60, description="seconds between looks at the published versions")


class RecordSettings(Group):
    """What is kept of finished requests, and for how long."""

    enabled: bool = Field(True, description="record outcomes at all")
    prompts: bool = Field(True, description="keep the conversation's text with the outcome")
    buffer: int = Field(10_000, ge=1, le=1_000_000, description="outcomes held in memory while Redis is away")
    per_task: int = Field(10_000, ge=10, le=10_000_000, description="outcomes kept per task")
    retention: Seconds = Field(7 * 86_400.0, le=3_650 * 86_400.0, description="seconds an outcome is kept")
    prompt_chars: int = Field(16_384, ge=0, le=1_000_000, description="characters of conversation kept")


class LimitSettings(Group):
    """Bounds that protect the service."""

    body_bytes: int = Field(1_000_000, ge=1_000, le=100_000_000, description="largest request body")
    concurrency: int = Field(64, ge=1, le=100_000, description="requests answered at once; more get 429")
    deadline: Seconds = Field(300.0, le=3_600, description="seconds a request may take at most")
    rate: Rate | None = Field(None, description="default rate limit of a key, such as 600/minute; none: unlimited")
    drain: Seconds = Field(30.0, le=3_600, description="seconds running requests get to finish after SIGTERM")
    max_samples: int = Field(64, ge=1, le=1_024, description="most samples one request may ask for")


class LocalSettings(Group):
    """The PyTorch engine in the API process."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    quantize: Literal["auto", "yes", "no"] = Field("auto", description="int8 weights; auto: on CPU only")
    max_batch: int = Field(16, ge=1, le=512, description="samples decoded together")
    context: int | None = Field(4_096, ge=64, le=1_048_576, description="tokens of prompt plus completion")
    threads: int | None = Field(None, ge=1, le=1_024, description="PyTorch threads; none: all cores")


class VllmSettings(Group):
    """vLLM in the API process."""

    context: int | None = Field(4_096, ge=64, le=1_048_576, description="tokens of prompt plus completion")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights; auto: as stored")
    max_num_seqs: int = Field(128, ge=1, le=4_096, description="samples decoded together")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of GPU memory (CPU: of RAM) to use")
    kv_cache_gib: float | None = Field(
        None, gt=0, le=4_096, description="GiB for keys and values, per device; none: what is left of the share"
    )
    tensor_parallel_size: int = Field(1, ge=1, le=1_024, description="devices that share each layer")
    pipeline_parallel_size: int = Field(1, ge=1, le=1_024, description="groups of devices that share out the layers")
    enforce_eager: bool = Field(False, description="no compilation and no CUDA graphs: quicker start, slower tokens")
    probe_interval: Seconds = Field(15.0, le=3_600, description="seconds between checks that the model is not poisoned")


class UpstreamSettings(Group):
    """vLLM servers that are run by somebody else: `vllm serve MODEL --enable-prompt-embeds`."""

    urls: str = Field("", description="http://host:port of each server, separated by commas")
    model: str | None = Field(None, description="name under which they serve the model; none: their own base model")
    api_key: SecretStr | None = Field(None, description="bearer key (`vllm serve --api-key`)")
    api_key_file: Path | None = Field(None, description="file that holds the key (a mounted secret)")
    context: int | None = Field(
        None, ge=64, le=10_485_760, description="tokens of prompt plus completion; none: theirs"
    )
    connect_timeout: Seconds = Field(2.0, le=60, description="seconds to connect")
    read_timeout: Seconds = Field(120.0, le=3_600, description="seconds between two pieces of an answer")
    health_interval: Seconds = Field(2.0, le=300, description="seconds between looks at a server")
    probe_interval: Seconds = Field(30.0, le=3_600, description="seconds between checks that it is not poisoned")

    @field_validator("urls")
    @classmethod
    def _addresses(cls, value: str) -> str:
        for url in filter(None, (part.strip() for part in value.split(","))):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
                raise ValueError(f"{url!r} is not http://host:port")
        return value

    @property
    def addresses(self) -> tuple[str, ...]:
        """The servers, each once, in order."""
        return tuple(dict.fromkeys(part.strip().rstrip("/") for part in self.urls.split(",") if part.strip()))


class ScriptedSettings(Group):
    """The shipped fake, for trying the API and measuring the service itself."""

    text: str = Field("The answer is 42.", description="what every sample says; {soft}: digest of the offset")
    latency: float = Field(0.0, ge=0, le=60, description="seconds a sample takes")


class Settings(BaseSettings):
    """The whole configuration of a process."""

    model_config = SettingsConfigDict(
        env_prefix="DETOT_",
        env_nested_delimiter="__",
        extra="ignore",
        frozen=True,
        env_file=None,
        env_parse_none_str="none",
    )

    host: str = Field("127.0.0.1", description="address the API binds to; beyond loopback needs keys")
    port: int = Field(8000, ge=0, le=65_535)
    worker_port: int | None = Field(8001, ge=0, le=65_535, description="port of the worker's /metrics; none: off")
    data_dir: Path = Field(Path("~/.local/share/detot"), description="embedded Valkey's data, log files")
    cache_dir: Path = Field(Path("~/.cache/detot"), description="model weights")
    keys_file: Path | None = Field(None, description="API keys, hashed; made by `detot keys add`")
    tasks: ExistingFile | None = Field(None, description="your task catalogue; none: the shipped one")
    engine: Literal["local", "vllm", "vllm-server", "scripted"] = "local"
    model: str = Field(DEFAULT_MODEL, description="known model, Hugging Face id or local folder")
    offline: bool = Field(False, description="never ask a model hub")
    control_share: float = Field(0.05, ge=0.0, le=1.0, description="share of requests always at the zero offset")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    redis: RedisSettings = RedisSettings()  # type: ignore[call-arg]
    record: RecordSettings = RecordSettings()  # type: ignore[call-arg]
    limits: LimitSettings = LimitSettings()  # type: ignore[call-arg]
    local: LocalSettings = LocalSettings()  # type: ignore[call-arg]
    vllm: VllmSettings = VllmSettings()  # type: ignore[call-arg]
    upstream: UpstreamSettings = UpstreamSettings()  # type: ignore[call-arg]
    scripted: ScriptedSettings = ScriptedSettings()  # type: ignore[call-arg]

    def model_post_init(self, _: Any) -> None:
        for name in ("data_dir", "cache_dir"):
            object.__setattr__(self, name, getattr(self, name).expanduser().absolute())

    @property
    def loopback(self) -> bool:
        """Whether the API is reachable from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def base_url(self) -> str:
        """Where this machine reaches the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def redis_password(self) -> str | None:
        """The password, from the setting or from its file."""
        return _secret(self.redis.password, self.redis.password_file, "DETOT_REDIS__PASSWORD_FILE")

    @property
    def upstream_key(self) -> str | None:
        """The key, from the setting or from its file."""
        return _secret(self.upstream.api_key, self.upstream.api_key_file, "DETOT_UPSTREAM__API_KEY_FILE")


def _secret(value: SecretStr | None, file: Path | None, name: str) -> str | None:
    if file is None:
        return value.get_secret_value() if value else None
    try:
        return file.read_text().strip()
    except OSError as e:
        raise ConfigError(f"{name}: {file}: {e.strerror}") from e


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment, with explicit overrides on top (None means: not given).

    Raises:
        ConfigError: naming each variable at fault, its value and its bound.
    """
    _refuse_unknown()
    try:
        return Settings(**{k: v for k, v in overrides.items() if v is not None})
    except ValidationError as e:
        raise ConfigError("; ".join(_explain(err) for err in e.errors())) from None


def _refuse_unknown() -> None:
    """A misspelled variable would otherwise be ignored silently, and with it what somebody wanted to protect."""
    known = [*Settings.model_fields, *_NOT_OURS]
    for name in os.environ:
        head = name.lower().removeprefix("detot_").split("__")[0]
        if name.upper().startswith("DETOT_") and head not in known and not head.startswith(_FOREIGN):
            close = difflib.get_close_matches(head, known, 1)
            groups = [g for g in known if head.startswith(f"{g}_")]
            hint = f"DETOT_{groups[0].upper()}__{head[len(groups[0]) + 1 :].upper()}" if groups else ""
            hint = hint or (f"DETOT_{close[0].upper()}" if close else "")
            raise ConfigError(f"{name}: there is no such setting" + (f"; did you mean {hint}?" if hint else ""))


def child_environment(settings: Settings) -> dict[str, str]:
    """An environment from which a child process reads these very settings.

    Everything else is inherited; `DETOT_` variables of this process are not, what `settings` says replaces them.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith("DETOT_")}
    return inherited | dict(_variables("DETOT_", settings.model_dump(exclude_defaults=True)))


def _variables(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + key.upper()
        if isinstance(value, Mapping):
            yield from _variables(name + "__", value)
        else:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            yield name, "none" if plain is None else str(plain)


def _explain(err: Any) -> str:
    name = "DETOT_" + "__".join(str(part) for part in err["loc"]).upper()
    secret = "PASSWORD" in name or "API_KEY" in name
    return f"{name}={'***' if secret else _written(err['input'])}: {err['msg'].removeprefix('Value error, ')}"


def _written(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)
