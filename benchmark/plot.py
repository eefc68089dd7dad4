"""Read run folders or a tidy CSV; write tidy CSVs and a picture; compare the methods.

    python benchmark/plot.py runs/grid --out results            # runs.csv, curves.csv, figure.png
    python benchmark/plot.py results/curves.csv --style iqm --x hours --out results
    python benchmark/plot.py results/curves.csv --summary       # one table, with steps to half
    python benchmark/plot.py --markdown                         # benchmark/RESULTS.md

A run is scored in greedy evaluation episodes, by its win rate (SMAC), the share of episodes with a
goal (football) or the return (particle worlds). Nothing is evaluated before training.

    area    mean over all evaluations of a run; they are evenly spaced
    final   mean over those in the last tenth of the steps; a dash if these are fewer than 3, or
            all evaluations fewer than 20
    sampled mean return of the training episodes, over all updates: of the policy that explores
            (QMIX and FACMAC log a mean over the last 100 episodes)
    gain    difference to MAPPO in the same scenario with the same other settings (baselines: with
            whatever theirs are) and about as many steps, seed by seed: mean over the seeds of both
    ahead   in how many of these pairs the area is larger than MAPPO's
    hours   of rollouts and updates, without evaluations: mean of the runs, which may have shared
            their machine; empty if unknown

Tables give the mean over seeds and in brackets its 95 % percentile bootstrap interval, from five
seeds on; below, a dash. It is narrow: of normal scores it holds the true mean in 85 of 100 cases
with five seeds, in 90 with ten. Where runs that are read together differ in a setting, say the
learning rate, the names of their methods tell it.
"""

import json
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmark import launch  # noqa: E402

KEY = ["scenario", "method", "seed"]
RUN = [*KEY, *"steps hours final area sampled commit machine command".split()]
CURVE = [*KEY, *"metric global_step hours value".split()]
MEASURES = ["area", "final", "sampled"]
TOLD = "scenario method seeds steps area final area_gain final_gain ahead".split()
TOLD += "sampled sampled_gain hours commit".split()
METRICS = {  # column of progress.csv -> metric; the first one that a run has is its score
    "eval/win_rate": "win rate",
    "eval/episodic_return": "return",
    "charts/episodic_return": "sampled return",
    "variance/corr": "corr(A, Qc)",
    "variance/slope": "Cov(A, Qc) / Var(Qc)",
    "variance/r_var_pi": "R_Var, Q centred by the policy",
}
SCORES = ["win rate", "return"]
TYPES = dict.fromkeys("method scenario metric commit machine command".split(), str)
TYPES |= dict.fromkeys([*METRICS, *"charts/SPS hours value final area sampled".split()], float)
TYPES |= dict.fromkeys(["seed", "steps", "global_step"], int)
# Settings that MAPPO has not; and those of no effect on what is learned, or told elsewhere.
SECOND = set("q_scale td_lambda target_tau forgetting ridge".split())
UNTOLD = set("nu critic mu mixer resume device threads num_workers total_timesteps track".split())
UNTOLD |= set("runs_dir eval_every eval_episodes checkpoint_every log_every game_timeout".split())
UNTOLD |= {*KEY, *"map_name env_id backend script progress done job".split()}
# Okabe and Ito's colours first: the colour-blind tell them apart.
KINDS = "MAPPO|MAIPG qmix|MAIPG compatible|MAIPG vdn|MAIPG qmix gumbel|HAPPO|QMIX|FACMAC".split("|")
HUES = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9 #000000 #8C564B".split()
LINES = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))]
STYLE = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.6}


# ---------------------------------------------------------------------------------------- reading
def read_csv(path, columns):
    """A CSV whose `columns` have no empty cell. ValueError: one line that says what is wrong."""
    try:
        table = pd.read_csv(path, index_col=False, dtype=TYPES, na_values=["inf", "-inf"])
        if missing := set(columns) - set(table):
            raise ValueError(f"there is no column {min(missing)}")
        bad = table[columns].isna().any(axis=1)
        line = 2 + bad.argmax() if bad.any() else 1 + len(table)
        if bad.any() or not len(table) or not path.read_bytes().endswith(b"\n"):
            raise ValueError(f"line {line} is incomplete")
    except ValueError as error:
        raise ValueError(f"{path} is damaged or foreign: {error}") from None
    return table


def method_of(args, script):
    """How a run is called in figures and tables."""
    if not script.startswith("maipg"):
        return script.upper()
    critic = "compatible" if args.get("critic") == "compatible" else args["mixer"] or "qmix"
    sampled = " gumbel" if args.get("mu") == "gumbel" else ""  # expectation goes without saying
    return f"MAIPG {args['nu']:g} {critic}{sampled}" if args["nu"] else "MAPPO"


