"""The classifier experiment: does a word's path through the space experts tell which word it is? (The paper's XGBoost.)

Each word of each caption gives a path, an expert for each block; words are the classes. Folds are made of captions, not of
words, so that the copies of a caption's path never stand on both sides.
Shape legend: S samples, L transformer blocks, K experts.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raphael_dist.errors import UserError

FOLDS = 5
ENOUGH = 2 * FOLDS  # captions that a word must occur in
MAX_PER_WORD = 60  # samples of a word, so that a frequent one does not decide


@dataclass(frozen=True, eq=False)
class Samples:
    """Paths int [S, L] with the number of their word in `words`, int [S], and of their caption, int [S]."""

    paths: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    words: list[str]


@dataclass(frozen=True)
class Outcome:
    """What a classifier reached over the folds: mean accuracy and its deviation between folds, in 0..1.

    chance: accuracy of naming the most frequent word. shuffled: accuracy with labels that were shuffled.
    """

    accuracy: float
    deviation: float
    chance: float
    shuffled: float
    words: int
    samples: int


def gather(found: Sequence[tuple[str, int, list[int]]], only: Sequence[str] = (), max_words: int = 100) -> Samples:
    """Choose what to classify of (word, caption, path): the most frequent words that occur in enough captions.

    only: take these words alone, as far as they are there. UserError: fewer than two are left.
    """
    by_word: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for word, caption, path in found:
        if not only or word in only:
            by_word[word].setdefault(caption, path)
    enough = [word for word, of in by_word.items() if len(of) >= ENOUGH]
    words = sorted(sorted(enough), key=lambda word: -len(by_word[word]))[:max_words]
    if len(words) < 2:
        raise UserError(f"the classifier needs two words in {ENOUGH} captions or more each; there are {len(words)}")
    rows = [(path, n, c) for n, word in enumerate(words) for c, path in list(by_word[word].items())[:MAX_PER_WORD]]
    paths, labels, groups = zip(*rows, strict=True)
    return Samples(np.array(paths), np.array(labels), np.array(groups), words)


def classify(samples: Samples, seed: int = 0, rounds: int = 20, threads: int = 1) -> Outcome:
    """Train XGBoost on the paths, one-hot, in five folds of captions; and once more on shuffled labels.

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
        raise UserError('the classifier needs XGBoost: run `pip install "raphael_dist[eval]"`') from None
    features = (paths_SL[:, :, None] == np.arange(paths_SL.max() + 1)).reshape(len(paths_SL), -1).astype(np.float32)
    fold_of = {group: number % FOLDS for number, group in enumerate(np.random.default_rng(0).permutation(np.unique(groups)))}
    fold = np.array([fold_of[group] for group in groups])
    scores = []
    for held_out in range(FOLDS):
        train, test = fold != held_out, fold == held_out
        known = np.unique(labels[train])  # XGBoost wants classes without a gap
        model = XGBClassifier(n_estimators=rounds, max_depth=4, learning_rate=0.3, n_jobs=threads, tree_method="hist")
        model.fit(features[train], np.searchsorted(known, labels[train]))
        scores.append(float(np.mean(known[model.predict(features[test])] == labels[test])))
    return scores
