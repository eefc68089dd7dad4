"""benchmark/plot.py: what is read, the statistics by hand, names, colours, tables, bad input."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark import plot

RUN = "smax-3m__maipg_smac__nu0__s1__x"


def run_folder(place, seed, scores, nu=0.0, script="maipg_smac", left=0, **settings):
    """A run as a script leaves it: an evaluation every second row, 100 steps/s; `left` steps short
    of its end."""
    mark = "-".join(map(str, settings.values()))
    folder = place / f"job{nu}{seed}{mark}{script}" / RUN.replace("maipg_smac", script)
    folder.mkdir(parents=True)
    args = {"map_name": "3m", "backend": "smax", "nu": nu, "mixer": "qmix", "seed": seed}
    args |= {"total_timesteps": 2000 * len(scores) + left} | settings
    (folder / "args.json").write_text(json.dumps(args))
    lines = ["global_step,eval/win_rate,variance/corr,charts/SPS"]
    for k, score in enumerate(scores):
        lines += [f"{2000 * k + 1000},nan,0.5,100", f"{2000 * k + 2000},{score},nan,50"]
    (folder / "progress.csv").write_text("\n".join(lines) + "\n")
    about = {"command": "python x", "commit": "7012627", "machine": "m", "torch": "t"}
    (folder.parent / "job.json").write_text(json.dumps(about))
    return folder


def runs_table(rows, steps=1000):
    """(method, seed, area) rows as a runs.csv on one scenario; final is the area plus 1."""
    table = pd.DataFrame(rows, columns=["method", "seed", "area"])
    table = table.assign(scenario="3m", steps=steps, hours=1.0, commit="abc")
    return table.assign(final=table["area"] + 1)


def all_means(x):
    """The means of all n^n resamples of x, each as likely: the bootstrap's exact distribution."""
    return [np.mean(sample) for sample in itertools.product(x, repeat=len(x))]


# ---------------------------------------------------------------------------------------- reading
def test_a_run_is_read(tmp_path):
    scores = [k / 20 for k in range(14)]
    run_folder(tmp_path, 1, scores)
    runs, curves = plot.read([tmp_path])
    (row,) = runs.to_dict("records")
    assert (row["method"], row["scenario"], row["commit"]) == ("MAPPO", "SMAX 3m", "7012627")
    assert row["steps"] == 28_000 and row["area"] == pytest.approx(sum(scores) / 14)
    assert math.isnan(row["final"])  # 14 evaluations are too few
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
    (tmp_path / "matrix").mkdir()
    (tmp_path / "matrix" / "args.json").write_text("{}")  # of maipg_matrix.py: no run of steps
    runs, curves = plot.read([tmp_path, tmp_path / "job0.01maipg_smac"])  # one of them twice
    assert runs["seed"].tolist() == [1] and set(curves["seed"]) == {1}


@pytest.mark.parametrize("x", ["global_step", "hours"])
def test_one_evaluation_is_enough(tmp_path, x):
    run_folder(tmp_path, 1, [0.5])
    assert plot.main([str(tmp_path), "--x", x, "--out", str(tmp_path / "out")]) == 0
    (row,) = pd.read_csv(tmp_path / "out" / "comparison.csv").to_dict("records")
    assert row["area"] == 0.5 and math.isnan(row["final"])


def test_seeds_without_a_common_hour(tmp_path, capsys):
    for seed, scale in (1, 1), (2, 50):
        folder = run_folder(tmp_path, seed, [0.5] * 3)
        text = (folder / "progress.csv").read_text()
        text = text.replace(",100\n", f",{100 * scale}\n").replace(",50\n", f",{50 * scale}\n")
        (folder / "progress.csv").write_text(text)
    assert plot.main([str(tmp_path), "--x", "hours", "--out", str(tmp_path / "out")]) == 2
    assert "error: --x hours: no hours" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ names
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


