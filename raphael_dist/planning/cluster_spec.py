"""Descriptions of clusters: speeds of devices, links and disks, and prices, each number with its source.

A description is a YAML file. Those in `planning/clusters/` are loaded by name, others by path. Every number is written as
`{value: ..., source: ...}`. The source of an assumed number contains the word "assumed".
"""

from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raphael_dist.config.types import Dtype
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.planning.communication import Cluster
from raphael_dist.text import read_text

CLASSES_WITH_FLOPS = ("product", "convolution", "attention")  # the classes of op_costs.CLASSES that have FLOPs


class Number(BaseModel):
    """A number of a cluster description, and its source as a string: a data sheet, a measurement, or "assumed ..."."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=3)


class Rates(BaseModel):
    """Speed of one class of operations. An operation takes `us + max(FLOPs / tflops, bytes / gb_s)` (a roofline model).

    Attributes:
        us: microseconds that an operation without work takes.
        tflops: TFLOP/s of a large operation; None for classes without FLOPs.
        gb_s: GB/s of inputs and outputs of a large operation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    us: Number
    tflops: Number | None = None
    gb_s: Number


class ClusterSpec(BaseModel):
    """The description of a cluster of nodes with equal devices.

    Attributes:
        device: "gpu", to which its host queues operations in advance, or "cpu", which is its own host.
        per_node: devices in a node.
        memory_gb: GB (1e9 bytes) of a device; on a CPU, of the host.
        peak_tflops: peak TFLOP/s in the data sheet, by `train.dtype`.
        rates: achieved rates, by `train.dtype` and class of operations. A class that is not listed has the rates of the
            class "product" (if it has FLOPs) or "other".
        launch_us: microseconds that the host needs to launch one operation.
        node_gb_s, net_gb_s: GB/s from a device to others of its node, and through its network card.
        node_hop_us, net_hop_us: latency in microseconds between two devices of a node, and of different nodes.
        price: dollars per device hour.
        gpu_hours_per_failure: mean device hours between two failures that end a run.
        storage_gb_s: GB/s at which a node writes to storage.
        host_gb_s: GB/s from a device to its host.
        restart_s: seconds from a failure to the next step.
        recomputed: how many times longer an operation takes when the backward pass repeats it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = ""
    device: Literal["gpu", "cpu"]
    per_node: Number
    memory_gb: Number
    peak_tflops: dict[Dtype, Number]
    rates: dict[Dtype, dict[str, Rates]]
    launch_us: Number
    node_gb_s: Number
    net_gb_s: Number
    node_hop_us: Number
    net_hop_us: Number
    price: Number
    gpu_hours_per_failure: Number
    storage_gb_s: Number
    host_gb_s: Number
    restart_s: Number
    recomputed: Number = Number(value=1.0, source="assumed")

    def with_value(self, name: str, value: float) -> "ClusterSpec":
        """Return a copy in which the number `name` (e.g. "price") is `value`. The stated source of the number is kept."""
        return self.model_copy(update={name: getattr(self, name).model_copy(update={"value": value})})

    def links(self, ranks: int) -> Cluster:
        """Return the links between `ranks` devices of this cluster: devices per node, bandwidths and latencies."""
        return Cluster(
            ranks,
            min(ranks, int(self.per_node.value)),
            self.node_gb_s.value,
            self.net_gb_s.value,
            self.node_hop_us.value,
            self.net_hop_us.value,
            gloo=self.device == "cpu",
        )

    def rate(self, dtype: str, op_class: str) -> Rates:
        """Return the speed of a class of torch operations, e.g. "convolution", in a dtype, e.g. "bfloat16".

        A class that the description does not list has the speed of the class "product" (if it has FLOPs) or "other".

        Raises:
            UserError: the cluster description has no rates for the dtype.
        """
        for name, rates in self.rates.items():
            if name == dtype:
                return rates.get(op_class) or rates["product" if op_class in CLASSES_WITH_FLOPS else "other"]
        raise UserError(
            f"train.dtype={dtype} requires rates.{dtype}, the speed of operations in this dtype, in the description of the "
            f"cluster {self.name}, but it has rates only for {', '.join(self.rates)}. Add rates.{dtype}, or change "
            "train.dtype."
        )


def cluster_names() -> list[str]:
    """Return the names of the cluster descriptions that ship with the package, e.g. "h100x8", sorted."""
    folder = resources.files("raphael_dist.planning") / "clusters"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_cluster(name_or_path: str) -> ClusterSpec:
    """Read a cluster description, given its name (e.g. "h100x8", see `cluster_names`) or the path of a YAML file.

    Raises:
        UserError: there is no such cluster, or its description is invalid.
    """
    names = cluster_names()
    if name_or_path in names:
        text = (resources.files("raphael_dist.planning") / "clusters" / f"{name_or_path}.yaml").read_text()
    elif name_or_path.endswith((".yaml", ".yml")):
        try:
            text = read_text(Path(name_or_path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--cluster {name_or_path} cannot be read: {error}. Give a readable .yaml file, or use one of "
                f"{', '.join(names)}."
            ) from None
    else:
        hint = did_you_mean(name_or_path, names)
        raise UserError(
            f"--cluster {name_or_path}: there is no such cluster{hint}. Use {', '.join(names)}, or a .yaml file."
        )
    return _parse(name_or_path, text)


def _parse(name: str, text: str) -> ClusterSpec:
    try:
        tree = yaml.safe_load(text)
        spec = ClusterSpec.model_validate({**tree, "name": Path(name).stem} if isinstance(tree, dict) else tree)
    except yaml.YAMLError as error:
        raise UserError(
            f"--cluster {name} is not valid YAML: {' '.join(str(error).split())}. Correct this place in the file, or use "
            f"one of {', '.join(cluster_names())}."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"--cluster {name}: {field} is not valid ({first['msg']}). Write each number as {{value: NUMBER, source: "
            "TEXT}, where TEXT says where the number comes from."
        ) from None
    for dtype, rates in spec.rates.items():
        for required in ("product", "other"):
            if required not in rates or (required == "product" and rates[required].tflops is None):
                missing = "tflops" if required in rates else "the whole entry"
                raise UserError(
                    f"--cluster {name}: rates.{dtype}.{required} must have the keys us (microseconds per operation), "
                    f"tflops (TFLOP/s) and gb_s (GB/s), but {missing} is missing. Add it."
                )
    return spec
