"""Classify words by the space experts that process them, which repeats the paper's XGBoost experiment.

    python tools/classify_paths.py --checkpoint models/emoji --words captions adjectives verbs

In each transformer block, a gate chooses a space expert for each word of a caption. A sample of the classifier is one word
of one caption. Its features are its path: the chosen space expert in each block. Its class is the word. All captions with
equal text are in the same cross-validation fold, so that no caption is in both training and test data.

Shape legend: S samples, L transformer blocks, K experts.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.config.types import WEIGHTS
from raphael_dist.errors import UserError, run_command

CAPTIONS = 2000  # read at most
FOLDS = 5
MIN_CAPTIONS = 2 * FOLDS  # a word must occur in this many captions
MAX_PER_WORD = 60  # samples of a word, so that frequent words do not dominate


@dataclass(frozen=True, eq=False)
class Samples:
    """S samples for the classifier, each a word of a caption. L: number of transformer blocks.

    Attributes:
        paths: number of the space expert that the gate of each block chose for the word, int [S, L].
        labels: the word, as an index into `words`, int [S].
        groups: number of the caption, int [S].
        words: the classes.
    """

    paths: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    words: list[str]


@dataclass(frozen=True)
class Outcome:
    """Accuracy of a classifier over the cross-validation folds, in 0..1.

    Attributes:
        accuracy, deviation: mean and standard deviation over folds.
        chance: accuracy of always predicting the most frequent word.
        shuffled: accuracy with shuffled labels.
        words, samples: number of classes and of samples.
    """

    accuracy: float
    deviation: float
    chance: float
    shuffled: float
    words: int
    samples: int


def gather(paths: Sequence[tuple[str, int, list[int]]], only: Sequence[str] = (), max_words: int = 100) -> Samples:
    """Return the samples of the most frequent words. Words in fewer than MIN_CAPTIONS captions are left out.

    Args:
        paths: for each word of each caption: (word, number of the caption, space expert in each block).
        only: use only these words; empty: all.
        max_words: largest number of words.

    Raises:
        UserError: fewer than two words are left.
    """
    by_word: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for word, caption, path in paths:
        if not only or word in only:
            by_word[word].setdefault(caption, path)
    frequent = [word for word, path_of in by_word.items() if len(path_of) >= MIN_CAPTIONS]
    words = sorted(sorted(frequent), key=lambda word: -len(by_word[word]))[:max_words]
    if len(words) < 2:
        raise UserError(
            f"--words requires at least two words that occur in {MIN_CAPTIONS} captions each, but the number of such words "
            f"is {len(words)}. Give more shards with --captions SHARDS, or choose other --words."
        )
    rows = [(path, n, c) for n, word in enumerate(words) for c, path in list(by_word[word].items())[:MAX_PER_WORD]]
    path_rows, labels, groups = zip(*rows, strict=True)
    return Samples(np.array(path_rows), np.array(labels), np.array(groups), words)


def classify(samples: Samples, seed: int = 0, rounds: int = 20, threads: int = 1) -> Outcome:
    """Train XGBoost to predict words from their paths, and again with shuffled labels; return the accuracies.

    The experts in a path are one-hot encoded. There are FOLDS cross-validation folds of captions.

    Args:
        samples: words with their paths.
        seed: seed for shuffling labels.
        rounds: number of trees per class.
        threads: CPU threads of XGBoost.

    Raises:
        UserError: xgboost is not installed.
    """
    labels = samples.labels
    scores = _folds(samples.paths, labels, samples.groups, rounds, threads)
    shuffled = np.random.default_rng(seed).permutation(labels)
    of_shuffled = _folds(samples.paths, shuffled, samples.groups, rounds, threads)
    most = Counter(labels.tolist()).most_common(1)[0][1] / len(labels)
    return Outcome(
        float(np.mean(scores)), float(np.std(scores)), most, float(np.mean(of_shuffled)), len(samples.words), len(labels)
    )


def _folds(paths_SL: np.ndarray, labels: np.ndarray, groups: np.ndarray, rounds: int, threads: int) -> list[float]:
    try:
        from xgboost import XGBClassifier
    except ImportError:
        raise UserError(
            "the classifier requires the package xgboost, but it is not installed. Run `pip install 'raphael_dist[eval]'`."
        ) from None
    features = (paths_SL[:, :, None] == np.arange(paths_SL.max() + 1)).reshape(len(paths_SL), -1).astype(np.float32)
    fold_of = {group: number % FOLDS for number, group in enumerate(np.random.default_rng(0).permutation(np.unique(groups)))}
    fold = np.array([fold_of[group] for group in groups])
    scores = []
    for held_out in range(FOLDS):
        train, test = fold != held_out, fold == held_out
        known = np.unique(labels[train])  # XGBoost requires class numbers without a gap
        model = XGBClassifier(n_estimators=rounds, max_depth=4, learning_rate=0.3, n_jobs=threads, tree_method="hist")
        model.fit(features[train], np.searchsorted(known, labels[train]))
        scores.append(float(np.mean(known[model.predict(features[test])] == labels[test])))
    return scores


# Adjectives and verbs, as in the paper, in short captions; the lists are our own.
ADJECTIVES = """
    red orange yellow green blue purple pink brown black white grey golden silver dark bright pale
    big small tiny huge tall short long wide narrow thick thin round square flat deep steep
    hot cold warm cool wet dry hard soft smooth rough sharp blunt heavy light strong weak
    old young new ancient modern fresh rotten ripe raw clean dirty dusty muddy shiny dull rusty
    happy sad angry calm brave shy proud lonely tired sleepy hungry thirsty gentle fierce friendly wild
    quiet loud fast slow empty full open closed broken whole wooden metallic golden glassy woolen leathery
    striped spotted plain fancy curly
