"""The worked examples in docstrings are true."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("module", "least"), [("elastic_moe.placement.placement", 6), ("elastic_moe.placement.dispatch", 5)]
)
def test_the_examples_hold(module: str, least: int):
    result = doctest.testmod(import_module(module))
    assert result.failed == 0
    assert result.attempted >= least
