"""The schema of conf/: what may be set, its meaning, its allowed values.

All of it lives in this one torch-free module (not beside each component) because the supervisor must validate an
override and print the help within a second, before anything heavy is imported. `launch/` converts once; each
component is handed only its own dataclass.
"""

import dataclasses
import ipaddress
import math
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_moe.deadlines import Deadlines

DTYPES = ("float32", "bfloat16", "float16", "auto")
LOG_LEVELS = ("debug", "info", "warning", "error")
EXCHANGE_KINDS = ("collective", "symmetric")
TRANSPORTS, PROTOCOLS = ("zmq", "mooncake"), ("tcp", "rdma")
SOURCES = ("node", "remote", "dram", "remote_dram", "instance", "disk")
BACKUP_MODES = ("off", "on")
SPARES = ("auto", "on", "off")
ATTENTIONS = ("auto", "paged", "sdpa")
EPLB_MODES = ("off", "sync", "async")
EPLB_ALGORITHMS = ("search", "deepseek")


def setting(default: Any, help_: str) -> Any:
    """A field of a section of the schema: its default, and its meaning for `--help`."""
    return field(default=default, metadata={"help": help_})


def check(ok: bool, key: str, value: object, allowed: str) -> None:
    """Refuse the value of a dotted key, in one line with what is allowed, unless it is `ok`."""
    if not ok:
        raise ValueError(f"{key}={value!r}: {allowed}")


@dataclass
class ModelConfig:
    """Which model, and how it is held."""

    name: str = setting("demo", "name clients use for the model")
    path: str = setting("", "folder of a Hugging Face safetensors checkpoint (config.json beside it)")
    dtype: str = setting("float32", f"weights and compute: one of {', '.join(DTYPES)} (auto: the checkpoint's own)")
    device: str = setting("auto", "cpu, cuda, or auto (cuda when there is a GPU for every local rank)")
    load_from: str = setting(
        "", "URL[,URL...] of running servers whose weights are taken; model.path needs no weights then"
    )

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        check(bool(self.name), "model.name", self.name, "must not be empty")
        check(self.dtype in DTYPES, "model.dtype", self.dtype, f"must be one of {', '.join(DTYPES)}")
        check(self.device in ("auto", "cpu", "cuda"), "model.device", self.device, "must be auto, cpu or cuda")
        check(bool(self.path), "model.path", self.path, "must name a folder with a safetensors checkpoint")
        folder = Path(self.path)
        check(folder.is_dir(), "model.path", self.path, "no such folder; give a local checkpoint folder")
        check((folder / "config.json").is_file(), "model.path", self.path, "holds no config.json")
        ok = all(url.startswith("http://") for url in self.seeds)
        check(ok, "model.load_from", self.load_from, "must be empty, or http://HOST:PORT[,http://HOST:PORT...]")
        files = ("model.safetensors", "model.safetensors.index.json")
        ok = bool(self.seeds) or any((folder / f).is_file() for f in files)
        check(ok, "model.path", self.path, f"holds neither {files[0]} nor {files[1]}")

    @property
    def seeds(self) -> list[str]:
        """The URLs of `load_from`."""
        return [url for url in self.load_from.split(",") if url]


