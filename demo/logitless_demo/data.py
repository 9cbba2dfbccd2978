"""Text to tokens to batches. A batch is a pure function of (tokens, seed, step), so a run can be resumed anywhere."""

from __future__ import annotations

import glob
import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitless_demo.checkpoint import atomic_write
from logitless_demo.errors import InputError

# Folders of the standard library that are tests, tables, tools or other people's packages.
STDLIB_NOISE = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip
HELD_OUT_FRACTION = 0.05
# A file is cut at line ends into documents no longer than this, shorter where there is little text, so that even one
# file has documents to hold out.
LONGEST_DOCUMENT = 65_536
SHORTEST_CUT = 512

# Independent streams of random numbers drawn from one seed.
WEIGHT_STREAM, ORDER_STREAM, GRADIENT_STREAM = range(3)


@dataclass(frozen=True)
class Tokenizer:
    """What is needed of a tokenizer.

    Attributes:
        name: tells its ids from those of another tokenizer.
        vocabulary: number of ids, V.
        begin: id put before each document.
        encode: text to ids, without `begin`.
    """

    name: str
    vocabulary: int
    begin: int
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and tokens held out, split by document.

    Attributes:
        key: hash of the tokenizer's name and the text.
        vocabulary: number of token ids, V.
        train: `[tokens]`, int32.
        held_out: `[tokens]`, int32.
    """

    key: str
    vocabulary: int
    train: NDArray[np.int32]
    held_out: NDArray[np.int32]


def derived_seed(seed: int, stream: int, index: int) -> int:
    """Returns a 63-bit seed that depends on all three numbers and on nothing else."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def tekken() -> Tokenizer:
    """Loads the 131,072-token tekken tokenizer that mistral-common ships."""
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekkenizer = Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")
    return Tokenizer(
        name="tekken_240911",
        vocabulary=tekkenizer.n_words,
        begin=tekkenizer.bos_id,
        encode=lambda text: tekkenizer.encode(text, bos=False, eos=False),
    )


def find_files(text: str | None) -> list[Path]:
    """Returns the files to read, sorted.

    Args:
        text: a file, a folder (all files under it that are not hidden), a glob, or None for Python's standard library.

    Raises:
        InputError: there is no such file.
    """
    if text is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            path for path in root.rglob("*.py") if STDLIB_NOISE.isdisjoint(path.relative_to(root).parts)
        ]  # fmt: skip
        remedy = "give text of your own with --text"
    elif Path(text).is_dir():
        root = Path(text)
        files = [path for path in root.rglob("*") if not _hidden(path.relative_to(root)) and path.is_file()]
        remedy = "give a folder with text files in it"
    else:
        files = [path for path in map(Path, glob.glob(text, recursive=True)) if path.is_file()]  # noqa: PTH207
        remedy = "give an existing file, folder or glob"
    if not files:
        raise InputError(f"--text: no files found at {text or sysconfig.get_path('stdlib')}: {remedy}")
    return sorted(files)


def load_corpus(text: str | None, tokenizer: Tokenizer, cache: Path) -> Corpus:
    """Reads text and tokenizes it, or takes the tokens from the cache when the text has been seen before.

    The split depends on the text alone, so that runs with different seeds can be compared by held-out loss.

    Args:
        text: what `find_files` takes.
        tokenizer: makes ids of text.
        cache: folder for token files, named by `Corpus.key`; made if missing.

    Raises:
        InputError: there are no files, or none of them is UTF-8 text.
    """
    files = find_files(text)
    digest = hashlib.sha256(f"{tokenizer.name}/{HELD_OUT_FRACTION}/{LONGEST_DOCUMENT}/{SHORTEST_CUT}".encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"\0{len(content)}\0".encode())
        digest.update(content)
    key = digest.hexdigest()[:20]
    cached = cached_corpus(key, tokenizer, cache)
    if cached is not None:
        return cached

    documents = _documents(files)
    if not documents:
        raise InputError(f"--text: none of the {len(files)} files at {text} is UTF-8 text: give plain text")
    random.Random(0).shuffle(documents)
    ids = [np.asarray([tokenizer.begin, *tokenizer.encode(document)], dtype=np.int32) for document in documents]
    wanted = HELD_OUT_FRACTION * sum(len(part) for part in ids)
    ends = np.cumsum([len(part) for part in ids])
    count = min(int(np.searchsorted(ends, wanted)) + 1, len(ids) - 1)
    empty = np.empty(0, dtype=np.int32)
    cache.mkdir(parents=True, exist_ok=True)
    for name, parts in (("held-out", ids[:count]), ("train", ids[count:])):
        with atomic_write(_cache_file(cache, key, name)) as file:
            np.save(file, np.concatenate([empty, *parts]))
    cached = cached_corpus(key, tokenizer, cache)
    assert cached is not None
    return cached


