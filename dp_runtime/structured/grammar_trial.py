"""GrammarTrial: has grammars compiled in a process of its own, before any rank compiles them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.core.structured_outputs import MAX_BYTES, StructuredOutputs
from dp_runtime.errors import EngineClosed, not_allowed, require
from dp_runtime.structured import matchers
from dp_runtime.structured.grammar import compilable, grammar_of, one_error

TRIAL_S = 20.0  # that an answer may take on a busy machine, with the process's start
WAIT_S = 30.0  # for the grammars of others
MAX_WORK_S = 0.5  # of a processor; a rank compiles again for each request
MAX_KNOWN_BYTES = 8 * MAX_BYTES
ENTRY_BYTES = 1024  # of each known one beside its text


class GrammarTrial:
    """Tells which grammars ranks may compile, for any thread.

    Whatever a grammar does, such as to exhaust the stack, only the process meets it. The first
    grammar waits for its start and for the vocabulary to be read, which takes about a second.
    """

    def __init__(
        self, tokenizer_json: str | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer_json, self._vocab_size = tokenizer_json, vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._lock = threading.Lock()
        self._trying = threading.Lock()
        self._checked: OrderedDict[StructuredOutputs, int] = OrderedDict()  # sizes, latest last
        self._process: _Process | None = None
        self._closed = False

    def check(self, wanted: StructuredOutputs) -> None:
        """Raise ValueError for what can't be compiled; the latest that could are known."""
        if wanted not in self._checked:
            self._try(wanted)
        with self._lock:
            self._checked[wanted] = ENTRY_BYTES + len(str(getattr(wanted, wanted.kind)))
            self._checked.move_to_end(wanted)
            while sum(self._checked.values()) > MAX_KNOWN_BYTES:
                self._checked.popitem(last=False)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.end()

    def _try(self, wanted: StructuredOutputs) -> None:
        tokenizer_json = compilable(wanted, self._tokenizer_json, self._eos_token_ids)
        field, value = f"structured_outputs.{wanted.kind}", getattr(wanted, wanted.kind)
        try:
            grammar = grammar_of(wanted)
        except (ValueError, RecursionError) as error:
            raise not_allowed(field, value, one_error(str(error))) from None
        ready = self._trying.acquire(timeout=WAIT_S)
        require(ready, field, value, "try it later: other grammars are still being compiled")
        try:
            cause = self._running(tokenizer_json).error_of(grammar)
        finally:
            self._trying.release()
        if cause is not None:
            raise not_allowed(field, value, one_error(cause))

    def _running(self, tokenizer_json: str) -> _Process:
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if self._process is None or self._process.ended:
                self._process = _Process.start(
                    tokenizer_json=tokenizer_json, vocab_size=self._vocab_size,
                    eos=self._eos_token_ids,
                )  # fmt: skip
                weakref.finalize(self, self._process.end)
            return self._process


@dataclass(frozen=True, eq=False)
class _Process:
    popen: subprocess.Popen[bytes]
    channel: socket.socket

    @classmethod
    def start(cls, **vocabulary: object) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-P", matchers.__file__], stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        ours.settimeout(TRIAL_S)
        process = cls(popen, ours)
        process._send(vocabulary)
        return process

    @property
    def ended(self) -> bool:
        return self.popen.poll() is not None

    def error_of(self, grammar: str) -> str | None:
        """Return why a grammar is refused; the process may end with it."""
        try:
            self._send({"grammar": grammar, "max_work_s": MAX_WORK_S})
            with self.channel.makefile() as lines:
                line = lines.readline()
        except TimeoutError:
            self.end()
            return f"it takes more than {TRIAL_S:g} s to compile"
        except OSError:
            line = ""
        if line:
            error: str | None = json.loads(line).get("error")
            return error
        self.end()
        if self.popen.returncode == -signal.SIGPROF:
            return f"it takes more than {MAX_WORK_S:g} s of a processor to compile"
        return f"the compiler ends with it (status {self.popen.returncode}), as of deep nesting"

    def end(self) -> None:
        if not self.ended and self.channel.fileno() >= 0:
            self.channel.close()  # it ends as it reads no more
        try:
            self.popen.wait(0.2)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.channel.close()

    def _send(self, content: dict[str, object]) -> None:
        self.channel.sendall(json.dumps(content).encode() + b"\n")
