"""benchmark/figures.py: every figure of the paper at --scale smoke; benchmark/throughput.py."""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmark import figures, throughput

ROOT = Path(__file__).resolve().parent.parent
SCALES = ["smoke", "cpu", "paper"]


def runs_of(figure, scale, tmp_path):
    args = figures.Args(figure=figure, scale=scale, runs=tmp_path)
    return figures.make_runs(args)[0]


@pytest.mark.parametrize("figure", figures.FIGURES)
def test_every_command_is_one_of_its_script(figure, tmp_path):
    """make_runs parses each by the script's own Args."""
    for scale in SCALES:
        runs = runs_of(figure, scale, tmp_path)
        assert len({run.folder for run in runs}) == len(runs) >= 2
        assert all(run.folder.parent == tmp_path / scale for run in runs)
    assert not list(tmp_path.iterdir())


def test_figures_share_runs(tmp_path):
    for scale in SCALES:
        folders = {
            name: {run.folder for run in runs_of(name, scale, tmp_path)}
            for name in ["fig2", "fig3", "fig6", "fig7", "fig8"]
        }
        assert folders["fig3"] < folders["fig7"] and folders["fig8"] < folders["fig7"]
        assert folders["fig2"] & folders["fig6"]


def test_the_papers_grid(tmp_path):
    """Ten maps, ten seeds, five of the baselines; MAIPG's nu is the trainer's own, of Table 3."""
    runs = [" ".join(run.words) for run in runs_of("fig3", "paper", tmp_path)]
    assert sum("--nu 0 " in words for words in runs) == 100
    assert sum("--mixer qmix" in words for words in runs) == 100
    assert not any("--nu" in words for words in runs if "--mixer" in words)
    assert len(runs) == 300 and len({words.split()[1] for words in runs}) == 10
    runs = [" ".join(run.words) for run in runs_of("fig5", "paper", tmp_path)]
    settings = {(words.split()[3], "vdn" in words) for words in runs}
    # nu = 0 has no mixer
    assert settings == {("0", False)} | {(nu, m) for nu in ("0.3", "0.5") for m in (True, False)}
    assert len(runs) == 2 * 5 * 10 and all(("gumbel" in x) == ("--mixer" in x) for x in runs)
    worlds = [x for run in runs_of("fig6", "paper", tmp_path) if "--mixer" in (x := run.words)]
    assert len(worlds) == 30
    assert all(" ".join(x).endswith("--mu gumbel --q-scale raw") and "0.05" in x for x in worlds)


