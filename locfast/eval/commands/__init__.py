"""What `python -m locfast.evaluate` can do, one module each: `add_arguments(parser)`, and `run(args)` -> exit code.

These are commands, as a room's `__main__` is: they may import what stands above the evaluation room, and nothing of
that room may import them. Each imports torch inside `run` alone, so that its `--help` answers at once. A new evaluation
is one module here and one line below.
"""

COMMANDS = {
    "finetune": "every weight fine-tuned on class folders, by MAE's and LUT's recipe",
    "knn": "nearest neighbours on frozen features of class folders",
    "linear": "a linear classifier on frozen features of class folders",
    "zero-shot": "classes by their names, through the text tower of an open_clip model",
    "retrieval": "images by their captions and captions by their images, through such a text tower",
    "regions": "boxes by the names of their classes and by their phrases, through a prompter and by RoI-align",
}
"""Name of a command (and of its module, - for _) -> what `--help` says of it."""
