"""benchmark/launch.py on this machine and on a Slurm of one node, with a stand-in for a trainer."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark import launch

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "tests/standin/trainer.py"


def start(out, *words, seeds=("1", "2"), maps=("3m",), steps=20):
    """A launcher in a process of its own; what it prints lies beside `out`."""
    command = [sys.executable, "benchmark/launch.py", "--script", TRAINER, "--out", str(out)]
    command += ["--scenarios", *maps, "--seeds", *seeds, *words, "--", "--steps", str(steps)]
    with open(f"{out}.txt", "a") as log:
        kwargs = {"stdout": log, "stderr": log, "cwd": ROOT, "start_new_session": True}
        return subprocess.Popen(command, **kwargs)


def finish(*args, **kwargs):
    return start(*args, **kwargs).wait(timeout=120)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def steps_of(folder):
    path = folder / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def run_folders(out):
    return sorted(path for path in out.glob("trainer__*") if path.is_dir())


def begun(out, count, least=3):
    return lambda: sum(len(steps_of(f)) >= least for f in run_folders(out)) >= count


def pids(out):
    return [int((f / "pid").read_text()) for f in run_folders(out) if (f / "pid").exists()]


def assert_whole(out, runs, steps=20):
    """Every run has done every step, and none twice."""
    folders = run_folders(out)
    assert len(folders) == runs
    for folder in folders:
        assert steps_of(folder) == list(range(steps)) and launch.result_of(folder)


def test_a_grid_has_no_run_twice():
    runs = launch.make_runs("maipg_smac.py", ["2s3z"], (0.0, 0.3), ("qmix", "vdn"), (1, 2))
    assert len(runs) == 6  # nu = 0 has no mixer
    assert len({run.name for run in runs}) == 6
    words = [run.text for run in runs]
    assert "python maipg_smac.py --map-name 2s3z --nu 0.3 --seed 1 --mixer vdn" in words
    other = launch.make_runs("maipg_smac.py", ["2s3z"], (0,), (), (1,), num_envs=3)[0]
    assert other.name not in {run.name for run in runs} and "--num-envs 3" in other.text
    assert launch.make_runs("maipg_grf.py", ["x"])[0].text.split()[2:4] == ["--scenario", "x"]


def test_finished_is_what_has_all_its_steps(tmp_path):
    folder = tmp_path / "job" / "run"
    folder.mkdir(parents=True)
    table = folder / "progress.csv"

    def share(text, total=100):
        (folder / "args.json").write_text(json.dumps({"total_timesteps": total}))
        table.write_text(text)
        finished = launch.result_of(tmp_path / "job")
        assert finished == (folder if launch.done(table) >= 1 else None)
        return launch.done(table), launch.progress_of(tmp_path / "job")

    head = "global_step,eval/win_rate,losses/policy\n"
    assert share("") == share(head) == (0.0, 0.0)
    assert share(f"{head}40,,1\n80,0.5,2\n") == (0.8, 0.8)
    assert share(f"{head}40,,1\n120,0.5,2\n") == (1.2, 1.0)  # the last rollout is whole
    assert share(f"{head}100,0.5,2\n", total=200) == (0.5, 0.5)  # resumed, to go further
    (folder / "args.json").unlink()
    assert launch.done(table) == 0.0


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    words = "--scenarios 2s3z --seeds 1 2 --dry-run --out".split()
    assert launch.main([*words, str(tmp_path / "grid")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("maipg_smac.py --map-name 2s3z" in line for line in lines)
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("words", [["--script", "no.py"], ["--", "--steps"], ["--", "steps", "1"]])
def test_bad_input(words, tmp_path, capsys):
    assert launch.main(["--out", str(tmp_path / "grid"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_runs_then_skips_what_is_finished(tmp_path):
    out = tmp_path / "grid"
    assert finish(out) == 0
    assert_whole(out, 2)
    assert (
        '"command": "python tests/standin/trainer.py'
        in (run_folders(out)[0] / "job.json").read_text()
    )
    assert finish(out) == 0
    assert_whole(out, 2)
    assert "2 runs, 2 finished before" in Path(f"{out}.txt").read_text()


def test_debug_runs_in_this_process(tmp_path):
    assert finish(tmp_path / "grid", "--cluster", "debug", steps=3) == 0
    assert_whole(tmp_path / "grid", 2, steps=3)


def test_a_failed_run_is_named_with_its_last_line(tmp_path):
    out = tmp_path / "grid"
    assert finish(out, seeds=("1",), maps=("3m", "nowhere"), steps=3) == 1
    text = Path(f"{out}.txt").read_text()
    assert "FAILED trainer__nowhere__s1" in text and "there is no such map" in text
    assert "1 of 2 runs are finished" in text


def test_launcher_and_jobs_are_killed(tmp_path):
    out = tmp_path / "grid"
    launcher = start(out)
    wait_for(begun(out, 2))
    os.killpg(launcher.pid, signal.SIGKILL)  # the launcher, and submitit's processes
    for pid in pids(out):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not any(map(launch.is_running, run_folders(out))))
    assert not any(map(launch.result_of, run_folders(out)))
    assert finish(out) == 0
    assert_whole(out, 2)


def test_only_the_launcher_is_killed(tmp_path):
    """Its runs go on; the next launcher waits for them instead of starting them again."""
    out = tmp_path / "grid"
    launcher = start(out, steps=60)
    wait_for(begun(out, 2))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    before = pids(out)
    assert all(map(launch.is_running, run_folders(out)))
    assert finish(out, steps=60) == 0
    assert_whole(out, 2, steps=60)
    assert pids(out) == before


def test_a_killed_trainer_goes_on_by_itself(tmp_path):
    out = tmp_path / "grid"
    launcher = start(out, seeds=("1",))
    wait_for(begun(out, 1))
    os.kill(pids(out)[0], signal.SIGKILL)
    assert launcher.wait(timeout=60) == 0
    assert_whole(out, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop(number, tmp_path):
    out = tmp_path / "grid"
    launcher = start(out, steps=60)
    wait_for(begun(out, 2))
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 128 + number
    assert not any(map(launch.is_running, run_folders(out)))
    done = [len(steps_of(folder)) for folder in run_folders(out)]
    assert all(3 <= count < 60 for count in done)
    assert finish(out, steps=60) == 0
    assert_whole(out, 2, steps=60)


def test_stop_before_a_trainer_has_begun(tmp_path):
    """submitit's processes take a second or two to start: none may start a trainer later."""
    out = tmp_path / "grid"
    launcher = start(out, steps=60)
    wait_for(lambda: len(list((out / "submitit").glob("*_submitted.pkl"))) == 2)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    time.sleep(5)
    assert not any(map(launch.is_running, run_folders(out)))
    assert not any(launch.result_of(folder) for folder in run_folders(out))
    assert finish(out, steps=60) == 0
    assert_whole(out, 2, steps=60)


