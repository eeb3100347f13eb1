"""Decides for each U-Net level whether its experts are sharded over ranks or replicated on every rank.

With sharded experts, ranks exchange image tokens (Space-MoE) or samples (Time-MoE) in every pass. With replicated experts,
ranks exchange the experts' gradients and weights once per step. Outer levels have many tokens and small experts; inner
levels have few tokens and large experts. The decision is computed from the configuration alone: `--dry-run` prints it, and
every rank's engine computes the same one.

Bytes are the average that one rank sends in an optimizer step. For gathers and reductions a ring algorithm is assumed: for n
numbers over r ranks each rank sends n (r - 1) / r, once to reduce gradients and once to gather weights (ZeRO-1 and 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from raphael_dist.config.schema import Config
from raphael_dist.config.types import EXPERT_KINDS, ExpertKind, bytes_per_element
from raphael_dist.model.latents import latent_factor
from raphael_dist.parallel.batch_plan import BatchPlan


@dataclass(frozen=True)
class LevelCost:
    """Communication cost of the experts of one kind on one U-Net level, and whether they are sharded.

    Attributes:
        kind: kind of experts, "space" or "time".
        level: U-Net level, 0 is the outermost.
        blocks: number of transformer blocks of the level.
        ep: number of ranks that share one set of experts if they are sharded.
        rows: number of rows of the experts' input on one rank and in one step, summed over the level's blocks. A row is an
            image token.
        parameters: number of parameters of all experts of this kind on the level.
        sharded_bytes: bytes that a rank sends per step if the experts are sharded.
        replicated_bytes: bytes that a rank sends per step if every rank has all experts.
        shard: the decision: True if the experts are sharded.
    """

    kind: ExpertKind
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
        """Number of parameters that a rank does not have if the experts are sharded instead of replicated."""
        return self.parameters - self.parameters // self.ep


def choose_placement(config: Config, plan: BatchPlan) -> list[LevelCost]:
    """Decide for each U-Net level with transformer blocks whether its experts are sharded; return costs and decisions.

    The list has one entry per kind of experts and level. Kinds of experts whose expert-parallel size (`parallel.space_ep`,
    `parallel.time_ep`) is 1 are left out. `plan`: how the global batch is divided over ranks.
    """
    costs = []
    for kind in EXPERT_KINDS:
        if config.parallel.ep(kind) > 1:
            costs += [_cost(config, plan, kind, level, n) for level, n in enumerate(blocks_per_level(config)) if n]
    return costs


def blocks_per_level(config: Config) -> list[int]:
    """Return the number of transformer blocks on each U-Net level, outermost first; 0 on levels without attention.

    Args:
        config: the model's configuration. The blocks of encoder and decoder are added up; the middle block belongs to the
            last level.
    """
    m = config.model
    blocks = [(2 * m.layers_per_block + 1) * attends for attends in m.attention]
    blocks[-1] += 1
    return blocks


def _cost(config: Config, plan: BatchPlan, kind: ExpertKind, level: int, blocks: int) -> LevelCost:
    m, ep = config.model, config.parallel.ep(kind)
    dim, hidden, experts = m.channels[level], m.expert_width[level], m.num_experts(kind)
    fused = 2 * hidden if kind == "time" and m.time_activation == "geglu" else hidden
    parameters = blocks * experts * (fused * dim + fused + dim * hidden + dim)
    rows = blocks * plan.accumulation * plan.micro_batch_size * mean_tokens(config, level)
    if kind == "space":
        # Every token goes to all other ranks of the group with its weights for their experts, and returns; so does e_k(0).
        sent = (ep - 1) * (rows * (2 * dim + experts // ep) + blocks * plan.accumulation * experts // ep * dim)
    else:
        # The expert of a sample is on another rank with probability (P - 1) / P.
        sent = rows * 2 * dim * (ep - 1) // ep
    passes = 2 if m.checkpoint_activations == "none" else 3  # forward, recomputed, backward
    size, world = bytes_per_element(config.train.dtype), plan.world_size
    sharded = size * (passes * sent + sync_traffic(parameters // ep, world // ep))
    replicated = size * sync_traffic(parameters, world)
    placement = config.parallel.placement[level if len(config.parallel.placement) > 1 else 0]
    shard = sharded < replicated if placement == "auto" else placement == "shard"
    return LevelCost(kind, level, blocks, ep, rows, parameters, sharded, replicated, shard)


def sync_traffic(parameters: int, ranks: int) -> int:
    """Return how many tensor elements a rank sends per optimizer step to reduce gradients and to gather new weights.

    A ring algorithm with ZeRO-1 or 2 is assumed.

    Args:
        parameters: number of parameters.
        ranks: number of ranks that have these parameters.
    """
    return 2 * parameters * (ranks - 1) // max(1, ranks)


def mean_tokens(config: Config, level: int) -> int:
    """Return the number of image tokens per image on a U-Net level (0: outermost), averaged over the run's image sizes."""
    side: int = latent_factor(config.image.vae) * 2**level
    tokens = [-(-height // side) * -(-width // side) for height, width in config.image.buckets]
    return sum(tokens) // len(tokens)


def describe(costs: Sequence[LevelCost]) -> list[str]:
    """Return the lines of a table: on which levels experts are sharded, and the bytes that a rank sends in either case.

    `costs`: the result of `choose_placement`. If `costs` is empty, the result is [].
    """
    if not costs:
        return []
    lines = [
        "placement of experts, per U-Net level (MB sent per rank and step; M parameters over all blocks of the level):",
        "kind   level  blocks  rows/rank  parameters     sharded     replicated  choice",
    ]
    for c in costs:
        choice = f"shard, {c.saved / 1e6:.1f} M fewer parameters per rank" if c.shard else "replicate"
        lines.append(
            f"{c.kind:<6} {c.level:>5} {c.blocks:>7} {c.rows:>10} {c.parameters / 1e6:>9.1f} M "
            f"{c.sharded_bytes / 1e6:>7.1f} MB {c.replicated_bytes / 1e6:>10.1f} MB  {choice}"
        )
    return lines