def cached_corpus(key: str, tokenizer: Tokenizer, cache: Path) -> Corpus | None:
    """Returns the tokens cached under `key`, or None where there are none or they cannot be read."""
    try:
        train, held_out = (np.load(_cache_file(cache, key, name), mmap_mode="r") for name in ("train", "held-out"))
    except (OSError, ValueError):
        return None
    return Corpus(key, tokenizer.vocabulary, train, held_out)


def check_size(corpus: Corpus, batch: int, sequence: int) -> None:
    """Checks that there is text for one batch without repetition and for one held-out sequence.

    Raises:
        InputError: there is not.
    """
    needed = (batch + 1) * sequence
    if len(corpus.train) < needed or len(corpus.held_out) <= sequence:
        raise InputError(
            f"too little text: {len(corpus.train)} tokens to train on and {len(corpus.held_out)} held out, needed are "
            f"{needed} and {sequence + 1}: give more with --text, or lower --sequence or --batch"
        )


def training_batch(tokens: NDArray[np.int32], seed: int, step: int, batch: int, sequence: int) -> tuple[Tensor, Tensor]:
    """Returns the batch of one step: each pass over the text visits all windows once, in an order of its own.

    Args:
        tokens: `[tokens]`, at least `(batch + 1) * sequence` of them.
        seed: of the order.
        step: counts from 0.
        batch: sequences a step, B.
        sequence: tokens a sequence, T.

    Returns:
        Inputs and targets, each `[B, T]`, int64; a target is the input's next token.
    """
    windows = len(tokens) // sequence - 1
    starts = []
    for index in range(step * batch, (step + 1) * batch):
        offset, order = _epoch(seed, index // windows, windows, sequence)
        starts.append(offset + sequence * int(order[index % windows]))
    return _windows(tokens, np.asarray(starts), sequence)


def held_out_batches(
    tokens: NDArray[np.int32], limit: int, batch: int, sequence: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the held-out text from its beginning: the same batches every time.

    Args:
        tokens: `[tokens]`, more than `sequence` of them.
        limit: tokens to read, rounded down to whole sequences but at least one.
        batch: sequences a batch, B; the last may have fewer.
        sequence: tokens a sequence, T.

    Yields:
        Inputs and targets as `training_batch` returns.
    """
    count = max(1, min(limit, len(tokens) - 1) // sequence)
    starts = sequence * np.arange(count)
    for first in range(0, count, batch):
        yield _windows(tokens, starts[first : first + batch], sequence)


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, sequence: int) -> tuple[int, NDArray[np.int64]]:
    generator = np.random.default_rng(derived_seed(seed, ORDER_STREAM, epoch))
    return int(generator.integers(sequence)), generator.permutation(windows)


def _windows(tokens: NDArray[np.int32], starts: NDArray[np.int64], sequence: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(sequence + 1)].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _documents(files: list[Path]) -> list[str]:
    texts = []
    for path in files:
        try:
            content = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if content.strip() and "\0" not in content:
            texts.append(content)
    longest = min(LONGEST_DOCUMENT, max(SHORTEST_CUT, sum(map(len, texts)) // 64))
    return [document for text in texts for document in _cut(text, longest)]


def _cut(text: str, longest: int) -> Iterator[str]:
    start = 0
    while len(text) - start > longest:
        line_end = text.rfind("\n", start, start + longest) + 1
        end = line_end if line_end > start else start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _cache_file(cache: Path, key: str, name: str) -> Path:
    return cache / f"{key}.{name}.npy"
