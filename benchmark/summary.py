"""The study's table, in Markdown: what each method scores on each task, against MAPPO, how soon.

    python benchmark/summary.py benchmark/results/readme/curves.csv

area, final, sampled, and what the brackets say: see plot.py. Below them is the difference to
MAPPO, seed by seed, and in how many seeds the area is larger.

    half    steps of the first evaluation whose score has come half of the way to MAPPO's final one
            (mean over the seeds), from 0 or, where scores are returns, from MAPPO's first; a run
            that does not come so far counts with all its steps, and the table says how many did not
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import plot  # noqa: E402


@dataclass
class Args:
    curves: tyro.conf.Positional[Path]  # a curves.csv, each task with one "MAPPO"


def steps_to_half(runs, curves):
    """(steps to half, whether it was reached) of each run of one task, indexed by method and seed.

    ValueError: there is no MAPPO, or it has no final score.
    """
    metric = next((name for name in plot.SCORES if name in set(curves["metric"])), None)
    scores = curves[curves["metric"] == metric]
    mappo, keys = scores[scores["method"] == "MAPPO"], ["method", "seed"]
    start = 0.0
    if metric == "return":
        start = mappo.loc[mappo["global_step"] == mappo["global_step"].min(), "value"].mean()
    goal = (start + runs.loc[runs["method"] == "MAPPO", "final"].mean()) / 2
    if math.isnan(goal):
        task = runs["scenario"].iloc[0]
        raise ValueError(f"{task}: there is no MAPPO, or it has no final score")
    first = scores[scores["value"] > goal - 1e-9].groupby(keys)["global_step"].min()
    first = first.reindex(runs.set_index(keys).index)
    return first.fillna(runs.set_index(keys)["steps"]), first.notna()


def table(runs, curves):
    """Lines of Markdown: two rows per method and task."""
    head = "task, steps|method (seeds)|area|final|sampled|half|ahead"
    lines = [f"|{head}|", "|" + "---|" * 7]
    for task, own in runs.groupby("scenario"):
        half, reached = steps_to_half(own, curves[curves["scenario"] == task])
        own = own.assign(half=[half[method, seed] for method, seed in zip(own.method, own.seed)])
        told = plot.comparison(own, [*plot.MEASURES, "half"])
        for row in told.to_dict("records"):
            method = row["method"]
            cells = [plot.cell(row, name) for name in plot.MEASURES]
            cells += [plot.cell(row, "half", ",.0f"), ""]
            if missed := (~reached[method]).sum():
                cells[-2] += f", {missed} did not"
            name = f"{task}, {row['steps']:,}" if method == "MAPPO" else ""
            lines.append(f"|{name}|{method} ({row['seeds']})|{'|'.join(cells)}|")
            if method != "MAPPO":
                gains = [plot.cell(row, f"{name}_gain", "+.3f") for name in plot.MEASURES]
                gains += [plot.cell(row, "half_gain", "+,.0f"), row["ahead"]]
                lines.append(f"||less MAPPO|{'|'.join(gains)}|")
    return lines


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if not args.curves.is_file():
            raise FileNotFoundError(f"there is no {args.curves}")
        print("\n".join(table(*plot.read([args.curves]))))
    except (OSError, ValueError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
