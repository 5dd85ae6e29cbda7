"""GPU memory that other processes of this host can map: the driver's virtual memory management, one call a function.

A file descriptor names the memory. It lives as long as any process maps it: when its owner is killed, a write of
somebody else that is under way still lands in memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from elastic_moe.errors import PeerLost


@dataclass(frozen=True)
class Block:
    """`num_bytes` of GPU memory, mapped here at `address`."""

    address: int
    num_bytes: int
    handle: Any


def allocate(num_bytes: int, device: torch.device) -> tuple[Block, int]:
    """At least `num_bytes` on `device`, and a file descriptor by which another process can map them.

    Raises:
        RuntimeError: the driver refuses, for want of memory say.
    """
    cuda, properties = _driver(), _properties(device)
    flag = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    (granularity,) = _checked(cuda.cuMemGetAllocationGranularity(properties, flag))
    num_bytes = -(-num_bytes // granularity) * granularity
    (handle,) = _checked(cuda.cuMemCreate(num_bytes, properties, 0))
    (descriptor,) = _checked(cuda.cuMemExportToShareableHandle(handle, _descriptor_type(), 0))
    return _map(handle, num_bytes, device), descriptor


def attach(descriptor: int, num_bytes: int, device: torch.device) -> Block:
    """Map memory of another process for kernels on `device`. Takes over the descriptor.

    Raises:
        PeerLost: it cannot be reached from `device`.
    """
    cuda = _driver()
    try:
        (handle,) = _checked(cuda.cuMemImportFromShareableHandle(descriptor, _descriptor_type()))
        return _map(handle, num_bytes, device)
    except RuntimeError as error:
        raise PeerLost(f"memory of a peer cannot be mapped on {device}: {error}") from error
    finally:
        os.close(descriptor)


def detach(block: Block) -> None:
    """Give the mapping back, and the memory with the last one. No kernel may be using it."""
    cuda = _driver()
    _checked(cuda.cuMemUnmap(block.address, block.num_bytes))
    _checked(cuda.cuMemAddressFree(block.address, block.num_bytes))
    _checked(cuda.cuMemRelease(block.handle))


def copy(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """Queue a copy between device addresses, mapped peers included. The copy engine does it; no kernel runs."""
    with _context_of(stream.device) as cuda:
        _checked(cuda.cuMemcpyAsync(target, source, num_bytes, stream.cuda_stream))


def export(address: int, device: torch.device) -> tuple[bytes, int]:
    """The driver's name of the allocation that an address of `device` lies in, for other processes; and where it lies
    in it.

    Raises:
        RuntimeError: it is memory that has no such name (of `allocate`, or of torch's expandable segments).
    """
    with _context_of(device) as cuda:
        base, _ = _checked(cuda.cuMemGetAddressRange(address))
        (handle,) = _checked(cuda.cuIpcGetMemHandle(base))
    return bytes(handle.reserved), address - int(base)


def open_exported(allocation: bytes, device: torch.device) -> int:
    """The address, for copies by `device`, of an allocation that another process has exported.

    Raises:
        PeerLost: it is there no more, or cannot be reached from `device`.
    """
    handle = _driver().CUipcMemHandle()
    handle.reserved = allocation
    flag = _driver().CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    try:
        with _context_of(device) as cuda:
            (address,) = _checked(cuda.cuIpcOpenMemHandle(handle, flag))
    except RuntimeError as error:
        raise PeerLost(f"memory of another process's GPU cannot be mapped: {error}") from error
    return int(address)


def close_exported(address: int, device: torch.device) -> None:
    """Give such a mapping of `device` back. No copy may be using it."""
    with _context_of(device) as cuda:
        _checked(cuda.cuIpcCloseMemHandle(address))


def as_tensor(block: Block, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] over a block of this process's own memory."""
    return torch.as_tensor(_Exported(block), device=device)


class _Exported:
    def __init__(self, block: Block) -> None:
        self.__cuda_array_interface__ = {
            "shape": (block.num_bytes,),
            "typestr": "|u1",
            "data": (block.address, False),
            "version": 3,
        }


def _map(handle: Any, num_bytes: int, device: torch.device) -> Block:
    cuda, properties = _driver(), _properties(device)
    access = cuda.CUmemAccessDesc()
    access.location = properties.location
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    (address,) = _checked(cuda.cuMemAddressReserve(num_bytes, 0, 0, 0))
    _checked(cuda.cuMemMap(address, num_bytes, 0, handle, 0))
    _checked(cuda.cuMemSetAccess(address, num_bytes, [access], 1))
    return Block(int(address), num_bytes, handle)


def _properties(device: torch.device) -> Any:
    cuda = _driver()
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = torch.cuda.current_device() if device.index is None else device.index
    properties.requestedHandleTypes = _descriptor_type()
    return properties


def _descriptor_type() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


@contextmanager
def _context_of(device: torch.device) -> Iterator[Any]:
    """The driver, working with that GPU whatever thread calls: a new thread has no context of its own, or that of GPU 0
    as soon as torch has called there."""
    cuda = _driver()
    _checked(cuda.cuCtxPushCurrent(_primary_context(device.index)))
    try:
        yield cuda
    finally:
        _checked(cuda.cuCtxPopCurrent())


@cache
def _primary_context(index: int) -> Any:
    """The one that torch uses, too."""
    (context,) = _checked(_driver().cuDevicePrimaryCtxRetain(index))
    return context


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = answer
    if error:
        raise RuntimeError(f"CUDA driver: {error.name}")
    return tuple(values)


@cache
def _driver() -> Any:
    """NVIDIA's bindings, which come with every torch for CUDA since 2.10."""
    return import_module("cuda.bindings.driver")
