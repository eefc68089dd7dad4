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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

import maipg_smac
from benchmark import launch

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "tests/standin/trainer.py"


def words_of(out, *words, seeds=("1", "2"), maps=("3m",), steps=20):
    own = ["--script", TRAINER, "--out", str(out), "--scenarios", *maps, "--seeds", *seeds, *words]
    return [*own, "--", "--steps", str(steps)]


def start(out, *words, **kwargs):
    """A launcher in a process of its own, started elsewhere; what it prints lies beside `out`."""
    command = [sys.executable, str(ROOT / "benchmark/launch.py")]
    command += words_of(os.path.relpath(out, out.parent), *words, **kwargs)
    with open(f"{out}.txt", "a") as log:
        how = {"stdout": log, "stderr": log, "cwd": out.parent, "start_new_session": True}
        return subprocess.Popen(command, **how)


def finish(out, *words, **kwargs):
    """A launcher in this process; its exit code."""
    return launch.main(words_of(out, *words, **kwargs))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def steps_of(folder):
    path = folder / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def run_folders(out):
    return sorted(path for path in out.glob("trainer__*") if path.is_dir())


def run_of(folder):
    return launch.Run(TRAINER, (), folder, 1)


def begun(out, count, least=3):
    return lambda: sum(len(steps_of(f)) >= least for f in run_folders(out)) >= count


def holders(out):
    return [run_of(folder).holder() for folder in run_folders(out)]


def pids(out):
    return [int(holder.split("@")[0]) for holder in holders(out)]


def assert_whole(out, runs, steps=20):
    """Every run has done every step, and none twice."""
    folders = run_folders(out)
    assert len(folders) == runs
    for folder in folders:
        assert steps_of(folder) == list(range(steps)) and run_of(folder).finished()


def grid(*extra, **settings):
    settings = {"script": TRAINER, "scenarios": ("3m",), "seeds": (1,)} | settings
    return launch.make_runs(launch.Grid(**settings, flags=extra))


def test_a_grid_has_no_run_twice():
    runs = grid(scenarios=("3m", "8m"), nus=(0.0, 0.3), mixers=("qmix", "vdn"), seeds=(1, 2))
    assert len(runs) == len({run.folder for run in runs}) == 12  # nu = 0 has no mixer
    words = [" ".join(run.words) for run in runs]
    assert "--map-name 3m --nu 0.3 --mixer vdn --seed 2" in words
    assert "--map-name 8m --nu 0 --seed 1" in words
    assert grid()[0].words == ("--map-name", "3m", "--seed", "1")
    football = grid(script="maipg_grf.py", scenarios=("academy_corner",))
    assert football[0].words[:2] == ("--scenario", "academy_corner")


def test_a_name_for_every_setting():
    """Other settings, other names; the same settings, however typed, the same one."""
    settings = [[], ["--steps", "21"], ["--steps", "22"], ["--track"], ["--track", "--steps", "22"]]
    names = [grid(*words)[0].folder.name for words in settings]
    names += [grid(nus=(nu,))[0].folder.name for nu in (0.4, 0.123456781, 0.123456782)]
    names += [grid(mixers=(name,))[0].folder.name for name in ("qmix", "vdn")]
    names += [grid(script="maipg_smac.py")[0].folder.name, grid(seeds=(7,))[0].folder.name]
    assert len(set(names)) == len(names)
    for words in (["--steps=22", "--track"], ["--track", "--steps", "22"]):
        assert grid(*words)[0].folder.name == names[4]
        assert grid(*words)[0].words[-len(words) :] == tuple(words)  # as typed
    assert grid(cores=2)[0].folder.name == names[0]  # goes on with more threads


def test_a_changed_default_is_another_name(monkeypatch):
    """Runs of another meaning are not gone on with."""
    name = grid(script="maipg_smac.py")[0].folder.name

    @dataclass
    class Changed(maipg_smac.Args):
        ridge: float = 0.1

    monkeypatch.setattr(maipg_smac, "Args", Changed)
    assert grid(script="maipg_smac.py")[0].folder.name != name


