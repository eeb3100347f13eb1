"""Experts spread over ranks compute what one process computes: outputs, gradients, clip norms, steps, checkpoints."""

import pytest

from tests.launch import run_ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_layers_equal_the_plain_layers_on_all_data_in_every_dispatch(world_size):
    run_ranks(["tests/workers/expert_layers.py"], world_size)
