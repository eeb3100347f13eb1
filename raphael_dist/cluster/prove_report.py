"""Judges what all ranks report to the command `prove`, which tests a cluster; writes report.json and report.html.

report.html needs no other files.
"""

import datetime
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from raphael_dist.cluster.preflight_report import judge
from raphael_dist.cluster.prove_results import Outcome
from raphael_dist.errors import EXIT_USER_ERROR
from raphael_dist.storage.files import replace_bytes
from raphael_dist.text import JsonObject, counted

FORMAT = 1
EXIT_WRONG_NUMBERS = 3
GREEN, AMBER, RED, NOT_PROVEN = "green", "amber", "red", "not proven"
NOT_RUN = "not run"
# Properties that `prove` cannot check.
NEVER_PROVEN = ("learning: a long run on real data", "the failure of a real node in the middle of a run")


@dataclass
class CheckReport:
    """The result of one check of `prove` on all ranks.

    Attributes:
        name, title: name of the check, and its title in the report.
        status: GREEN (passed), AMBER (passed with warnings), RED (failed), NOT_PROVEN (cannot run on this machine) or
            NOT_RUN.
        code: exit code of this check: 0, 2 (bad environment) or 3 (wrong numbers).
        lines: what was measured, as lines of text.
        problems: what is wrong, on which rank and node.
        not_proven: what could not be checked on this machine, and why.
        values: measured numbers of rank 0, by name.
        seconds: longest duration on a rank.
        joined: whether all ranks could exchange data; if not, no further check can run.
    """

    name: str = ""
    title: str = ""
    status: str = NOT_RUN
    code: int = 0
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_proven: list[str] = field(default_factory=list)
    values: JsonObject = field(default_factory=dict)
    seconds: float = 0.0
    joined: bool = True

    def text(self) -> list[str]:
        """Return status, problems and measurements of the check as lines for a terminal."""
        head = f"{self.status.upper():<11}{self.title} ({self.seconds:.0f} s)"
        return [head, *(f"  PROBLEM: {p}" for p in self.problems), *(f"  {line}" for line in self.lines)]


