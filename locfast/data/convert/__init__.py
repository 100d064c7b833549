"""Public data sets with boxes and phrases, read as they are published and written as images with regions.

One module a data set: a docstring (what `--help` says), `add_arguments(parser)` and `convert(args) -> Tally`. GRIT's
images come in tar shards, and so do they leave; the others' are files, which a .jsonl lists and nothing copies.
"""

KINDS = {
    "grit": "GRIT's tar shards, as img2dataset leaves them -> tar shards",
    "visual-genome": "region_descriptions.json and image_data.json -> .jsonl",
    "refcoco": "RefCOCO, RefCOCO+ and RefCOCOg: refs(...).p and instances.json -> .jsonl",
    "flickr30k-entities": "Annotations/*.xml and Sentences/*.txt -> .jsonl",
    "coco": "instances_*.json, and captions_*.json where wanted -> .jsonl",
    "lvis": "lvis_v1_*.json -> .jsonl",
}
"""Name of a data set and of its module -> what `--help` says of it."""
