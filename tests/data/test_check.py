"""`python -m locfast.data`: a look at a source from the outside."""

import subprocess
import sys


def check(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "locfast.data", *args], capture_output=True, text=True)


def test_a_sound_folder_is_described(folder):
    done = check(str(folder(10)), "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert "10 images in" in done.stdout
    assert "looked at 10 of 10: 10 can be read, 0 cannot" in done.stdout


def test_damaged_files_are_named_and_make_it_fail(folder, damage):
    root = folder(100)
    bad = damage(root)
    done = check(str(root), "--workers", "2")
    assert done.returncode == 1
    assert "90 can be read, 10 cannot" in done.stdout
    assert all(name in done.stdout for name in bad)


def test_a_missing_source_ends_with_one_message_and_code_2(tmp_path):
    done = check(str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "found no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['data', '--help']\n"
        "try: runpy.run_module('locfast.data', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