def test_names_tell_the_settings_that_differ(tmp_path):
    """MAPPO at one learning rate, MAIPG at two and two ridges: nothing is pooled, and the names of
    both say which MAPPO is whose."""
    more = {"gamma": 0.99, "critic": "compatible", "ridge": 0.1}
    run_folder(tmp_path, 1, [0.5], learning_rate=0.001, **more | {"ridge": 7})  # MAPPO has none
    run_folder(tmp_path, 2, [0.5], learning_rate=0.001, **more)
    run_folder(tmp_path, 1, [0.5], nu=0.4, learning_rate=0.001, **more)
    run_folder(tmp_path, 1, [0.5], nu=0.4, learning_rate=0.001, **more | {"ridge": 0.3})
    run_folder(tmp_path, 1, [0.5], nu=0.4, learning_rate=5e-4, **more)
    run_folder(tmp_path, 1, [0.5], nu=0.2, learning_rate=0.001, threads=8, **more)
    run_folder(tmp_path, 1, [0.5], script="qmix", learning_rate=3.0)
    runs, curves = plot.read([tmp_path])
    rate = "learning_rate 0.001"
    assert sorted(runs["method"]) == [
        f"MAIPG 0.2 compatible, {rate}",
        "MAIPG 0.4 compatible, learning_rate 0.0005, ridge 0.1",
        f"MAIPG 0.4 compatible, {rate}, ridge 0.1",
        f"MAIPG 0.4 compatible, {rate}, ridge 0.3",
        f"MAPPO, {rate}",
        f"MAPPO, {rate}",
        "QMIX",
    ]
    assert runs["method"].iloc[0] == f"MAPPO, {rate}" and set(curves["method"]) == set(
        runs["method"]
    )
    pairs = plot.comparison(runs).set_index("method")["ahead"]
    assert pairs[f"MAIPG 0.4 compatible, {rate}, ridge 0.3"] == "0 of 1"
    assert pairs["MAIPG 0.4 compatible, learning_rate 0.0005, ridge 0.1"] == ""  # no such MAPPO


def test_names_tell_a_setting_that_was_left_open(tmp_path):
    """None is a setting like others."""
    run_folder(tmp_path, 1, [0.5], critic_epochs=None)
    run_folder(tmp_path, 1, [0.9], critic_epochs=20)
    run_folder(tmp_path, 1, [0.7], nu=0.4, critic_epochs=20)
    run_folder(tmp_path, 1, [0.7], script="qmix", rollout_steps=400)  # the others have none
    runs, _ = plot.read([tmp_path])
    assert sorted(runs["method"]) == [
        "MAIPG 0.4 qmix, critic_epochs 20",
        "MAPPO, critic_epochs 20",
        "MAPPO, critic_epochs default",
        "QMIX",
    ]
    gains = plot.comparison(runs).set_index("method")["area_gain"]
    assert gains["MAIPG 0.4 qmix, critic_epochs 20"] == pytest.approx(-0.2)


def test_names_are_short_where_nothing_differs(tmp_path):
    run_folder(tmp_path, 1, [0.5], gamma=0.99, mixer="vdn")  # MAPPO builds no mixer
    run_folder(tmp_path, 2, [0.5], gamma=0.99, threads=2)
    run_folder(tmp_path, 1, [0.5], gamma=0.9, map_name="8m")  # another scenario
    run_folder(tmp_path, 1, [0.5], gamma=0.99, nu=0.4, td_lambda=0.5)
    # --mixer qmix, or --critic paper alone: the same.
    run_folder(tmp_path, 2, [0.5], gamma=0.99, nu=0.4, td_lambda=0.5, mixer=None)
    assert set(plot.read([tmp_path])[0]["method"]) == {"MAPPO", "MAIPG 0.4 qmix"}


