"""Collect the runs in RUNS_DIR into curves.csv and success.png of this folder.

python benchmark/results/grf/draw.py RUNS_DIR
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STYLES = {0.0: ("#D55E00", "--", "MAPPO (nu = 0)"), 0.5: ("#0072B2", "-", "MAIPG (nu = 0.5)")}


def main(runs_dir):
    results = [json.loads(p.read_text()) for p in sorted(Path(runs_dir).glob("*/result.json"))]
    scenarios = sorted({result["args"]["scenario"] for result in results})
    figure, axes = plt.subplots(1, len(scenarios), figsize=(5 * len(scenarios), 3.3), squeeze=False)
    with open(HERE / "curves.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow("scenario nu seed global_step success_rate stderr return".split())
        for result in results:
            args, evaluations = result["args"], result["evaluations"]
            names = ["global_step", "eval/win_rate", "eval/win_rate_stderr", "eval/episodic_return"]
            table = [[row[name] for name in names] for row in evaluations]
            out.writerows([args["scenario"], args["nu"], args["seed"], *row] for row in table)
            axis = axes[0][scenarios.index(args["scenario"])]
            colour, line, label = STYLES[args["nu"]]
            steps, rates, errors, _ = zip(*table)
            axis.errorbar(steps, rates, errors, color=colour, ls=line, label=label, capsize=2)
    for axis, scenario in zip(axes[0], scenarios):
        axis.set(title=scenario, xlabel="environment steps", ylim=(-0.03, 1.03))
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("greedy success rate, one seed")
    figure.tight_layout()
    figure.savefig(HERE / "success.png", dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
