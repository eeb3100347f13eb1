"""The combinations of settings with which `prove` trains its small model."""

from dataclasses import dataclass
from typing import get_args

from raphael_dist.cluster.prove_model import EXPERTS, proof_config
from raphael_dist.config.schema import Config
from raphael_dist.config.types import Dtype
from raphael_dist.text import JsonObject


@dataclass(frozen=True)
class Case:
    """One combination of settings with which the command `prove` tests training.

    Attributes:
        dtype: "float32" or "bfloat16".
        stage: ZeRO stage, from 0 to 3.
        ep: number of ranks over which the experts of each layer are sharded; 1: not sharded.
    """

    dtype: str
    stage: int
    ep: int

    def __str__(self) -> str:
        return f"{self.dtype} ZeRO-{self.stage} ep {self.ep}"


def cases(world: int) -> list[Case]:
    """Return all combinations of dtype, ZeRO stage and expert parallelism that `prove` tests on `world` ranks."""
    sizes = expert_sizes(world)
    plain = [Case(dtype, stage, 1) for dtype in get_args(Dtype) for stage in range(4) if (dtype, stage) != ("bfloat16", 0)]
    return plain + [Case(dtype, stage, ep) for dtype in get_args(Dtype) for stage in (1, 2) for ep in sizes[1:]]


def expert_sizes(world: int) -> list[int]:
    """Return over how many of `world` ranks the 8 experts of the model of `prove` can be sharded: some of 1, 2, 4, 8."""
    return [n for n in range(1, EXPERTS + 1) if EXPERTS % n == 0 and world % n == 0]


def case_config(case: Case, world: int, batch: int = 0, micro: int = 2, **sections: JsonObject) -> Config:
    """Return the configuration of the small model of `prove` with the settings of `case` on `world` ranks.

    Args:
        case: dtype, ZeRO stage and expert parallelism.
        world: number of ranks.
        batch: global batch size. 0: 4 world - 1, so that with `micro` = 2 a step has two micro-steps, and the last one has
            an empty slot (a sample with weight 0).
        micro: micro-batch size.
        **sections: settings to replace, as {key: value} by section.
    """
    train = {"global_batch_size": batch or 4 * world - 1, "micro_batch_size": micro, "dtype": case.dtype}
    parallel = {"space_ep": case.ep, "time_ep": case.ep, "placement": ["shard"]}
    return proof_config(train=train, parallel=parallel, **sections)