def test_a_method_is_paired_with_the_mappo_of_its_settings():
    names = ["MAPPO, a 1", "MAPPO, a 2", "QMIX"]
    assert plot.mappo_of("MAIPG 0.4 qmix, a 2, ridge 3", names) == "MAPPO, a 2"
    assert plot.mappo_of("MAIPG 0.4 qmix", names) is None
    assert plot.mappo_of("QMIX", ["MAPPO", *names]) == "MAPPO"
    assert plot.mappo_of("MAIPG 0.4 qmix, a 2", ["MAPPO", *names]) == "MAPPO, a 2"


# ------------------------------------------------------------------------------------- statistics
def curve(values, steps=None, metric="win rate"):
    steps = range(10, 10 * len(values) + 1, 10) if steps is None else steps
    return pd.DataFrame({"metric": metric, "global_step": steps, "value": values})


def test_final_and_area_by_hand():
    values = [0.0] * 27 + [0.3, 0.6, 0.9]  # 27 is at nine tenths: not in the last tenth
    final, area = plot.scores(curve(values), 300)
    assert final == pytest.approx(0.6) and area == pytest.approx(1.8 / 30)
    assert plot.scores(curve([5.0] * 27 + [0.3, 0.6, 0.9]), 300)[0] == pytest.approx(0.6)
    longer, _ = plot.scores(curve(values), 320)  # the steps count, not the last evaluation
    assert math.isnan(longer)  # 280 is out: two are left


def test_when_final_is_a_dash():
    twenty = plot.scores(curve([1.0] * 20), 200)
    assert math.isnan(twenty[0]) and twenty[1] == 1.0  # two in the last tenth
    assert plot.scores(curve([1.0] * 21), 210)[0] == 1.0  # three: after 189
    late = [*range(10, 180, 10), 184, 188, 192]  # 20, three in the last tenth of 200
    assert plot.scores(curve([1.0] * 20, late), 200)[0] == 1.0
    assert math.isnan(plot.scores(curve([1.0] * 19, late[1:]), 200)[0])  # 19 are too few


def test_the_win_rate_is_the_score_where_there_is_one():
    both = pd.concat([curve([7.0], metric="return"), curve([0.5])])
    assert plot.scores(both, 10)[1] == 0.5
    assert plot.scores(curve([7.0], metric="return"), 10)[1] == 7.0
    assert math.isnan(plot.scores(curve([7.0], metric="corr(A, Qc)"), 10)[1])


def test_iqm_is_the_mean_of_the_middle_half():
    assert plot.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert plot.iqm([0.0, 1.0, 2.0]) == 1.0  # three seeds: their mean
    x = np.random.default_rng(0).normal(size=16)
    assert plot.iqm(x) == pytest.approx(np.sort(x)[4:12].mean())


def test_the_bootstrap_against_all_its_resamples():
    x = np.array([0.0, 0.1, 0.4, 0.5, 1.0])
    low, high = plot.bootstrap(np.mean, x, resamples=20_000)
    assert low == pytest.approx(np.quantile(all_means(x), 0.025), abs=0.011)
    assert high == pytest.approx(np.quantile(all_means(x), 0.975), abs=0.011)
    both = plot.bootstrap(np.mean, np.stack([x, 2 * x], axis=1), resamples=20_000)
    assert both == pytest.approx(np.array([[low, 2 * low], [high, 2 * high]]))
    assert np.isnan(plot.bootstrap(np.mean, x[:4])).all()  # four seeds: a dash


OURS, THEIRS = [0.3, 0.9, 0.5, 0.2, 0.7, 0.1], [0.1, 0.2, 0.3, 0.3, 0.1, 9.0]


def pair_table(seeds, **more):
    rows = [("MAPPO", k + 1, THEIRS[k]) for k in range(seeds)]
    rows += [("MAIPG 0.4 qmix", k + 1, OURS[k]) for k in reversed(range(seeds))]
    return runs_table(rows + [("MAPPO", 99, 5.0)], **more)  # a seed that one has only


