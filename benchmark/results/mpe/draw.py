"""Collect the runs in RUNS_DIR into the CSV files and figures of this folder.

python benchmark/results/mpe/draw.py RUNS_DIR
"""

import csv
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t

HERE = Path(__file__).parent
TASKS = ["spread", "line", "formation"]
STYLES = {"qmix": ("#0072B2", "-"), "vdn": ("#009E73", "--"), "joint": ("#D55E00", ":")}
METRICS = ["variance/r_var_pi", "variance/r_var_v", "variance/corr"]


def load(runs_dir):
    """{(task, mixer, nu, q_scale): [(args, rows of progress.csv)]} of the finished runs."""
    groups = {}
    for path in sorted(Path(runs_dir).glob("*/result.json")):
        args = json.loads((path.parent / "args.json").read_text())
        rows = list(csv.DictReader((path.parent / "progress.csv").open()))
        key = [args[name] for name in ("scenario", "mixer", "nu", "q_scale")]
        key = (*key[:2], 0.0, "-") if args["nu"] == 0 else tuple(key)
        groups.setdefault(key, []).append((args, rows))
    return groups


def returns(rows):
    """(steps, greedy returns) of a run's evaluations."""
    kept = [row for row in rows if row["eval/episodic_return"]]
    steps = np.array([int(row["global_step"]) for row in kept])
    return steps, np.array([float(row["eval/episodic_return"]) for row in kept])


def write_tables(groups):
    with open(HERE / "curves.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow("task mixer nu q_scale seed global_step eval_return".split())
        for key, runs in sorted(groups.items()):
            for args, rows in runs:
                out.writerows([*key, args["seed"], s, x] for s, x in zip(*returns(rows)))
    with open(HERE / "final.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow("task mixer nu q_scale seeds steps last_return low_95 high_95".split())
        for key, runs in sorted(groups.items()):
            last = [returns(rows)[1][-3:].mean() for _, rows in runs]
            half = math.nan  # of Student's t over the seeds
            if len(last) > 1:
                half = t.ppf(0.975, len(last) - 1) * np.std(last, ddof=1) / math.sqrt(len(last))
            mean, steps = np.mean(last), returns(runs[0][1])[0][-1]
            row = [f"{x:.2f}" for x in (mean, mean - half, mean + half)]
            out.writerow([*key, len(last), steps, *row])


def figure_6(groups):
    """Greedy return of MAPPO and MAIPG (QMIX, nu = 0.4) on the three tasks."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3))
    for axis, task in zip(axes, TASKS):
        methods = [((task, "qmix", 0.0, "-"), "MAPPO (nu = 0)", "#D55E00", "--")]
        methods += [((task, "qmix", 0.4, "advantage"), "MAIPG (nu = 0.4)", "#0072B2", "-")]
        for key, label, colour, line in methods:
            runs = groups.get(key, [])
            if not runs:
                continue
            steps = returns(runs[0][1])[0]
            values = np.array([returns(rows)[1] for _, rows in runs])
            mean, std = values.mean(0), values.std(0)
            axis.plot(steps / 1000, mean, line, color=colour, label=f"{label}, {len(runs)} seed(s)")
            axis.fill_between(steps / 1000, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        axis.set(title=f"{task}, 5 agents", xlabel="environment steps, thousands")
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("greedy return (mean, std over seeds)")
    figure.tight_layout()
    figure.savefig(HERE / "figure6.png", dpi=130)


def figure_2(groups):
    """R_Var of the three critics on spread, on data that no network had been trained on."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3))
    with open(HERE / "figure2.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["mixer", "seed", "global_step", *METRICS])
        for mixer, (colour, line) in STYLES.items():
            runs = groups.get(("spread", mixer, 0.4, "advantage"), [])
            for args, rows in runs:
                values = [[float(row[name]) for name in METRICS] for row in rows]
                steps = [int(row["global_step"]) for row in rows]
                out.writerows([mixer, args["seed"], s, *x] for s, x in zip(steps, values))
            if not runs:
                continue
            for axis, name in zip(axes, METRICS):
                curves = np.array([[float(row[name]) for row in rows] for _, rows in runs])
                steps = [int(row["global_step"]) / 1000 for row in runs[0][1]]
                label = f"{mixer}, {len(runs)} seed(s)"
                axis.plot(steps, curves.mean(0), line, color=colour, label=label)
    titles = ["Var(A - Qc) / Var(A)", "Var(A - (Q - V)) / Var(A)", "corr(A, Qc)"]
    for axis, title in zip(axes, titles):
        axis.axhline(0 if "corr" in title else 1, color="grey", lw=1)
        axis.set(title=title, xlabel="environment steps, thousands")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "figure2.png", dpi=130)


def main(runs_dir):
    groups = load(runs_dir)
    write_tables(groups)
    figure_6(groups)
    figure_2(groups)


if __name__ == "__main__":
    main(sys.argv[1])
