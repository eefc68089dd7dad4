"""Launch a grid of trainings on this machine or on Slurm, and go on where it was stopped.

    python benchmark/launch.py --scenarios 2s3z 3m --nus 0 0.4 --seeds 1 2 3 -- --num-envs 32
    python benchmark/launch.py --scenarios 2s3z --cluster slurm --cores 4 --hours 12

A run has a folder of its own, OUT/<name>/: the trainer's run folder, log.txt, and job.json with
command, commit and machine. What has all its steps is skipped, what was killed goes on from its
checkpoint, and a lock that the trainer holds sees to it that nothing runs twice: also when this
launcher is killed, its jobs are not, and it is started again. Flags after -- go to the script.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import submitit
import torch
import tyro
from submitit.helpers import DelayedSubmission
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HAVE_SCENARIOS = ("maipg_mpe", "maipg_grf")  # the other scripts have maps


# ----------------------------------------------------------------------------------------- one run
@dataclass(frozen=True)
class Run:
    """One training: a script below the project's root, and its flags as (name, value) pairs."""

    script: str
    flags: tuple

    @property
    def name(self):
        """Readable, and different for runs with any different flag."""
        told = {"map-name", "scenario", "nu", "mixer", "seed"}
        parts = [f"{k if len(k) < 3 else ''}{v}" for k, v in self.flags if k in told - {"seed"}]
        seed = dict(self.flags).get("seed", 1)
        mark = hashlib.sha256(repr((self.script, sorted(self.flags))).encode()).hexdigest()[:6]
        return "__".join([Path(self.script).stem, *parts, f"s{seed}", mark])

    @property
    def text(self):
        """The command line as a reader would type it."""
        return shlex.join(["python", self.script, *self.words(dict(self.flags))])

    @staticmethod
    def words(flags):
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def command(self, folder, resume=None):
        """What is executed; `resume`: the run folder to go on with."""
        flags = {"resume": resume} if resume else dict(self.flags) | {"runs-dir": folder}
        return [sys.executable, "-W", "ignore", str(ROOT / self.script), *self.words(flags)]


def make_runs(script, scenarios, nus=(), mixers=(), seeds=(1,), **flags):
    """The grid as Runs. nu = 0 has no mixer, so that it is run once; no nus: the script's own."""
    scenario_flag = Path(script).stem in HAVE_SCENARIOS or flags.get("env") == "grf"
    runs, flag = {}, "scenario" if scenario_flag else "map-name"
    for scenario, nu, mixer, seed in itertools.product(
        scenarios, nus or [None], mixers or [None], seeds
    ):
        own = {flag: scenario, "nu": None if nu is None else f"{nu:g}", "seed": seed}
        own |= {"mixer": None if nu == 0 else mixer}
        own |= {key.replace("_", "-"): value for key, value in flags.items()}
        run = Run(script, tuple((k, str(v)) for k, v in own.items() if v is not None))
        runs[run.name] = run
    return list(runs.values())


def result_of(folder):
    """The finished run folder below a run's folder, or None."""
    return next((p.parent for p in sorted(folder.glob("*/progress.csv")) if done(p) >= 1), None)


def done(path):
    """Share of its steps that a progress.csv tells of."""
    try:
        step = int(path.read_text().splitlines()[-1].split(",")[0])
        return step / json.loads((path.parent / "args.json").read_text())["total_timesteps"]
    except (OSError, ValueError, IndexError):  # being written, or only its head is there
        return 0.0


