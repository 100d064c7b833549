"""`python -m locfast.train`: quick help, layered settings, and every mistake told in one message with exit code 2."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from locfast.cli import command, no_access, no_room, parse_train, peek
from locfast.config.files import from_dict, read_yaml, to_dict, write_config
from locfast.config.maskembed import MaskEmbedConfig
from locfast.config.registry import make_config, method_config, run_config_class
from locfast.errors import UserError

ROOT = Path(__file__).parents[1]


def _train(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", "locfast.train", *flags]
    return subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def _told(*flags: str) -> str:
    """The one message of a command that has to fail."""
    run = _train(*flags)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return " ".join(run.stderr.split())


def test_help_takes_less_than_half_a_second():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert _train("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time: what the wall clock shows on a machine that does nothing else
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_help_names_every_flag_and_imports_no_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--help']\n"
        "try: runpy.run_module('locfast.train', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in to_dict(make_config("maskembed")):
        assert f"--{name.replace('_', '-')}" in run.stdout


def test_lists_methods_and_recipes():
    assert {"clip", "cloc", "lut", "maskembed", "uta"} == set(_train("--method", "help").stdout.split())
    assert "clip_l14_336" in _train("--recipe", "help").stdout.split()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "maskembd"], "no such method; did you mean 'maskembed'?"),
        (["--recipe", "clip_l14_337"], "no such recipe; did you mean 'clip_l14_336'?"),
        (["--stps", "3"], "--steps"),
        (["--steps", "-3"], "--steps must be positive, got -3"),
        (["--steps", "many"], "many"),
        (["--maskembed.decoder", "average"], "add --maskembed.target last_cls"),
        (["--track", "paper"], "--track knows tensorboard, wandb"),
        (["--config", "nowhere.yaml"], "Cannot read the config file nowhere.yaml"),
        (["--data", "nowhere", "--device", "cpu"], "asked for the data nowhere, found no such file or folder"),
        (["--data", "", "--device", "cpu"], "found no name"),
        (["--data", "EMPTY", "--device", "cpu"], "found an empty folder"),
        (["--device", "cuda:99"], "--device cuda:99: no such device"),
        (["--data", "demo:8", "--model", "vit_tiny_patch16_242", "--device", "cpu"], "mean 'vit_tiny_patch16_224'?"),
    ],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(flags, told, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = [str(tmp_path / "empty") if word == "EMPTY" else word for word in flags]
    assert told in _told(*flags, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stepz: 3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("maskembed: {sofcap: 3}", "unknown key 'maskembed.sofcap'; did you mean 'softcap'?"),
        ("maskembed: {optim: {beta: 3}}", "unknown key 'maskembed.optim.beta'; did you mean 'betas'?"),
        ("steps: 1.5", "steps must be a whole number, got 1.5"),
        ("steps: true", "steps must be a whole number, got True"),
        ("pretrained: 1", "pretrained must be true or false, got 1"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("model: 3", "model must be text, got 3"),
        ("decoder: dali2", "decoder is one of auto, cpu"),
        ("maskembed: 3", "maskembed is a section"),
        ("maskembed: {optim: {betas: [0.9]}}", "betas must have 2 values, got 1"),
        ("track: wandb", "track must be a list"),
        ("- a\n- b", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_config_file_is_read_strictly(tmp_path, text, told):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_train(["--config", str(file)])
    assert told in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_flags_lie_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-5\nseed: 7\nmaskembed:\n  optim:\n    weight_decay: 0.5\n")
    recipe = parse_train(["--recipe", "clip_l14_336"])
    config = parse_train(["--recipe", "clip_l14_336", "--config", str(file), "--seed", "8", "--maskembed.no-flip"])
    assert recipe.lr == 2e-4
    assert config.lr == 1e-5
    assert config.seed == 8
    assert config.model == recipe.model == "vit_large_patch14_clip_quickgelu_336.openai"
    assert method_config(config).optim.weight_decay == 0.5
    assert not method_config(config).flip
    assert method_config(config).optim.eps == method_config(recipe).optim.eps


def test_every_recipe_is_a_valid_config():
    names = _train("--recipe", "help").stdout.split()
    assert len(names) >= 19
    for name in names:
        assert parse_train(["--recipe", name]).recipe == name


def test_a_written_config_reads_back_equal(tmp_path):
    own = MaskEmbedConfig(softcap=None, masking="block", decoder_layer_scale=1e-6)
    config = make_config("maskembed", model="vit", lr=3e-4, track=("wandb",), maskembed=own)
    write_config(config, tmp_path / "config.yaml", "locfast")
    values = read_yaml(tmp_path / "config.yaml")
    assert from_dict(run_config_class("maskembed"), values, "file") == config
    assert not {"out", "config", "resume", "overwrite"} & values.keys()


def test_resume_takes_its_settings_from_the_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_config(make_config("maskembed", model="vit_x", data="photos", lr=0.1), run / "config.yaml", "locfast")
    config = parse_train(["--resume", "--out", str(run), "--workers", "3"])
    assert (config.model, config.data, config.lr, config.workers) == ("vit_x", "photos", 0.1, 3)
    assert config.resume
    assert parse_train(["--out", str(run)]).model == "demo"


def test_resume_of_a_folder_without_a_run_starts_nothing_unless_told_what(tmp_path):
    (tmp_path / "run-7").mkdir()
    missing = ["--resume", "--out", str(tmp_path / "run7")]
    with pytest.raises(UserError, match="there is no run; did you mean 'run-7'"):
        parse_train(missing)
    assert parse_train([*missing, "--model", "vit_x", "--data", "photos"]).data == "photos"
    assert parse_train(["--resume", "--recipe", "clip_b16", "--out", str(tmp_path / "run7")]).recipe == "clip_b16"


def test_epochs_on_the_command_line_lie_over_steps_of_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 7\n")
    file = ["--config", str(tmp_path / "run.yaml")]
    assert parse_train(file).steps == 7
    assert parse_train([*file, "--epochs", "2"]).steps is None
    assert parse_train([*file, "--epochs", "2", "--steps", "3"]).steps == 3


@pytest.mark.parametrize(
    ("line", "value"),
    [("--out a", "a"), ("--out=b", "b"), ("--out a --out=b", "b"), ("--out", None), ("--outer a", None)],
)
def test_peek_sees_the_last_value_of_a_flag(line, value):
    assert peek(line.split(), "--out") == value


def test_a_full_disk_and_ctrl_c_are_no_tracebacks(capsys):
    def full() -> None:
        raise OSError(28, "No space left on device", "/data/run/train.log")

    def interrupted() -> None:
        raise KeyboardInterrupt

    for main, code, told in (
        (full, 2, "the disk is full while writing /data/run/train.log"),
        (interrupted, 130, "Ctrl-C"),
    ):
        with pytest.raises(SystemExit) as end:
            command(main)()
        assert end.value.code == code
        assert told in capsys.readouterr().err
    assert no_room(ValueError("no disk here")) is None
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)()


def test_a_folder_that_must_not_be_written_is_told_in_one_message(capsys):
    denied = PermissionError(errno.EROFS, "Read-only file system", "/mnt/out")

    @command
    def main() -> None:
        raise denied

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "/mnt/out is out of reach (Read-only file system)" in told
    assert no_access(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert no_access(PermissionError(errno.EPERM, "a socket, say")) is None
