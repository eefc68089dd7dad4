"""Collect the runs in RUNS_DIR into the CSV files and the figure of this folder.

python benchmark/results/smac/draw.py RUNS_DIR
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
from scipy.stats import binomtest, t

HERE = Path(__file__).parent
STYLES = {0.0: ("#0072B2", "--", "MAPPO (nu = 0)")}  # readable in print and for the colour-blind


def read(folder):
    """(args, [(global_step, win rate)] of the evaluations, median steps per second) of a run."""
    args = json.loads((folder / "args.json").read_text())
    rows = list(csv.DictReader((folder / "progress.csv").open()))
    curve = [(int(r["global_step"]), float(r["eval/win_rate"])) for r in rows if r["eval/win_rate"]]
    return args, curve, np.median([float(row["charts/SPS"]) for row in rows])


def interval(rates):
    """Mean of the last ten evaluations and its 95% interval: Student's t over the seeds; for a
    single seed Wilson's, over its evaluation episodes, which knows nothing of other seeds."""
    seeds = [x.mean() for x in rates]
    mean = float(np.mean(seeds))
    if len(seeds) > 1:
        half = t.ppf(0.975, len(seeds) - 1) * np.std(seeds, ddof=1) / math.sqrt(len(seeds))
        return mean, max(0.0, mean - half), min(1.0, mean + half)
    episodes = 32 * len(rates[0])
    wilson = binomtest(round(mean * episodes), episodes).proportion_ci(method="wilson")
    return mean, wilson.low, wilson.high


def main(runs_dir):
    runs = [read(path.parent) for path in sorted(Path(runs_dir).glob("*/result.json"))]
    groups = {}
    for args, curve, speed in runs:
        groups.setdefault((args["map_name"], args["nu"]), []).append((args, curve, speed))
    with open(HERE / "curves.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["map", "backend", "nu", "mixer", "seed", "global_step", "eval_win_rate"])
        for args, curve, _ in runs:
            key = [args[k] for k in ("map_name", "backend", "nu", "mixer", "seed")]
            out.writerows([*key, step, rate] for step, rate in curve)
    with open(HERE / "final.csv", "w", newline="") as file:
        out = csv.writer(file)
        names = "map nu seeds steps win_rate_last_ten low_95 high_95 last_win_rate"
        out.writerow([*names.split(), "area_under_curve", "median_sps_contended"])
        for (name, nu), group in sorted(groups.items()):
            curves = [np.array([rate for _, rate in curve]) for _, curve, _ in group]
            mean, low, high = interval([curve[-10:] for curve in curves])
            last, area = (np.mean([f(c) for c in curves]) for f in (lambda c: c[-1], np.mean))
            speed = np.median([speed for *_, speed in group])
            row = [f"{x:.3f}" for x in (mean, low, high, last, area)]
            out.writerow([name, nu, len(group), group[0][1][-1][0], *row, f"{speed:.0f}"])
    maps = sorted({name for name, _ in groups})
    figure, axes = plt.subplots(1, len(maps), figsize=(4.2 * len(maps), 3.4), squeeze=False)
    for axis, name in zip(axes[0], maps):
        for (other, nu), group in sorted(groups.items()):
            if other != name:
                continue
            colour, line, label = STYLES.get(nu, ("#D55E00", "-", f"MAIPG (nu = {nu:g})"))
            steps = [step for step, _ in group[0][1]]
            rates = np.array([[rate for _, rate in curve] for _, curve, _ in group])
            mean, std = rates.mean(0), rates.std(0)
            axis.plot(steps, mean, line, color=colour, label=f"{label}, {len(group)} seed(s)")
            axis.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        axis.set(title=f"SMAX {name}", xlabel="environment steps", ylim=(-0.03, 1.03))
        axis.legend(fontsize=8, loc="best")
    axes[0][0].set_ylabel("greedy win rate, 32 episodes (mean, std over seeds)", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "win_rate.png", dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