def checkpoint_of(folder):
    """The newest run folder with a checkpoint, or None. (One without has nothing to lose.)"""
    saved = sorted(folder.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    return saved[-1].parent if saved else None


def progress_of(folder):
    """Share of the steps that are done, from the last line of progress.csv."""
    if result_of(folder):
        return 1.0
    newest = max(folder.glob("*/progress.csv"), key=lambda p: p.stat().st_mtime, default=None)
    return min(done(newest), 1.0) if newest else 0.0


def last_line(path):
    """Last line of a log that says something."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


def is_running(folder):
    """Whether a process holds the run's lock."""
    path = folder / "lock"
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def provenance():
    """{commit, machine, torch} of the checkout and of this machine, without its name."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = f"{os.cpu_count()} cores, {cpu}{gpu}"
    return {"commit": commit, "machine": machine, "torch": torch.__version__}


class Job:
    """What submitit runs, here or on a node: one training, from its checkpoint if it has one."""

    def __init__(self, run, folder, device):
        self.run, self.folder, self.device = run, folder, device

    def __call__(self):
        """The trainer's exit code; 0 at once if the run is finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock, open(self.folder / "log.txt", "a") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a run whose launcher was killed
            if result_of(self.folder):
                return 0
            record = {"command": self.run.text, **provenance()}
            if not (self.folder / "job.json").exists():
                (self.folder / "job.json").write_text(json.dumps(record, indent=2) + "\n")
            for _ in range(2):  # once more if it was killed
                # The trainer inherits the lock: it is held until the trainer itself has ended. Its
                # own session keeps a Ctrl-C away; Slurm's warning (SIGUSR2) is for `checkpoint`.
                self.process = subprocess.Popen(
                    self.run.command(self.folder, checkpoint_of(self.folder)),
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                    env=dict(os.environ) | self.device,
                    pass_fds=[lock.fileno()],
                    start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
                )
                (self.folder / "pid").write_text(str(self.process.pid))
                if (code := self.process.wait()) >= 0:
                    break
            return code

    def checkpoint(self):
        """submitit calls this before a preemption or the time limit: save, and queue again."""
        self.process.terminate()
        # Not process.wait(): the signal came in the midst of it, and it would wait for itself.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Job(self.run, self.folder, self.device))


# ------------------------------------------------------------------------------------------ launch
@dataclass
class Options:
    out: Path = Path("runs/grid")  # where the runs' folders are made
    cluster: Literal["local", "slurm", "debug"] = "local"  # debug: one after the other, in here
    jobs: int | None = None  # at once; None: cores of this machine / cores of a job (Slurm: 1000)
    cores: int = 1  # per job; also the trainer's --threads
    memory_gb: int = 4  # per job (Slurm)
    gpus: int = 0  # per job (Slurm); local jobs take this machine's GPUs in turn
    hours: float = 24.0  # per job; then it saves, and is queued again
    partition: str | None = None  # of Slurm
    dry_run: bool = False  # print the commands, and stop


def folders_of(runs, options):
    """{run: its folder}, the runs with as many threads as a job has cores."""
    runs = [Run(run.script, (*run.flags, ("threads", str(options.cores)))) for run in runs]
    return {run: Path(options.out).resolve() / run.name for run in runs}


def launch(runs, options):
    """Run what is not finished yet. Returns the exit code: 0 if all runs are finished."""
    folders = folders_of(runs, options)
    if options.dry_run:
        for run, folder in folders.items():
            saved = checkpoint_of(folder)
            state = "done" if result_of(folder) else "resume" if saved else "new"
            print(f"{state:6}", shlex.join(run.command(folder, saved)))
        return 0
    with contextlib.ExitStack() as stack:
        return Launcher(folders, options, stack).go()


class Launcher:
    """The runs that wait, those that are under way, and those that failed."""

    def __init__(self, folders, options, stack):
        self.folders, self.options = folders, options
        self.submitit = Path(options.out).resolve() / "submitit"
        self.waiting = [run for run, folder in folders.items() if not result_of(folder)]
        self.active, self.failed, self.stop = {}, {}, 0  # active: {run: submitit job, or None}
        logging.getLogger("submitit").setLevel(logging.ERROR)  # warns where Slurm keeps no accounts
        executor = submitit.AutoExecutor(self.submitit, cluster=options.cluster)
        executor.update_parameters(timeout_min=int(60 * options.hours), name="maipg")
        if options.cluster == "slurm":
            slurm = {"slurm_cpus_per_task": options.cores, "slurm_signal_delay_s": 120}
            slurm["slurm_mem"] = f"{options.memory_gb}GB"
            slurm |= {"slurm_gpus_per_node": options.gpus} if options.gpus else {}
            slurm |= {"slurm_partition": options.partition} if options.partition else {}
            executor.update_parameters(**slurm)
        self.executor, self.count = executor, 0
        self.slots = options.jobs or max(1, os.cpu_count() // options.cores)
        if options.cluster == "slurm":
            self.slots = options.jobs or 1000  # Slurm has a queue of its own
        skipped = len(folders) - len(self.waiting)
        bar = "{l_bar}{bar}| {n:.2f}/{total} runs [{elapsed}"
        print(f"{len(folders)} runs, {skipped} finished before, {self.slots} at once", flush=True)
        self.bar = stack.enter_context(
            tqdm(total=len(folders), bar_format=bar + "<{remaining}]", disable=None)
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            old = signal.signal(number, self.on_signal)
            stack.callback(signal.signal, number, old)

    def on_signal(self, number, frame):
        self.stop = number

    def submit(self, run):
        """Start a run, or adopt it where a launcher that was killed has left it under way."""
        folder = self.folders[run]
        if is_running(folder):
            return None
        known = folder / "slurm_id"
        if self.options.cluster == "slurm" and known.exists():
            job = submitit.SlurmJob(self.submitit, known.read_text())
            if not job.done(force_check=True):
                return job
        gpus = 0 if self.options.cluster == "slurm" else torch.cuda.device_count()
        device = {"CUDA_VISIBLE_DEVICES": str(self.count % gpus)} if gpus > 1 else {}
        if gpus == 1 and self.options.cluster == "local":  # submitit hides it
            device = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
        self.count += 1
        job = self.executor.submit(Job(run, folder, device))
        if self.options.cluster == "slurm":
            folder.mkdir(parents=True, exist_ok=True)
            known.write_text(job.job_id)
        return job

    def ended(self, run, job):
        """Whether a run is not under way any more."""
        if self.options.cluster == "debug" and job:
            job.wait()
        return (job is None or job.done()) and not is_running(self.folders[run])

    def go(self):
        said = time.monotonic()
        while (self.waiting or self.active) and not self.stop:
            while self.waiting and len(self.active) < self.slots and not self.stop:
                run = self.waiting.pop(0)
                self.active[run] = self.submit(run)
            for run, job in list(self.active.items()):
                if self.ended(run, job):
                    del self.active[run]
                    if not result_of(self.folders[run]) and job is None:
                        self.waiting.append(run)  # not ours, and it was killed
                    elif not result_of(self.folders[run]):
                        self.failed[run] = last_line(self.folders[run] / "log.txt")
            self.bar.n = sum(progress_of(folder) for folder in self.folders.values())
            self.bar.refresh()
            if self.bar.disable and time.monotonic() - said > 60:
                print(f"{self.bar.n:.2f} of {self.bar.total} runs", flush=True)
                said = time.monotonic()
            time.sleep(0.5)
        if self.stop:
            return self.interrupt()
        for run, why in self.failed.items():
            print(f"FAILED {run.name}: {why} (log: {self.folders[run] / 'log.txt'})")
        finished = len(self.folders) - len(self.failed)
        print(f"{finished} of {len(self.folders)} runs are finished")
        return 1 if self.failed else 0

    def interrupt(self):
        """Local jobs save and end; Slurm keeps its own."""
        if self.options.cluster == "slurm":
            print("the jobs stay with Slurm (scancel ends them); the same command watches them")
            return 128 + self.stop
        jobs = [job for job in self.active.values() if job and self.options.cluster == "local"]
        for job in jobs:  # first, so that none starts a trainer now
            job.cancel()
        while not all(job.done() for job in jobs):
            time.sleep(0.1)
        for run in self.active:
            with contextlib.suppress(OSError, ValueError):
                if is_running(self.folders[run]):
                    os.kill(int((self.folders[run] / "pid").read_text()), signal.SIGTERM)
        while any(is_running(self.folders[run]) for run in self.active):
            time.sleep(0.1)
        print("stopped: every run has saved its state, the same command goes on")
        return 128 + self.stop


@dataclass
class Grid(Options):
    script: str = "maipg_smac.py"  # below the project's root; benchmark/baselines/qmix.py, ...
    scenarios: tuple[str, ...] = ("2s3z",)  # maps or scenarios
    nus: tuple[float, ...] = ()  # none: the script's own for the scenario
    mixers: tuple[str, ...] = ()  # none: the script's own
    seeds: tuple[int, ...] = (1, 2, 3)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    own, extra = words, []
    if "--" in words:
        own, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    grid = tyro.cli(Grid, args=own, description=__doc__)
    if not (ROOT / grid.script).is_file():
        print(f"error: --script {grid.script} is not a file below {ROOT}", file=sys.stderr)
        return 2
    if len(extra) % 2 or not all(word.startswith("--") for word in extra[::2]):
        print("error: after -- come pairs of --flag value", file=sys.stderr)
        return 2
    extra = {flag[2:]: value for flag, value in zip(extra[::2], extra[1::2])}
    runs = make_runs(grid.script, grid.scenarios, grid.nus, grid.mixers, grid.seeds, **extra)
    options = {field.name: getattr(grid, field.name) for field in dataclasses.fields(Options)}
    return launch(runs, Options(**options))


if __name__ == "__main__":
    sys.exit(main())