@dataclass
class ProveReport:
    """The results of all checks of the command `prove` in one environment.

    Attributes:
        environment: hosts, versions of packages, configuration and git commit.
        checks: the result of each check, including checks that have not been run.
    """

    environment: JsonObject
    checks: list[CheckReport]

    @property
    def exit_code(self) -> int:
        """The exit code: 3 if numbers are wrong; else 2 if the environment is bad or a check did not run or finish; else 0.

        A check that cannot run on this machine (NOT_PROVEN) does not change the exit code.
        """
        codes = {check.code if check.status != NOT_RUN else EXIT_USER_ERROR for check in self.checks}
        return max(codes, default=0)

    def finished(self) -> list[str]:
        """Return the names of the checks that need not be repeated: GREEN (passed) or NOT_PROVEN (impossible here)."""
        return [check.name for check in self.checks if check.status in (GREEN, NOT_PROVEN)]

    def add(self, check: CheckReport) -> None:
        """Store `check`, the new result of a check, in place of the earlier result with the same name."""
        self.checks = [check if other.name == check.name else other for other in self.checks]

    def write(self, folder: Path) -> None:
        """Write the results to report.json and report.html in a folder, replacing earlier files atomically."""
        tree = {"format": FORMAT, "key": key_of(self.environment), "exit_code": self.exit_code, **asdict(self)}
        tree["written"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        tree["never_proven"] = NEVER_PROVEN
        replace_bytes(folder / "report.json", json.dumps(tree, indent=1).encode(), durable=False)
        replace_bytes(folder / "report.html", html(tree).encode(), durable=False)


def key_of(environment: JsonObject) -> str:
    """Return a checksum of an environment (hosts, versions, configuration). If it changes, all checks are repeated."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]


def open_report(folder: Path, environment: JsonObject, titles: dict[str, str]) -> ProveReport:
    """Return the report stored in a folder if it was made in the same environment, else a new report without results.

    Args:
        folder: folder with report.json.
        environment: hosts, versions and configuration of this run.
        titles: titles of all checks, by name.
    """
    report = ProveReport(environment, [CheckReport(name, title) for name, title in titles.items()])
    try:
        tree = json.loads((folder / "report.json").read_text())
        if tree["format"] == FORMAT and tree["key"] == key_of(environment):
            for check in tree["checks"]:
                report.add(CheckReport(**check))
    except (OSError, ValueError, KeyError, TypeError):  # missing or incomplete
        pass
    return report


def judge_environment(outcomes: list[Outcome | None], hosts: list[str]) -> CheckReport:
    """Evaluate the preflight (tests of all nodes before a training starts) as a check of `prove`.

    Args:
        outcomes: how the preflight ended, by rank; None for a rank whose supervising process (agent) did not answer. A
            result is the content of the report file of the rank (`preflight.Probe.report`).
        hosts: host name of each rank.
    """
    probes = [outcome.result for outcome in outcomes if outcome is not None and outcome.result]
    if not probes:
        problems = _silent(outcomes, hosts) or ["no rank left a report"]
        return CheckReport(status=RED, code=EXIT_USER_ERROR, problems=problems, joined=False)
    verdict = judge(probes, len(hosts), list(dict.fromkeys(hosts)))
    problems = [f"{node}: {text}" for node, texts in verdict.faults.items() for text in texts]
    joined = len(probes) == len(hosts) and all("all_reduce" in probe for probe in probes)
    status = RED if problems else AMBER if verdict.warnings else GREEN
    code = EXIT_USER_ERROR if problems else 0
    return CheckReport(status=status, code=code, lines=verdict.lines, problems=problems + verdict.warnings, joined=joined)


def judge_check(outcomes: list[Outcome | None], hosts: list[str], environment: bool, expects_kill: bool) -> CheckReport:
    """Combine the outcomes of a check on all ranks that ran it into one result.

    Args:
        outcomes: how the check ended, by rank; None for a rank whose supervising process (agent) did not answer.
        hosts: host name of each rank.
        environment: whether a failure means a bad environment, not wrong numbers.
        expects_kill: whether the check kills its own processes on all ranks. It passes only if all of them were killed.
    """
    silent = _silent(outcomes, hosts)
    answered = [outcome for outcome in outcomes if outcome is not None]
    if expects_kill and not silent and all(o.last == "killed" and "ended with" in o.why for o in answered):
        ranks = counted(len(answered), "rank")
        return CheckReport(status=GREEN, lines=[f"killed while a checkpoint was being written: {ranks}"])
    unfinished = silent or _unfinished([outcome for outcome in answered if outcome.result is None])
    if unfinished:
        return CheckReport(status=RED, code=EXIT_USER_ERROR, problems=unfinished)
    results = [outcome.result for outcome in answered if outcome.result is not None]
    pairs = [(o, p) for o, result in zip(answered, results, strict=True) for p in result["problems"]]
    problems = _named([(o, p) for o, p in pairs if not p["amber"]])
    warnings = _named([(o, p) for o, p in pairs if p["amber"]])
    lines, not_proven = results[0]["lines"], results[0]["not_proven"]
    status = RED if problems else AMBER if warnings else GREEN if lines else NOT_PROVEN
    code = 0 if not problems else EXIT_USER_ERROR if environment else EXIT_WRONG_NUMBERS
    return CheckReport(
        status=status,
        code=code,
        lines=lines,
        problems=problems + warnings,
        not_proven=not_proven,
        values=results[0]["values"],
    )


def _silent(outcomes: list[Outcome | None], hosts: list[str]) -> list[str]:
    lost = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
    return [f"rank {rank} on {hosts[rank]} does not answer: its node hangs or is gone" for rank in lost]


def _unfinished(outcomes: list[Outcome]) -> list[str]:
    """Return lines that name the ranks because of which a check did not finish: those that died or failed.

    If no rank died or failed, the lines name the ranks that sent the fewest progress messages. Ranks that only waited for
    others are not named. `outcomes`: the outcomes of all ranks that did not finish.
    """
    if not outcomes:
        return []
    late = [o for o in outcomes if o.why.startswith("not finished")]
    failed = [o for o in outcomes if not o.why.startswith(("not finished", "stopped"))]
    if late:  # their processes were killed, so that others lost their connection
        failed = [o for o in failed if not re.search("(closed|reset) by peer", o.why)]
    # The death of a rank makes others fail in a collective: a process that ended by itself comes first.
    died = [o for o in failed if o.why.startswith("its process ended")]
    if died or failed:
        return [f"rank {o.rank} on {o.node}: {o.why}, at {o.last!r}" for o in died or failed]
    least, most = min(o.marks for o in outcomes), max(o.marks for o in outcomes)
    if least == most:
        return [f"all ranks hang at {outcomes[0].last!r}: {late[0].why if late else outcomes[0].why}"]
    ahead = next(o.last for o in outcomes if o.marks == most)
    behind = [o for o in outcomes if o.marks == least]
    return [f"rank {o.rank} on {o.node} hangs at {o.last!r}; others are at {ahead!r}" for o in behind]


def _named(pairs: list[tuple[Outcome, JsonObject]]) -> list[str]:
    """Return one line per text of a problem, with the ranks that reported this text.

    `pairs`: (outcome of a rank, fields of a `Problem`). If a rank caused its problem itself (`Problem.own`), only such
    problems are listed, because the others can follow from them.
    """
    own = [(o, p) for o, p in pairs if p["own"]]
    ranks: dict[str, list[str]] = {}
    for outcome, problem in own or pairs:
        ranks.setdefault(problem["text"], []).append(f"rank {outcome.rank} on {outcome.node}")
    lines = [f"{', '.join(names[:4])}{' and others' * (len(names) > 4)}: {text}" for text, names in ranks.items()]
    effects = {o.rank for o, _ in pairs} - {o.rank for o, _ in own}
    if own and effects:
        lines.append(f"problems of {counted(len(effects), 'other rank')}, which can follow from this one, are not listed")
    return lines


_STYLE = """
body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
.tile{display:inline-block;padding:.3em .7em;margin:.2em;border-radius:.3em;color:#fff}
.green{background:#2a7d2a}.amber{background:#b36b00}.red{background:#b3261e}.none{background:#777}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}
pre{white-space:pre-wrap;background:#f4f4f4;padding:.6em}.problem{color:#b3261e;font-weight:bold}
"""
_VERDICTS = {
    0: (GREEN, "All checks that could run here passed"),
    EXIT_USER_ERROR: (RED, "The environment is bad, or a check did not finish"),
    EXIT_WRONG_NUMBERS: (RED, "Numbers are wrong: do not train here"),
}


def html(tree: JsonObject) -> str:
    """Return the report of the command `prove` as HTML: the status of each check, details, and checks that could not run.

    `tree`: the content of report.json.
    """
    colour, verdict = _VERDICTS[tree["exit_code"]]
    if colour == GREEN and any(check["status"] == AMBER for check in tree["checks"]):
        colour = AMBER
    tiles = "".join(
        f'<a class="tile {_css(check["status"])}" href="#{escape(check["name"])}">{escape(check["title"])}: '
        f"{escape(check['status'])}</a>"
        for check in tree["checks"]
    )
    missing = [*_not_proven(tree["checks"]), *tree["never_proven"]]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>raphael_dist: proof</title><style>{_STYLE}</style>'
        f'<h1>raphael_dist on this cluster</h1><p class="tile {_css(colour)}">{verdict} (exit code {tree["exit_code"]})</p>'
        f"<p>{tiles}</p><p>Written {tree['written']}</p><h2>Details</h2>"
        + "".join(map(_details, tree["checks"]))
        + "<h2>What was not proven here</h2><ul>"
        + "".join(f"<li>{escape(text)}</li>" for text in missing)
        + "</ul><h2>Environment</h2>"
        + _environment(tree["environment"])
        + "</html>"
    )


def _css(status: str) -> str:
    return status if status in (GREEN, AMBER, RED) else "none"


def _not_proven(checks: list[JsonObject]) -> list[str]:
    """Return lines of text: properties that could not be tested on this machine, and checks that did not run or failed."""
    reasons = [text for check in checks for text in check["not_proven"]]
    return reasons + [f"{check['title']}: {check['status']}" for check in checks if check["status"] in (NOT_RUN, RED)]


def _details(check: JsonObject) -> str:
    problems = "".join(f'<p class="problem">{escape(text)}</p>' for text in check["problems"])
    lines = escape("\n".join(check["lines"] + [f"not proven: {text}" for text in check["not_proven"]]))
    name, status = escape(check["name"]), escape(check["status"])
    head = f'<h3 id="{name}"><span class="tile {_css(check["status"])}">{status}</span> '
    return f"{head}{escape(check['title'])} ({check['seconds']:.0f} s)</h3>{problems}" + (
        f"<pre>{lines}</pre>" if lines else ""
    )


def _environment(environment: JsonObject) -> str:
    ranks = [rank or {} for rank in environment["ranks"]]
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["rank", *names])
    rows = "".join(
        f"<tr><td>{number}</td>" + "".join(f"<td>{escape(str(rank.get(name, '?')))}</td>" for name in names) + "</tr>"
        for number, rank in enumerate(ranks)
    )
    return f"<table><tr>{head}</tr>{rows}</table><p>Commit: {escape(environment['commit'] or 'unknown')}</p>"
