"""Several compiling processes at once. One that crashes costs its own kernel and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Worker:
    """A process that runs worker.py, started when it is first asked."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer, or {"failed": ...} with the last words of a process that died of the request."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        self._end()
        code = process.returncode
        self._errors.seek(0)
        words = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self._errors.seek(0)
        self._errors.truncate()
        return {"failed": f"the compiler died ({code}): {_last_words(words)}"}

    def kill(self) -> None:
        """End the process now; a request that waits for it is answered as if it had died of it."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        self.kill()
        self._end()
        self._errors.close()

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.__exit__(None, None, None)  # closes its pipes and waits for it
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "CUDA_VISIBLE_DEVICES": "",  # the same list with and without a GPU, and none of its memory
        }
        return subprocess.Popen(
            [sys.executable, "-m", "locfast.machine_code.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )


class Pool:
    """Up to `size` workers. Use in a `with` block, which ends them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if not self._idle:
                self._workers.append(Worker())
                self._idle.append(self._workers[-1])
            worker = self._idle.pop()
        try:
            return worker.ask(request)
        finally:
            with self._lock:
                self._idle.append(worker)

    def ask_all(self, requests: Sequence[dict[str, Any]], progress: Callable[[], object]) -> list[dict[str, Any]]:
        """Answers in the order of the requests; `progress` is called after each."""

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            answer = self.ask(request)
            progress()
            return answer

        with ThreadPoolExecutor(self._size) as executor:
            try:
                return list(executor.map(ask, requests))
            except BaseException:  # Ctrl-C: what waits is dropped, and what runs ends with its process
                executor.shutdown(wait=False, cancel_futures=True)
                for worker in self._workers:
                    worker.kill()
                raise


def _last_words(lines: list[str]) -> str:
    for word in ("is not a recognized processor", "LLVM ERROR"):
        if found := next((line for line in lines if word in line), None):
            return found
    return lines[-1] if lines else "without a word"