def settings_of(folder):
    """args.json of a run folder, with its method, scenario, script, job.json, the path of its
    progress.csv and the share of its steps that are done."""
    if folder.name.count("__") < 2:
        raise ValueError(f"{folder} is not named as a run's folder, SCENARIO__SCRIPT__...")
    try:
        about, progress = folder.parent / "job.json", folder / "progress.csv"
        args = json.loads((folder / "args.json").read_text())
        script = folder.name.split("__")[1]
        scenario = args.get("map_name") or args.get("env_id") or args["scenario"]
        scenario = f"SMAX {scenario}" if args.get("backend") == "smax" else scenario
        own = {"scenario": scenario, "method": method_of(args, script), "seed": int(args["seed"])}
        own |= {"script": script, "progress": progress, "done": launch.done(progress)}
        own["job"] = dict(json.loads(about.read_text())) if about.exists() else {}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder}: args.json or job.json is damaged: {error!r}") from None
    return {k: v for k, v in args.items() if k not in SECOND or args.get("nu", 1)} | own


def full_names(runs):
    """Names of the methods, with the settings that differ: "MAPPO, learning_rate 0.001".

    runs: a row of `settings_of` each. What MAPPO has too is compared among all runs of a script in
    a scenario, so that the names of MAPPO and MAIPG tell the same; the rest within a method.
    """
    names = runs["method"]
    for key in sorted(set(runs) - UNTOLD):
        alike = ["scenario", "script", "method"] if key in SECOND else ["scenario", "script"]
        text = runs[key].map(lambda x: "default" if pd.isna(x) else str(x))
        differ = text.groupby([runs[name] for name in alike]).transform("nunique") > 1
        names = names.where(~differ, names + f", {key} " + text)
    return names


def read_run(settings):
    """(a row of runs.csv, the run's rows of curves.csv) of a run. ValueError: damaged."""
    key = {name: settings[name] for name in KEY}
    table = read_csv(settings["progress"], ["global_step", "charts/SPS"])
    steps = np.diff(table["global_step"], prepend=0)
    table["hours"] = (steps / table["charts/SPS"]).cumsum() / 3600
    table = table.reindex(columns=["global_step", "hours", *METRICS])
    # Cov / (sd A sd Qc) and Cov / Var(Qc) say the rest; their ratio is sd of Qc / sd of A.
    ratio = table["variance/corr"] / table["variance/slope"]
    table["variance/r_var_pi"] = 1 - 2 * table["variance/corr"] * ratio + ratio**2
    last = table.iloc[-1]
    table = table.rename(columns=METRICS).melt(["global_step", "hours"], var_name="metric")
    curves = table.dropna().assign(**key)[CURVE]
    if not curves["metric"].isin(SCORES).any():
        raise ValueError(f"{settings['progress']} has no evaluation")
    row = settings["job"] | key | {"steps": int(last["global_step"]), "hours": last["hours"]}
    return pd.DataFrame([row]).reindex(columns=RUN), curves


def read_tables(path):
    """(runs, curves) of a curves.csv and of the runs.csv beside it."""
    curves = read_csv(path, [name for name in CURVE if name != "hours"])
    runs = read_csv(path.with_name("runs.csv"), [*KEY, "steps"])
    return runs.reindex(columns=RUN), curves.reindex(columns=CURVE)


def read(paths):
    """(runs, curves) of a curves.csv, or of every finished run below the folders in `paths`.

    FileNotFoundError: there is none. ValueError: a file is damaged, or runs cannot be pooled.
    """
    if len(paths) > 1 and any(path.is_file() for path in paths):
        raise ValueError("a curves.csv is read alone: its names tell what differs within it")
    tables = [read_tables(path) for path in paths if path.is_file()]
    folders = sorted({args.parent.resolve() for path in paths for args in path.rglob("args.json")})
    # The matrix games have no progress.csv.
    found = [settings_of(folder) for folder in folders if (folder / "progress.csv").exists()]
    found = [settings for settings in found if settings["done"] >= 1]
    names = full_names(pd.DataFrame(found, dtype=object)) if found else []
    tables += [read_run(settings | {"method": name}) for settings, name in zip(found, names)]
    if not tables:
        raise FileNotFoundError(f"no finished run and no CSV in {' '.join(map(str, paths))}")
    mappo_first = lambda column: column.replace("^MAPPO", " MAPPO", regex=True)
    runs, curves = (pd.concat(x).sort_values(KEY, key=mappo_first) for x in zip(*tables))
    runs, parts = runs.set_index(KEY), dict(iter(curves.groupby(KEY)))
    if set(parts) != set(runs.index):
        raise ValueError("curves.csv and the runs.csv beside it tell of different runs")
    for (scenario, method), own in runs.groupby(KEY[:2]):
        if own.index.has_duplicates or own["steps"].max() > 1.1 * own["steps"].min():
            raise ValueError(f"{method} on {scenario}: runs of one seed, or not equally long")
    runs[["final", "area"]] = [scores(parts[key], n) for key, n in runs["steps"].items()]
    runs["sampled"] = curves[curves["metric"] == "sampled return"].groupby(KEY)["value"].mean()
    return runs.reset_index(), curves


