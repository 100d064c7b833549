"""What `python -m locfast.data` can do, one module a command: `add_arguments(parser)`, and `run(args)` -> exit code.

These are commands, as a room's `__main__` is: they may import what stands above the data room, and nothing of the data
room may import them. Each imports torch inside `run` alone, so that its `--help` answers at once.
"""

COMMANDS = {
    "stats": "what a source holds, and which of its files are damaged",
    "preview": "a picture of what the model will see first",
    "bench": "images a second, by decoder and number of workers",
    "convert": "public data sets with boxes (GRIT, Visual Genome, RefCOCO, ...) -> images with regions",
    "index": "read the headers of tar shards now, not when a run starts",
}
"""Name of a command and of its module -> what `--help` says of it."""
