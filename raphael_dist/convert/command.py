"""What the command lines of the checkpoint tools share: options checked, reports printed."""

import torch
from rich.console import Console
from rich.table import Table

from raphael_dist.convert.layouts import layout_of
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import Report
from raphael_dist.errors import UserError


def options_of(
    layout: str,
    ep: str,
    world: int,
    stage: int,
    weights: str | None,
    dtype: str | None,
    unet_only: bool,
    text_by_name: bool = False,
) -> Options:
    """Return the options of a target. Raises UserError for one that the layout does not take."""
    try:
        space, time = (int(part) for part in ep.split(","))
    except ValueError:
        raise UserError(
            f"--ep {ep}: given as two numbers, ranks per set of space experts and of time experts, e.g. 2,1"
        ) from None
    if min(space, time, world) < 1:
        raise UserError(f"--ep {ep}, --world {world}: must be 1 or more")
    heeds = layout_of("--to", layout).options
    if "world" not in heeds and (space, time, world) != (1, 1, 1):
        raise UserError(f"--ep, --world: a {layout} checkpoint does not depend on ranks; leave them out")
    for name, given in (("--weights", weights), ("--dtype", dtype)):
        if given and name[2:] not in heeds:
            raise UserError(f"{name} {given}: {layout} holds every kind of values in float32; leave it out")
    for name, switched_on in (("--unet-only", unet_only), ("--text-by-name", text_by_name)):
        if switched_on and "unet_only" not in heeds:
            raise UserError(f"{name}: a {layout} checkpoint holds no encoders anyway; leave it out")
    number = getattr(torch, dtype or "float32")
    return Options(space, time, world, stage, weights, number, unet_only=unet_only, text_by_name=text_by_name)


def print_report(report: Report, path: str, out: str) -> None:
    """Print what went where."""
    table = Table(title=f"{report.source} {path} -> {report.target} {out}", title_justify="left")
    table.add_column("kind")
    for column in ("tensors", "parameters", "bytes", "files"):
        table.add_column(column, justify="right")
    for row in report.rows:
        table.add_row(row.kind, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.bytes:,}", f"{row.files}")
    console = Console(highlight=False)
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}")
    size = sum(row.bytes for row in report.rows) / 1e9
    rate = size / max(report.seconds, 1e-9)
    console.print(
        f"source checked: {report.verified}; every tensor written once, read back; {report.seconds:.1f} s, {rate:.2f} GB/s"
    )
