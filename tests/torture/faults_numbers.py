"""Non-finite losses and gradients, spikes, and checkpoints whose weights only give bad steps."""

import json
import shutil
import signal

from raphael_dist.checkpoint.folders import step_of
from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.errors import EXIT_NON_FINITE, EXIT_NOT_SAVED
from tests.torture.faults_process import at_random, send
from tests.torture.kinds import fault
from tests.torture.trial import EVERY, STEPS, WORLD, Outcome, Trial, checkpoints, refused, sums, survived

G = 12
SPACE_W1 = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe.w1"


@fault("a non-finite loss or gradient, then a kill", "numbers")
def bad_step_and_kill(trial: Trial) -> Outcome:
    """The oracle is the same run with the bad step, without the kill."""
    step = trial.draw.randrange(1, STEPS)
    if trial.draw.random() < 0.5:
        faults = {"nan": trial.draw.sample(range(step * G, (step + 1) * G), trial.draw.randint(1, 3))}
    else:
        faults = {"inf_grad": {"ranks": [trial.draw.randrange(WORLD)], "steps": [step + 1], "name": SPACE_W1}}
    undisturbed = trial.run
    codes = trial.train(faults=faults)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    assert f"step {step + 1} was skipped" in trial.log, "the step was not skipped, or not logged"
    trial.oracle = undisturbed.rename(trial.folder / "undisturbed")
    saved = [step_of(folder) for folder in checkpoints(trial.oracle)]
    assert step + 1 not in saved or step + 1 == STEPS, "a checkpoint was published between skipped steps"
    victim = trial.draw.randrange(WORLD)
    codes = trial.train(at_random(trial, lambda pids: send(pids[victim], signal.SIGKILL) and None), faults=faults)
    trial.newest()
    trial.finish(faults=faults)
    return survived(f"step {step + 1} skipped; killed with codes {codes}")


@fault("losses that stay non-finite", "numbers")
def never_finite(trial: Trial) -> Outcome:
    at = trial.begin(at=trial.draw.choice([0, 2, 4]))
    first = trial.draw.randrange(at, at + 3)
    faults = {"nan": [step * G + trial.draw.randrange(G) for step in range(first, first + 12)]}
    line = trial.check_refused(trial.train(faults=faults, sections={"train": {"max_steps": 12}}), (EXIT_NON_FINITE,))
    assert "train.max_skipped" in line
    newest = trial.newest()
    quarantined = trial.run / "checkpoints" / f"damaged-step-{at:08d}"  # if no step from it was good
    assert newest >= at or quarantined.is_dir(), f"the checkpoint of step {at} is gone, the newest is {newest}"
    before = trial.snapshot()
    codes = trial.train(faults=faults, sections={"train": {"max_steps": 12}})  # again, from the checkpoint
    assert codes == [EXIT_NON_FINITE] * WORLD, f"exit codes {codes}:\n{trial.output}"
    was, remaining = (
        {name.split("/")[0].removeprefix("damaged-") for name in names} for names in (before, trial.snapshot())
    )
    assert was <= remaining, "a checkpoint is gone"
    for folder in (trial.run / "checkpoints").glob("damaged-step-*"):
        if not (trial.run / "checkpoints" / folder.name.removeprefix("damaged-")).exists():
            folder.rename(folder.with_name(folder.name.removeprefix("damaged-")))
    return refused(line[:160])


@fault("a NaN in weights or their average when they are saved", "numbers")
def nan_in_state(trial: Trial) -> Outcome:
    trial.begin(at=trial.draw.choice([0, 2]))
    rank = trial.draw.randrange(WORLD)
    if trial.draw.random() < 0.5:
        codes = trial.train(around={rank: {"ema": STEPS}})
        what = "the average"
    else:
        codes = trial.train(faults={"saving": [{"ranks": [rank], "step": STEPS, "nan_weight": True}]})
        what = "a weight"
    line = trial.check_refused(codes, (EXIT_NOT_SAVED,))
    assert "is not finite" in line
    assert trial.newest() == STEPS - EVERY
    trial.finish()
    return refused(f"{what} of rank {rank}: {line.replace(str(trial.run), '')[:160]}")


@fault("a checkpoint whose weights only give bad steps", "numbers")
def poisoned(trial: Trial) -> Outcome:
    from tests.training.test_step_guard import poison

    at = trial.begin(at=trial.draw.choice([4, 6]))
    poison(trial.run, at)
    codes = trial.train(sections={"train": {"max_steps": STEPS + 6}})
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    assert f"No step after step {at} was good" in trial.log
    assert (trial.run / "checkpoints" / f"damaged-step-{at:08d}").is_dir()
    newest = checkpoints(trial.run)[-1]
    reader = CheckpointReader(newest)
    assert reader.integrity_error() is None
    # Three batches were used on the bad weights; none is used twice.
    assert reader.manifest["samples_seen"] == (reader.step + 3 + EVERY) * G
    return survived(f"step {at} quarantined, continued to step {reader.step}")


@fault("a spike that is rolled back, then a kill", "numbers")
def spike(trial: Trial) -> Outcome:
    """The oracle is the same run with the spike, without the kill."""
    at = 14
    sections = {
        "train": {"max_steps": at + 4, "spike_action": trial.draw.choice(["rollback", "skip"]), "spike_sigma": 8.0},
        "checkpoint": {"every": 4, "background": False},
    }
    faults = {"spike": [(at - 1) * G + trial.draw.randrange(G)]}
    codes = trial.train(faults=faults, sections=sections)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    assert "is a spike" in trial.log
    undisturbed = trial.run.rename(trial.folder / "undisturbed")
    victim, last = trial.draw.randrange(WORLD), f"step-{at + 4:08d}"
    codes = trial.train(
        at_random(trial, lambda p: send(p[victim], signal.SIGKILL) and None), faults=faults, sections=sections
    )
    if not (trial.run / "checkpoints" / last).exists():
        again = trial.train(faults=faults, sections=sections)
        assert again == [0] * WORLD, f"exit codes {again}:\n{trial.output}"
    assert sums(trial.run / "checkpoints" / last) == sums(undisturbed / "checkpoints" / last), (
        "the spike was judged otherwise"
    )
    seen = [json.loads((d / "checkpoints" / last / MANIFEST).read_text())["samples_seen"] for d in (trial.run, undisturbed)]
    assert seen[0] == seen[1]
    shutil.rmtree(undisturbed)
    return survived(f"{sections['train']['spike_action']}, killed with codes {codes}")