# ------------------------------------------------------------------------------------------- Slurm
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """munged, slurmctld and slurmd of this machine alone; ended with the test."""
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)
    ]
    if missing:
        pytest.skip(f"no {' '.join(missing)}: apt-get install slurm-wlm munge")
    if os.getuid():
        pytest.skip("slurmd has to be started by root")
    place, host = tmp_path / "slurm", socket.gethostname()
    place.mkdir()
    for folder in (tmp_path, *tmp_path.parents):  # munged insists on safe folders above its socket
        if folder.stat().st_uid != 0 or folder.stat().st_mode & 0o022 and folder != Path("/tmp"):
            pytest.skip(f"munged does not trust {folder}")
    key = place / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    sock = place / "munge.socket"
    munged = ["munged", "--foreground", "--force", f"--socket={sock}", f"--key-file={key}"]
    munged += [f"--log-file={place}/munged.log", f"--pid-file={place}/munged.pid"]
    munged += [f"--seed-file={place}/munged.seed"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 512
    config = f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        AuthType=auth/munge
        AuthInfo=socket={sock}
        SlurmUser={pwd.getpwuid(0).pw_name}
        SlurmctldPort={free_port()}
        SlurmdPort={free_port()}
        StateSaveLocation={place}/state
        SlurmdSpoolDir={place}/spool
        SlurmctldPidFile={place}/slurmctld.pid
        SlurmdPidFile={place}/slurmd.pid
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        MpiDefault=none
        ReturnToService=2
        SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
        NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory} State=UNKNOWN
        PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
    """
    (place / "slurm.conf").write_text("\n".join(line.strip() for line in config.splitlines()))
    for name in ("state", "spool"):
        (place / name).mkdir()
    monkeypatch.setenv("SLURM_CONF", str(place / "slurm.conf"))
    log = open(place / "daemons.txt", "w")  # noqa: SIM115
    daemons = [subprocess.Popen(munged, stdout=log, stderr=log)]
    try:
        wait_for(sock.exists, 10)
        for command in (["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
        idle = lambda: "idle" in query("sinfo", "-h", "-o", "%t")
        try:
            wait_for(idle, 30)
        except AssertionError:
            pytest.skip(f"no Slurm here: {(place / 'daemons.txt').read_text()[-400:]}")
        yield place
    finally:
        query("scancel", "-f", "-u", "root")
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        log.close()


def query(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def test_slurm(slurm, tmp_path):
    """Two jobs; one is cancelled in the middle, named as failed, and goes on with the next call."""
    out = tmp_path / "grid"
    words = ("--cluster", "slurm", "--memory-gb", "1", "--hours", "1")
    launcher = start(out, *words, steps=60)
    wait_for(begun(out, 2))
    victim = run_folders(out)[0]
    query("scancel", (victim / "slurm_id").read_text())
    assert launcher.wait(timeout=120) == 1
    text = Path(f"{out}.txt").read_text()
    assert f"FAILED {victim.name}" in text and "1 of 2 runs are finished" in text
    assert 3 <= len(steps_of(victim)) < 60
    assert finish(out, *words, steps=60) == 0
    assert_whole(out, 2, steps=60)


def test_slurm_keeps_jobs_whose_launcher_was_killed(slurm, tmp_path):
    out = tmp_path / "grid"
    words = ("--cluster", "slurm", "--memory-gb", "1", "--hours", "1")
    launcher = start(out, *words, steps=60)
    wait_for(begun(out, 2))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    ids = [(folder / "slurm_id").read_text() for folder in run_folders(out)]
    assert finish(out, *words, steps=60) == 0
    assert_whole(out, 2, steps=60)
    assert ids == [(folder / "slurm_id").read_text() for folder in run_folders(out)]


def test_slurm_preemption_saves_and_queues_again(slurm, tmp_path):
    """Slurm's warning before a preemption or the time limit: SIGUSR2 to all processes of a job."""
    out = tmp_path / "grid"
    words = ("--cluster", "slurm", "--memory-gb", "1", "--hours", "1")
    launcher = start(out, *words, seeds=("1",), steps=40)
    wait_for(begun(out, 1))
    job = (run_folders(out)[0] / "slurm_id").read_text()
    query("scancel", "--signal=USR2", job)
    wait_for(lambda: "PENDING" in query("squeue", "-h", "-j", job, "-o", "%T"))
    query("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes
    assert launcher.wait(timeout=200) == 0
    assert_whole(out, 1, steps=40)
    assert (run_folders(out)[0] / "log.txt").read_text().count("begins at") == 2
