"""What `python -m locfast.vesl` can do, one module a command: `add_arguments(parser)`, and `run(args)` -> exit code.

These are commands, as a room's `__main__` is: no other file of the room may import them. Each imports torch inside
`run` alone, so that its `--help` answers at once.
"""

COMMANDS = {
    "run": "all three steps: caption, phrases, detect",
    "caption": "step 1: captions of all images, given or generated",
    "phrases": "step 2: the noun phrases of the captions",
    "detect": "step 3: boxes of the phrases, written as region shards",
    "view": "a page of pictures to judge labels by eye",
}
"""Name of a command and of its module -> what `--help` says of it."""
