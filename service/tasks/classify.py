"""Which task a request is: a static word embedding plus surface features, a calibrated linear classifier, rejection.

The embedding is the mean of wordllama's token vectors (256 dimensions), of unit length. The classifier is multinomial
logistic regression with an L2 penalty, fitted on the catalogue's examples when it is built; its probabilities are
calibrated by temperature scaling (Guo et al. 2017, 1706.04599) on cross-validated scores. What no task claims with
enough probability goes to `general`, whose own examples also teach the classifier what a task is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer

from service.errors import ModelError
from service.tasks.catalogue import GENERAL, Catalogue
from service.tasks.signals import Signals, clip, signals
from service.tasks.surface import surface

MIN_EXAMPLES = 3  # a task with fewer is reached by name only
REJECT_BELOW = 0.5  # calibrated probability under which a task does not get a request
_HEAD, _TAIL = 2_000, 500  # characters of a long text that are embedded
_SURFACE_WEIGHT, _SURFACE_CLIP = 0.2, 4.0
_PENALTY, _BALANCE, _STEPS, _FOLDS = 0.6, 0.5, 100, 5
_SPACE = re.compile(r"\s+")
_SPACED_MARK = re.compile(r"\s+(?=[.,!?;:])")
_LOWER_START = re.compile(r"(?:^|(?<=[.!?] ))[a-z]")


@dataclass(frozen=True, slots=True)
class Classification:
    """The finding for one text.

    Attributes:
        task: where the request goes.
        probability: calibrated probability of `task`.
        scores: calibrated probability of every task that is classified into; they add up to 1.
        rejected: another task was in the lead, but below `REJECT_BELOW`, so the request goes to `general`.
    """

    task: str
    probability: float
    scores: dict[str, float]
    rejected: bool


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A fitted classifier; immutable, safe to share between threads.

    Attributes:
        tasks: ids of the K classes.
        weights: float32 `(256 + S + 1, K)` with S surface features; bias in the last row, temperature divided out.
        mean, scale: float32 `(S,)`, standardise the surface features.
        temperature: the calibration's divisor, for information.
    """

    tasks: tuple[str, ...]
    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    temperature: float

    @classmethod
    def build(cls, catalogue: Catalogue) -> Classifier:
        """Fit on the catalogue's examples; the same catalogue gives the same classifier.

        Raises:
            ModelError: wordllama's embedding table is missing.
        """
        known = [t for t in catalogue.tasks.values() if len(t.examples) >= MIN_EXAMPLES or t.id == GENERAL]
        examples = [_in_both_styles(t.examples) for t in known]
        texts = [x for group in examples for x in group] or [""]
        labels = np.repeat(np.arange(len(known)), [len(group) for group in examples])
        embedded = np.array([embed(x) for x in texts])
        shallow = np.array([surface(x, signals(x)) for x in texts])
        mean, scale = shallow.mean(0), 1 / (shallow.std(0) + 0.05)
        if len(known) == 1:
            weights, temperature = np.zeros((embedded.shape[1] + shallow.shape[1] + 1, 1)), 1.0
        else:
            x = _join(embedded, shallow, mean, scale)
            with threadpool_limits(1, user_api="blas"):  # small matrices: threads only wait, long so on a busy machine
                weights, temperature = _fit(x, labels, len(known)), _temperature(x, labels, len(known))
        weights = (weights / temperature).astype(np.float32)
        return cls(tuple(t.id for t in known), weights, mean, scale, temperature)

    def classify(self, text: str, seen: Signals | None = None) -> Classification:
        """The task of a request's text, whose signals may be given if already known.

        Any text will do; time is bounded however long it is.
        """
        if not text.strip():
            scores = {task: float(task == GENERAL) for task in self.tasks}
            return Classification(GENERAL, 1.0, scores, rejected=False)
        x = _join(embed(text), surface(text, seen or signals(text)), self.mean, self.scale)
        z = x @ self.weights
        p = np.exp(z - z.max())
        scores = dict(zip(self.tasks, (p / p.sum()).tolist(), strict=True))
        leader = max(scores, key=scores.__getitem__)
        rejected = leader != GENERAL and scores[leader] < REJECT_BELOW
        task = GENERAL if rejected else leader
        return Classification(task, scores[task], scores, rejected)


