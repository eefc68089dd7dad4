"""Launch a grid of trainings on this machine or on Slurm, and go on where it was stopped.

    python benchmark/launch.py --scenarios 2s3z 3m --nus 0 0.4 --seeds 1 2 3 -- --num-envs 32
    python benchmark/launch.py --scenarios 2s3z --cluster slurm --cores 4 --hours 12

All else that Slurm should know stands in sbatch's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT,
SBATCH_MEM_PER_NODE, SBATCH_GPUS_PER_NODE, ... Local runs take this machine's GPUs in turn.

Flags after -- go to the script. A run has a folder of its own, OUT/<name>/: the trainer's run
folder, log.txt, and job.json with command, commit and machine. What has all its steps is skipped,
what was killed goes on from its checkpoint. Nothing runs twice, whoever is killed or started again:
the trainer holds a lock. Ctrl-C: the runs save and end; again: the launcher ends at once.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from itertools import cycle, product
from pathlib import Path
from typing import Literal

import cloudpickle
import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Jobs take this module's code with them: they begin in any folder.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


# ------ settings
@dataclass
class Options:
    cluster: Literal["local", "slurm"] = "local"  # this machine, or Slurm's
    jobs: int | None = None  # at once; None: cores of this machine / cores of a job (Slurm: 1000)
    cores: int = 1  # per job; also the trainer's --threads
    hours: float = 24.0  # per job (Slurm); then it saves, and is queued again
    dry_run: bool = False  # print the commands, and stop


@dataclass
class Grid(Options):
    script: str = "maipg_smac.py"  # below the project's root; benchmark/baselines/qmix.py, ...
    scenarios: tuple[str, ...] = ("2s3z",)  # maps or scenarios
    nus: tuple[float, ...] | None = None  # None: the script's own for the scenario
    mixers: tuple[str, ...] | None = None  # None: the script's own
    seeds: tuple[int, ...] = (1, 2, 3)
    out: Path = Path("runs/grid")  # where the runs' folders are made
    flags: tyro.conf.Positional[tuple[str, ...]] = ()  # after --: flags of the script


LIMITS = {"nus": (0, 1), "seeds": (0, 10**9), "hours": (0.1, 10_000)}
OURS = ["", "map-name", "scenario", "nu", "mixer", "seed", "threads", "runs-dir", "resume"]


def check(grid):
    """Raise ValueError if a value can't be."""
    for name, value in vars(grid).items():
        flag, (low, high) = f"--{name}", LIMITS.get(name, (1, 10_000))
        values = value if isinstance(value, tuple) else [value]
        if name != "flags" and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{flag} {' '.join(map(str, values))}: nothing, or something twice")
        for x in values:
            if type(x) in (int, float) and not low <= x <= high:
                raise ValueError(f"{flag} {x}: must lie in [{low}, {high}]")
            if name in ["scenarios", "mixers"] and not re.fullmatch(r"[\w-]{1,80}", str(x)):
                raise ValueError(f"{flag} {x!r}: letters, digits, - and _ only")
            if name == "flags" and x[:2] == "--" and x[2:].split("=")[0].replace("_", "-") in OURS:
                raise ValueError(f"{x} after --: the launcher sets it")


