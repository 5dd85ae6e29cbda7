"""bench=sources: how fast one rank's experts come from their source, against the limit of the machine.

Every byte is verified. `limit_gb_per_s` is of the same run. Of disk: as many threads read the same files from the page
cache, in slices of the same size, into buffers of their own (on a GPU: pinned ones, and copy them to it), and do
nothing else. Of dram: one thread copies as many bytes from the segment's memory (pinned, on a GPU), an arena at a time.
Of another process that holds them: `socket`: one connection of loopback; `gpu`: plain copies from its GPU (the last of
the machine) to this one.
"""

import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from elastic_moe.backup.segment import Segment, Writer, parts_of
from elastic_moe.backup.source import NodeMemory
from elastic_moe.deadlines import Deadlines
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.integrations.transformers import find_experts, meta_model
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.disk import READERS, Disk
from elastic_moe.weights.holders import Holder, Holders
from elastic_moe.weights.peer_gpu import PeerGpus
from elastic_moe.weights.server import WeightServer
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.sources import Account, Origin, Source, fill
from elastic_moe.weights.store import ExpertStore
from launch.benchmarks.config import BenchConfig
from launch.benchmarks.limits import disk_limit, gpu_limit, loopback_limit, median_s, segment_limit
from launch.random_model import SHAPES, make_random_model

FORM = "of this benchmark"


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each source. ValueError: there is no GPU, and one is asked for."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench.device=cuda needs a GPU")
    device = torch.device(config.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    with tempfile.TemporaryDirectory(prefix="sources-") as name:
        make_random_model(Path(name), config.seed, SHAPES[config.shape])
        for found in _measured(Path(name), device, config.repeats):
            yield {"machine": machine, "shape": config.shape, **found}


def _measured(folder: Path, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Every expert of the model, verified; the first time its digests are learned, and it is not counted."""
    num_readers = READERS[device.type]
    with _from_disk(folder, device) as (store, disk):
        goal = torch.arange(store.num_slots).expand(len(store.held), -1).numpy()
        num_bytes = store.expert_bytes * goal.size

        def figure(source: Source, limit: float, **more: Any) -> dict[str, Any]:
            def read_all() -> None:
                store.held.fill(EMPTY)
                fill(store.wants(goal), store, [source], Account())

            found = num_bytes / median_s(read_all, repeats) / 1e9
            return {
                "source": source.nearest,
                "gb": round(num_bytes / 1e9, 2),
                "experts": int(goal.size),
                **more,
                "gb_per_s": round(found, 2),
                "limit_gb_per_s": round(limit, 2),
                "of_limit": round(found / limit, 3),
            }

        limit = disk_limit(sorted(folder.glob("model-*.safetensors")), device, num_readers, repeats)
        yield figure(disk, limit, threads=num_readers)
        file = os.memfd_create("bench of a backup")
        _back_up(file, store)
        path = f"/proc/{os.getpid()}/fd/{file}"
        yield figure(NodeMemory(lambda: path, FORM), segment_limit(file, device, repeats))
        os.close(file)
        if device.type == "cuda":  # in a process of its own, which leaves the other GPU alone afterwards
            with _other_process(_tell_gpu_limit, store.expert_bytes, repeats) as limit:
                pass
        with _other_process(_hold, folder, device.type) as address:
            holder = Holder(address, Origin.NODE)
            over_socket = Holders([holder], Deadlines(), FORM)
            yield figure(over_socket, loopback_limit(repeats), way="socket")
            over_socket.close()
            if device.type == "cuda":
                gpus = PeerGpus(Origin.NODE, lambda: [holder], Deadlines(), FORM)
                yield figure(gpus, limit, way="gpu")
                gpus.close()


@contextlib.contextmanager
def _from_disk(folder: Path, device: torch.device) -> Iterator[tuple[ExpertStore, Disk]]:
    """A slot for every expert of a checkpoint, empty yet, and where they can be read."""
    model = meta_model(folder, None)
    modules = find_experts(model)
    layouts = {name: ExpertLayout.of_module(module) for name, module in modules.items()}
    names = list(layouts)
    with CheckpointReader(folder, model, layouts) as reader:
        store = ExpertStore([SlotExperts(m, layouts[n], layouts[n].num_experts, device) for n, m in modules.items()])
        yield (
            store,
            Disk(lambda layer, expert, out: reader.read_expert(names[layer], expert, out), READERS[device.type]),
        )


@contextlib.contextmanager
def _other_process(act: Callable[..., None], *args: object) -> Iterator[Any]:
    """What `act` of these and a pipe sends first; its process is killed at the end."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=act, args=(*args, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


def _tell_gpu_limit(num_bytes: int, repeats: int, parent: Any) -> None:
    parent.send(gpu_limit(num_bytes, repeats))


def _hold(folder: Path, kind: str, parent: Any) -> None:
    """Hold all experts, on the last GPU if `kind` is cuda; say where they are asked for, and give until killed."""
    device = torch.device(kind, torch.cuda.device_count() - 1) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    with _from_disk(folder, device) as (store, disk):
        goal = torch.arange(store.num_slots).expand(len(store.held), -1).numpy()
        fill(store.wants(goal), store, [disk], Account())
        server = WeightServer("127.0.0.1")
        server.start(EngineShelf(store, form=FORM))
        parent.send(server.address)
        threading.Event().wait()


def _back_up(file: int, store: ExpertStore) -> None:
    """As the daemon does."""
    shelf = EngineShelf(store, form=FORM)
    Segment.create(file, FORM, len(store.held), store.num_experts, 2 * store.expert_bytes)
    writer = Writer(file)
    for layer, slots in enumerate(store.held.tolist()):
        for expert in slots:
            gift = shelf.expert(layer, expert)
            parts = parts_of(gift.header, [len(frame) for frame in gift.frames])
            writer.set_parts(layer, parts)
            memory = writer.begin(layer, expert, parts[-1].begin + parts[-1].size)
            for part, frame in zip(parts, gift.frames, strict=True):
                memory[part.begin : part.begin + part.size] = frame
            writer.commit(layer, expert, gift.header.digest)