# ------------------------------------------------------------------------------------- statistics
def scores(curves, steps):
    """(final, area) of one run of so many steps; nan is a dash."""
    metric = next((name for name in SCORES if name in set(curves["metric"])), None)
    rows = curves[curves["metric"] == metric]
    last = rows.loc[10 * rows["global_step"] > 9 * steps, "value"]
    enough = len(rows) >= 20 and len(last) >= 3
    return last.mean() if enough else np.nan, rows["value"].mean()


def iqm(x, axis=0):
    """Interquartile mean: the mean of the middle half."""
    return stats.trim_mean(x, 0.25, axis=axis)


def bootstrap(statistic, x, resamples=2000):
    """(low, high) of the statistic of x [seeds, ...]: 95 % percentile interval; nan below five
    seeds, or if one of x is."""
    if len(x) < 5 or np.isnan(x).any():
        return np.full((2, *np.shape(x)[1:]), np.nan)
    how = {"method": "percentile", "n_resamples": resamples, "rng": 0}
    return stats.bootstrap([x], statistic, **how).confidence_interval


def estimate(name, x):
    """{name, name_low, name_high}: mean of x [seeds] and its interval; nan if one of x is."""
    low, high = bootstrap(np.mean, x)
    return {name: x.mean(skipna=False), f"{name}_low": low, f"{name}_high": high}


def mappo_of(method, methods):
    """The MAPPO among `methods` that has the settings which the method's name tells, or None."""
    told = {"MAPPO", *method.split(", ")[1:]}
    fit = [name for name in methods if {"MAPPO"} <= set(name.split(", ")) <= told]
    return max(fit, key=len, default=None)


def comparison(runs, measures=MEASURES):
    """A row per scenario and method: area, final, and the gains over MAPPO."""
    rows, runs = [], runs.assign(sampled=runs.get("sampled", np.nan))
    for (scenario, method), own in runs.groupby(KEY[:2], sort=False):
        others = runs[(runs["scenario"] == scenario) & (runs["method"] != method)]
        mappo = others[others["method"] == mappo_of(method, set(others["method"]))]
        pairs = own.merge(mappo, on="seed", suffixes=("", "_mappo"))
        pairs = pairs[(pairs["steps"] / pairs["steps_mappo"] - 1).abs() < 0.1]
        gains = {name: pairs[name] - pairs[f"{name}_mappo"] for name in measures}
        row = {"scenario": scenario, "method": method, "seeds": len(own)}
        row |= {"steps": own["steps"].min(), "hours": own["hours"].mean()}
        for name, gain in gains.items():
            row |= estimate(name, own[name]) | estimate(f"{name}_gain", gain)
        row["ahead"] = f"{(gains['area'] > 0).sum()} of {len(pairs)}" if len(pairs) else ""
        row["commit"] = " ".join(sorted(set(own["commit"].dropna())))
        rows.append(row)
    return pd.DataFrame(rows)


def on_one_grid(rows, x):
    """(grid [P], values [seeds, P]) of the curves of one method on one task, interpolated where
    seeds were evaluated at different x, where all of them have been."""
    table = rows.pivot_table("value", index=x, columns="seed")
    table = table.interpolate("index", limit_area="inside").dropna()
    if table.empty:
        raise ValueError(f"--x {x}: no {x} at which all seeds of a method have been evaluated")
    return table.index.to_numpy(), table.T.to_numpy()


