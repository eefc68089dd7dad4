"""benchmark/plot.py's statistics, and every figure of the paper at --scale smoke."""

import itertools
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark import figures, plot, report, throughput

ROOT = Path(__file__).resolve().parent.parent


def run_folder(place, seed, scores, nu=0.0, left=0, **settings):
    """A run as a script leaves it: an evaluation every second row, 100 steps/s; `left` steps short
    of its end."""
    folder = place / f"job{nu}{seed}" / f"smax-3m__maipg_smac__nu{nu:g}__qmix__s{seed}__x"
    folder.mkdir(parents=True)
    args = {"map_name": "3m", "backend": "smax", "nu": nu, "mixer": "qmix", "seed": seed}
    args |= {"total_timesteps": 2000 * len(scores) + left} | settings
    (folder / "args.json").write_text(json.dumps(args))
    lines = ["global_step,eval/win_rate,variance/corr,charts/SPS"]
    for k, score in enumerate(scores):
        lines += [f"{2000 * k + 1000},nan,0.5,100", f"{2000 * k + 2000},{score},nan,50"]
    (folder / "progress.csv").write_text("\n".join(lines) + "\n")
    about = {"command": "python x", "commit": "abc", "machine": "m", "torch": "t"}
    (folder.parent / "job.json").write_text(json.dumps(about))
    return folder


def test_a_run_is_read(tmp_path):
    scores = [k / 20 for k in range(14)]
    run_folder(tmp_path, 1, scores)
    runs, curves = plot.read([tmp_path])
    (row,) = runs.to_dict("records")
    assert (row["method"], row["scenario"], row["commit"]) == ("MAPPO", "SMAX 3m", "abc")
    assert row["steps"] == 28_000 and row["final"] == pytest.approx(sum(scores[-10:]) / 10)
    assert row["area"] == pytest.approx(sum(scores) / 14)  # a straight line
    assert row["hours"] * 3600 == pytest.approx(14 * (1000 / 100 + 1000 / 50))
    rate = curves[curves["metric"] == "win rate"]
    assert rate["value"].tolist() == scores and rate["global_step"].tolist()[:2] == [2000, 4000]
    assert (curves["metric"] == "corr(A, Qc)").sum() == 14


def test_r_var_follows_from_what_is_logged(tmp_path):
    rng = np.random.default_rng(0)
    a, q = rng.normal(size=(2, 500))
    q = 0.3 * q + 0.1 * a
    cov = np.cov(a, q)
    folder = run_folder(tmp_path, 1, [0.5])
    table = pd.read_csv(folder / "progress.csv")
    table["variance/corr"] = cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    table["variance/slope"] = cov[0, 1] / cov[1, 1]
    table.to_csv(folder / "progress.csv", index=False)
    _, curves = plot.read([tmp_path])
    values = curves[curves["metric"] == "R_Var, Q centred by the policy"]["value"]
    assert values.to_numpy() == pytest.approx([(a - q).var() / a.var()] * 2)


def test_unfinished_runs_are_left_out(tmp_path):
    run_folder(tmp_path, 1, [0.1, 0.2])
    run_folder(tmp_path, 2, [0.1, 0.2], left=1)
    (tmp_path / "job" / "new").mkdir(parents=True)
    (tmp_path / "job" / "new" / "progress.csv").write_text("global_step,charts/SPS\n")
    runs, curves = plot.read([tmp_path])
    assert runs["seed"].tolist() == [1] and set(curves["seed"]) == {1}


NAMES = [  # args, name in figures and tables
    ({"nu": 0.0, "mixer": "qmix", "critic": "paper", "mu": "gumbel"}, "MAPPO"),
    ({"nu": 0.4, "mixer": "qmix", "critic": "paper", "mu": "expectation"}, "MAIPG 0.4 qmix"),
    ({"nu": 0.4, "mixer": "vdn", "critic": "paper", "mu": "gumbel"}, "MAIPG 0.4 vdn gumbel"),
    ({"nu": 0.5, "mixer": "qmix", "critic": "compatible", "mu": "expectation"}, "compatible"),
    ({"nu": 0.5, "mixer": "qmix", "critic": "compatible", "mu": "gumbel"}, "compatible gumbel"),
    ({"nu": 0.2, "mixer": "joint"}, "MAIPG 0.2 joint"),  # the particle worlds'
]


@pytest.mark.parametrize("args, name", NAMES)
def test_names_of_methods(args, name):
    name = f"MAIPG 0.5 {name}" if name.startswith("compatible") else name
    assert plot.method_of(args, "maipg_smac") == name
    assert plot.method_of(args, "happo") == "HAPPO"


def test_iqm_is_the_mean_of_the_middle_half():
    assert plot.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert plot.iqm([0.0, 1.0, 2.0]) == 1.0  # three seeds: their mean
    x = np.random.default_rng(0).normal(size=16)
    assert plot.iqm(x) == pytest.approx(np.sort(x)[4:12].mean())


