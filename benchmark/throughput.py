"""Environment steps per second and peak memory of every script and backend.

    python benchmark/throughput.py --out runs/throughput.csv      # every script that can run here
    python benchmark/throughput.py --only smac --device cuda

Each row is a run of the real command, in a process of its own: the median over its updates, without
the first two, in which JAX compiles and memory is allocated. Memory is the highest resident set of
the largest process, and on a GPU torch's and JAX's together are not told apart: see nvidia-smi.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parent.parent
SMAC, MPE, GRF = "maipg_smac.py", "maipg_mpe.py", "maipg_grf.py"
NO_EVALUATION = ["--eval-every", "1000000000", "--eval-episodes", "1"]
CASES = {  # name: (script, flags, environment steps of an update)
    f"smac-{backend}-N{count}-nu{nu}": (
        SMAC,
        f"--backend {backend} --map-name 2s3z --num-envs {count} --nu {nu}".split(),
        400 * count,
    )
    for backend in ("smax", "sc2")
    for count in ((8, 32, 128) if backend == "smax" else (8,))
    for nu in (0, 0.4)
}
CASES |= {f"mpe-spread-n5-nu{nu}": (MPE, ["--nu", str(nu)], 3200) for nu in (0, 0.2)}
CASES |= {
    f"grf-3_vs_1-N8-nu{nu}": (GRF, f"--nu {nu} --num-envs 8 --rollout-steps 100".split(), 800)
    for nu in (0, 0.5)
}


def missing(name):
    """Why a case cannot run on this machine, or None."""
    if name.startswith("grf") and not importlib.util.find_spec("gfootball"):
        return "gfootball is not installed"
    if "sc2" in name:
        import maipg_smac

        return maipg_smac.what_sc2_lacks("2s3z") or None
    return None


def measure(script, flags, batch, args):
    """{steps_per_second, peak_mib} of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(ROOT / script), *flags, *NO_EVALUATION]
        command += ["--total-timesteps", str(batch * args.updates), "--runs-dir", folder]
        command += ["--device", args.device, "--threads", str(args.threads)]
        log = Path(folder, "log.txt")
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            lines = log.read_text().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {status}")
        table = pd.read_csv(next(Path(folder).glob("*/progress.csv"))).iloc[2:]
    return {"steps_per_second": table["charts/SPS"].median(), "peak_mib": usage.ru_maxrss / 1024}


@dataclass
class Args:
    only: str = ""  # cases whose name contains this
    device: Literal["cpu", "cuda"] = "cpu"  # of torch; SMAX follows where JAX has a GPU
    threads: int = 2  # CPU threads of torch
    updates: int = 8  # per case; the first two do not count
    out: Path = Path("runs/throughput.csv")  # the table as CSV


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    cases = {name: case for name, case in CASES.items() if args.only in name}
    if not cases or args.updates < 3:
        print(f"error: --only is part of {' '.join(CASES)}; --updates from 3", file=sys.stderr)
        return 2
    rows, code = [], 0
    for name, case in cases.items():
        if why := missing(name):
            print(f"{name}: left out, {why}", flush=True)
            continue
        try:
            row = measure(*case, args)
        except RuntimeError as error:
            print(f"{name}: FAILED: {error}", flush=True)
            code = 1
            continue
        rows.append({"case": name, "device": args.device} | row)
        print(name, *(f"{key} {value:.4g}" for key, value in row.items()), sep="  ", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.4g")
    print(args.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
