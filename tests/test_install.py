"""What the scripts that install the games refuse and check, with stand-ins for the system."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*words, **env):
    """(exit code, output) of a script of benchmark/."""
    how = {"env": os.environ | env, "text": True, "stdout": -1, "stderr": subprocess.STDOUT}
    answer = subprocess.run(["bash", *map(str, words)], **how)
    return answer.returncode, answer.stdout


def tool(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    "system, python, told", [("3.11.2", "3.99", "Python 3.99"), ("", "", "venv")]
)
def test_football_is_refused_before_the_build(system, python, told, tmp_path):
    """Another Python than the system's; no virtual environment. Nothing is installed."""
    for name in ["apt-get", "sudo"]:
        tool(tmp_path / "bin", name, f"touch {tmp_path}/used")
    tool(tmp_path / "bin", "dpkg", "echo Status: install ok installed")
    tool(tmp_path / "bin", "apt-cache", f"echo '  Candidate: {system}-1'")
    # Asked for its prefix, then for its version.
    answer = f'case "$2" in *version*) echo {python};; *) exit {0 if python else 1};; esac'
    tool(tmp_path / "bin", "python", answer)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    code, text = run(ROOT / "benchmark/install_grf.sh", PATH=path)
    told = {"venv": "activate the virtual environment"}.get(told, told)
    assert code == 2 and text.startswith("error: ") and told in text and text.count("\n") == 1
    assert not (tmp_path / "used").exists()


def test_starcraft_names_the_one_thing_to_mend(tmp_path):
    home, modules = tmp_path / "game", tmp_path / "modules"
    check = ["benchmark/install_sc2.sh", "--check", home]
    env = {"PYTHONPATH": str(modules), "HOME": str(tmp_path)}

    def problem():
        code, text = run(ROOT / check[0], *check[1:], **env)
        assert code == 2 and text.count("error: ") == 1
        return text.splitlines()[-1]

    assert "no folder" in problem()
    home.mkdir()
    assert "no game" in problem()
    (home / "Versions").mkdir()
    (home / "Versions/Base75689").mkdir()
    tool(home / "Versions/Base75689", "SC2_x64", "")
    assert "no SMAC map" in problem()
    (home / "Maps/SMAC_Maps").mkdir(parents=True)
    (home / "Maps/SMAC_Maps/3m.SC2Map").write_text("map")
    (modules / "smac").mkdir(parents=True)
    (modules / "smac/__init__.py").touch()
    assert "AutoML" in problem()
    (modules / "smac/env").mkdir()
    (modules / "smac/env/__init__.py").write_text("import no_such_module")
    assert "No module named 'no_such_module'" in problem()
    (modules / "smac/env/__init__.py").write_text("StarCraft2Env = None")
    code, text = run(ROOT / check[0], *check[1:], **env)
    assert code == 0 and "version 4.10" in text and "maps: 1" in text
    assert f"export SC2PATH={home}" in text


def test_a_copy_of_starcraft_that_breaks_off_is_none(tmp_path):
    """An interrupted copy has no Versions: the next call copies again."""
    home, bin = tmp_path / "home", tmp_path / "bin"
    tool(bin, "curl", "exit 0")
    tool(bin, "unzip", "cd $6 && mkdir -p StarCraftII/Versions/Base75689 StarCraftII/Maps")
    tool(bin, "git", "exit 3")  # the copy is done
    tool(bin, "cp", 'case "$2" in *Versions*) mkdir "$3"; exit 4;; esac; exec /bin/cp "$@"')
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "AGREE_TO_EULA": "1"}
    assert run(ROOT / "benchmark/install_sc2.sh", home, **env)[0] == 4
    assert {path.name for path in home.iterdir()} == {"Maps", "Versions.part"}
    (bin / "cp").unlink()
    assert run(ROOT / "benchmark/install_sc2.sh", home, **env)[0] == 3
    assert {path.name for path in home.iterdir()} == {"Maps", "Versions"}
    assert (home / "Versions/Base75689").is_dir()


def test_starcraft_wants_its_licence_accepted(tmp_path):
    code, text = run(ROOT / "benchmark/install_sc2.sh", tmp_path / "game", AGREE_TO_EULA="0")
    assert code == 2 and "AGREE_TO_EULA=1" in text and not list(tmp_path.iterdir())
