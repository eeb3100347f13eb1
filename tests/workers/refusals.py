"""One rank: tries to build runs with a mistake each and writes the message that each is refused with.

Usage: refusals.py OUT.json CASES.json, cases {name: overrides}; a case that is accepted gives null.
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
