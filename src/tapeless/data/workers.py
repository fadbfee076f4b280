"""Processes that turn blocks of text into tokens, each block of a stream by the next one in turn; and one
that makes a tokenizer of them."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tapeless.data.bpe import BPETokenizer, library, train_bpe
from tapeless.data.texts import Block
from tapeless.data.tokenizers import Tokenizer, tokenizer_from_dict
from tapeless.errors import DataError, argument
from tapeless.signals import handled

TOKENS, ERROR = b"\0", b"\1"  # what an answer begins with


def encode(tokenizer: Tokenizer, text: str, opens: bool, lines: bool) -> np.ndarray:
    """The tokens [n] int32 of a block; BOS, where there is one, before each document that begins in it."""
    between = [] if tokenizer.bos is None else [tokenizer.bos]
    if not lines:
        return np.array([*(between if opens else []), *tokenizer.encode(text)], np.int32)
    ids: list[int] = []
    for document in documents(text):
        ids += between
        ids += tokenizer.encode(document)
    return np.array(ids, np.int32)


def documents(text: str) -> list[str]:
    """The lines that are not blank, stripped."""
    return [document for line in text.split("\n") if (document := line.strip())]


def encoded(
    blocks: Iterator[Block], tokenizer: Tokenizer, lines: bool, processes: int
) -> Iterator[tuple[Block, np.ndarray]]:
    """Each block with its tokens, in order; at most one block a process is in memory.

    Raises `DataError` for text that has no tokens, or if a process dies.
    """
    if processes == 1:
        for block in blocks:
            yield block, encode(tokenizer, block.text, block.opens, lines)
        return
    with _started(processes, _work, json.dumps(tokenizer.to_dict()), lines) as connections:
        idle, busy = deque(connections), deque[tuple[Any, Block]]()
        for block in blocks:
            if not idle:
                connection, earlier = busy.popleft()
                yield earlier, _tokens(connection)
                idle.append(connection)
            connection = idle.popleft()
            _send(connection, bytes([block.opens]) + block.text.encode())
            busy.append((connection, block))
        for connection, earlier in busy:
            yield earlier, _tokens(connection)


def trained(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """`train_bpe` in a process of its own. The library does not listen to Ctrl-C, but a process can be
    ended at any time."""
    library()
    with _started(1, _train, vocab_size) as [connection]:
        for text in texts:
            _send(connection, text.encode())
        _send(connection, b"")
        return BPETokenizer(json.loads(_answer(connection)))


@contextmanager
def _started(processes: int, work: Callable[..., None], *arguments: Any) -> Iterator[list[Any]]:
    """Connections to so many processes, which end when these are closed, or this process ends."""
    context = multiprocessing.get_context("spawn")
    started, connections = [], []
    try:
        # Ctrl-C goes to every process of a terminal: those started here leave it to this one. What is
        # ignored stays so in a new process, but on Windows.
        with handled([signal.SIGINT], signal.SIG_IGN):
            for _ in range(processes):
                ours, theirs = context.Pipe()
                connections.append(ours)
                process = context.Process(target=_begin, args=(work, theirs, *arguments), daemon=True)
                process.start()
                theirs.close()
                started.append(process)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in started:
            process.terminate()
            process.join()


def _send(connection: Any, content: bytes) -> None:
    try:
        connection.send_bytes(content)
    except OSError:
        raise DataError(
            "a process that tokenizes has died, perhaps for lack of memory: try less text, or fewer "
            f"processes ({argument('processes')})."
        ) from None


def _tokens(connection: Any) -> np.ndarray:
    return np.frombuffer(_answer(connection), np.int32, offset=4)


def _answer(connection: Any) -> bytes:
    try:
        answer = connection.recv_bytes()
    except (EOFError, OSError):
        raise DataError(
            "a process that tokenizes has died, perhaps for lack of memory: try less text, or fewer "
            f"processes ({argument('processes')})."
        ) from None
    if answer[:1] == ERROR:
        raise DataError(answer[1:].decode())
    return answer


def _begin(work: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work(*arguments)


def _work(connection: Any, description: str, lines: bool) -> None:
    """What such a process does until its connection is closed."""
    try:
        tokenizer = tokenizer_from_dict(json.loads(description))
        while True:
            question = connection.recv_bytes()
            try:
                ids = encode(tokenizer, question[1:].decode(), bool(question[0]), lines)
                answer = TOKENS.ljust(4) + ids.tobytes()
            except DataError as error:
                answer = ERROR + str(error).encode()
            connection.send_bytes(answer)
    except (EOFError, OSError):
        return


def _train(connection: Any, vocab_size: int) -> None:
    def texts() -> Iterator[str]:
        while text := connection.recv_bytes():
            yield text.decode()

    try:
        connection.send_bytes(json.dumps(train_bpe(texts(), vocab_size).to_dict()).encode())
    except (EOFError, OSError):
        return