# ---------------------------------------------------------------------------------------- drawing
def looks(methods):
    """{method: colour and line}. The colour is the same in every picture: a hue for the kind of
    method, paler for a smaller nu. Lines tell apart what has the same hue."""
    result = {}
    for method in methods:
        short = method.split(",")[0]
        nu = re.search(r" (\d+\.?\d*)", short)
        kind, hues = short.replace(nu[0], "") if nu else short, dict(zip(KINDS, HUES))
        hue = hues.get(kind, hues.get(kind.removesuffix(" gumbel"), "#8C8C8C"))
        alike = [look for look in result.values() if look["color"][0] == hue]
        colour = (hue, min(1.0, 0.5 + float(nu[1])) if nu else 1.0)
        result[method] = {"color": colour, "ls": LINES[len(alike) % len(LINES)]}
    return result


def panel(axis, part, looks, x, style):
    """One metric on one scenario: a line per method."""
    for method, rows in part.groupby("method", sort=False):
        grid, values = on_one_grid(rows, x)
        if style == "iqm":
            middle, (low, high) = iqm(values), bootstrap(iqm, values)
        else:
            middle, spread = values.mean(0), values.std(0)
            low, high = middle - spread, middle + spread
        marker = "" if len(grid) > 1 else "o"
        axis.plot(grid, middle, label=method, marker=marker, **looks[method])
        axis.fill_between(grid, low, high, color=looks[method]["color"], alpha=0.18, lw=0)
    axis.locator_params(axis="x", nbins=5)
    if x == "global_step":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M


def draw(curves, path, metrics=None, x="global_step", style="std"):
    """One panel per metric (down; "score": the scenario's own) and scenario (across; many, of one
    metric: in two rows), one line per method."""
    scenarios, metrics = sorted(set(curves["scenario"])), metrics or ["score"]
    rows, columns = len(metrics), len(scenarios)
    if rows == 1 and columns > 5:
        rows, columns = 2, (columns + 1) // 2
    width = 3.6 if columns < 3 else 2.6
    with matplotlib.rc_context(STYLE):
        figure = Figure((1.4 + width * columns, 1.4 + 2.6 * rows), layout="constrained")
        for place, (metric, scenario) in enumerate(product(metrics, scenarios), 1):
            axis = figure.add_subplot(rows, columns, place)
            part = curves[curves["scenario"] == scenario]
            have = [*part["metric"].unique()]
            if metric == "score":
                metric = next(m for m in SCORES + have if m in have)
            part = part[part["metric"] == metric]
            panel(axis, part, looks(dict.fromkeys(curves["method"])), x, style)
            rate = "scored" if scenario.startswith("academy_") else "greedy win rate"
            label = {"win rate": rate, "return": "greedy return"}.get(metric, metric)
            axis.set(title=scenario, ylabel=label)
            axis.set_xlabel("environment steps" if x == "global_step" else x)
            if metric == "win rate":
                axis.set_ylim(-0.03, 1.03)
        handles = {name: h for a in figure.axes for h, name in zip(*a.get_legend_handles_labels())}
        seeds = curves.groupby(KEY[:2])["seed"].nunique().groupby("method").unique()
        names = [f"{name} ({', '.join(map(str, sorted(seeds[name])))})" for name in handles]
        figure.legend(handles.values(), names, loc="outside lower center", ncols=columns)
        band = {"std": "mean and standard deviation", "iqm": "IQM, from 5 seeds on its interval"}
        figure.suptitle(f"{band[style]} over the seeds (how many: in brackets)", fontsize=8)
        figure.savefig(path, dpi=150)


