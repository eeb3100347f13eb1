"""Rank: runs one part of the start or of validation alone, without training (see tests/lib/forks.py).

spec["case"] is a key of CASES. Its function gets `spec`, and its result is written to seen-RANK.json in spec["folder"].
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from raphael_dist.config.schema import Config, config_from_tree, load_config
from raphael_dist.data.features import encoders
from raphael_dist.data.features.characters import CharacterTokenizer
from raphael_dist.data.features.encoders import ImageEncoder
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.data.open_streams import open_encoders, open_stream
from raphael_dist.engine import expert_groups
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from raphael_dist.sampling.prompts import sample_requests
from raphael_dist.sampling.sampler import Request, Sampler
from raphael_dist.training import validation
from tests.lib.synthetic import SIZE, TEXT_WIDTH, TOKENS, TREE


def groups_case(spec: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Create expert-parallel groups of each size in spec["sizes"], and check that DeepSpeed finds the same groups.

    Returns:
        By size: "sums": the sums of the rank numbers in DeepSpeed's expert-parallel and expert-data-parallel group,
        "index": this rank's index in the group, "same": whether a second call returns the same process group.
    """
    from deepspeed.utils import groups

    actual = {}
    for size in spec["sizes"]:
        expert_group = expert_groups.create_groups(size, Traffic())
        sums = []
        for group in (
            groups._get_expert_parallel_group(expert_group.name),
            groups._get_expert_data_parallel_group(expert_group.name),
        ):
            value = torch.tensor([float(ranks.rank)])
            dist.all_reduce(value, group=group)
            sums.append(float(value))
        again = expert_groups.create_groups(size, Traffic())
        actual[size] = {"sums": sums, "index": expert_group.index, "same": again.process_group is expert_group.process_group}
    return actual


def encoders_case(spec: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Count how often this rank loads the text encoder while it opens the data twice and then prepares to sample.

    Returns:
        "loads": number of loads after each of these three, and the width and fingerprint of the text encoder.
    """
    loads, load = [0], encoders.text_model

    def counting(*args: Any) -> Any:
        loads[0] += 1
        return load(*args)

    encoders.text_model = counting
    config, seen = load_config("emoji-tiny", spec["overrides"]), []
    for _ in range(2):
        encoders_ = open_encoders(config, torch.device("cpu"))
        open_stream(config, ranks, encoders_, training=True)
        text, image = encoders_.text, encoders_.image
        seen.append(loads[0])
    validation.ready_to_sample(config, ranks, SimpleNamespace(stage=spec.get("stage", 1)), text, image)  # type: ignore[arg-type]
    return {"loads": [*seen, loads[0]], "width": text.width, "fingerprint": text.fingerprint}


class Letters:
    """Replaces a text encoder: tokens are random numbers seeded by the caption.

    `checked`: the arguments of all calls of `warn_truncated`.
    """

    def __init__(self) -> None:
        self.checked: list[tuple[str, list[str]]] = []
        self.tokenizer, self.max_tokens = CharacterTokenizer(), TOKENS

    def warn_truncated(self, texts: Sequence[str], what: str) -> None:
        self.checked.append((what, list(texts)))

    def encode(self, captions: list[str]) -> TextFeatures:
        seeds = [sum(map(ord, caption)) for caption in captions]
        tokens = [torch.randn(TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        mask = torch.ones(len(captions), TOKENS, dtype=torch.bool)
        return TextFeatures(torch.stack(tokens), mask, torch.full((len(captions),), TOKENS - 1))


def config_of_prompts(prompts: list[str], space_ep: int) -> Config:
    """Return the tiny model's configuration with these prompts, and with space experts sharded over `space_ep` ranks."""
    arguments = {
        "image": {"vae": "none", "buckets": [[SIZE, SIZE]]},
        "model": {**TREE["model"], "latent_channels": 3},
        "sample": {"prompts": prompts, "steps": 2},
        "parallel": {"space_ep": space_ep},
    }
    return config_from_tree({**TREE, **arguments})


def tiny_unet(config: Config) -> RaphaelUNet:
    """Return a model whose images depend on the caption.

    Parameters that are usually initialised to zero get random values, because the last layer would otherwise return zeros.
    """
    torch.manual_seed(0)
    model = RaphaelUNet(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


def prompts_case(spec: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Sample images for spec["prompts"] on all ranks, as validation does.

    Returns:
        "drawn": numbers of the prompts that this rank sampled. "images": all images, on rank 0. "checked": the texts for
        which this rank checked whether the text encoder truncates them.
    """
    config, drawn, draw = config_of_prompts(spec["prompts"], spec["space_ep"]), [], Sampler.draw

    def counting(self: Sampler, requests: list[Request], *args: Any, **kwargs: Any) -> Any:
        drawn.extend(request.index for request in requests)
        return draw(self, requests, *args, **kwargs)

    Sampler.draw = counting  # type: ignore[method-assign]
    engine: Any = SimpleNamespace(module=tiny_unet(config), stage=spec["stage"], device=torch.device("cpu"))
    text: Any = Letters()
    samples = validation.draw_samples(config, ranks, engine, None, text, ImageEncoder.of(None), sample_requests(config))
    return {"drawn": drawn, "images": None if samples is None else samples[0].tolist(), "checked": text.checked}


CASES = {"groups": groups_case, "encoders": encoders_case, "prompts": prompts_case}


def main(spec: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    ranks = discover()
    initialise(ranks)
    seen = CASES[spec["case"]](spec, ranks)
    (Path(spec["folder"]) / f"seen-{ranks.rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
    return 0