@dataclass
class ElasticConfig:
    """Experts, slots and the deadlines of the group."""

    redundant_slots: int = setting(0, "spare expert slots per rank and layer, beyond the fewest that hold every expert")
    slots_per_rank: int | None = setting(
        None, "expert slots per rank and layer; null: ceil(experts / ranks) + redundant_slots"
    )
    exchange_timeout_s: float | None = setting(
        None, "deadline of one token exchange between ranks, in seconds; null: three quarters of hang_timeout_s"
    )
    start_timeout_s: float = setting(120.0, "how long the ranks wait for each other at start, in seconds")

    grow_slots: bool = setting(True, "add slots on the survivors when a loss leaves fewer than the experts need")
    hang_timeout_s: float = setting(
        20.0, "an engine without progress for this long is killed and respawned, however busy it is, in seconds"
    )
    progress_timeout_s: float = setting(
        1.5,
        "an engine that stands still for this long, waiting for nobody, is killed; so long a member may be silent",
    )
    max_quick_deaths: int = setting(
        3, "a rank that died this often in a row, soon after it joined or before, ends the launch if no other serves"
    )
    min_members: int = setting(
        1, "ranks that serve together at least; fewer answer 503, as the smaller half of a cut network may"
    )
    lighthouse: str = setting(
        "", "URL[,URL...] of outside lighthouses for membership; empty: one embedded on each node"
    )
    spare_process: str = setting(
        "auto",
        f"one of {', '.join(SPARES)}: a process beside each engine that has imported everything, and takes its seat "
        "when it dies; auto: where engines run on GPUs",
    )
    sources: str = setting(
        "",
        f"comma list of where lost experts may come from: {', '.join(SOURCES)}; empty: all, in this order",
    )
    secret_file: str = setting(
        "", "file with the secret that all nodes share; empty: ELASTIC_MOE_SECRET, or on one node one of its own"
    )

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        check(self.redundant_slots >= 0, "elastic.redundant_slots", self.redundant_slots, "must be 0 or more")
        slots = self.slots_per_rank
        check(slots is None or slots >= 1, "elastic.slots_per_rank", slots, "must be null, or 1 or more")
        for key in ("exchange_timeout_s", "start_timeout_s", "hang_timeout_s", "progress_timeout_s"):
            value = getattr(self, key)
            ok = value is None or 0 < value < math.inf
            check(ok, f"elastic.{key}", value, "must be more than 0 seconds, and finite")
        self.deadlines(num_ranks=1)
        check(self.max_quick_deaths >= 1, "elastic.max_quick_deaths", self.max_quick_deaths, "must be 1 or more")
        check(self.min_members >= 1, "elastic.min_members", self.min_members, "must be 1 or more")
        ok = self.spare_process in SPARES
        check(ok, "elastic.spare_process", self.spare_process, f"must be one of {', '.join(SPARES)}")
        known = set(self.source_names) <= set(SOURCES)
        check(known, "elastic.sources", self.sources, f"must be empty, or a comma list of {', '.join(SOURCES)}")
        urls = [url for url in self.lighthouse.split(",") if url]
        ok = all(url.startswith("http://") for url in urls)
        check(ok, "elastic.lighthouse", self.lighthouse, "must be empty, or http://HOST:PORT[,http://HOST:PORT...]")

    def keeps_spare(self, device: str) -> bool:
        """Whether an engine on a device of this kind has a spare process."""
        return self.spare_process == "on" or (self.spare_process == "auto" and device == "cuda")

    @property
    def source_names(self) -> tuple[str, ...]:
        """The `sources`; all if it names none."""
        return tuple(name.strip() for name in self.sources.split(",") if name.strip()) or SOURCES

    def deadlines(self, num_ranks: int) -> Deadlines:
        """Those of a launch of `num_ranks` ranks that serve.

        Raises:
            ValueError: keys contradict each other; the message says which, why, and what is allowed.
        """
        hang_s, exchange_s = self.hang_timeout_s, self.exchange_timeout_s
        if exchange_s is None:
            exchange_s = Deadlines.exchange_below(hang_s)
        return Deadlines.of(
            num_ranks,
            exchange_s=exchange_s,
            start_s=self.start_timeout_s,
            progress_s=self.progress_timeout_s,
            hang_s=hang_s,
        )


@dataclass
class ExchangeConfig:
    """How tokens travel to their experts and back."""

    kind: str = setting(
        "collective", f"one of {', '.join(EXCHANGE_KINDS)} (collective: gloo, NCCL; symmetric: GPU memory)"
    )
    max_tokens: int = setting(512, "symmetric: tokens of a rank in one step for which memory is reserved")
    fp8: bool = setting(False, "symmetric: tokens travel to their experts in 8 bits")

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        check(self.kind in EXCHANGE_KINDS, "exchange.kind", self.kind, f"must be one of {', '.join(EXCHANGE_KINDS)}")
        check(self.max_tokens >= 1, "exchange.max_tokens", self.max_tokens, "must be 1 or more")


