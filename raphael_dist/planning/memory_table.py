"""Writes a Markdown table of the largest micro-batch of a configuration that fits into GPUs of several memory sizes."""

from raphael_dist.planning.search import MICRO_BATCHES, USABLE, Choice, Outcome, Search
from raphael_dist.planning.trace import Recompute

SIZES_GB = (24, 48, 80, 141)  # RTX 4090, L40S, A100 and H100, H200
COMPARED: tuple[Recompute, ...] = ("none", "blocks")


def memory_table(name: str, search: Search) -> str:
    """Return a Markdown table of the largest micro-batch that fits into GPUs of 24, 48, 80 and 141 GB.

    There is a row for each ZeRO stage and a column for each memory size. A cell has two entries such as "8 (20.1) / 12
    (21.5)": without recomputation, and with recomputation of transformer blocks. An entry is the micro-batch (images per
    rank) and in brackets the memory of a rank in GB; "-" if no micro-batch fits.

    Args:
        name: label of the rows, e.g. the name of the preset.
        search: the model and the cluster. `search.allowed["stage"]` lists the ZeRO stages of the rows; without this entry
            there is one row, for stage 2.
    """
    header = [
        "| preset | GPUs | ZeRO | " + " | ".join(f"{size} GB" for size in SIZES_GB) + " |",
        "|---" * (3 + len(SIZES_GB)) + "|",
    ]
    return "\n".join(header + [_row(name, search, int(stage)) for stage in search.allowed.get("stage", (2,))])


def _row(name: str, search: Search, stage: int) -> str:
    outcomes = {recompute: _by_micro_batch(search, stage, recompute) for recompute in COMPARED}
    cells = [" / ".join(_cell(outcomes[recompute], size) for recompute in COMPARED) for size in SIZES_GB]
    return f"| {name} | {search.world} | {stage} | " + " | ".join(cells) + " |"


def _by_micro_batch(search: Search, stage: int, recompute: Recompute) -> list[Outcome]:
    """Return the predicted memory and step time of each possible micro-batch, the largest micro-batch first.

    `stage`: the ZeRO stage. `recompute`: which activations are recomputed.
    """
    choices = [Choice(1, 1, stage, False, micro, recompute, "auto") for micro in reversed(MICRO_BATCHES)]
    return [outcome for choice in choices if (outcome := search.evaluate(choice))]


def _cell(outcomes: list[Outcome], size_gb: float) -> str:
    for outcome in outcomes:
        if outcome.memory.total <= USABLE * size_gb * 1e9:
            return f"{outcome.choice.micro_batch_size} ({outcome.memory.total / 1e9:.1f})"
    return "-"
