"""`train.compile` does not change results, with any recomputation, and each part is one graph. Requires a C++ compiler."""

import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raphael_dist.engine import engine
from raphael_dist.errors import UserError
from raphael_dist.model.compiling import compile_parts, require_compiler, uncompiled
from raphael_dist.model.residual_block import ResidualBlock
from raphael_dist.model.unet import RaphaelUNet
from tests.lib.synthetic import tiny_config
from tests.model.test_unet import run

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work
CPU = torch.device("cpu")
# One level: each kind of part, in as few graphs as possible, since each takes the C++ compiler seconds.
SMALL = {"channels": [16], "attention": [True], "expert_width": [20], "expert_backend": "dense", "shared_expert": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_step_equals_eager_step_with_any_recomputation():
    plain = run("none", False, **SMALL)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for recomputed in ("none", "blocks", "all"):
        actual = run(recomputed, False, prepare=lambda unet: compile_parts(unet, CPU, dynamic=False), **SMALL)
        assert actual.keys() == plain.keys()  # parameters keep their names
        for name, value in plain.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 3  # residual blocks of two widths, and the dense form
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_flops_are_counted_before_and_after_compilation():
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


def test_compile_without_compiler_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train.compile=true requires a C\+\+ compiler, but no-such-compiler"):
        require_compiler(CPU)


def test_compile_under_zero3_is_refused_before_compilation():
    with pytest.raises(UserError, match=r"train.compile=true requires ZeRO stage 0, 1 or 2.*stage 3.*zero2.json"):
        engine._compile(RaphaelUNet(tiny_config()), tiny_config(), 3, CPU)