def test_finished_is_what_has_all_its_steps(tmp_path):
    folder = tmp_path / "job" / "run"
    folder.mkdir(parents=True)
    table = folder / "progress.csv"

    def share(text, total=100):
        (folder / "args.json").write_text(json.dumps({"total_timesteps": total}))
        table.write_text(text)
        assert run_of(tmp_path / "job").finished() == (launch.done(table) >= 1)
        return launch.done(table)

    head = "global_step,eval/win_rate,losses/policy\n"
    assert share("") == share(head) == 0.0
    assert share(f"{head}40,,1\n80,0.5,2\n") == 0.8
    assert share(f"{head}40,,1\n120,0.5,2\n") == 1.2  # the last rollout is whole
    assert share(f"{head}100,0.5,2\n", total=200) == 0.5  # resumed, to go further
    for text in ("{}", "[]", "{", '{"total_timesteps": null}'):
        (folder / "args.json").write_text(text)
        assert launch.done(table) == 0.0
    (folder / "args.json").unlink()
    assert launch.done(table) == 0.0


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    words = words_of(tmp_path / "grid", "--dry-run", "--cores", "3")
    assert launch.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not list(tmp_path.iterdir())
    folder = grid("--steps", "20", out=tmp_path / "grid")[0].folder
    end = f"--map-name 3m --seed 1 --steps 20 --runs-dir {folder} --threads 3"
    assert lines[0].startswith("to run") and lines[0].endswith(f"{ROOT / TRAINER} {end}")


BAD = [  # words for the launcher, words after --, what the line names
    ("--jobs -1", "", "--jobs -1"),
    ("--jobs 0", "", "--jobs 0"),
    ("--cores 0", "", "--cores 0"),
    ("--cores -3", "", "--cores -3"),
    ("--jobs 100000", "", "--jobs 100000"),
    ("--hours -1", "", "--hours -1"),
    ("--hours nan", "", "--hours nan"),
    ("--seeds 1 2 1", "", "--seeds 1 2 1"),
    ("--seeds -1", "", "--seeds -1"),
    ("--seeds", "", "--seeds"),
    ("--nus 2", "", "--nus 2"),
    ("--nus 0.1 nan", "", "--nus nan"),
    ("--nus 0 -0.0", "", "--nus"),
    ("--nus", "", "--nus"),
    ("--mixers qmix qmix", "", "--mixers"),
    ("--mixers a/b", "", "a/b"),
    ("--scenarios a/../../../b", "", "a/../../../b"),
    ("--scenarios ..", "", ".."),
    ("--scenarios 3m 8m 3m", "", "--scenarios"),
    ("--scenarios", "", "--scenarios"),
    (["--scenarios", ""], "", "''"),
    (["--scenarios", "3m\n"], "", "3m"),
    (["--scenarios", "3 m"], "", "3 m"),
    (["--scenarios", "m" * 300], "", "mmm"),
    ("--script no.py", "", "--script no.py"),
    ("--script ../x.py", "", "--script"),
    ("--script /etc/hostname", "", "--script"),
    ("--script benchmark", "", "--script"),
    ("--script README.md", "", "--script"),
    ("--script tests/standin/fake_install.py", "", "--script"),
    ("--script maipg_matrix.py", "", "--script"),
    ("", "--seed 3", "--seed"),
    ("", "--nu=0.3", "--nu=0.3"),
    ("", "--runs_dir x", "--runs_dir"),
    ("", "--steps 3 --resume x", "--resume"),
    ("", "--threads 4", "--threads"),
    ("", "--map-name 8m", "--map-name"),
    ("", "--", "--"),
]


@pytest.mark.parametrize("own, extra, told", BAD)
def test_bad_input(own, extra, told, tmp_path, capsys):
    own = own.split() if isinstance(own, str) else own
    words = ["--script", TRAINER, "--out", str(tmp_path / "grid"), *own, "--", *extra.split()]
    assert launch.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    assert not list(tmp_path.iterdir())


# The parser's own message, of several lines.
REFUSED = [
    ["--cores", "x"],
    ["--cluster", "lsf"],
    ["--no-such"],
    ["--jobs", "2.5"],
    ["--hours", "x"],
    ["--", "steps", "1"],
]
REFUSED += [["--", "--steps"], ["--", "--steps", "x"], ["--", "--step", "1"], ["--nus", "x"]]