def write(runs, curves, folder, name="figure", **drawing):
    """runs.csv, curves.csv, comparison.csv and a picture in a folder; the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, table in {"curves": curves, "runs": runs, "comparison": comparison(runs)}.items():
        table.to_csv(folder / f".{what}.csv", index=False, float_format="%.6g")
        (folder / f".{what}.csv").replace(folder / f"{what}.csv")  # never half a table
    draw(curves, folder / f"{name}.png", **drawing)
    return folder / f"{name}.png"


# ----------------------------------------------------------------------------------------- tables
def cell(row, name, form=".3f"):
    """A mean and its interval, as in the tables."""
    value, *ends = (f"{row[key]:{form}}" for key in (name, f"{name}_low", f"{name}_high"))
    text = f"{value} [{', '.join(ends)}]".replace("+nan", "nan")
    return text.replace("nan, nan", "-").replace("nan [-]", "-")


def steps_to_half(runs, curves):
    """(steps, whether it came so far) of each run of one task, by method and seed: to the first
    evaluation whose score is half of the way to MAPPO's final one (mean over the seeds), from 0
    or, where scores are returns, from MAPPO's first. Who does not come so far: all its steps.

    ValueError: there is no MAPPO, or it has no final score.
    """
    metric = next((name for name in SCORES if name in set(curves["metric"])), None)
    scores = curves[curves["metric"] == metric]
    mappo, keys = scores[scores["method"] == "MAPPO"], ["method", "seed"]
    start = 0.0
    if metric == "return":
        start = mappo.loc[mappo["global_step"] == mappo["global_step"].min(), "value"].mean()
    goal = (start + runs.loc[runs["method"] == "MAPPO", "final"].mean()) / 2
    if np.isnan(goal):
        task = runs["scenario"].iloc[0]
        raise ValueError(f"{task}: there is no MAPPO, or it has no final score")
    first = scores[scores["value"] > goal - 1e-9].groupby(keys)["global_step"].min()
    first = first.reindex(runs.set_index(keys).index)
    return first.fillna(runs.set_index(keys)["steps"]), first.notna()


def summary(runs, curves):
    """Lines of Markdown: per task and method its scores, and the differences to MAPPO."""
    head = "task, steps|method (seeds)|area|final|sampled|half|ahead"
    lines = [f"|{head}|", "|" + "---|" * 7]
    for task, own in runs.groupby("scenario"):
        half, reached = steps_to_half(own, curves[curves["scenario"] == task])
        own = own.assign(half=[half[method, seed] for method, seed in zip(own.method, own.seed)])
        told = comparison(own, [*MEASURES, "half"])
        for row in told.to_dict("records"):
            method = row["method"]
            cells = [cell(row, name) for name in MEASURES]
            cells += [cell(row, "half", ",.0f"), ""]
            if missed := (~reached[method]).sum():
                cells[-2] += f", {missed} did not"
            name = f"{task}, {row['steps']:,}" if method == "MAPPO" else ""
            lines.append(f"|{name}|{method} ({row['seeds']})|{'|'.join(cells)}|")
            if method != "MAPPO":
                gains = [cell(row, f"{name}_gain", "+.3f") for name in MEASURES]
                gains += [cell(row, "half_gain", "+,.0f"), row["ahead"]]
                lines.append(f"||less MAPPO|{'|'.join(gains)}|")
    return lines


def markdown(folder, out):
    """Write the tables of every results folder below a folder to a Markdown file; its path."""
    lines = ["# Results", "", "Written by `plot.py --markdown`.", "", __doc__.split("\n\n", 2)[2]]
    for path in sorted(folder.rglob("runs.csv")):
        place = Path(folder.name, path.parent.relative_to(folder))
        lines += [f"## [{path.parent.name}]({place}/README.md)", ""]
        lines += [f"![]({place}/{picture.name})\n" for picture in sorted(path.parent.glob("*.png"))]
        table = comparison(read_csv(path, [*KEY, "steps", "area"]).reindex(columns=RUN))
        for name in [*MEASURES, *(f"{name}_gain" for name in MEASURES)]:
            table[name] = [cell(row, name) for row in table.to_dict("records")]
        table["steps"] = table["steps"].map("{:,}".format)
        table = table[TOLD].rename(columns=lambda name: name.replace("_", " "))
        header, *rows = table.to_csv(sep="|", index=False, float_format="%.2f").splitlines()
        lines += [f"|{row}|" for row in (header, "|".join(["---"] * len(TOLD)), *rows)] + [""]
    if len(lines) == 5:
        raise FileNotFoundError(f"no runs.csv below {folder}")
    out.write_text("\n".join(lines))
    return out


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of runs, or one curves.csv
    out: Path = Path("results")  # folder of what is written
    style: Literal["std", "iqm"] = "std"  # mean +- deviation, as in the paper; or IQM, interval
    x: Literal["global_step", "hours"] = "global_step"  # axis
    metrics: tuple[str, ...] = ("score",)  # one row of panels each; "score": the task's own
    summary: bool = False  # instead: one table in Markdown, with the steps to half of MAPPO's score
    markdown: bool = False  # instead of all this: the tables of benchmark/results


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if args.markdown:
            print(markdown(HERE / "results", HERE / "RESULTS.md"))
            return 0
        if gone := [str(path) for path in args.paths if not path.exists()]:
            raise FileNotFoundError(f"there is no {gone[0]}")
        runs, curves = read(args.paths)
        if args.summary:
            print("\n".join(summary(runs, curves)))
            return 0
        if unknown := set(args.metrics) - {"score", *curves["metric"]}:
            raise ValueError(f"no metric {min(unknown)}; there are {sorted(set(curves['metric']))}")
        if args.x == "hours" and curves["hours"].isna().any():
            raise ValueError("--x hours: these runs do not all tell their hours")
        print(write(runs, curves, args.out, metrics=args.metrics, x=args.x, style=args.style))
    except (OSError, ValueError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
