"""Read run folders or tidy CSVs; write tidy CSVs and a figure; compare the methods.

    python benchmark/plot.py runs/grid --out results            # runs.csv, curves.csv, figure.png
    python benchmark/plot.py results/curves.csv --style iqm --x hours --out results

A run's score is its win rate (SMAC, football) or its return (particle worlds) in greedy evaluation
episodes; its final score is the mean of the last ten evaluations, its area the mean over the steps.
Bands: mean +- standard deviation over seeds as in the paper, or the interquartile mean with its 95%
percentile bootstrap interval, seeds resampled within each task (Agarwal et al., 2021).
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import launch  # noqa: E402

RUN = "method scenario seed steps hours final area commit machine command".split()
CURVE = "method scenario seed metric global_step hours value".split()
METRICS = {  # column of progress.csv -> metric; the first one that a run has is its score
    "eval/win_rate": "win rate",
    "eval/episodic_return": "return",
    "variance/corr": "corr(A, Qc)",
    "variance/slope": "Cov(A, Qc) / Var(Qc)",
    "variance/gradient": "variance of the policy gradient",
    "variance/r_var_pi": "R_Var, Q centred by the policy",
    "variance/r_var_v": "R_Var, Q centred by V",
}
SCORES = ["win rate", "return"]
# Okabe and Ito's colours, told apart by the colour-blind; line styles tell them apart in print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))]


# ---------------------------------------------------------------------------------------- reading
def method_of(args, script):
    """How a run is called in figures and tables."""
    if not script.startswith("maipg"):
        return script.upper()
    if not args["nu"]:
        return "MAPPO"
    critic = "compatible" if args.get("critic") == "compatible" else args["mixer"]
    sampled = " gumbel" if args.get("mu") == "gumbel" else ""  # expectation goes without saying
    return f"MAIPG {args['nu']:g} {critic}{sampled}"


def read_run(folder):
    """(a row of runs.csv, the run's rows of curves.csv) of a run folder."""
    args = json.loads((folder / "args.json").read_text())
    script = folder.name.split("__")[1]
    scenario = args.get("map_name") or args.get("env_id") or args.get("scenario")
    if args.get("backend") == "smax":
        scenario = f"SMAX {scenario}"
    key = {"method": method_of(args, script), "scenario": scenario, "seed": args["seed"]}
    table = pd.read_csv(folder / "progress.csv")
    hours = (
        table["global_step"].diff().fillna(table["global_step"]) / table["charts/SPS"]
    ).cumsum()
    table = table.assign(hours=hours / 3600)
    if "variance/slope" in table:  # Cov / (sd A sd Qc) and Cov / Var(Qc) say the rest
        ratio = table["variance/corr"] / table["variance/slope"]  # sd of Qc / sd of A
        table["variance/r_var_pi"] = 1 - 2 * table["variance/corr"] * ratio + ratio**2
    parts = []
    for column, metric in METRICS.items():
        if column in table and table[column].notna().any():
            rows = table.loc[table[column].notna(), ["global_step", "hours", column]]
            parts.append(rows.rename(columns={column: "value"}).assign(metric=metric))
    curves = pd.concat(parts).assign(**key)[CURVE] if parts else pd.DataFrame(columns=CURVE)
    last = table.iloc[-1]
    row = key | {"steps": int(last["global_step"]), "hours": last["hours"]}
    row |= dict(zip(("final", "area"), scores(curves)))
    about = folder.parent / "job.json"
    row |= json.loads(about.read_text()) if about.exists() else {}
    return {name: row.get(name, "") for name in RUN}, curves


def scores(curves):
    """(final score, area under the curve) of one run's curves; nan without an evaluation."""
    for metric in SCORES:
        rows = curves[curves["metric"] == metric]
        if len(rows):
            x, y = rows["global_step"].to_numpy(float), rows["value"].to_numpy(float)
            area = np.trapezoid(y, x) / (x[-1] - x[0]) if len(x) > 1 else y[0]
            return float(y[-10:].mean()), float(area)
    return np.nan, np.nan


def read(paths):
    """(runs, curves) of files curves.csv and of every finished run below the folders in `paths`."""
    rows, curves = [], []
    for path in map(Path, paths):
        if path.is_file():
            curves.append(pd.read_csv(path))
            beside = path.with_name("runs.csv")
            rows += pd.read_csv(beside).to_dict("records") if beside.exists() else []
            continue
        for table in sorted(path.glob("**/progress.csv")):
            if launch.done(table) >= 1:
                row, curve = read_run(table.parent)
                rows.append(row)
                curves.append(curve)
    if not curves:
        raise FileNotFoundError(f"no finished run and no CSV in {' '.join(map(str, paths))}")
    order = ["scenario", "method", "seed"]
    runs = pd.DataFrame(rows, columns=RUN).sort_values(order, kind="stable")
    return runs, pd.concat(curves, ignore_index=True).sort_values(order, kind="stable")


# ------------------------------------------------------------------------------------- statistics
def iqm(x, axis=0):
    """Interquartile mean: the mean of the middle half."""
    return stats.trim_mean(x, 0.25, axis=axis)


def bootstrap(statistic, *samples, resamples=2000):
    """95% percentile interval; each sample (one per task, or per method) is resampled by itself.

    nan where a sample has fewer than two runs: nothing is known of other seeds.
    """
    if min(len(x) for x in samples) < 2:
        return np.nan, np.nan
    with warnings.catch_warnings():  # equal scores: the interval is a point
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            samples,
            statistic,
            n_resamples=resamples,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return interval.low, interval.high


def aggregate(tasks):
    """(IQM, low, high) of the scores of all tasks [seeds] together, seeds resampled per task."""
    together = lambda *x: iqm(np.concatenate(x))
    return float(together(*tasks)), *bootstrap(together, *tasks)


def difference(ours, theirs):
    """(IQM of ours - IQM of theirs, low, high)."""
    gap = lambda x, y: iqm(x) - iqm(y)
    return float(gap(ours, theirs)), *bootstrap(gap, ours, theirs)


def improvement(ours, theirs):
    """(P(a run of ours beats one of theirs), low, high); a tie counts half."""
    wins = lambda x, y: np.mean(
        (np.subtract.outer(x, y) > 0) + 0.5 * (np.subtract.outer(x, y) == 0)
    )
    return float(wins(np.asarray(ours), np.asarray(theirs))), *bootstrap(wins, ours, theirs)


def on_one_grid(rows, x):
    """(grid [P], values [seeds, P]) of the curves of one method on one task, interpolated where
    seeds were evaluated at different x, up to where the shortest one ends."""
    seeds = [part.sort_values(x) for _, part in rows.groupby("seed")]
    end = min(part[x].iloc[-1] for part in seeds)
    grid = np.unique(np.concatenate([part[x] for part in seeds]))
    if x == "hours":  # no two runs have the same: as many points as one run has
        grid = np.linspace(max(part[x].iloc[0] for part in seeds), end, len(seeds[0]))
    grid = grid[grid <= end]
    return grid, np.stack([np.interp(grid, part[x], part["value"]) for part in seeds])


# ---------------------------------------------------------------------------------------- drawing
def draw(curves, path, metrics=None, x="global_step", style="std"):
    """One panel per metric (down) and scenario (across), one line per method."""
    have = list(dict.fromkeys(curves["metric"]))
    metrics = metrics or [next(m for m in SCORES + have if m in have)]
    scenarios, methods = sorted(set(curves["scenario"])), sorted(set(curves["method"]))
    methods.sort(key=lambda name: name != "MAPPO")  # the reference comes first
    counts = {
        m: curves[curves["method"] == m].groupby("scenario")["seed"].nunique() for m in methods
    }
    label = {m: f"{m} ({'-'.join(map(str, sorted(set(n))))})" for m, n in counts.items()}
    size = (max(4.0, 3.6 * len(scenarios)), 0.8 + 2.6 * len(metrics))
    figure, axes = plt.subplots(len(metrics), len(scenarios), figsize=size, squeeze=False)
    for (row, metric), (column, scenario) in (
        (a, b) for a in enumerate(metrics) for b in enumerate(scenarios)
    ):
        axis = axes[row][column]
        part = curves[(curves["metric"] == metric) & (curves["scenario"] == scenario)]
        for k, method in enumerate(methods):
            rows = part[part["method"] == method]
            if not len(rows):
                continue
            grid, values = on_one_grid(rows, x)
            look = {"color": COLOURS[k % 7], "ls": LINES[k % 7]}
            if style == "iqm":
                middle = iqm(values)
                low, high = np.transpose([bootstrap(iqm, v, resamples=500) for v in values.T])
            else:
                middle, spread = values.mean(0), values.std(0)
                low, high = middle - spread, middle + spread
            axis.plot(grid, middle, label=label[method], lw=1.6, **look)
            axis.fill_between(grid, low, high, color=look["color"], alpha=0.18, lw=0)
        axis.set_title(scenario, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        if x == "global_step":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M
        if metric == "win rate":
            axis.set_ylim(-0.03, 1.03)
        if metric.startswith("variance"):
            axis.set_yscale("log")
        if metric.startswith("R_Var"):
            axis.axhline(1.0, color="black", ls="--", lw=0.8)
        axes[row][0].set_ylabel(metric, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps" if x == "global_step" else x, fontsize=8)
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels())}
    columns = min(len(handles), max(2, 2 * len(scenarios)))
    figure.legend(handles.values(), handles, loc="lower center", ncols=columns, fontsize=8)
    band = "mean and standard deviation" if style == "std" else "IQM and its 95 % interval"
    figure.suptitle(f"{band} over the seeds (how many: in brackets)", fontsize=8)
    figure.tight_layout(rect=(0, 0.06 + 0.12 / size[1] * -(-len(handles) // columns), 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def comparison(runs):
    """A row per scenario and method: seeds, steps, hours, IQM, area, and the gain over MAPPO."""
    rows = []
    for scenario, part in runs.groupby("scenario"):
        reference = part[part["method"] == "MAPPO"]
        for method, own in part.groupby("method"):
            value, low, high = aggregate([own["final"].to_numpy()])
            row = {"scenario": scenario, "method": method, "seeds": len(own)}
            row |= {"steps": int(own["steps"].min()), "hours": own["hours"].mean()}
            row |= {"iqm": value, "low": low, "high": high, "area": own["area"].mean()}
            if method != "MAPPO" and len(reference):
                pair = own["final"].to_numpy(), reference["final"].to_numpy()
                row |= dict(zip(("gain", "gain_low", "gain_high"), difference(*pair)))
                row |= dict(zip(("p_better", "p_low", "p_high"), improvement(*pair)))
            rows.append(row)
    return pd.DataFrame(rows)


def write(runs, curves, folder, name="figure", **drawing):
    """runs.csv, curves.csv, comparison.csv and a figure in a folder; nothing is left half made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"curves": curves}
    tables |= {"runs": runs, "comparison": comparison(runs)} if len(runs) else {}
    for what, table in tables.items():
        temporary = folder / f".{what}.csv"
        table.to_csv(temporary, index=False, float_format="%.6g")
        temporary.replace(folder / f"{what}.csv")
    draw(curves, folder / f"{name}.png", **drawing)
    return folder / f"{name}.png"


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]  # run folders (with all below them), CSVs
    out: Path = Path("results")  # where the files go
    style: Literal["std", "iqm"] = "std"  # band around the curves
    x: Literal["global_step", "hours"] = "global_step"  # axis
    metrics: tuple[str, ...] = ()  # one row of panels each; none: the score


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        runs, curves = read(args.paths)
        if unknown := set(args.metrics) - set(curves["metric"]):
            raise ValueError(f"no metric {unknown}; there are {sorted(set(curves['metric']))}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write(runs, curves, args.out, metrics=args.metrics, x=args.x, style=args.style))
    return 0


if __name__ == "__main__":
    sys.exit(main())
