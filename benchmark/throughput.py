"""What an update costs: MAPPO (nu = 0) against MAIPG with either critic, in each script.

    python benchmark/throughput.py                      # every script that can run here
    python benchmark/throughput.py --scripts smac --num-envs 32 --device cuda

The three take turns, so that they share whatever else the machine does; each has its own games.
The first turn, in which memory is allocated, does not count. Medians over the others: seconds of a
rollout, and of an update with its targets; environment steps per second; and the time, relative to
nu = 0 in the same turn. Evaluation and log are left out.
"""

import contextlib
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GAMES = {"smax": "SMAXEnvs", "sc2": "SC2Envs", "mpe": "ParticleEnvs", "grf": "FootballEnvs"}
SIZES = {"grf": {"num_envs": 8, "rollout_steps": 100}}  # instead of the script's own
METHODS = {"nu = 0": {"nu": 0.0}, "compatible": {"critic": "compatible"}, "paper": {}}


@dataclass
class Args:
    scripts: tuple[Literal["smac", "mpe", "grf"], ...] = ("smac", "mpe", "grf")  # maipg_*.py
    num_envs: int | None = None  # None: the script's own (football: 8)
    updates: int = 5  # that count
    device: Literal["cpu", "cuda"] = "cpu"  # of torch; SMAX follows where JAX has a GPU
    threads: int = 1  # CPU threads of torch
    out: Path = Path("runs/throughput.csv")  # the table


def trainer(script, args, envs):
    """turn(): one update, as a script trains; seconds of (rollout, targets and update)."""
    torch.manual_seed(1)
    now, buffer, rngs = script.begin(envs, 1, args), {}, {}
    agent = script.Agent(now, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    for name in ["explore", "gumbel", "shuffle"]:
        rngs[name] = torch.Generator(args.device).manual_seed(1)

    def turn():
        times = [time.perf_counter()]
        script.rollout(agent.policy, envs, buffer, now, args.rollout_steps, rngs["explore"])
        buffer["done"].sum().item()  # waits for the GPU
        times.append(time.perf_counter())
        batch, metrics = script.estimate(agent, buffer, now, args)
        script.update(agent, optimizer, batch, metrics["diagnostics/sigma_a"], rngs, args)
        next(agent.parameters()).sum().item()
        return times[1] - times[0], time.perf_counter() - times[1]

    return turn


def measure(script, name, args):
    """A script's rows of the table. Raises its UsageError."""
    size = SIZES.get(name, {}) | ({} if args.num_envs is None else {"num_envs": args.num_envs})
    turns, rows = {}, []
    with contextlib.ExitStack() as stack:
        for method, own in METHODS.items():
            case = script.resolve(script.Args(**own, **size, device=args.device))
            games = getattr(script, GAMES[getattr(case, "backend", name)])(case)
            turns[method] = trainer(script, case, stack.enter_context(contextlib.closing(games)))
        for number in range(args.updates + 1):
            for method, turn in turns.items():
                rows.append((number, name, method, *turn()))
    table = pd.DataFrame(rows, columns=["turn", "script", "method", "rollout_s", "update_s"])
    seconds = table["rollout_s"] + table["update_s"]
    table["steps_per_s"] = case.num_envs * case.rollout_steps / seconds
    table["ratio"] = seconds / seconds.groupby(table["turn"]).transform("first")
    table = table[table["turn"] > 0].drop(columns="turn")
    return table.groupby(["script", "method"], sort=False, as_index=False).median()


def main(argv=None):
    args, tables = tyro.cli(Args, args=argv, description=__doc__), []
    if not args.scripts or min(args.updates, args.threads) < 1:
        print("error: --scripts: one or more; --updates, --threads: from 1", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    for name in dict.fromkeys(args.scripts):
        script = importlib.import_module(f"maipg_{name}")
        try:
            tables.append(measure(script, name, args))
            print(tables[-1].round(3).to_string(index=False), flush=True)
        except (script.UsageError, ImportError) as error:
            print(f"error: {name} is left out: {error}", file=sys.stderr)
    if tables:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(args.out, index=False, float_format="%.4g")
        print(args.out)
    return 0 if tables else 2


if __name__ == "__main__":
    sys.exit(main())
