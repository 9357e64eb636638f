"""setup.sh, which train.sh and test/run.sh begin with: one clear sentence for what is missing, and no second install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cut", "awk", "df", "cksum", "basename", "touch", "tail", "dirname")


@pytest.fixture
def checkout(tmp_path):
    """A folder with setup.sh and a requirement that no index has; an `echo` stands for what comes after."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("no-such-package-anywhere==1.0\n")
    (tmp_path / "start.sh").write_text("set -euo pipefail\nsource ./setup.sh requirements.txt\n"
                                       "echo started with $(command -v python)\n")
    return tmp_path


def start(folder: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "start.sh"], cwd=folder, env=os.environ | environment, text=True, capture_output=True)


def test_a_missing_python_is_said(checkout, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    run = start(checkout, PATH=str(tools))
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1 and "Python 3.10 or newer is needed" in run.stderr


def test_a_full_disk_is_said_before_anything_is_installed(checkout):
    run = start(checkout, NEED_GB="1000000")
    assert run.returncode == 1
    assert "need 1000000 GB of disk" in run.stderr
    assert not (checkout / ".venv").exists()


def test_no_network_is_said_and_the_next_start_tries_again(checkout):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0", "NEED_GB": "0"}
    run = start(checkout, **nowhere)
    assert run.returncode == 1
    assert "pip could not install requirements.txt: is there a network" in run.stderr
    assert "started" not in run.stdout
    again = start(checkout, **nowhere)
    assert again.returncode == 1 and "pip could not install" in again.stderr


def test_a_second_start_reuses_what_is_there(checkout):
    (checkout / "requirements.txt").write_text("")
    first = start(checkout, NEED_GB="0")
    assert first.returncode == 0, first.stderr
    assert "Installing" in first.stdout and f"started with {checkout}/.venv/bin/python" in first.stdout
    second = start(checkout, NEED_GB="1000000", PYTHON="/nowhere/python")    # nothing of this is looked at again
    assert second.returncode == 0 and "Installing" not in second.stdout
    (checkout / "requirements.txt").write_text("# changed\n")
    assert "Installing" in start(checkout, NEED_GB="0").stdout


@pytest.mark.parametrize("content, script", [('{"seed": 1}', "train_sdxl.py"), ('{"model_type": "lora"}', "train_lora_sdxl.py")])
def test_train_sh_runs_the_script_of_the_config(tmp_path, content, script):
    shutil.copy(ROOT / "train.sh", tmp_path)
    (tmp_path / "library").symlink_to(ROOT / "library")
    (tmp_path / "setup.sh").write_text("")    # everything is there
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(content)
    (tmp_path / "accelerate").write_text("#!/bin/sh\necho accelerate $@\n")
    (tmp_path / "accelerate").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(["bash", "train.sh", "--seed", "3"], cwd=tmp_path, env=os.environ | {"PATH": path}, text=True,
                         capture_output=True)
    assert run.stdout == f"accelerate launch {script} --config_file config/config.json --seed 3\n", run.stderr