""".split()  # noqa: SIM905
NOUNS = "cat dog horse house car tree flower boat hat cup chair bird".split()  # noqa: SIM905
VERBS = """
    runs walks jumps swims flies climbs dances sings sleeps eats drinks cooks reads writes paints draws
    laughs cries smiles shouts whispers listens waits sits stands kneels falls rolls slides spins
    throws catches kicks pushes pulls lifts carries drops digs builds breaks cuts folds ties
    rides drives sails rows hunts fishes plants waters sweeps washes cleans repairs opens closes
    plays wins loses fights hides seeks points waves claps prays
""".split()  # noqa: SIM905
SUBJECTS = ("a man", "a woman", "a child", "an old man", "a girl", "a boy", "a farmer", "a sailor", "a teacher", "a monkey")


def adjective_captions() -> list[str]:
    """Return the captions "a ADJECTIVE NOUN" for every pair of ADJECTIVES and NOUNS."""
    return [f"a {adjective} {noun}" for adjective, noun in product(dict.fromkeys(ADJECTIVES), NOUNS)]


def verb_captions() -> list[str]:
    """Return the captions "SUBJECT VERB" for every pair of SUBJECTS and VERBS."""
    return [f"{subject} {verb}" for subject, verb in product(SUBJECTS, dict.fromkeys(VERBS))]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        prog="classify_paths.py",
        example="python tools/classify_paths.py --checkpoint models/emoji",
        description="Train a classifier that identifies a word by its path, the space experts that process it.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, step-* folder or exported pipeline")
    parser.add_argument(
        "--words",
        nargs="+",
        choices=("captions", "adjectives", "verbs"),
        default=["captions"],
        help="words to identify (default: captions)",
    )
    parser.add_argument(
        "--captions", nargs="+", metavar="SHARDS", help="shards whose captions are used (default: data.shards of the run)"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="weights to use: moving average (ema) or last (master); default: ema if present"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Classify words and print a table of accuracies. Raises UserError for mistakes that the user can correct."""
    import torch

    from raphael_dist.analysis.gate_routes import collect_word_paths
    from raphael_dist.data.sequential_samples import read_samples
    from raphael_dist.sampling.load_model import load_trained

    trained = load_trained(args.checkpoint, args.weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = trained.config
    if not config.model.space_experts:
        raise UserError(
            f"--checkpoint {args.checkpoint} must be a model with space experts, which a gate chooses for words, but "
            "model.space_experts is 0. Use another checkpoint."
        )
    print("| words | classes | samples | accuracy | chance (most frequent) | shuffled |\n|---|---|---|---|---|---|")
    for kind in args.words:
        only: Sequence[str] = ()
        if kind == "captions":
            shards, option = args.captions or config.data.shards, "--captions" if args.captions else "data.shards"
            samples = read_samples(shards, config.data.cache_dir, (8, 8), option, limit=CAPTIONS)
            captions = [sample.captions[0] for sample in samples]
        elif kind == "adjectives":
            captions, only = adjective_captions(), ADJECTIVES
        else:
            captions, only = verb_captions(), VERBS
        o = classify(gather(collect_word_paths(trained.model, trained.sampler.text, captions), only))
        accuracy = f"{o.accuracy:.1%} +- {o.deviation:.1%}"
        print(f"| {kind} | {o.words} | {o.samples} | {accuracy} | {o.chance:.1%} | {o.shuffled:.1%} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
