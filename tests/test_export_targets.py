"""`python -m locfast.export --to ...` on a run's folder: every target, and every mistake told in one message."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from locfast.cli import parse_train
from locfast.engine.run import train
from locfast.export import main
from locfast.models.exporters.folder import standalone
from tests.models.exporters.small import one_thread, student

__all__ = ["one_thread"]


def make_run(folder: Path, kind: str, *flags: str) -> Path:
    """One step of MaskEmbed on four images."""
    save_for_hf(student(kind).model, str(folder / "teacher"), safe_serialization=True)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"images/{index}.png")
    line = f"--model {folder}/teacher --data {folder}/images --out {folder}/run --val none --steps 1 --batch-size 2"
    train(parse_train([*line.split(), "--workers", "0", "--lr", "1e-2", "--device", "cpu", *flags]))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"), "clip_quickgelu")


def export(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["locfast.export", *map(str, args)])
    main()


@pytest.mark.parametrize(
    "target, module, files, told",
    [
        (
            "hf",
            "transformers",
            {"aligned_tower.py", "preprocessor_config.json", "aligned.json"},
            "final norm differ by",
        ),
        ("open_clip", "open_clip", {"open_clip_tower.py", "visual.safetensors", "aligned.json"}, "load_model"),
        ("prismatic", "timm", {"aligned_vit.py", "timm_softcap.py", "adapter.safetensors"}, "# maskembed"),
        ("llava", "transformers", {"aligned_tower.py", "adapter.json", "maskembed_adapter.py"}, "AlignedTower"),
    ],
)
def test_a_run_goes_to_every_target_with_its_card(
    target: str,
    module: str,
    files: set[str],
    told: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(module)
    export(monkeypatch, run, "--to", target)
    out = run / f"exported-{target}"
    assert files <= {file.name for file in out.iterdir()}
    assert told in capsys.readouterr().out
    card = (out / "README.md").read_text()
    for part in ("measured on 4 images of the run", "| method | maskembed |", "## What is not kept", "softcap: 30.0"):
        assert part in card, part
    library = {"hf": "transformers", "llava": "transformers", "prismatic": "timm"}.get(target, target)
    assert f"library_name: {library}\n" in card
    monkeypatch.syspath_prepend(out)
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(out))
    names: dict[str, Any] = {"image": Image.new("RGB", (90, 70)), "images": torch.zeros(1, 3, 64, 64)}
    exec(code, names)  # the card's lines, as they stand
    assert names["features"].shape == (1, 17, 64)
    if target in ("prismatic", "llava"):
        assert names["embeddings"].shape == (1, 17, 4096)


def test_the_adapter_holds_the_trained_decoder_and_takes_the_width_that_was_typed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(monkeypatch, run, "--to", "prismatic", "--llm-width", "80", "--out", tmp_path / "out")
    adapter = standalone("maskembed_adapter").load_adapter(tmp_path / "out").state_dict()
    saved = load_file(run / "checkpoints/step-00000001/model.safetensors")
    assert adapter["output.weight"].shape == (80, 64)
    pairs = {"position": "decoder.position", "blocks.1.attn.qkv.weight": "decoder.blocks.1.attn.qkv.weight"}
    for name, key in {**pairs, "input.weight": "head.weight"}.items():
        assert adapter[name].equal(saved[key])


def test_mistakes_are_told_in_one_message_with_exit_code_2(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for args, told in (
        (("--to", "prismatic", "--out", tmp_path / "full"), "nothing is overwritten unasked"),
        (
            ("--to", "hf", "--overwrite", "--out", tmp_path / "full/file"),
            "full/file is a file, and an export is a folder",
        ),
        (("--to", "timm", "--out", tmp_path / "full/file/below"), "full/file is a file"),
        (("--to", "llava", "--llm-width", "0"), "--llm-width 0: this is the width"),
        (("--to", "llava", "--llm-width", "-5"), "from 1 to 65536"),
        (("--to", "prismatic", "--llm-width", "4096000"), "--llm-width 4096000"),
        (("--to", "hf", "--adapter", "mlp"), "an export to hf has no adapter"),
        (("--llm-width", "4096"), "an export to timm has no adapter"),
    ):
        with pytest.raises(SystemExit) as stop:
            export(monkeypatch, run, *args)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert told in message and "Traceback" not in message
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["file"]


def test_a_run_without_a_checkpoint_without_a_decoder_or_of_another_architecture_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--maskembed.decoder average --maskembed.target last_cls --maskembed.masking block --maskembed.softcap None"
    made = make_run(tmp_path, "dinov2_reg", *flags.split())
    for to, told in (("llava", "this run has a PooledDecoder"), ("hf", "neither of transformers' CLIPVisionModel")):
        with pytest.raises(SystemExit) as stop:
            export(monkeypatch, made, "--to", to)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
    for file in (made / "checkpoints/step-00000001").iterdir():
        file.unlink()
    with pytest.raises(SystemExit) as stop:
        export(monkeypatch, made, "--to", "prismatic", "--adapter", "mlp")
    assert stop.value.code == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert not list(made.glob("exported*"))