def test_the_difference_is_paired_by_seed():
    row = plot.comparison(pair_table(5)).set_index("method").loc["MAIPG 0.4 qmix"]
    gaps = np.subtract(OURS, THEIRS)[:5]
    assert row["ahead"] == "4 of 5"
    for name in ("area_gain", "final_gain"):
        assert row[name] == pytest.approx(gaps.mean())
        assert row[f"{name}_low"] == pytest.approx(np.quantile(all_means(gaps), 0.025), abs=0.02)
        assert row[f"{name}_high"] == pytest.approx(np.quantile(all_means(gaps), 0.975), abs=0.02)
    assert row["area_low"] == pytest.approx(np.quantile(all_means(OURS[:5]), 0.025), abs=0.02)


def test_the_sampled_return_is_a_mean_over_updates(tmp_path):
    """Of all rows in which an episode ended; the difference is paired by seed."""
    for seed, nu in itertools.product((1, 2), (0.0, 0.4)):
        path = run_folder(tmp_path, seed, [0.5] * 3, nu=nu) / "progress.csv"
        table = pd.read_csv(path)
        table["charts/episodic_return"] = [math.nan, 1, 2, 3, 4, 5 + 5 * nu * seed]
        table.to_csv(path, index=False)
    runs, curves = plot.read([tmp_path])
    table = plot.comparison(runs).set_index("method")
    assert table["sampled"].tolist() == pytest.approx([3, 3.6])
    assert table.loc["MAIPG 0.4 qmix", "sampled_gain"] == pytest.approx(0.6)
    assert (curves["metric"] == "sampled return").sum() == 4 * 5


def test_four_common_seeds_have_no_interval():
    table = plot.comparison(pair_table(4)).set_index("method")
    row = table.loc["MAIPG 0.4 qmix"]
    assert row["area_gain"] == pytest.approx(np.subtract(OURS, THEIRS)[:4].mean())
    assert math.isnan(row["area_gain_low"]) and math.isnan(row["area_low"])
    assert not math.isnan(table.loc["MAPPO", "area_low"])  # it has five
    assert math.isnan(table.loc["MAPPO", "area_gain"]) and table.loc["MAPPO", "ahead"] == ""


def test_a_final_that_one_seed_lacks_is_a_dash():
    runs = pair_table(5)
    runs.loc[runs["seed"] == 1, "final"] = np.nan
    row = plot.comparison(runs).set_index("method").loc["MAIPG 0.4 qmix"]
    assert math.isnan(row["final"]) and math.isnan(row["final_gain"]) and row["area_gain"] > 0


def test_runs_of_other_lengths_are_not_paired():
    runs = pair_table(5)
    runs.loc[runs["method"] != "MAPPO", "steps"] = 2000
    row = plot.comparison(runs).set_index("method").loc["MAIPG 0.4 qmix"]
    assert math.isnan(row["area_gain"]) and row["ahead"] == "" and row["area"] > 0


def test_curves_of_different_steps_are_interpolated():
    table = {"seed": [1, 1, 2, 2, 2], "global_step": [0, 10, 0, 5, 20], "value": [0, 1, 2, 4, 4]}
    steps, values = plot.on_one_grid(pd.DataFrame(table), "global_step")
    assert steps.tolist() == [0, 5, 10]
    assert values.tolist() == [[0, 0.5, 1], [2, 4, 4]]


# --------------------------------------------------------------------------- pictures and tables
def test_a_method_has_one_colour_in_all_pictures():
    names = ["MAPPO", "MAIPG 0.3 vdn", "MAIPG 0.5 vdn", "MAIPG 0.5 qmix", "HAPPO", "QMIX", "FACMAC"]
    every = plot.looks(names)
    for method in names:
        assert plot.looks([method])[method]["color"] == every[method]["color"]
    assert len({look["color"] for look in every.values()}) == len(names)
    two = plot.looks(["MAPPO, a 1", "MAPPO, a 2"])
    assert {look["color"] for look in two.values()} == {every["MAPPO"]["color"]}
    assert len({str(look["ls"]) for look in two.values()}) == 2
    odd = plot.looks(["MINE 1..2", "THEIRS", "MAIPG 0.4 qmix gumbel, q_scale raw", ""])
    assert len({(look["color"], str(look["ls"])) for look in odd.values()}) == 4