# ------ one run
@dataclass(eq=False)
class Run:
    """One training. submitit calls it, here or on a node."""

    script: str  # path from ROOT
    words: tuple[str, ...]  # its flags
    folder: Path  # OUT/<name>
    cores: int
    gpu: str | None = None  # CUDA_VISIBLE_DEVICES; None: as it is
    process = None  # the trainer

    def finished(self):
        """Whether it has done all its steps."""
        return any(done(path) >= 1 for path in self.folder.glob("*/progress.csv"))

    def command(self):
        """What is executed: from the newest checkpoint, or, where there is none, anew. The flags
        stand in both: a PettingZoo environment has to be named again."""
        saved = sorted(self.folder.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        begin = ["--resume", str(saved[-1].parent)] if saved else ["--runs-dir", str(self.folder)]
        python = [sys.executable, "-W", "ignore", str(ROOT / self.script)]
        return [*python, *self.words, *begin, "--threads", str(self.cores)]

    def holder(self):
        """Who holds the lock: "pid@host" of the trainer, "?" before it begins, "" if nobody."""
        with contextlib.suppress(BlockingIOError), open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return ""
        return (self.folder / "lock").read_text() or "?"

    def __call__(self):
        """Wait for the lock, which a trainer may hold whose launcher was killed. Then train, if it
        is still needed, and once more if the trainer is killed."""
        with open(self.folder / "log.txt", "a") as log, open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in range(2):
                lock.truncate(0)
                # Negative: a signal. SIGTERM is ours.
                if self.finished() or self.train(log, lock) in [-signal.SIGTERM, *range(256)]:
                    return

    def train(self, log, lock):
        """The trainer's exit code. It inherits the lock, which is held until it has ended itself.
        Its own session keeps a Ctrl-C away; Slurm's warning, SIGUSR2 to all, is `checkpoint`'s."""
        path, commits = self.folder / "job.json", []
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
            commits = json.loads(path.read_text())["commit"].split()
        about = {"command": shlex.join(["python", self.script, *self.words])} | provenance()
        about["commit"] = " ".join(dict.fromkeys([*commits, about["commit"]]))
        path.write_text(json.dumps(about, indent=2) + "\n")
        gpu = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": ROOT}
        how |= {"env": os.environ | gpu, "pass_fds": [lock.fileno()], "start_new_session": True}
        mask = lambda: signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR2})
        self.process = subprocess.Popen(self.command(), preexec_fn=mask, **how)
        print(f"{self.process.pid}@{os.uname().nodename}", end="", file=lock, flush=True)
        return self.process.wait()

    def checkpoint(self):
        """submitit calls this before a preemption or the time limit: save, and queue again."""
        if self.process:
            self.process.terminate()
            # Not process.wait(): the signal came in the midst of it, and it would wait for itself.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(replace(self))


def done(path):
    """Share of its steps that a progress.csv tells of."""
    try:
        step = int(path.read_text().splitlines()[-1].split(",")[0])
        return step / json.loads((path.parent / "args.json").read_text())["total_timesteps"]
    except (OSError, ValueError, LookupError, TypeError):  # being written, damaged, only a head
        return 0.0


def provenance():
    """{commit, machine, torch} of the checkout and of this machine, without its name."""
    ask = lambda command: subprocess.getoutput(f"{command} 2> /dev/null").strip()
    commit = ask(f"git -C {shlex.quote(str(ROOT))} describe --always --dirty --abbrev=7")
    cpu = ask("grep -m 1 'model name' /proc/cpuinfo").rpartition(": ")[2] or os.uname().machine
    gpu = ask("nvidia-smi --query-gpu=name --format=csv,noheader").splitlines()
    machine = ", ".join([f"{os.cpu_count()} cores", cpu, *gpu[:1]])
    return {"commit": commit or "unknown", "machine": machine, "torch": metadata.version("torch")}


# ------ the grid
def trainer(script):
    """(path from ROOT, default Args) of a trainer. Raises ValueError."""
    try:
        path = (ROOT / script).resolve(strict=True).relative_to(ROOT)
        module = import_module(".".join(path.with_suffix("").parts))
        return str(path), module.Args(resume="", runs_dir="runs")
    except Exception as error:
        raise ValueError(f"--script {script}: no trainer of this project: {error}") from None


def make_runs(grid):
    """The grid as Runs. nu = 0 has no mixer, and is run once. Raises ValueError; flags that the
    script refuses end the program with its own message (code 2)."""
    check(grid)
    script, default = trainer(grid.script)
    where, runs = "--scenario" if hasattr(default, "scenario") else "--map-name", {}
    for scenario, nu, mixer in product(grid.scenarios, grid.nus or [None], grid.mixers or [None]):
        words, name = [where, scenario], f"{Path(script).stem}__{scenario}"
        if nu is not None:
            words, name = [*words, "--nu", f"{nu:.12g}"], f"{name}__nu{nu:g}"
        if mixer and nu != 0:
            words, name = [*words, "--mixer", mixer], f"{name}__{mixer}"
        # Any other setting, or default, makes another name; the order of the flags does not.
        settings = tyro.cli(type(default), args=[*words, *grid.flags], prog=script)
        values = sorted(vars(settings).items())
        mark = hashlib.sha256(repr((script, values)).encode()).hexdigest()[:8]
        for seed in grid.seeds:
            folder = grid.out.resolve() / f"{name}__s{seed}__{mark}"
            own = (*words, "--seed", str(seed), *grid.flags)
            runs[folder] = Run(script, own, folder, grid.cores)
    return list(runs.values())