@pytest.mark.parametrize("words", REFUSED)
def test_refused_by_a_parser(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.main(["--script", TRAINER, "--out", str(tmp_path / "grid"), *words])
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_has_to_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "grid", Path("/proc/grid")):
        assert finish(out) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_slurm_has_to_be_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert finish(tmp_path / "grid", "--cluster", "slurm") == 2
    error = capsys.readouterr().err
    assert "srun" in error and error.count("\n") == 1 and not (tmp_path / "grid").exists()


def test_gpus_are_taken_in_turn(tmp_path, monkeypatch):
    """What nvidia-smi lists, or what the user has left visible."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\necho GPU 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(launch, "work", lambda *_: {})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = {"seeds": (1, 2, 3), "out": tmp_path / "grid"}
    for visible, expected in ((None, "010"), ("2,3", "232"), ("", ["", "", ""])):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        runs = grid(**settings)
        launch.launch(runs, launch.Grid(**settings))
        assert [run.gpu for run in runs] == list(expected)


def test_runs_then_skips_what_is_finished(tmp_path, capfd):
    out = tmp_path / "grid"
    assert start(out, steps=5).wait(timeout=60) == 0
    assert_whole(out, 2, steps=5)
    about = json.loads((run_folders(out)[0] / "job.json").read_text())
    assert about["command"] == f"python {TRAINER} --map-name 3m --seed 1 --steps 5"
    assert about.keys() == {"command", "commit", "machine", "torch"} and all(about.values())
    assert finish(out, steps=5) == 0
    assert_whole(out, 2, steps=5)
    assert "2 runs, 2 finished before" in capfd.readouterr().out


def test_a_run_goes_on_with_its_flags_and_tells_all_commits(tmp_path, monkeypatch):
    """A PettingZoo environment has to be named again."""
    folder = tmp_path / "run"
    (folder / "x").mkdir(parents=True)
    (folder / "x/checkpoint.pt").touch()
    run = launch.Run(TRAINER, ("--map-name", "3m", "--seed", "1", "--steps", "5"), folder, 1)
    words = run.command()
    assert words[words.index("--resume") + 1] == str(folder / "x") and "--runs-dir" not in words
    assert all(word in words for word in run.words)
    shutil.rmtree(folder / "x")
    for commit, told in ("a", "a"), ("a", "a"), ("b", "a b"), ("c", "c"):
        about = {"commit": commit, "machine": "m", "torch": "t"}
        monkeypatch.setattr(launch, "provenance", about.copy)
        run()
        assert json.loads((folder / "job.json").read_text())["commit"] == told
        if told == "a b":
            (folder / "job.json").write_text("")  # a full disk's
        for path in folder.glob("*/progress.csv"):
            path.unlink()


def test_a_failed_run_is_named_and_a_killed_one_goes_on(tmp_path):
    out = tmp_path / "grid"
    launcher = start(out, "--jobs", "2", seeds=("1",), maps=("3m", "nowhere"))
    wait_for(lambda: any(len(steps_of(folder)) >= 3 for folder in out.glob("*3m*")))
    (whole,) = out.glob("*3m*")
    os.kill(int(run_of(whole).holder().split("@")[0]), signal.SIGKILL)
    assert launcher.wait(timeout=60) == 1
    text = Path(f"{out}.txt").read_text()
    assert "FAILED trainer__nowhere__s1" in text and "there is no such map" in text
    assert "1 of 2 runs are finished" in text
    assert steps_of(whole) == list(range(20))
    assert (whole / "log.txt").read_text().count("begins at") == 2


def test_launcher_and_jobs_are_killed(tmp_path):
    out = tmp_path / "grid"
    launcher = start(out)
    wait_for(begun(out, 2))
    os.killpg(launcher.pid, signal.SIGKILL)  # the launcher, and submitit's processes
    for pid in pids(out):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not any(holders(out)))
    assert not any(run_of(folder).finished() for folder in run_folders(out))
    assert finish(out) == 0
    assert_whole(out, 2)


def test_only_the_launcher_is_killed(tmp_path):
    """Its runs go on; other launchers wait for them instead of starting them again."""
    out = tmp_path / "grid"
    launcher = start(out, steps=100)
    wait_for(begun(out, 2))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert all(holders(out))
    others = [start(out, steps=100) for _ in range(2)]
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    assert_whole(out, 2, steps=100)
    logs = [(folder / "log.txt").read_text() for folder in run_folders(out)]
    assert [log.count("begins at") for log in logs] == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop(number, tmp_path):
    out = tmp_path / "grid"
    launcher = start(out, steps=100)
    wait_for(begun(out, 2))
    # A terminal sends Ctrl-C to all of its processes.
    (os.killpg if number == signal.SIGINT else os.kill)(launcher.pid, number)
    assert launcher.wait(timeout=60) == 128 + number
    assert not any(holders(out))
    done = [len(steps_of(folder)) for folder in run_folders(out)]
    assert all(3 <= count < 100 for count in done)
    assert "Traceback" not in Path(f"{out}.txt").read_text()
    assert "stopped" in Path(f"{out}.txt").read_text()
    assert finish(out, steps=100) == 0
    assert_whole(out, 2, steps=100)


def test_stop_before_a_trainer_has_begun(tmp_path):
    """submitit's processes take a second or two to start: none may start a trainer later."""
    out = tmp_path / "grid"
    launcher = start(out, steps=60)
    wait_for(lambda: len(list((out / "submitit").glob("*_submitted.pkl"))) == 2)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(str(out).encode() in words for words in processes)
    assert not any(run_of(folder).finished() for folder in run_folders(out))