def panels(monkeypatch, curves, **drawing):
    """The axes of a picture, and its legend's labels."""
    kept, savefig = [], plot.Figure.savefig
    keep = lambda figure, *args, **how: kept.append(figure) or savefig(figure, *args, **how)
    monkeypatch.setattr(plot.Figure, "savefig", keep)
    plot.draw(curves, drawing.pop("path"), **drawing)
    monkeypatch.undo()
    (figure,) = kept
    return figure.axes, [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("style", ["std", "iqm"])
def test_the_picture(tmp_path, monkeypatch, style):
    rows = [
        (scenario, method, seed, metric, 10 * step, step + seed)
        for scenario in ("academy_corner", "spread")
        for method in ("MAPPO", "MAIPG 0.4 qmix")
        for seed in range(1, 6 if method == "MAPPO" else 3)
        for metric in (["win rate", "return"] if scenario == "academy_corner" else ["return"])
        for step in (1, 2)
    ]
    curves = pd.DataFrame(rows, columns=[*plot.KEY, "metric", "global_step", "value"])
    drawing = {"path": tmp_path / "x.png", "metrics": ["win rate", "return"], "style": style}
    axes, labels = panels(monkeypatch, curves, **drawing)
    names = [axis.get_ylabel() for axis in axes]
    assert names[0] == "scored" and names[2:] == ["greedy return"] * 2
    assert labels == ["MAPPO (5)", "MAIPG 0.4 qmix (2)"]
    line, other = axes[0].lines
    assert line.get_ydata().tolist() == [4, 5]  # mean, or middle half, of seeds 1 to 5
    band, narrow = (area.get_paths() for area in axes[0].collections)
    if style == "std":
        assert band[0].get_extents().y0 == pytest.approx(4 - math.sqrt(2))
    else:  # two seeds have no interval
        assert 2 < band[0].get_extents().y0 < 4 and not narrow
    assert Image.open(tmp_path / "x.png").size[0] > 500
    assert len(axes) == 4 and not axes[1].lines  # spread has no win rate
    # Each scenario's own score; one of MAPPO's seeds is missing on spread.
    curves = curves[(curves["scenario"] != "spread") | (curves["seed"] < 5)]
    drawing |= {"path": tmp_path / "y.png", "metrics": ["score", "return"]}
    axes, labels = panels(monkeypatch, curves, **drawing)
    assert [axis.get_ylabel() for axis in axes] == ["scored", *["greedy return"] * 3]
    assert axes[1].lines[0].get_ydata().tolist() == [3.5, 4.5]
    assert labels == ["MAPPO (4, 5)", "MAIPG 0.4 qmix (2)"]


def test_many_scenarios_of_one_metric_take_two_rows(tmp_path, monkeypatch):
    rows = [(f"task {k}", "MAPPO", 1, "win rate", step, k) for k in range(7) for step in (1, 2)]
    curves = pd.DataFrame(rows, columns=[*plot.KEY, "metric", "global_step", "value"])
    for metrics in (None, ()):
        axes, _ = panels(monkeypatch, curves, path=tmp_path / "x.png", metrics=metrics)
        assert [len(axis.lines) for axis in axes] == [1] * 7
    assert [axis.get_title() for axis in axes] == [f"task {k}" for k in range(7)]
    assert axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 4)


def grid(place):
    """MAPPO and MAIPG with two seeds, 24 evaluations, the last three of which are 0.08 better."""
    for seed in (1, 2):
        for nu, score in ((0.0, 0.1 * seed), (0.4, 0.2 + 0.1 * seed)):
            run_folder(place, seed, [score] * 21 + [score + 0.08] * 3, nu)
    return place


