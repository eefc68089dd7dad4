"""Run what a figure or table of the paper needs, and draw it.

    python benchmark/figures.py fig5 --scale smoke      # a minute: does everything work?
    python benchmark/figures.py fig5 --scale cpu        # what 2 cores can do in an hour or two
    python benchmark/figures.py fig5 --scale paper      # the paper's grid: says what it would cost

fig1 and table5 are the paper's own at both of these, and take minutes.
Runs lie in RUNS/<scale>/<name>/, where figures share them: none is run twice, and what was
interrupted goes on. Pictures and tables lie in OUT (RUNS/<scale>/<figure>/ if none is given).
"""

import importlib.util
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maipg_matrix  # noqa: E402
from benchmark import launch, plot  # noqa: E402

# The paper names its ten maps in its pictures only. These ten are in SMAC and in SMAX.
MAPS = "2s3z 3s5z 8m 25m 5m_vs_6m 10m_vs_11m 3s_vs_5z 27m_vs_30m 3s5z_vs_3s6z 6h_vs_8z"
WORLDS = "spread line formation"
SHOOT = "academy_run_pass_and_shoot_with_keeper"
ACADEMY = f"{SHOOT} academy_3_vs_1_with_keeper academy_counterattack_easy"
ACADEMY += " academy_counterattack_hard academy_corner"
TINY = "--num-envs 1 --eval-episodes 1 --total-timesteps"
SMAX = "--backend smax --eval-every"
GRF = "--num-envs 20 --rollout-steps 200 --num-workers 1 --eval-episodes 50 --eval-every 40000"

# What is trained at a scale: scenarios, MAIPG's nus (None: the script's own), seeds, flags. The
# smoke test of a script is one for all.
SETTINGS = {
    ("smac", "smoke"): ("3m", None, 1, f"{TINY} 800 {SMAX} 400"),
    ("smac", "cpu"): ("3m 2s3z", None, 2, f"--total-timesteps 120000 {SMAX} 10000"),
    ("smac", "paper"): (MAPS, None, 10, ""),
    ("ablation", "cpu"): ("2s3z", (0.3, 0.5), 3, f"--total-timesteps 500000 {SMAX} 20000"),
    ("ablation", "paper"): ("2s3z corridor", (0.3, 0.5), 10, ""),
    ("spread", "cpu"): ("spread", None, 3, "--total-timesteps 300000 --eval-every 30000"),
    ("spread", "paper"): ("spread", (0.05,), 10, ""),
    ("mpe", "smoke"): ("spread", None, 1, f"{TINY} 50 --update-epochs 1 --eval-every 25"),
    ("mpe", "cpu"): (WORLDS, None, 3, "--total-timesteps 300000 --eval-every 30000"),
    ("mpe", "paper"): (WORLDS, (0.05,), 10, ""),
    ("grf", "smoke"): ("academy_empty_goal_close", None, 1, f"{TINY} 40 --rollout-steps 20"),
    ("grf", "cpu"): (SHOOT, None, 1, f"--total-timesteps 200000 {GRF}"),
    ("grf", "paper"): (ACADEMY, None, 10, ""),
}
R_VAR = {"metrics": ["R_Var, Q centred by the policy", "corr(A, Qc)"]}
RATES = {"metrics": ["win rate", "corr(A, Qc)"]}
# What it shows; what is trained, by which script; MAPPO, MAIPG's mixers, baselines; the drawing.
FIGURES = {
    "fig2": ("R_Var of factorised and joint critics", "spread", "mpe", "qmix vdn joint", R_VAR),
    "fig3": ("win rates on SMAC", "smac", "smac", "MAPPO qmix HAPPO QMIX", {}),
    "fig4": ("success rates in football", "grf", "grf", "MAPPO qmix", {}),
    "fig5": ("ablation of nu and mixer", "ablation", "smac", "MAPPO qmix vdn", RATES),
    "fig6": ("returns in the particle worlds", "mpe", "mpe", "MAPPO qmix", {}),
    "fig7": ("as fig3, and FACMAC", "smac", "smac", "MAPPO qmix HAPPO QMIX FACMAC", {}),
    "fig8": ("MAIPG and QMIX by the clock", "smac", "smac", "MAPPO qmix QMIX", {"x": "hours"}),
}
# Command lines of maipg_matrix.py, whose runs are one batch of tensors; flags of a smoke test.
MATRIX = {
    "fig1": ([""], "--iterations 20 --settings 2x3 --num-games 4"),
    "table5": (["--game table5a", "--game table5b"], "--iterations 20 --seeds 2"),
}


@dataclass(kw_only=True)
class Args(launch.Options):
    figure: tyro.conf.Positional[Literal[tuple(sorted([*MATRIX, *FIGURES]))]]  # or table
    scale: Literal["smoke", "cpu", "paper"] = "smoke"  # see above
    runs: Path = Path("runs/figures")  # where runs lie
    out: Path | None = None  # where the figure and its tables go
    style: Literal["std", "iqm"] = "std"  # band around the curves: the paper's, or IQM
    yes: bool = False  # start the paper's grid


def matrix(args, out):
    """Figure 1 or Table 5; the exit code."""
    commands, smoke = MATRIX[args.figure]
    more = ["--out-dir", str(out), *(smoke.split() if args.scale == "smoke" else [])]
    for words in commands:
        words = [*words.split(), *more]
        print("python maipg_matrix.py", *words, flush=True)
        if not args.dry_run and (code := maipg_matrix.main(words)):
            return code
    return 0


def make_runs(args):
    """(runs of a figure, one of its grids). Baselines have at most five seeds, as in the paper."""
    _, setting, script, methods, _ = FIGURES[args.figure]
    scenarios, nus, count, flags = SETTINGS.get((setting, args.scale), SETTINGS[script, args.scale])
    same = {field.name: getattr(args, field.name) for field in fields(launch.Options)}
    same |= {"scenarios": tuple(scenarios.split()), "flags": tuple(flags.split())}
    same["out"] = args.runs / args.scale
    runs, seeds = [], tuple(range(1, count + 1))
    for method in methods.split():
        grid = launch.Grid(**same, script=f"maipg_{script}.py", seeds=seeds)
        if method == "MAPPO":
            grid.nus = (0.0,)
        elif method.isupper():
            grid.script, grid.seeds = f"benchmark/baselines/{method.lower()}.py", seeds[:5]
        else:
            grid.nus, grid.mixers = nus, (method,)
            if args.scale == "paper":
                grid.flags += ("--mu", "gumbel", *(["--q-scale", "raw"] * (script == "mpe")))
        runs += launch.make_runs(grid)
    return runs, grid


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    out = args.out or args.runs / args.scale / args.figure
    if args.figure in MATRIX:
        return matrix(args, out)
    about, _, script, _, drawing = FIGURES[args.figure]
    try:
        if script == "grf" and not importlib.util.find_spec("gfootball"):
            raise ValueError("gfootball is not installed: run benchmark/install_grf.sh")
        runs, grid = make_runs(args)
        print(f"{args.figure}: {about}; {len(runs)} runs", flush=True)
        if args.scale == "paper" and not (args.yes or args.dry_run):
            steps = sum(launch.trainer(run.script)[1].total_timesteps for run in runs)
            print(f"the paper's grid: {steps:,} environment steps; --yes starts it")
            return 0
        code = launch.launch(runs, grid)
        finished = [run.folder for run in runs if run.finished()]
        if finished and not args.dry_run and code < 128:
            print(plot.write(*plot.read(finished), out, args.figure, style=args.style, **drawing))
        return code
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
