"""What the machine itself does: plain copies and reads, as the limits of benchmarks."""

import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_moe.background import start_worker
from elastic_moe.backup.segment import Segment
from elastic_moe.weights.shards import SLICE_BYTES


def segment_limit(file: int, device: torch.device, repeats: int) -> float:
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

    limit = sum(arena.nbytes for arena in arenas) / median_s(copy_all, repeats) / 1e9
    for arena in arenas if cuda else ():
        cudart.cudaHostUnregister(arena.ctypes.data)
    return limit


def gpu_limit(num_bytes: int, repeats: int) -> float:
    """Gigabytes per second of plain copies of `num_bytes` each from the last GPU of the machine to the first."""
    there = [
        torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{torch.cuda.device_count() - 1}") for _ in range(64)
    ]
    here = torch.empty(num_bytes, dtype=torch.uint8, device="cuda:0")

    def copy_all() -> None:
        for one in there:
            here.copy_(one, non_blocking=True)
        torch.cuda.synchronize(here.device)

    return len(there) * num_bytes / median_s(copy_all, repeats) / 1e9


def loopback_limit(repeats: int) -> float:
    """Gigabytes per second through one TCP connection of this host, from one thread to another."""
    block, count = bytearray(SLICE_BYTES), 16
    sender = start_worker("loopback")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        with here:

            def send_all() -> None:
                sending = sender.submit(lambda: [there.sendall(block) for _ in range(count)])
                target = memoryview(bytearray(SLICE_BYTES))
                for _ in range(count):
                    got = 0
                    while got < SLICE_BYTES:
                        got += here.recv_into(target[got:])
                sending.result()

            return count * SLICE_BYTES / median_s(send_all, repeats) / 1e9


def median_s(act: Callable[[], None], repeats: int) -> float:
    """Seconds that `act` takes, the first time not counted."""
    act()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def disk_limit(files: list[Path], device: torch.device, num_threads: int, repeats: int) -> float:
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

    return sum(sizes.values()) / median_s(read_all, repeats) / 1e9
