"""What the text tower reads: names of classes, and the sentences around them."""

from __future__ import annotations

import re
from pathlib import Path

from locfast.data.sources.class_folder import ClassFolder
from locfast.errors import UserError

TEMPLATES = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
"""By name, where open_clip has them: CLIP's 80 sentences, and the seven that its authors found to suffice."""
WNID = re.compile(r"n\d{8}")


def class_names(source: ClassFolder, file: str | None = None) -> list[str]:
    """What to call every class in a sentence, in the order of `source.classes`.

    From `file`, else classes.json or classes.txt beside the folders; for folders called by WordNet ids of ImageNet-1k
    (all of them or some), open_clip's names; else the folders' names, with spaces for underscores. Raises UserError
    for ids that ImageNet-1k has not.
    """
    if named := source.readable_names(file):
        return [named[name] for name in source.classes]
    if not all(WNID.fullmatch(name) for name in source.classes):
        return [name.replace("_", " ") for name in source.classes]
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    names = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    if unknown := [name for name in source.classes if name not in names]:
        raise UserError(
            f"the class folders of {source.root} are WordNet ids, but {len(unknown)} are not of ImageNet-1k, first "
            f'{unknown[0]}. Give their names: --names FILE with {{"{unknown[0]}": "..."}} or one name a line.'
        )
    return [names[name] for name in source.classes]


def templates(asked: str) -> list[str]:
    """Prompts with {} for the name: of a set that open_clip has, or the lines of a file. Raises UserError."""
    import open_clip

    if asked in TEMPLATES:
        return [template("{}") for template in getattr(open_clip, TEMPLATES[asked])]
    try:
        lines = [line.strip() for line in Path(asked).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--templates {asked}: no text file, and not one of {', '.join(TEMPLATES)}.") from None
    if not lines or any(line.count("{}") != 1 for line in lines):
        raise UserError(f"--templates {asked}: every line needs one {{}} where the name goes: a photo of a {{}}.")
    return lines
