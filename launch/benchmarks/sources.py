"""bench=sources: how fast one rank's experts come from their source, against the limit of the machine.

`limit_gb_per_s` is of the same run. Of disk: as many threads read the same files from the page cache, in slices
of the same size, into buffers of their own (on a GPU: pinned ones, and copy them to it), and do nothing else. Of dram:
one thread copies as many bytes from the segment's memory (pinned, on a GPU), an arena at a time.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_moe.background import start_worker
from elastic_moe.backup.segment import Segment, Writer, parts_of
from elastic_moe.backup.source import NodeMemory
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.integrations.transformers import find_experts, meta_model
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.disk import READERS, Disk
from elastic_moe.weights.shards import SLICE_BYTES
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.sources import Account, Source, fill
from elastic_moe.weights.store import ExpertStore
from launch.benchmarks.config import BenchConfig
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
    model = meta_model(folder, None)
    modules = find_experts(model)
    layouts = {name: ExpertLayout.of_module(module) for name, module in modules.items()}
    names, num_readers = list(layouts), READERS[device.type]
    with CheckpointReader(folder, model, layouts) as reader:
        slots = [SlotExperts(m, layouts[n], layouts[n].num_experts, device) for n, m in modules.items()]
        store = ExpertStore(slots)
        goal = torch.arange(store.num_slots).expand(len(names), -1).numpy()
        disk = Disk(lambda layer, expert, out: reader.read_expert(names[layer], expert, out), num_readers)

        num_bytes = store.expert_bytes * goal.size

        def figure(source: Source, limit: float, **more: Any) -> dict[str, Any]:
            def read_all() -> None:
                store.held.fill(EMPTY)
                fill(store.wants(goal), store, [source], Account())

            found = num_bytes / _median_s(read_all, repeats) / 1e9
            return {
                "source": source.nearest,
                "gb": round(num_bytes / 1e9, 2),
                "experts": int(goal.size),
                **more,
                "gb_per_s": round(found, 2),
                "limit_gb_per_s": round(limit, 2),
                "of_limit": round(found / limit, 3),
            }

        limit = _limit(sorted(folder.glob("model-*.safetensors")), device, num_readers, repeats)
        yield figure(disk, limit, threads=num_readers)
        file = os.memfd_create("bench of a backup")
        _back_up(file, store)
        path = f"/proc/{os.getpid()}/fd/{file}"
        yield figure(NodeMemory(lambda: path, FORM), _copy_limit(file, device, repeats))
        os.close(file)


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


def _copy_limit(file: int, device: torch.device, repeats: int) -> float:
    """Gigabytes per second of plain copies of all arenas to one place."""
    segment, cuda = Segment(file), device.type == "cuda"
    arenas = [np.frombuffer(segment.arena(number), dtype=np.uint8) for number in range(segment.num_arenas)]
    target = torch.empty(segment.shape.arena_bytes, dtype=torch.uint8, device=device)
    cudart: Any = torch.cuda.cudart() if cuda else None
    for arena in arenas if cuda else ():
        cudart.cudaHostRegister(arena.ctypes.data, arena.nbytes, 0)

    def copy_all() -> None:
        for arena in arenas:
            target.copy_(torch.from_numpy(arena), non_blocking=True)
        if cuda:
            torch.cuda.synchronize(device)

    limit = sum(arena.nbytes for arena in arenas) / _median_s(copy_all, repeats) / 1e9
    for arena in arenas if cuda else ():
        cudart.cudaHostUnregister(arena.ctypes.data)
    return limit


def _median_s(act: Callable[[], None], repeats: int) -> float:
    act()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _limit(files: list[Path], device: torch.device, num_threads: int, repeats: int) -> float:
    """Gigabytes per second of plain reads by `num_threads` threads."""
    sizes = {path: path.stat().st_size for path in files}
    slices = [(path, at) for path, size in sizes.items() for at in range(0, size, SLICE_BYTES)]
    cuda = device.type == "cuda"
    lanes = [
        (
            torch.cuda.Stream(device) if cuda else None,
            [torch.empty(SLICE_BYTES, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)],
            torch.empty(SLICE_BYTES, dtype=torch.uint8, device=device),
        )
        for _ in range(num_threads)
    ]

    workers = [start_worker("limit") for _ in lanes]

    def read(number: int) -> None:
        stream, buffers, target = lanes[number]
        sent = [torch.cuda.Event() for _ in buffers] if cuda else []
        open_files = {path: os.open(path, os.O_RDONLY) for path in files}
        for turn, (path, at) in enumerate(slices[number::num_threads]):
            buffer = buffers[turn % 2]
            if cuda:
                sent[turn % 2].synchronize()
            count = os.preadv(open_files[path], [buffer.numpy().data], at)
            if cuda:
                with torch.cuda.stream(stream):
                    target[:count].copy_(buffer[:count], non_blocking=True)
                sent[turn % 2].record(stream)
        if stream is not None:
            stream.synchronize()
        for file in open_files.values():
            os.close(file)

    def read_all() -> None:
        for running in [worker.submit(read, number) for number, worker in enumerate(workers)]:
            running.result()

    return sum(sizes.values()) / _median_s(read_all, repeats) / 1e9