# ------ launcher
def submit(run, executor):
    """submitit's job; on Slurm, one that a killed launcher has left goes on."""
    known = run.folder / "slurm_id"
    if executor.cluster == "slurm" and known.exists():
        job = submitit.SlurmJob(executor.folder, known.read_text())
        if not job.done(force_check=True):
            return job
    run.folder.mkdir(parents=True, exist_ok=True)
    # A Ctrl-C is for the launcher, not for submitit's processes.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    job = executor.submit(run)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if executor.cluster == "slurm":
        known.write_text(job.job_id)
    return job


def stop(runs, told):
    """Ask trainers on this machine to save and end, but once: a second signal ends them at once."""
    for holder in {run.holder() for run in runs} - told:
        pid, _, host = holder.partition("@")
        if host == os.uname().nodename:
            told.add(holder)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)


def work(waiting, slots, executor, bar, stopped):
    """Run all, or until there is a signal in `stopped`; name what failed."""
    jobs, told, patience = {}, set(), 1 if executor.cluster == "slurm" else 2
    while (waiting or jobs) and len(stopped) < patience:
        if stopped:
            waiting.clear()
            stop(jobs, told)
        while waiting and len(jobs) < slots and not stopped:
            run = waiting.pop(0)
            jobs[run] = submit(run, executor)
        for run in [run for run, job in jobs.items() if job.done() and not run.holder()]:
            job, log = jobs.pop(run), run.folder / "log.txt"
            bar.update(run.finished())
            if not (run.finished() or stopped):
                text = log.read_text(errors="replace") if log.exists() else job.stderr() or ""
                line = ["it wrote nothing", *re.findall(r".*\w.*", text)][-1]
                bar.write(f"FAILED {run.folder.name}: {line} (log: {log})")
        time.sleep(0.5)


def launch(runs, grid):
    """Run what is not finished yet. The exit code: 0, 1 if some failed, 128 + n after signal n."""
    waiting = [run for run in runs if not run.finished()]
    if grid.dry_run:
        for run in runs:
            print("to run" if run in waiting else "done  ", shlex.join(run.command()))
        return 0
    folder, local = grid.out.resolve() / "submitit", grid.cluster == "local"
    executor = submitit.AutoExecutor(folder, cluster=grid.cluster, slurm_max_num_timeout=1000)
    # Local jobs have no limit of time.
    how = {"name": "maipg", "timeout_min": 10**7, "slurm_time": int(60 * grid.hours)}
    how |= {"slurm_cpus_per_task": grid.cores, "slurm_signal_delay_s": 120}
    executor.update_parameters(**how)
    slots = grid.jobs or (max(1, os.cpu_count() // grid.cores) if local else 1000)
    old, stopped = len(runs) - len(waiting), []
    print(f"{len(runs)} runs, {old} finished before, {slots} at once", flush=True)
    count = subprocess.getoutput("nvidia-smi -L 2> /dev/null").count("\n") + 1
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    for run, gpu in zip(waiting, cycle(gpus if local else [None])):
        run.gpu = gpu
    note = lambda number, frame: stopped.append(number)
    handlers = {n: signal.signal(n, note) for n in [signal.SIGINT, signal.SIGTERM]}
    with tqdm(total=len(runs), initial=old, unit="run") as bar:
        work(waiting, slots, executor, bar, stopped)
    for n, handler in handlers.items():
        signal.signal(n, handler)
    if stopped:
        print("stopped; the same command goes on, or watches the jobs that Slurm keeps (scancel)")
        return 128 + stopped[0]
    ended = sum(run.finished() for run in runs)
    print(f"{ended} of {len(runs)} runs are finished")
    return int(ended < len(runs))


# ------ main
def main(argv=None):
    grid = tyro.cli(Grid, args=argv, description=__doc__)
    try:
        return launch(make_runs(grid), grid)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