def test_a_stop_amid_submissions_submits_no_more(tmp_path):
    runs, submitted, stopped = [run_of(tmp_path / str(k)) for k in range(5)], [], []

    def submit(run):
        submitted.append(run)
        stopped.extend([signal.SIGINT] * (len(submitted) == 2))
        return SimpleNamespace(done=lambda: True)

    executor, bar = SimpleNamespace(cluster="local", submit=submit), tqdm(disable=True)
    launch.work(runs.copy(), 5, executor, bar, stopped)
    assert submitted == runs[:2]


# ------ Slurm
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


def test_slurm(slurm, tmp_path, monkeypatch):
    """Two jobs; one is cancelled in the middle, named as failed, and goes on with the next call."""
    for name, value in {"MEM_PER_NODE": "300M", "ACCOUNT": "ours"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    out = tmp_path / "grid"
    words = ("--cluster", "slurm", "--hours", "1")
    launcher = start(out, *words, steps=100)
    wait_for(begun(out, 2))
    queue = query("squeue", "-h", "-O", "minmemory,account,numcpus,timelimit").splitlines()
    assert [line.split() for line in queue] == [["300M", "ours", "1", "1:00:00"]] * 2
    victim = run_folders(out)[0]
    query("scancel", (victim / "slurm_id").read_text())
    assert launcher.wait(timeout=120) == 1
    text = Path(f"{out}.txt").read_text()
    assert f"FAILED {victim.name}" in text and "1 of 2 runs are finished" in text
    assert 3 <= len(steps_of(victim)) < 60
    assert finish(out, *words, steps=100) == 0
    assert_whole(out, 2, steps=100)


def test_slurm_keeps_jobs_whose_launcher_was_killed(slurm, tmp_path):
    out = tmp_path / "grid"
    words = ("--cluster", "slurm", "--hours", "1")
    launcher = start(out, *words, steps=100)
    wait_for(begun(out, 2))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    ids = [(folder / "slurm_id").read_text() for folder in run_folders(out)]
    assert finish(out, *words, steps=100) == 0
    assert_whole(out, 2, steps=100)
    assert ids == [(folder / "slurm_id").read_text() for folder in run_folders(out)]


def test_slurm_preemption_saves_and_queues_again(slurm, tmp_path):
    """Slurm's warning before a preemption or the time limit: SIGUSR2 to all processes of a job."""
    out = tmp_path / "grid"
    words = ("--cluster", "slurm", "--hours", "1")
    launcher = start(out, *words, seeds=("1",), steps=40)
    wait_for(begun(out, 1))
    job = (run_folders(out)[0] / "slurm_id").read_text()
    query("scancel", "--signal=USR2", job)
    wait_for(lambda: "PENDING" in query("squeue", "-h", "-j", job, "-o", "%T"))
    # Slurm waits two minutes; in the second of its end the node would refuse the job.
    query("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
    assert launcher.wait(timeout=200) == 0
    assert_whole(out, 1, steps=40)
    assert (run_folders(out)[0] / "log.txt").read_text().count("begins at") == 2
