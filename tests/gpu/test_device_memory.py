"""The driver's calls, from whatever thread."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from elastic_moe.memory import device_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def in_a_new_thread(act: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(30)


def after_work_on_gpu_0(act: Callable[[], object]) -> Callable[[], object]:
    def both() -> object:
        torch.cuda.set_device(0)
        torch.ones(1, device="cuda:0").add_(1)
        return act()

    return both


@pytest.mark.parametrize("before", [lambda act: act, after_work_on_gpu_0], ids=["first call", "after work on GPU 0"])
@pytest.mark.parametrize("number", range(torch.cuda.device_count()))
def test_a_thread_of_its_own_copies_to_any_gpu(number: int, before: Callable):
    device = torch.device("cuda", number)
    block, _ = device_memory.allocate(1024, device)
    wanted = torch.randint(256, (1024,), dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)

    def act() -> None:
        stream = torch.cuda.Stream(device)
        device_memory.copy(block.address, wanted.data_ptr(), 1024, stream)
        stream.synchronize()

    in_a_new_thread(before(act))
    assert torch.equal(device_memory.as_tensor(block, device)[:1024], wanted)
    device_memory.detach(block)


@pytest.mark.parametrize("before", [lambda act: act, after_work_on_gpu_0], ids=["first call", "after work on GPU 0"])
@pytest.mark.parametrize("number", range(torch.cuda.device_count()))
def test_a_thread_of_its_own_exports_memory_of_any_gpu(number: int, before: Callable):
    memory = torch.zeros(1024, dtype=torch.uint8, device=f"cuda:{number}")
    wanted = device_memory.export(memory.data_ptr(), memory.device)
    assert in_a_new_thread(before(lambda: device_memory.export(memory.data_ptr(), memory.device))) == wanted