def test_the_bootstrap_resamples_each_task_by_itself():
    """Against the exact distribution: all 3^3 x 2^2 resamples of two tasks."""
    one, two = np.array([0.0, 0.3, 0.6]), np.array([10.0, 20.0])
    low, high = plot.bootstrap(lambda x, y: np.mean([*x, *y]), one, two, resamples=20_000)
    exact = [
        np.mean([*x, *y])
        for x in itertools.product(one, repeat=3)
        for y in itertools.product(two, repeat=2)
    ]
    assert low == pytest.approx(np.quantile(exact, 0.025), abs=0.05)
    assert high == pytest.approx(np.quantile(exact, 0.975), abs=0.05)
    assert all(math.isnan(x) for x in plot.bootstrap(np.mean, one[:1]))


def test_improvement_and_difference():
    value, low, high = plot.improvement([1.0, 2.0], [0.0, 1.0])
    assert value == 3.5 / 4 and low <= value <= high  # three wins and a tie
    assert plot.improvement([3.0], [4.0])[0] == 0.0
    value, low, high = plot.difference(np.array([1.0, 2.0]), np.array([0.0, 0.5]))
    assert value == 1.25 and (low, high) == (0.5, 2.0)


def test_curves_of_different_steps_are_interpolated():
    table = {"seed": [1, 1, 2, 2, 2], "global_step": [0, 10, 0, 5, 20], "value": [0, 1, 2, 4, 4]}
    steps, values = plot.on_one_grid(pd.DataFrame(table), "global_step")
    assert steps.tolist() == [0, 5, 10]
    assert values.tolist() == [[0, 0.5, 1], [2, 4, 4]]


def test_tables_pictures_and_report(tmp_path):
    for seed in (1, 2):
        run_folder(tmp_path / "runs", seed, [0.1 * seed] * 12)
        run_folder(tmp_path / "runs", seed, [0.2 + 0.1 * seed] * 12, nu=0.4)
    out = tmp_path / "results" / "grid"
    assert plot.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    table = pd.read_csv(out / "comparison.csv").set_index("method")
    assert table.loc["MAIPG 0.4 qmix", "gain"] == pytest.approx(0.2)
    assert table.loc["MAIPG 0.4 qmix", "p_better"] == 1.0
    again = tmp_path / "again"  # the CSV says what the runs say
    words = [str(out / "curves.csv"), "--style", "iqm", "--x", "hours", "--out", str(again)]
    assert plot.main(words) == 0
    assert (again / "comparison.csv").read_text() == (out / "comparison.csv").read_text()
    assert Image.open(again / "figure.png").size[0] > 500
    words = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "R.md")]
    assert report.main(words) == 0
    text = (tmp_path / "R.md").read_text()
    assert "| MAIPG 0.4 qmix | 2 | 24,000 |" in text and "0.200 [0.100, 0.300]" in text


def test_plot_refuses_what_is_not_there(tmp_path, capsys):
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "no finished run" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_papers_grid_says_what_it_costs_and_waits(tmp_path, capsys):
    words = ["fig3", "--scale", "paper", "--runs", str(tmp_path)]
    assert figures.main(words) == 0
    text = capsys.readouterr().out
    # ten maps: MAPPO and MAIPG with ten seeds, HAPPO and QMIX with five
    assert "300 runs x" in text and " h on 2 cores" in text and "--yes" in text
    assert not list(tmp_path.iterdir())


def test_throughput(tmp_path, capsys):
    out = tmp_path / "new" / "t.csv"
    words = ["--only", "smax-N8-nu0.4", "--updates", "3", "--threads", "1", "--out", str(out)]
    assert throughput.main(words) == 0
    (row,) = pd.read_csv(out).to_dict("records")
    assert row["case"] == "smac-smax-N8-nu0.4" and row["steps_per_second"] > 50
    assert 100 < row["peak_mib"] < 10_000
    assert throughput.main(["--only", "nothing", "--out", str(tmp_path / "x.csv")]) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "x.csv").exists()
    if not find_spec("smac"):
        assert "oxwhirl" in throughput.missing("smac-sc2-N8-nu0")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


ORDER = ["fig7", "fig3", "fig8", "fig5", "fig6", "fig2", "fig1", "table5", "fig4"]


@pytest.mark.parametrize("name", ORDER)
def test_smoke(name, shared):
    """The command of a newcomer; figures share their runs."""
    assert set(ORDER) == {*figures.FIGURES, *figures.MATRIX}
    if name == "fig4" and not find_spec("gfootball"):
        pytest.skip("gfootball is not installed")
    words = [name, "--scale", "smoke", "--runs", str(shared)]
    command = [sys.executable, "benchmark/figures.py", *words]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    out = shared / "smoke" / name
    if name == "table5":
        assert len(list(out.glob("*.csv"))) == 2
        return
    (picture,) = out.glob("*.png")
    assert np.asarray(Image.open(picture).convert("L")).std() > 5
    if name != "fig1":
        methods = set(pd.read_csv(out / "runs.csv")["method"])
        expected = {"fig7": {"MAPPO", "MAIPG 0.4 qmix", "HAPPO", "QMIX", "FACMAC"}}
        expected |= {"fig5": {"MAPPO", "MAIPG 0.4 qmix", "MAIPG 0.4 vdn"}}
        assert methods == expected.get(name, methods) and len(methods) >= 2
