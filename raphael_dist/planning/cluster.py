"""Descriptions of clusters: what their devices, links and prices are, each number with its source.

A description is a YAML file: those in `planning/clusters/` go by name, others by path. Every number stands there as
`{value: ..., source: ...}`; what is assumed and not published or measured says so in its source.
"""

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.parallel.communication import Cluster

MULTIPLY = ("product", "convolution", "attention")  # classes of operations with FLOPs


class Number(BaseModel):
    """A number and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=3)


class Rates(BaseModel):
    """What one class of operations takes: `us + max(FLOPs / tflops, bytes / gb_s)` (the roofline, with a smallest time).

    us: microseconds of an operation with nothing to do. tflops: TFLOP/s of a large one; gb_s: GB/s of inputs and outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    us: Number
    tflops: Number | None = None
    gb_s: Number


class ClusterSpec(BaseModel):
    """A cluster of nodes with equal devices.

    device: "gpu", whose host runs ahead of it, or "cpu", which is its own host. memory_gb: GB (1e9) of a device; on a CPU of
    the host. peak_tflops: the data sheet's, by `train.dtype`. rates: by class of operations (operations.CLASSES) and dtype,
    those of no entry have that of
    `product` or of `other`. launch_us: what an operation takes the host. node_gb_s .. net_hop_us: as in
    `communication.Cluster`. gpu_hours_per_failure: device hours between two failures that end a run. storage_gb_s: GB/s that
    a node writes; host_gb_s: from a device to its host. restart_s: from a failure to the first step after it.
    spread: deviation of a rank's compute time, relative. recomputed: how many times longer an operation takes when the
    backward pass repeats it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = ""
    device: Literal["gpu", "cpu"]
    per_node: Number
    memory_gb: Number
    peak_tflops: dict[Literal["bfloat16", "float32"], Number]
    rates: dict[Literal["bfloat16", "float32"], dict[str, Rates]]
    launch_us: Number
    node_gb_s: Number
    net_gb_s: Number
    node_hop_us: Number
    net_hop_us: Number
    price: Number = Field(description="dollars for a device hour")
    gpu_hours_per_failure: Number
    storage_gb_s: Number
    host_gb_s: Number
    restart_s: Number
    spread: Number
    recomputed: Number = Number(value=1.0, source="assumed")

    def but(self, name: str, value: float) -> "ClusterSpec":
        """Return the same cluster with another number in the field of that name."""
        return self.model_copy(update={name: getattr(self, name).model_copy(update={"value": value})})

    def links(self, ranks: int) -> Cluster:
        """Return the links of `ranks` devices, for `communication`."""
        return Cluster(
            ranks,
            min(ranks, int(self.per_node.value)),
            self.node_gb_s.value,
            self.net_gb_s.value,
            self.node_hop_us.value,
            self.net_hop_us.value,
        )

    def rate(self, dtype: str, sort: str) -> Rates:
        """Return the rates of a class of operations."""
        rates = self.rates.get(dtype)  # type: ignore[call-overload]
        if rates is None:
            raise UserError(
                f"train.dtype={dtype}: the cluster {self.name} has no rates for it, it has those for "
                f"{', '.join(self.rates)}; add rates.{dtype} to its description"
            )
        return rates.get(sort) or rates["product" if sort in MULTIPLY else "other"]


def cluster_names() -> list[str]:
    """Return the names of the clusters that ship with the package."""
    folder = resources.files("raphael_dist.planning") / "clusters"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_cluster(name_or_path: str) -> ClusterSpec:
    """Read a description by its name or path. Raises UserError."""
    if name_or_path in cluster_names():
        text = (resources.files("raphael_dist.planning") / "clusters" / f"{name_or_path}.yaml").read_text()
    elif name_or_path.endswith((".yaml", ".yml")):
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--cluster {name_or_path}: cannot be read: {error}") from None
    else:
        hint = did_you_mean(name_or_path, cluster_names())
        raise UserError(
            f"--cluster {name_or_path}: no such cluster{hint}; known: {', '.join(cluster_names())}, or a .yaml file"
        )
    return _parse(name_or_path, text)


def _parse(name: str, text: str) -> ClusterSpec:
    try:
        tree: Any = yaml.safe_load(text)
        spec = ClusterSpec.model_validate({**tree, "name": Path(name).stem} if isinstance(tree, dict) else tree)
    except yaml.YAMLError as error:
        raise UserError(f"--cluster {name}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--cluster {name}: {where}: {first['msg']}; every number is {{value: ..., source: ...}}") from None
    for dtype, rates in spec.rates.items():
        for needed in ("product", "other"):
            if needed not in rates or (needed == "product" and rates[needed].tflops is None):
                raise UserError(f"--cluster {name}: rates.{dtype}.{needed} is missing or incomplete; give us, tflops, gb_s")
    return spec