def embed(text: str) -> np.ndarray:
    """Unit-length mean of the token vectors of the text's ends, lower-cased; float32 `(256,)`, zero without tokens."""
    _, table = _wordllama()
    tidy = _SPACED_MARK.sub("", _SPACE.sub(" ", clip(text, _HEAD, _TAIL).lower())).strip()
    if not tidy.isascii():
        tidy = tidy.encode("utf-8", "replace").decode()  # lone surrogates
    ids = [i for word in tidy.split() for i in (_known_word(word) if len(word) < 32 else _word_ids(word))]
    if not ids:
        return np.zeros(table.shape[1], np.float32)
    mean = table[ids].mean(0)
    return mean / max(float(np.sqrt(mean @ mean)), 1e-6)


def _word_ids(word: str) -> tuple[int, ...]:
    """Token ids of one word. No token of this vocabulary spans two words, so a text's ids are those of its words."""
    return tuple(_wordllama()[0].encode(word, add_special_tokens=False).ids)


_known_word = lru_cache(65_536)(_word_ids)


@cache
def _wordllama() -> tuple[Tokenizer, np.ndarray]:
    """wordllama's tokenizer and table, float32 `(32000, 256)`, from its installed files.

    Its package is not imported: that would configure the root logger and cost more than the rest of the build.
    """
    spec = find_spec("wordllama")
    root = Path(spec.origin).parent if spec and spec.origin else Path("wordllama")
    weights = root / "weights" / "l2_supercat_256.safetensors"
    vocabulary = root / "tokenizers" / "l2_supercat_tokenizer_config.json"
    for file in (weights, vocabulary):
        if not file.is_file():
            raise ModelError(f"wordllama's embedding is not there: looked for {file}")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, load_file(weights)["embedding.weight"].astype(np.float32)


def _in_both_styles(examples: tuple[str, ...]) -> list[str]:
    """The examples; one with spaces before its marks, as in tokenised corpora, also as people write it."""
    texts = []
    for text in examples:
        natural = _SPACED_MARK.sub("", text)
        texts += [text] if natural == text else [text, _LOWER_START.sub(lambda m: m.group().upper(), natural)]
    return texts


def _join(embedded: np.ndarray, shallow: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Classifier input `(..., 256 + S + 1)`: embedding, standardised surface features, 1 for the bias."""
    shallow = np.clip((shallow - mean) * scale, -_SURFACE_CLIP, _SURFACE_CLIP) * np.float32(_SURFACE_WEIGHT)
    return np.concatenate((embedded, shallow, np.ones((*embedded.shape[:-1], 1), np.float32)), axis=-1)


def _fit(x: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Multinomial logistic regression, `(n, d)` and `(n,)` -> weights `(d, K)`.

    Newton steps with the fixed bound on the Hessian of Boehning (1992), 1/2 X'SX + penalty, accelerated by Nesterov's
    momentum; classes are weighted by their size to the power -1/2, so that large ones lead without drowning small ones.
    """
    x = x.astype(np.float64)
    counts = np.bincount(labels, minlength=classes)
    importance = ((len(labels) / classes / np.maximum(counts, 1)) ** _BALANCE)[labels][:, None]
    penalty = np.full((x.shape[1], 1), _PENALTY)
    penalty[-1] = 1e-3  # the bias
    step = np.linalg.inv(0.5 * (x * importance).T @ x + np.diag(penalty[:, 0]))
    target = np.eye(classes)[labels]
    weights = ahead = np.zeros((x.shape[1], classes))
    for i in range(_STEPS):
        gradient = x.T @ ((_softmax(x @ ahead) - target) * importance) + penalty * ahead
        weights, previous = ahead - step @ gradient, weights
        ahead = weights + i / (i + 3) * (weights - previous)
    return weights


def _temperature(x: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Divisor of the scores, in [0.25, 4], that minimises the cross-validated negative log-likelihood."""
    order = np.concatenate([np.arange(n) for n in np.bincount(labels, minlength=classes)])  # within each class
    scores = np.empty((len(labels), classes))
    for fold in range(_FOLDS):
        held = order % _FOLDS == fold
        scores[held] = x[held] @ _fit(x[~held], labels[~held], classes)
    grid = np.geomspace(0.25, 4, 49)
    rows = np.arange(len(labels))
    losses = [-np.log(_softmax(scores / t)[rows, labels] + 1e-12).mean() for t in grid]
    return float(grid[int(np.argmin(losses))])


def _softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