def test_tables_and_pictures(tmp_path):
    out, again = tmp_path / "results" / "grid", tmp_path / "again"
    assert plot.main([str(grid(tmp_path / "runs")), "--out", str(out)]) == 0
    table = pd.read_csv(out / "comparison.csv").set_index("method")
    row = table.loc["MAIPG 0.4 qmix"]
    assert row["area_gain"] == pytest.approx(0.2) and row["final_gain"] == pytest.approx(0.2)
    assert row["ahead"] == "2 of 2" and row["hours"] == pytest.approx(24 * 30 / 3600, abs=1e-5)
    # The CSVs say what the runs say; final and area are computed anew.
    runs = pd.read_csv(out / "runs.csv", dtype={"commit": str}).assign(final=9.0, area=9.0)
    runs.to_csv(out / "runs.csv", index=False)
    words = [str(out / "curves.csv"), "--style", "iqm", "--x", "hours", "--out", str(again)]
    assert plot.main(words) == 0
    assert (again / "comparison.csv").read_text() == (out / "comparison.csv").read_text()
    assert "7012627" in (again / "runs.csv").read_text()
    assert sorted(path.name for path in again.iterdir()) == [
        "comparison.csv",
        "curves.csv",
        "figure.png",
        "runs.csv",
    ]


def test_a_full_disk_leaves_the_old_tables(tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "out", [str(grid(tmp_path / "runs")), "--out", str(tmp_path / "out")]
    assert plot.main(words) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.csv")}

    def half(table, path, **how):
        path.write_text("scenario,meth")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    assert plot.main(words) == 2 and "no space left" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in before} == before


