"""Shared by all tests: paths for the forked ranks, and one intra-op thread, so that parallel tests share the cores."""

import os
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
for folder in (TESTS.parent, TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")  # torchrun's store looks up names: an ill name service
torch.set_num_threads(1)
