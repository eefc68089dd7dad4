"""Run what a figure or table of the paper needs, and draw it.

    python benchmark/figures.py fig5 --scale smoke      # seconds: does everything work?
    python benchmark/figures.py fig5 --scale cpu        # what 2 cores can do in an hour or two
    python benchmark/figures.py fig5 --scale paper      # the paper's grid: says what it would cost

Runs lie in RUNS/<scale>/<name>/, where figures share them: none is run twice, and what was
interrupted goes on. Pictures and tables lie in OUT (RUNS/<scale>/<figure>/ if none is given).
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import launch, plot  # noqa: E402

SCALES = ["smoke", "cpu", "paper"]
HAPPO, QMIX, FACMAC = (f"benchmark/baselines/{name}.py" for name in ("happo", "qmix", "facmac"))
# Steps per second of one run on two cores of an AMD EPYC, for the costs of --scale paper.
SPEED = {"maipg_smac": 1000, "maipg_mpe": 2500, "maipg_grf": 300, "happo": 800}
SPEED |= {"qmix": 300, "facmac": 300}
# The paper names its ten maps in its pictures only. These ten are in SMAC and in SMAX.
MAPS = "2s3z 3s5z 8m 25m 5m_vs_6m 10m_vs_11m 3s_vs_5z 27m_vs_30m 3s5z_vs_3s6z 6h_vs_8z".split()
ACADEMY = ["3_vs_1_with_keeper", "run_pass_and_shoot_with_keeper", "counterattack_easy"]
ACADEMY = [f"academy_{name}" for name in [*ACADEMY, "counterattack_hard", "corner"]]

TEN = list(range(1, 11))  # seeds; the paper has at least ten, and three to five for the baselines

# ---------------------------------------------------------------- scenarios, seeds, flags per scale
SMAC = {
    "smoke": (["3m"], [1], {"backend": "smax", "total_timesteps": 160, "eval_every": 40}),
    "cpu": (["3m", "2s3z"], [1, 2], {"backend": "smax", "total_timesteps": 120_000}),
    "paper": (MAPS, TEN, {"total_timesteps": 10_000_000}),
}
SMAC["smoke"][2].update(eval_episodes=2, num_envs=2)
SMAC["cpu"][2].update(eval_every=10_000)
ON_POLICY = {"smoke": {"rollout_steps": 20}, "cpu": {}, "paper": {}}
OFF_POLICY = {"smoke": {"batch_episodes": 2}, "cpu": {}, "paper": {}}
ABLATION = {
    "smoke": SMAC["smoke"],
    "cpu": (["2s3z"], [1, 2, 3], {"backend": "smax", "total_timesteps": 500_000}),
    "paper": (["2s3z", "corridor"], TEN, {"total_timesteps": 10_000_000}),
}
ABLATION["cpu"][2].update(eval_every=20_000)
MPE = {
    "smoke": (["spread"], [1], {"num_envs": 4, "total_timesteps": 400, "eval_every": 200}),
    "cpu": (["spread", "line", "formation"], [1, 2, 3], {"total_timesteps": 300_000}),
    "paper": (["spread", "line", "formation"], TEN, {"total_timesteps": 10_000_000}),
}
MPE["smoke"][2].update(eval_episodes=4, update_epochs=2)
MPE["cpu"][2].update(eval_every=30_000)
FOOTBALL = {
    "smoke": (["academy_empty_goal_close"], [1], {"num_envs": 2, "rollout_steps": 20}),
    "cpu": (["academy_run_pass_and_shoot_with_keeper"], [1], {"num_envs": 20}),
    "paper": (ACADEMY, TEN, {}),
}
FOOTBALL["smoke"][2].update(total_timesteps=80, eval_every=40, eval_episodes=2, num_workers=1)
FOOTBALL["cpu"][2].update(rollout_steps=200, total_timesteps=200_000, eval_every=40_000)
FOOTBALL["cpu"][2].update(eval_episodes=50, num_workers=1)


def grid(setting, script="maipg_smac.py", nus=(), mixers=(), scenarios=None, **more):
    own, seeds, flags = setting
    seeds = seeds if script.startswith("maipg") else seeds[:5]
    return launch.make_runs(script, scenarios or own, nus, mixers, seeds, **flags | more)


def smac_runs(scale, baselines):
    """MAIPG and MAPPO, and the baselines, on the same maps for as many environment steps."""
    setting, on_policy = SMAC[scale], ON_POLICY[scale]
    runs = []
    for name in setting[0]:  # nu of Table 3
        nu = 0.4 if name in "3m 8m 25m 2s3z 3s5z 1c3s5z".split() else 0.3
        nus, mixers = (0, nu), ("qmix",)
        runs += grid(setting, nus=nus, mixers=mixers, scenarios=[name], **on_policy)
    for script in baselines:
        runs += grid(setting, script, **(on_policy if script == HAPPO else OFF_POLICY[scale]))
    return runs


def ablation_runs(scale):
    nus = (0, 0.4) if scale == "smoke" else (0, 0.3, 0.5)
    more = ON_POLICY[scale]
    return grid(ABLATION[scale], nus=nus, mixers=("qmix", "vdn"), **more)


def football_runs(scale):
    return grid(FOOTBALL[scale], "maipg_grf.py", nus=(0, 0.5), mixers=("qmix",))


def mpe_runs(scale):
    return grid(MPE[scale], "maipg_mpe.py", nus=(0, 0.2), mixers=("qmix",))


def control_variate_runs(scale):
    mixers = ("qmix", "vdn", "joint")
    return grid(MPE[scale], "maipg_mpe.py", nus=(0.2,), mixers=mixers, scenarios=["spread"])


R_VAR = ["R_Var, Q centred by the policy", "corr(A, Qc)"]
FIGURES = {  # name: (what it shows, its runs at a scale, how it is drawn)
    "fig2": ("R_Var of factorised and joint critics", control_variate_runs, {"metrics": R_VAR}),
    "fig3": ("win rates on SMAC", lambda scale: smac_runs(scale, [HAPPO, QMIX]), {}),
    "fig4": ("success rates in football", football_runs, {}),
    "fig5": (
        "ablation of nu and mixer, and how well Qc tells the advantage",
        ablation_runs,
        {"metrics": ["win rate", "corr(A, Qc)"]},
    ),
    "fig6": ("returns in the particle worlds", mpe_runs, {}),
    "fig7": ("as fig3, and FACMAC", lambda scale: smac_runs(scale, [HAPPO, QMIX, FACMAC]), {}),
    "fig8": ("MAIPG and QMIX by the clock", lambda scale: smac_runs(scale, [QMIX]), {"x": "hours"}),
}
MATRIX = {  # name: the command lines of maipg_matrix.py
    "fig1": [[]],
    "table5": [["--game", "table5a"], ["--game", "table5b"]],
}


def matrix(name, scale, out):
    """Figure 1 and Table 5 take one process, whose runs are one batch of tensors."""
    import maipg_matrix

    small = ["--num-games", "4", "--iterations", "20"]
    small += ["--seeds", "2"] if name == "table5" else ["--settings", "2x3", "--seeds", "1"]
    for words in MATRIX[name]:
        code = maipg_matrix.main(
            [*words, "--out-dir", str(out), *(small if scale == "smoke" else [])]
        )
        if code:
            return code
    return 0


@dataclass
class Args:
    figure: tyro.conf.Positional[Literal[tuple([*MATRIX, *FIGURES])]]  # or table
    scale: Literal[tuple(SCALES)] = "smoke"  # smoke, cpu, or the paper's own grid
    runs: Path = Path("runs/figures")  # where runs lie
    out: Path | None = None  # where the figure and its tables go
    cluster: Literal["local", "slurm", "debug"] = "local"  # as in launch.py, like what follows
    jobs: int | None = None  # at once
    cores: int = 1  # per job
    memory_gb: int = 4  # per job (Slurm)
    gpus: int = 0  # per job (Slurm)
    hours: float = 24.0  # per job
    partition: str | None = None  # of Slurm
    style: Literal["std", "iqm"] = "std"  # band around the curves: the paper's, or IQM
    yes: bool = False  # start the paper's grid
    dry_run: bool = False  # print the commands, and stop


def cost(runs):
    """What a grid would take, by the speeds measured on two cores."""
    hours = []
    for run in runs:
        script = Path(run.script).stem
        steps = int(dict(run.flags).get("total-timesteps", 25_000_000))
        hours.append(steps / SPEED[script] / 3600)
    return (
        f"{len(runs)} runs x {sum(hours) / len(hours):.0f} h = {sum(hours):,.0f} h on 2 cores each"
    )


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    base = args.runs / args.scale
    out = args.out or base / args.figure
    if args.figure in MATRIX:
        return matrix(args.figure, args.scale, out)
    about, runs_of, drawing = FIGURES[args.figure]
    runs = runs_of(args.scale)
    if args.figure == "fig4" and not args.dry_run and not importlib.util.find_spec("gfootball"):
        print("error: gfootball is not installed: run benchmark/install_grf.sh", file=sys.stderr)
        return 2
    print(f"{args.figure}: {about}; {len(runs)} runs")
    if args.scale == "paper":
        print(f"the paper's grid: {cost(runs)} (a GPU is faster; nothing is measured on one here)")
        if not (args.yes or args.dry_run):
            print("--yes starts it")
            return 0
    own = {name: getattr(args, name) for name in "cluster jobs cores memory_gb gpus hours".split()}
    options = launch.Options(base, partition=args.partition, dry_run=args.dry_run, **own)
    code = launch.launch(runs, options)
    if args.dry_run or code >= 128:
        return code
    try:
        table = plot.read(launch.folders_of(runs, options).values())
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plot.write(*table, out, args.figure, style=args.style, **drawing))
    return code


if __name__ == "__main__":
    sys.exit(main())