def test_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "HERE", tmp_path)
    assert plot.main(["--markdown"]) == 2 and "no runs.csv" in capsys.readouterr().err
    plot.write(*plot.read([grid(tmp_path / "runs")]), tmp_path / "results" / "grid", "grid")
    assert plot.main(["--markdown"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## [grid](results/grid/README.md)" in text and "![](results/grid/grid.png)" in text
    cells = "|SMAX 3m|MAIPG 0.4 qmix|2|48,000|0.360 [-]|0.430 [-]|0.200 [-]|0.200 [-]|2 of 2|"
    assert cells in text and "|SMAX 3m|MAPPO|2|48,000|0.160 [-]|0.230 [-]|-|-||" in text
    assert "percentile bootstrap" in text  # it says what the numbers are


# -------------------------------------------------------------------------------------- bad input
def spoil(name, text=None, old="", new=""):
    """A function that overwrites a file of a run folder, or replaces a passage in it."""

    def do(place):
        path = place / name
        path.write_text(path.read_text().replace(old, new) if text is None else text)

    return do


def cut(name, count):
    """A function that takes the last letters off a file of a run folder."""
    return lambda place: (place / name).write_text((place / name).read_text()[:-count])


CSV = "out/curves.csv"
PROGRESS, ARGS = (f"runs/{RUN}/{name}" for name in ("progress.csv", "args.json"))
HEAD = "scenario,method,seed,metric,global_step,hours,value\n"
BAD = {  # what is wrong: (paths and words, what is done to sound files, words of the message)
    "missing path": (["nowhere"], None, "there is no"),
    "missing path among others": (["runs", "nowhere.csv"], None, "there is no"),
    "no path": ([], None, "no finished run"),
    "no run": (["out"], lambda place: shutil.rmtree(place / "out"), "there is no"),
    "empty folder": (["empty"], lambda place: (place / "empty").mkdir(), "no finished run"),
    "empty CSV": ([CSV], spoil(CSV, ""), "No columns"),
    "CSV without rows": ([CSV], spoil(CSV, HEAD), "line 1 is incomplete"),
    "foreign CSV": ([CSV], spoil(CSV, "a,b\n1,2\n"), "no column"),
    "binary CSV": (["out/figure.png"], None, "damaged or foreign"),
    "runs.csv as curves.csv": (["out/runs.csv"], None, "no column"),
    "no runs.csv": ([CSV], lambda place: (place / "out/runs.csv").unlink(), "runs.csv"),
    "runs.csv of others": ([CSV], spoil("out/runs.csv", old="MAPPO,1", new="MAPPO,9"), "different"),
    "last line cut": ([CSV], cut(CSV, 4), "line 3"),
    "nan score": ([CSV], spoil(CSV, old=",0.25\n", new=",nan\n"), "line 3 is incomplete"),
    "infinite score": ([CSV], spoil(CSV, old=",0.25\n", new=",inf\n"), "line 3 is incomplete"),
    "word for a score": ([CSV], spoil(CSV, old=",0.25\n", new=",good\n"), "good"),
    "empty method": ([CSV], spoil(CSV, old="MAPPO", new=""), "line 2 is incomplete"),
    "too many cells": ([CSV], spoil(CSV, old=",0.25\n", new=",0.25,1,1\n"), "line 3"),
    "one run twice": (
        ["."],
        lambda place: shutil.copytree(place / "runs", place / "y"),
        "one seed",
    ),
    "runs beside a CSV": ([CSV, "runs"], None, "a curves.csv is read alone"),
    "renamed run": (
        ["runs"],
        lambda place: (place / "runs" / RUN).rename(place / "runs/best"),
        "best is not named as a run's folder",
    ),
    "unknown metric": (["runs", "--metrics", "beauty"], None, "beauty"),
    "unknown hours": ([CSV, "--x", "hours"], spoil(CSV, old="hours", new="h"), "hours"),
    "no evaluation": (["runs"], spoil(PROGRESS, old="eval/win_rate", new="x"), "no evaluation"),
    "evaluations of nan": (
        ["runs"],
        lambda place: (
            spoil(PROGRESS, old="0.25", new="nan")(place)
            or spoil(PROGRESS, old="0.5,nan", new="nan,nan")(place)
        ),
        "no evaluation",
    ),
    "no speed": (["runs"], spoil(PROGRESS, old="SPS", new="x"), "no column charts/SPS"),
    "progress.csv cut": (["runs"], cut(PROGRESS, 7), "incomplete"),
    "args.json cut": (["runs"], spoil(ARGS, '{"seed": 1'), "args.json"),
    "args.json of others": (["runs"], spoil(ARGS, "[1, 2]"), "args.json"),
    "args.json without nu": (["runs"], spoil(ARGS, old='"nu"', new='"x"'), "'nu'"),
    "args.json without steps": (["runs"], spoil(ARGS, old="4000", new="0"), "args.json"),
    "job.json of others": (["runs"], spoil("runs/job.json", "[1]"), "job.json"),
    "out is a file": (["runs", "--out", "runs/" + RUN + "/args.json"], None, "exists"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what, tmp_path, monkeypatch, capsys):
    words, harm, message = BAD[what]
    monkeypatch.chdir(tmp_path)
    folder = run_folder(tmp_path / "x", 1, [0.5, 0.25])
    shutil.move(folder, tmp_path / "runs" / RUN)
    shutil.move(folder.parent / "job.json", tmp_path / "runs" / "job.json")
    curves = (
        HEAD + "SMAX 3m,MAPPO,1,win rate,2000,0.1,0.5\nSMAX 3m,MAPPO,1,win rate,4000,0.2,0.25\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / CSV).write_text(curves)
    (tmp_path / "out/runs.csv").write_text("scenario,method,seed,steps\nSMAX 3m,MAPPO,1,4000\n")
    (tmp_path / "out/figure.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    if harm:
        harm(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert plot.main(["--out", "new", *words] if "--out" not in words else words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_different_lengths_are_not_pooled(tmp_path):
    run_folder(tmp_path, 1, [0.5] * 10)
    run_folder(tmp_path, 2, [0.5] * 20)
    with pytest.raises(ValueError, match="not equally long"):
        plot.read([tmp_path])
