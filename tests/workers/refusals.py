"""Rank process: tries to build runs whose configuration has a mistake, and writes the error messages.

Usage: refusals.py OUT.json CASES.json. CASES.json has {name: overrides}. OUT.json gets {name: error message}, with null if
there was no error.
"""

import json
import sys
from pathlib import Path

from raphael_dist.config.schema import load_config
from raphael_dist.errors import UserError
from raphael_dist.runtime.ranks import discover, initialise
from raphael_dist.runtime.stop_request import StopRequest
from raphael_dist.training import trainer
from tests.lib.launch import leave


def main(out: str, cases: dict[str, list[str]]) -> None:
    ranks = discover()
    device = initialise(ranks)
    messages: dict[str, str | None] = {}
    for name, overrides in cases.items():
        try:
            config = load_config("tests/fixtures/small.yaml", overrides)
            trainer.build(config, {"zero_optimization": {"stage": 1}}, ranks, device, StopRequest())
            messages[name] = None
        except UserError as error:
            messages[name] = str(error)
    Path(out).write_text(json.dumps(messages))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
