"""`train.compile` changes no number, whatever is recomputed, and every part is one graph. Needs a C++ compiler."""

import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raphael_dist.engine import engine
from raphael_dist.errors import UserError
from raphael_dist.model.compiling import compile_parts, require_compiler, uncompiled
from raphael_dist.model.residual import ResidualBlock
from raphael_dist.model.unet import RaphaelUNet
from tests.synthetic import tiny_config
from tests.test_unet import run

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work
CPU = torch.device("cpu")
# One level: each kind of part, in as few graphs as possible, since each takes the C++ compiler seconds.
SMALL = {"channels": [16], "attention": [True], "expert_width": [20], "space_backend": "wide", "shared_expert": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiled_step_is_the_plain_one_whatever_is_recomputed():
    plain = run("none", False, **SMALL)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for recomputed in ("none", "blocks", "all"):
        found = run(recomputed, False, prepare=lambda unet: compile_parts(unet, CPU, dynamic=False), **SMALL)
        assert found.keys() == plain.keys()  # parameters keep their names
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 3  # residual blocks of two widths, and the wide form
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_part_counts_its_flops_before_and_after_it_was_compiled():
    """The count before step 1 watches every operation, which a compiled graph would hide."""
    block, inputs = ResidualBlock(16, 16, 64, 8), (torch.randn(2, 16, 8, 8), torch.randn(2, 64))

    def flops() -> int:
        with uncompiled(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(*inputs)
        return counter.get_total_flops()

    expected = flops()
    torch._dynamo.reset()
    compile_parts(block, CPU, dynamic=False)
    assert flops() == expected
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        block(*inputs)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1  # the count has not turned compilation off
    assert flops() == expected


def test_where_no_compiler_is_the_switch_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train.compile=true needs a C\+\+ compiler, given no-such-compiler"):
        require_compiler(CPU)


def test_with_zero_3_the_switch_is_refused_before_anything_is_compiled():
    with pytest.raises(UserError, match=r"train.compile=true does not go with ZeRO-3.*zero2.json"):
        engine._compile(RaphaelUNet(tiny_config()), tiny_config(), 3, CPU)