def test_the_papers_grid_says_what_it_costs_and_waits(tmp_path, capsys):
    assert figures.main(["fig3", "--scale", "paper", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "300 runs" in text and "3,000,000,000 environment steps" in text and "--yes" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("figure", ["fig1", "table5"])
def test_a_dry_run_of_matrix_games_says_the_commands(figure, tmp_path, capsys):
    assert figures.main([figure, "--dry-run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(figures.MATRIX[figure][0]) and not list(tmp_path.iterdir())
    assert all(line.startswith("python maipg_matrix.py ") for line in said)


def test_an_interrupt_ends_all_of_a_table(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(figures.maipg_matrix, "main", lambda words: [called.append(words), 130][1])
    assert figures.main(["table5", "--out", str(tmp_path)]) == 130 and len(called) == 1


BAD = [  # command line, what the error names
    ("fig3 --jobs 0", "--jobs 0"),
    ("fig3 --jobs -1", "--jobs -1"),
    ("fig6 --cores 0", "--cores 0"),
    ("fig6 --hours -1", "--hours -1"),
    ("fig6 --jobs 20000", "--jobs 20000"),
    ("fig6 --cores -1", "--cores -1"),
    ("fig6 --runs {}/file", "file"),
    ("fig6 --runs {}/file/runs", "file"),
    ("fig1 --out {}/file", "file"),
]


@pytest.mark.parametrize("line, told", BAD)
def test_bad_input(line, told, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    words = line.format(tmp_path).split()
    assert figures.main(words if "--runs" in words else [*words, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words", [["fig9"], [], ["fig3", "--scale", "big"], ["fig3", "--seeds", "1"]]
)
def test_refused_by_the_parser(words):
    with pytest.raises(SystemExit) as ended:
        figures.main(words)
    assert ended.value.code == 2


def test_football_needs_its_engine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert figures.main(["fig4", "--runs", str(tmp_path)]) == 2
    assert "install_grf.sh" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_nothing_is_drawn_where_no_run_is_finished(tmp_path, monkeypatch):
    for code in (1, 130):
        monkeypatch.setattr(figures.launch, "launch", lambda runs, grid, code=code: code)
        assert figures.main(["fig6", "--runs", str(tmp_path)]) == code
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


# fig3 is a part of fig7; fig6 is below.
METHODS = {
    "fig7": {"MAPPO", "MAIPG 0.4 qmix", "HAPPO", "QMIX", "FACMAC"},
    "fig8": {"MAPPO", "MAIPG 0.4 qmix", "QMIX"},
    "fig5": {"MAPPO", "MAIPG 0.4 qmix", "MAIPG 0.4 vdn"},
    "fig2": {"MAIPG 0.4 qmix", "MAIPG 0.4 vdn", "MAIPG 0.4 joint"},
    "fig4": {"MAPPO", "MAIPG 0.5 qmix"},
}


def assert_drawn(out, methods):
    (picture,) = out.glob("*.png")
    assert np.asarray(Image.open(picture).convert("L")).std() > 5
    assert set(pd.read_csv(out / "runs.csv")["method"]) == methods


def train_here(runs, grid):
    """Trainings one after the other in this process; see below for the real launcher."""
    for run in runs:
        if not run.finished():
            module = importlib.import_module(".".join(Path(run.script).with_suffix("").parts))
            assert module.main(run.command()[4:]) == 0  # after python, its flags, the script
    return 0


@pytest.mark.parametrize("name", METHODS)
def test_smoke(name, shared, compiled_once, monkeypatch, capfd):
    """Figures share their runs."""
    monkeypatch.setattr(figures.launch, "launch", train_here)
    if name == "fig4" and not find_spec("gfootball"):
        pytest.skip("gfootball is not installed")
    assert figures.main([name, "--runs", str(shared)]) == 0, capfd.readouterr()
    assert capfd.readouterr().out.endswith(f"{shared / 'smoke' / name / name}.png\n")
    assert_drawn(shared / "smoke" / name, METHODS[name])


def test_the_newcomers_command_from_another_folder(shared):
    """Relative folders are those of the caller."""
    command = [
        sys.executable,
        str(ROOT / "benchmark/figures.py"),
        "fig6",
        "--runs",
        ".",
        "--out",
        "x",
    ]
    how = {"capture_output": True, "text": True, "timeout": 280}
    answer = subprocess.run(command, cwd=shared, **how)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert_drawn(shared / "x", {"MAPPO", "MAIPG 0.4 qmix"})


@pytest.mark.parametrize("name, files", [("fig1", "*.png"), ("table5", "*.csv")])
def test_matrix_games(name, files, tmp_path):
    tested = {*figures.MATRIX, *METHODS, "fig3", "fig6"}
    assert tested == {f"fig{k}" for k in range(1, 9)} | {"table5"}
    assert figures.main([name, "--runs", str(tmp_path)]) == 0
    assert len(list((tmp_path / "smoke" / name).glob(files))) == {"fig1": 1, "table5": 2}[name]


def test_throughput(tmp_path, capsys):
    out = tmp_path / "new" / "t.csv"
    words = ["--scripts", "mpe", "--smoke", "--rounds", "1", "--out", str(out)]
    assert throughput.main(words) == 0
    assert f"torch {torch.__version__}, threads: 1" in capsys.readouterr().out
    table = pd.read_csv(out).set_index("method")
    assert list(table.index) == ["nu = 0", "compatible", "paper"]
    assert set(table["script"]) == {"mpe"} and set(table["size"]) == {"smoke"}
    seconds = table["rollout_s"] + table["update_s"]
    assert table["ratio"].to_numpy() == pytest.approx(seconds / seconds["nu = 0"], rel=0.01)
    seconds = table["rollout_s"] + table["update_s"]
    assert (table["steps_per_s"] * seconds / (2 * 25) - 1).abs().max() < 0.5  # medians each
    assert table[["rollout_s", "update_s"]].min().min() > 0
    # A start of the last one only, in a process of its own.
    starts = table[["start_s", "peak_mib"]]
    assert starts.loc["paper"].between(0.5, 4000).all() and starts.isna().sum().sum() == 4


@pytest.mark.parametrize("name", throughput.SIZES)
def test_throughput_sizes(name):
    """Each fits its script; JaxMARL's own trainer is timed at JaxMARL's sizes."""
    if name == "grf":
        pytest.importorskip("gfootball")
    script = importlib.import_module(f"maipg_{name}")
    for what, size in (throughput.SIZES[name] | {"smoke": throughput.SMOKE}).items():
        for method in throughput.METHODS.values():
            case = script.resolve(script.Args(**size, **method, device="cpu"))
            assert (case.nu == 0) == (method == {"nu": 0})
            # Even where StarCraft II is installed.
            assert "JaxMARL" not in what or size["backend"] == "smax"


def test_jaxmarl_mappo():
    """Its rollout and update run."""
    pytest.importorskip("optax")
    jaxmarl_mappo = pytest.importorskip("benchmark.baselines.jaxmarl_mappo")
    turn = jaxmarl_mappo.trainer("3m", 2, steps=4, dim=8, epochs=1, minibatches=2)
    assert min(turn() + turn()) > 0


@pytest.mark.parametrize("words", ["--scripts", "--rounds 0", "--threads 0"])
def test_throughput_refuses(words, tmp_path, capsys):
    words = ["--scripts", "mpe", *words.split(), "--out", str(tmp_path / "x.csv")]
    assert throughput.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())