@dataclass
class EplbConfig:
    """The load balancer: which expert has how many copies, and where, while tokens flow."""

    mode: str = setting("off", f"one of {', '.join(EPLB_MODES)} (sync stops the step loop for a round; async does not)")
    algorithm: str = setting("search", f"one of {', '.join(EPLB_ALGORITHMS)}")
    interval_s: float = setting(10.0, "from one look at the loads to the next, in seconds")
    threshold: float = setting(1.05, "balance when the fullest rank has more than this times the mean load (1 or more)")
    half_life_steps: int = setting(500, "tokens counted this many steps ago count half")
    layers_per_chunk: int = setting(1, "layers that are swapped in at the same step at most")
    staging_mb: int = setting(64, "megabytes of experts that wait on a rank to be swapped in, one expert at least")
    mb_per_step: float = setting(8.0, "megabytes of experts that a rank sends or receives during one step, about")
    link_gb_per_s: float = setting(1.0, "what a rank can receive, in gigabytes per second, to tell whether a move pays")
    initial_loads: str = setting(
        "", "JSON file of past loads (GET /elastic/loads) for the placement at start; empty: none"
    )

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        check(self.mode in EPLB_MODES, "eplb.mode", self.mode, f"must be one of {', '.join(EPLB_MODES)}")
        known = self.algorithm in EPLB_ALGORITHMS
        check(known, "eplb.algorithm", self.algorithm, f"must be one of {', '.join(EPLB_ALGORITHMS)}")
        check(0 < self.interval_s < math.inf, "eplb.interval_s", self.interval_s, "must be more than 0, and finite")
        check(1 <= self.threshold < math.inf, "eplb.threshold", self.threshold, "must be 1 or more, and finite")
        for key in ("half_life_steps", "layers_per_chunk", "staging_mb"):
            check(getattr(self, key) >= 1, f"eplb.{key}", getattr(self, key), "must be 1 or more")
        for key in ("mb_per_step", "link_gb_per_s"):
            check(
                0 < getattr(self, key) < math.inf, f"eplb.{key}", getattr(self, key), "must be more than 0, and finite"
            )
        path = self.initial_loads
        check(not path or Path(path).is_file(), "eplb.initial_loads", path, "must be empty, or name a JSON file")


@dataclass
class BackupConfig:
    """Copies of all experts in the memory of hosts, for those that no live rank holds any more."""

    mode: str = setting("off", f"one of {', '.join(BACKUP_MODES)} (on: a daemon on each node keeps its share)")
    copies: int = setting(1, "nodes that keep a copy of each expert; all of them if there are fewer")
    memory_limit_gb: float | None = setting(
        None, "gigabytes that a node's share may take, or nothing is kept there; null: what the host has free"
    )
    gb_per_s: float = setting(0.5, "gigabytes per second that a node's share is read from the engines with, about")
    transport: str = setting(
        "zmq", f"from node to node: one of {', '.join(TRANSPORTS)} (mooncake: a TransferEngine, which knows no secret)"
    )
    mooncake_protocol: str = setting("tcp", f"of backup.transport=mooncake: one of {', '.join(PROTOCOLS)}")
    mooncake_device: str = setting("", "of backup.mooncake_protocol=rdma: comma list of its devices; empty: any")

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        check(self.mode in BACKUP_MODES, "backup.mode", self.mode, f"must be one of {', '.join(BACKUP_MODES)}")
        check(self.copies >= 1, "backup.copies", self.copies, "must be 1 or more")
        limit, rate = self.memory_limit_gb, self.gb_per_s
        ok = limit is None or 0 < limit < math.inf
        check(ok, "backup.memory_limit_gb", limit, "must be null, or more than 0 and finite")
        check(0 < rate < math.inf, "backup.gb_per_s", rate, "must be more than 0, and finite")
        known = self.transport in TRANSPORTS
        check(known, "backup.transport", self.transport, f"must be one of {', '.join(TRANSPORTS)}")
        protocol = self.mooncake_protocol
        check(protocol in PROTOCOLS, "backup.mooncake_protocol", protocol, f"must be one of {', '.join(PROTOCOLS)}")


