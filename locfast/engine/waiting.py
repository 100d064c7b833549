"""Why training waits for data, and what to turn: told once for each cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args, get_type_hints

from locfast.config.base import TrainConfig
from locfast.engine.logs import log

SLOW = 0.1
"""Share of the time spent waiting for data from which the log names the cause."""
DOING = {"read": "reading", "decode": "decoding", "transfer": "assembling and moving batches"}


def cause(wait: float, image: float, read: float, decode: float, transfer: float) -> str | None:
    """What a rank waits for: "read", "decode", "transfer", or None while it waits for less than a tenth of its time.

    `wait` is the share of its time, the others are milliseconds an image: `image` between one and the next, `read` and
    `decode` those of all workers together, `transfer` those of the main process. These last the loop sits through one
    by one; when they are more than half of its wait, faster workers would not end it.
    """
    if wait <= SLOW or read + decode + transfer <= 0:
        return None
    if transfer > wait * image / 2:
        return "transfer"
    return "read" if read > decode else "decode"


@dataclass(frozen=True)
class Pipeline:
    """What makes the batches of a rank."""

    device: str
    """cpu or cuda."""
    workers: int
    cores: int
    """Of the machine, for this rank."""
    decoder: str
    """The one at work."""
    decoders: tuple[str, ...] = field(default_factory=lambda: get_args(get_type_hints(TrainConfig)["decoder"]))
    """All that --decoder takes."""

    def advice(self, why: str) -> str:
        """What to turn when the loop waits for `why`."""
        return {"read": self._read, "decode": self._decode, "transfer": self._transfer}[why]()

    @property
    def _on_gpu(self) -> tuple[str, ...]:
        return tuple(name for name in self.decoders if name not in ("auto", "cpu"))

    def _read(self) -> str:
        if not self.workers:
            return f"--workers {max(1, self.cores - 1)} reads ahead; tar shards and a faster disk help too."
        return (
            "Reads wait for a disk rather than for cores, so more of them at a time may help: "
            f"--workers {2 * self.workers}. So may tar shards and a faster disk."
        )

    def _decode(self) -> str:
        smaller = "images stored at a smaller size are decoded faster"
        if self.device == "cpu":
            return f"Training and decoding share the cores, so more --workers take from training; {smaller}."
        if self.workers < self.cores - 1:
            return f"{self.workers} of {self.cores} cores decode: --workers {self.cores - 1} has nearly all do so."
        if self.decoder == "cpu" and self._on_gpu:
            return f"All cores decode: --decoder {' or '.join(self._on_gpu)} has the GPU do it; {smaller}."
        return f"All cores decode; {smaller}."

    def _transfer(self) -> str:
        if self.decoder in self._on_gpu:
            return "Decoding on the GPU is a part of that: --decoder cpu gives it to the workers."
        if self.workers >= self.cores:
            return f"That is work of the main process: --workers {max(1, self.cores - 1)} leaves it a core."
        return "That is work of the main process, which more --workers do not share; a smaller --image-size lessens it."


@dataclass
class Waiting:
    """Hears the numbers of every line of the log and tells each cause once, but not of the first interval: in that,
    the workers start."""

    pipeline: Pipeline
    ranks: int
    heard: bool = False
    told: set[str] = field(default_factory=set)

    def hear(self, numbers: Mapping[str, float]) -> None:
        first, self.heard = not self.heard, True
        read, decode, transfer = (numbers[f"data_{what}_ms"] for what in DOING)
        wait = numbers["data_wait"]
        why = cause(wait, 1000 * self.ranks / numbers["images_per_second"], read, decode, transfer)
        if first or why is None or why in self.told:
            return
        self.told.add(why)
        log.info(
            "Training waits for data %.0f %% of the time, mostly for %s: an image takes %.3g ms to read, %.3g to "
            "decode and %.3g to assemble and move. %s",
            *(100 * wait, DOING[why], read, decode, transfer, self.pipeline.advice(why)),
        )
