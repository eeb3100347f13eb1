"""Where expert parallelism pays: per U-Net level, shard the experts and move rows to them, or replicate them on every rank.

Ranks that share experts send image tokens (Space-MoE) or samples (Time-MoE) in every pass; ranks that hold all experts send
their weights and gradients once a step. Outer levels have many tokens and small experts, inner levels the reverse. All of
this is arithmetic on the configuration: `--dry-run` prints it and the engine applies it, on every rank alike.

Bytes are what one rank sends in an optimizer step, on average. Gathers and reductions count as rings: for n numbers over r
ranks each rank sends n (r - 1) / r, once to reduce gradients and once to gather weights (ZeRO-1 and 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raphael_dist.config import Config
from raphael_dist.model.latents import latent_factor
from raphael_dist.parallel.batch_plan import BatchPlan

Kind = Literal["space", "time"]


@dataclass(frozen=True)
class LevelCost:
    """One kind of experts on one U-Net level.

    Attributes:
        blocks: transformer blocks of the level. rows: image tokens that one rank sends through the experts per step.
        parameters: of the level's experts of this kind, all together.
        sharded_bytes: sent per rank and step when rows move to sharded experts; replicated_bytes: when every rank has all.
        shard: the choice.
    """

    kind: Kind
    level: int
    blocks: int
    ep: int
    rows: int
    parameters: int
    sharded_bytes: int
    replicated_bytes: int
    shard: bool

    @property
    def saved(self) -> int:
        """Parameters that a rank need not hold when the experts are sharded."""
        return self.parameters - self.parameters // self.ep


def place(config: Config, plan: BatchPlan) -> list[LevelCost]:
    """Return the choice for each kind of experts with ep > 1 on each level with transformer blocks."""
    costs = []
    for kind in ("space", "time"):
        if getattr(config.parallel, f"{kind}_ep") > 1:
            costs += [_cost(config, plan, kind, level, n) for level, n in enumerate(blocks_per_level(config)) if n]
    return costs


def blocks_per_level(config: Config) -> list[int]:
    """Return how many transformer blocks each level has; the middle belongs to the last level."""
    m = config.model
    blocks = [(2 * m.layers_per_block + 1) * attends for attends in m.attention]
    blocks[-1] += 1
    return blocks


def _cost(config: Config, plan: BatchPlan, kind: Kind, level: int, blocks: int) -> LevelCost:
    m, ep = config.model, getattr(config.parallel, f"{kind}_ep")
    dim, hidden, experts = m.channels[level], m.expert_width[level], getattr(m, f"{kind}_experts")
    fused = 2 * hidden if kind == "time" and m.time_activation == "geglu" else hidden
    parameters = blocks * experts * (fused * dim + fused + dim * hidden + dim)
    rows = blocks * plan.accumulation * plan.micro_batch * mean_tokens(config, level)
    if kind == "space":
        # Every token goes to all other ranks of the group, with its weights for their experts, and comes back; e_k(0) too.
        sent = (ep - 1) * (rows * (2 * dim + experts // ep) + blocks * plan.accumulation * experts // ep * dim)
    else:
        # A sample's expert is elsewhere with probability (P - 1) / P.
        sent = rows * 2 * dim * (ep - 1) // ep
    passes = 2 if m.checkpoint_activations == "none" else 3  # forward, recomputed, backward
    size, world = 2 if config.train.dtype == "bfloat16" else 4, plan.world_size
    own = synced(parameters // ep, world // ep)
    sharded, replicated = size * (passes * sent + own), size * synced(parameters, world)
    wanted = config.parallel.placement[level if len(config.parallel.placement) > 1 else 0]
    shard = sharded < replicated if wanted == "auto" else wanted == "shard"
    return LevelCost(kind, level, blocks, ep, rows, parameters, sharded, replicated, shard)


def synced(parameters: int, ranks: int) -> int:
    """Return how many numbers a rank sends to reduce the gradients of `parameters` and gather the new weights."""
    return 2 * parameters * (ranks - 1) // max(1, ranks)


def mean_tokens(config: Config, level: int) -> int:
    """Return the image tokens of a level, averaged over the image sizes."""
    side = latent_factor(config.image.encoder) * 2**level
    tokens = [-(-height // side) * -(-width // side) for height, width in config.image.buckets]
    return sum(tokens) // len(tokens)


def describe(costs: Sequence[LevelCost]) -> list[str]:
    """Return a table of the arithmetic and of what was chosen, as lines."""
    if not costs:
        return []
    lines = [
        "placement of experts, per U-Net level (MB sent per rank and step; M parameters over all blocks of the level):",
        "kind   level  blocks  rows/rank  parameters     sharded     replicated  choice",
    ]
    for c in costs:
        choice = f"shard, {c.saved / 1e6:.1f} M fewer parameters a rank" if c.shard else "replicate"
        lines.append(
            f"{c.kind:<6} {c.level:>5} {c.blocks:>7} {c.rows:>10} {c.parameters / 1e6:>9.1f} M "
            f"{c.sharded_bytes / 1e6:>7.1f} MB {c.replicated_bytes / 1e6:>10.1f} MB  {choice}"
        )
    return lines