@dataclass
class ServingConfig:
    """Continuous batching on each rank."""

    max_model_len: int | None = setting(None, "longest prompt + completion in tokens; null: the model's own limit")
    max_requests: int = setting(32, "requests one rank runs at once; more wait")
    max_batch_tokens: int = setting(512, "tokens one rank puts into one forward step")
    prefill_tokens: int | None = setting(
        None, "tokens of prompts in a step while other requests decode; null: what max_batch_tokens leaves"
    )
    kv_cache_tokens: int = setting(32768, "tokens the paged KV cache of one rank holds")
    page_size: int = setting(32, "tokens in one page of the KV cache (power of two, 4 or more)")
    cuda_graphs: bool = setting(
        True, "with exchange.kind=symmetric: forwards in CUDA graphs, if no layer waits for the GPU"
    )
    fused_kernels: bool = setting(True, "norms, rotary embeddings, routers by one kernel each, on a GPU")
    attention: str = setting(
        "auto",
        f"one of {', '.join(ATTENTIONS)} (paged: from the cache's pages, on a GPU; auto: paged where the model allows)",
    )
    graph_tokens: int = setting(16, "a captured forward is padded to a multiple of so many tokens, a large one further")
    prefix_caching: bool = setting(True, "share KV pages between requests with the same beginning")

    @property
    def cache_capacity(self) -> int:
        """Tokens that one request may have in the KV cache: its whole pages."""
        return self.kv_cache_tokens // self.page_size * self.page_size

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        length = self.max_model_len
        check(length is None or length >= 2, "serving.max_model_len", length, "must be null, or 2 or more")
        known = self.attention in ATTENTIONS
        check(known, "serving.attention", self.attention, f"must be one of {', '.join(ATTENTIONS)}")
        for key in ("max_requests", "max_batch_tokens", "graph_tokens"):
            check(getattr(self, key) >= 1, f"serving.{key}", getattr(self, key), "must be 1 or more")
        some = self.prefill_tokens is None or self.prefill_tokens >= 1
        check(some, "serving.prefill_tokens", self.prefill_tokens, "must be 1 or more, or null")
        page = self.page_size
        check(page >= 4 and page & (page - 1) == 0, "serving.page_size", page, "must be a power of two, 4 or more")
        tokens = self.kv_cache_tokens
        check(tokens >= 2 * page, "serving.kv_cache_tokens", tokens, f"must be at least two pages ({2 * page} tokens)")


@dataclass
class ServerConfig:
    """The HTTP front end, one per node."""

    host: str = setting("127.0.0.1", "address the HTTP server binds to")
    port: int = setting(8000, "port of the HTTP server (0: any free one, printed at start)")
    max_waiting: int = setting(1024, "requests in flight at one front end before it answers 429")

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        check(0 <= self.port <= 65535, "server.port", self.port, "must be 0 to 65535")
        check(self.max_waiting >= 1, "server.max_waiting", self.max_waiting, "must be 1 or more")
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            check(_resolves(self.host), "server.host", self.host, "must be an IP address or a host name that resolves")


def is_loopback(host: str) -> bool:
    """Whether an address or host name is of this host alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


@dataclass
class ServeConfig:
    """Everything `launch/serve.py` may be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    eplb: EplbConfig = field(default_factory=EplbConfig)
    backup: BackupConfig = field(default_factory=BackupConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    log_level: str = setting("info", f"one of {', '.join(LOG_LEVELS)}")

    def validate(self) -> None:
        """Raise ValueError with one line about the first value that cannot work."""
        check(self.log_level in LOG_LEVELS, "log_level", self.log_level, f"must be one of {', '.join(LOG_LEVELS)}")
        for part in (self.model, self.elastic, self.exchange, self.eplb, self.backup, self.serving, self.server):
            part.validate()
        tokens, reserved = self.serving.max_batch_tokens, self.exchange.max_tokens
        fits = self.exchange.kind != "symmetric" or tokens <= reserved
        check(fits, "serving.max_batch_tokens", tokens, f"must be at most exchange.max_tokens={reserved}")


def describe(schema: type, prefix: str = "") -> list[tuple[str, object, str]]:
    """All leaf keys of a schema as (dotted key, default, meaning), in the order they are written."""
    rows: list[tuple[str, object, str]] = []
    for f in dataclasses.fields(schema):
        if f.default_factory is not dataclasses.MISSING:
            rows += describe(type(f.default_factory()), f"{prefix}{f.name}.")
        else:
            rows.append((prefix + f.name, f.default, f.metadata["help"]))
    return rows
