"""The embedded scenes as labelled data."""

from __future__ import annotations

from locfast.data.labelled.split import LabelledSplit, Split
from locfast.data.scenes import CLASSES, SceneSource

STREAMS = {"train": (20000, 2048), "validation": (30000, 1024)}
"""Stream (the seed is added) and number of scenes."""


class LabelledScenes(SceneSource):
    """Scenes, whose label maps have no file of their own."""

    def label_name(self, index: int) -> str:
        return self.name(index)

    def file_name(self, index: int) -> str:
        return self.name(index)


def open_scenes(split: Split, seed: int) -> LabelledSplit:
    """Scenes that neither the demo's own training nor, for equal seeds, the other split shows; 0 is the ground."""
    stream, length = STREAMS[split]
    return LabelledSplit(LabelledScenes(length, seed=stream + seed), CLASSES, 0, None, "scenes", "demo")
