"""What an update costs: MAPPO (nu = 0) against MAIPG with either critic, in each script.

    python benchmark/throughput.py                      # every script that can run here
    python benchmark/throughput.py --scripts mpe --rounds 9

The methods of one size take turns, so that they share whatever else the machine does; each has its
own games. The first turn, in which memory is allocated, does not count. Medians over the others:
seconds of a rollout, and of an update with its targets; environment steps per second; and the
time, relative to nu = 0 in the same turn. Evaluation and log are left out. Then each method runs
alone, as a user starts it: seconds until its first update is done, and the memory at its peak.

SMAX also has JaxMARL's sizes, with a MAPPO-RNN as JaxMARL publishes it (baselines/), where flax and
optax are installed.
"""

import contextlib
import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GAMES = {"smax": "SMAXEnvs", "sc2": "SC2Envs", "mpe": "ParticleEnvs", "grf": "FootballEnvs"}
METHODS = {"nu = 0": {"nu": 0}, "compatible": {}, "paper": {"critic": "paper"}}
JAXMARL = {"rollout_steps": 128, "chunk_length": 16, "hidden_dim": 128}
JAXMARL |= {"update_epochs": 4, "num_minibatches": 4, "backend": "smax"}
# {script: {name: what differs from its defaults}}
SIZES = {"smac": {"defaults": {}}, "mpe": {"defaults": {}}}
SIZES["smac"] |= {f"JaxMARL's, {n} games": JAXMARL | {"num_envs": n} for n in (8, 32, 128)}
SIZES["grf"] = {"8 games": {"num_envs": 8, "rollout_steps": 100}}
SMOKE = {"num_envs": 2, "rollout_steps": 25, "chunk_length": 25, "update_epochs": 1}


@dataclass
class Args:
    scripts: tuple[Literal["smac", "mpe", "grf"], ...] = ("smac", "mpe", "grf")  # maipg_*.py
    rounds: int = 5  # turns that count
    threads: int = 1  # CPU threads of torch; JAX has its own
    device: Literal["cpu", "cuda"] = "cpu"  # of torch; SMAX follows where JAX has a GPU
    smoke: bool = False  # a tiny size of each script only
    out: Path = Path("runs/throughput.csv")  # the table


def trainer(script, args, envs):
    """turn(): one update, as a script trains; seconds of (rollout, targets and update)."""
    torch.manual_seed(1)
    now, buffer = script.begin(envs, 1, args), {}
    agent = script.Agent(now, args).to(args.device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    names = ["explore", "gumbel", "shuffle"]
    rngs = {name: torch.Generator(args.device).manual_seed(1) for name in names}

    def turn():
        start = time.perf_counter()
        script.rollout(agent.policy, envs, buffer, now, args.rollout_steps, rngs["explore"])
        buffer["done"].sum().item()  # waits for the GPU
        middle = time.perf_counter()
        batch, metrics = script.estimate(agent, buffer, now, args)
        script.update(agent, optimizer, batch, metrics["diagnostics/sigma_a"], rngs, args)
        next(agent.parameters()).sum().item()
        return middle - start, time.perf_counter() - middle

    return turn


def first_update(name, settings, folder):
    """Seconds until a command's first update is in its log, and its peak memory in MiB (Linux)."""
    words = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    start, quiet = time.perf_counter(), subprocess.DEVNULL
    command = [sys.executable, ROOT / f"maipg_{name}.py", *words, f"--runs-dir={folder}"]
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as run:
        while run.poll() is None:
            status = Path(f"/proc/{run.pid}/status").read_text()
            # A row of names comes first.
            if any(x.read_text().count("\n") > 1 for x in Path(folder).glob("*/progress.csv")):
                run.kill()
                return time.perf_counter() - start, int(status.split("VmHWM:")[1].split()[0]) / 1024
            time.sleep(0.05)
    raise OSError(f"maipg_{name}.py ended by itself: {run.returncode}")


def measure(script, name, size, args):
    """The rows of one size. Raises the script's UsageError."""
    settings = SIZES[name].get(size, SMOKE) | {"device": args.device, "threads": args.threads}
    turns, rows, starts = {}, [], {}
    with contextlib.ExitStack() as stack:
        for method, own in METHODS.items():
            case = script.resolve(script.Args(**settings, **own))
            games = getattr(script, GAMES[getattr(case, "backend", name)])(case)
            turns[method] = trainer(script, case, stack.enter_context(contextlib.closing(games)))
        if size.startswith("JaxMARL"):
            with contextlib.suppress(ImportError):
                from benchmark.baselines import jaxmarl_mappo

                turns["JaxMARL's MAPPO"] = jaxmarl_mappo.trainer(case.map_name, case.num_envs)
        for number in tqdm(range(args.rounds + 1), f"{name}, {size}", disable=None):
            rows += [(number, name, size, method, *turn()) for method, turn in turns.items()]
    for method in list(METHODS)[-1:] if args.smoke else METHODS:
        with tempfile.TemporaryDirectory() as folder:
            starts[method] = first_update(name, settings | METHODS[method], folder)
    columns = ["turn", "script", "size", "method", "rollout_s", "update_s"]
    table = pd.DataFrame(rows, columns=columns).set_index("turn")
    seconds = table["rollout_s"] + table["update_s"]
    table["steps_per_s"] = case.num_envs * case.rollout_steps / seconds
    table["ratio"] = seconds / seconds.groupby("turn").transform("first")
    table = table.drop(0).groupby(columns[1:4], sort=False, as_index=False).median()
    return table.join(pd.DataFrame(starts, ["start_s", "peak_mib"]).T, on="method")


def main(argv=None):
    args, tables = tyro.cli(Args, args=argv, description=__doc__), []
    if not args.scripts or min(args.rounds, args.threads) < 1:
        print("error: --scripts: one or more; --rounds, --threads: from 1", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU used"
    print(f"{cpu and cpu[1]}, {os.cpu_count()} cores, {gpu}; Python {platform.python_version()},")
    print(f"torch {torch.__version__}, threads: {args.threads}", flush=True)
    for name in dict.fromkeys(args.scripts):
        script = importlib.import_module(f"maipg_{name}")
        for size in ["smoke"] if args.smoke else SIZES[name]:
            try:
                tables.append(measure(script, name, size, args))
                print(tables[-1].round(3).to_string(index=False), flush=True)
            except (script.UsageError, ImportError, OSError) as error:
                print(f"error: {name} is left out: {error}", file=sys.stderr)
    if tables:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(args.out, index=False, float_format="%.4g")
        print(args.out)
    return 0 if tables else 2


if __name__ == "__main__":
    sys.exit(main())
