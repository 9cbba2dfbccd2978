"""Tokens in one file: made where the tokenizer is, read where the model is trained."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from logitless_demo.checkpoint import atomic_write
from logitless_demo.data import Corpus, Tokenizer, tekken
from logitless_demo.errors import InputError
from logitless_demo.outputs import check_output_file

CHUNK_CHARACTERS = 1 << 20
BLANK_LINES = re.compile(r"\n\s*\n")
# What NumPy raises at a file that is missing, damaged, another archive, or a single array.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


def prepare_tokens(folder: Path, path: Path, console: Console, load_tokenizer: Callable[[], Tokenizer] = tekken) -> int:
    """Tokenizes `train.txt` and `val.txt`, whose documents blank lines separate, and writes their ids.

    Args:
        folder: holds the two files.
        path: the file to write, an .npz archive of `train` and `held_out`, int32, and `vocabulary`.
        console: where progress is shown.
        load_tokenizer: makes the tokenizer, in other processes too.

    Returns:
        The process's exit code, 0.

    Raises:
        InputError: a file is missing, is not UTF-8, has no text in it, or cannot be written.
    """
    check_output_file("--tokens", path)
    texts = [_read(folder, name) for name in ("train.txt", "val.txt")]
    with console.status("tokenizing"):
        train, held_out = (_encode(text, load_tokenizer) for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"writing {path}"), atomic_write(path) as file:
        np.savez_compressed(file, train=train, held_out=held_out, vocabulary=load_tokenizer().vocabulary)
    console.print(
        f"{len(train):,} tokens to train on and {len(held_out):,} held out: {path}", soft_wrap=True, highlight=False
    )
    return 0


def load_tokens(path: Path) -> Corpus:
    """Reads what `prepare_tokens` wrote; the corpus's key is a hash of its tokens.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        # The file is opened here, since NumPy leaves one that it cannot read open.
        with path.open("rb") as file, np.load(file) as data:
            train, held_out, vocabulary = data["train"], data["held_out"], int(data["vocabulary"])
        for name, ids in (("train", train), ("held_out", held_out)):
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
                raise ValueError(f"{name} must be a list of whole numbers, got {ids.dtype} of shape {ids.shape}")
            if not 0 <= ids.min() <= ids.max() < vocabulary:
                raise ValueError(f"ids of {name} must lie in [0, {vocabulary}), got {ids.min()} to {ids.max()}")
    except UNREADABLE as error:
        raise InputError(
            f"--tokens {path} cannot be read ({error}): make it, logitless-demo converge --prepare FOLDER --tokens FILE"
        ) from error
    train, held_out = train.astype(np.int32), held_out.astype(np.int32)
    digest = hashlib.sha256(str(vocabulary).encode())
    for ids in (train, held_out):
        digest.update(str(len(ids)).encode())
        digest.update(ids.tobytes())
    return Corpus(digest.hexdigest()[:20], vocabulary, train, held_out)


def _read(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file():
        raise InputError(f"--prepare {folder}: there is no {name} in it: give a folder with train.txt and val.txt")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prepare: {path} must be UTF-8 text ({error}): convert it") from error
    if not text.strip():
        raise InputError(f"--prepare: {path} has no text in it: give plain text")
    return text


def _encode(text: str, load_tokenizer: Callable[[], Tokenizer]) -> NDArray[np.int32]:
    """Returns the ids of all documents, on all cores where there is more than one chunk."""
    chunks = list(_chunks(text))
    encode = partial(_encode_chunk, load_tokenizer)
    workers = min(os.cpu_count() or 1, len(chunks))
    if workers == 1:
        return np.concatenate([encode(chunk) for chunk in chunks])
    # Started afresh: a fork of a process with threads, as PyTorch's, may never wake.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(encode, chunks)))


def _chunks(text: str) -> Iterator[list[str]]:
    """Yields the documents, so many at a time that they make a chunk."""
    chunk, size = [], 0
    for document in BLANK_LINES.split(text.strip("\n")):
        chunk.append(document)
        size += len(document)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(load_tokenizer: Callable[[], Tokenizer], documents: list[str]) -> NDArray[np.int32]:
    tokenizer = _loaded(load_tokenizer)
    ids = [[tokenizer.begin, *tokenizer.encode(document)] for document in documents]
    return np.concatenate([np.asarray(document, dtype=np.int32) for document in ids])


@cache
def _loaded(load_tokenizer: Callable[[], Tokenizer]) -> Tokenizer:
    return load_tokenizer()  # once a process
