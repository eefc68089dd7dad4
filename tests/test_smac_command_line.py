"""maipg_smac.py as a user runs it: bad input, outputs, resume, signals, kill -9, faults."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import maipg_smac as maipg

ROOT = Path(__file__).parent.parent
SMALL = "--map-name 3m --backend smax --num-envs 2 --rollout-steps 20 --threads 1 --nu 0.4".split()
SMALL += "--hidden-dim 16 --mixer-dim 16 --eval-episodes 2 --update-epochs 2".split()
TIMES = ("charts/SPS", "time/")


def run(folder, *flags):
    """Exit code and run folder of a training."""
    before = set(folder.glob("*"))
    code = maipg.main([*SMALL, "--runs-dir", str(folder), *flags])
    new = set(folder.glob("*")) - before
    return code, new.pop() if new else None


def table(folder):
    rows = csv.DictReader((folder / "progress.csv").open())
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def flat(x, name=""):
    if isinstance(x, dict):
        return {k: v for key in x for k, v in flat(x[key], f"{name}/{key}").items()}
    if isinstance(x, list):
        return flat(dict(enumerate(x)), name)
    return {name: x}


def same(a, b):
    """The names of what differs between two checkpoints, wall-clock times aside."""
    a, b = (flat(maipg.load_checkpoint(x)) for x in (a, b))
    skip = ("/args/", "/done/seconds")
    keys = [k for k in a.keys() | b.keys() if not k.startswith(skip)]
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return [k for k in keys if k not in a or k not in b or not equal(a[k], b[k])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four updates."""
    folder = tmp_path_factory.mktemp("whole")
    flags = "--total-timesteps 160 --eval-every 80 --checkpoint-every 1 --grad-variance-every 2"
    code, path = run(folder, *flags.split())
    assert code == 0
    return path


BAD = [
    ("--map-name nowhere", "3m"),
    ("--map-name MMM2 --backend smax", "2s3z"),
    ("--backend sc3", "sc3"),
    ("--backend sc2", "smac"),
    ("--no-such-flag 1", "no-such-flag"),
    ("stray", "stray"),
    ("--nu", "nu"),
    ("--nu abc", "abc"),
    ("--nu -0.1", "nu"),
    ("--nu 1.1", "nu"),
    ("--nu nan", "nu"),
    ("--mixer sum", "sum"),
    ("--q-scale none", "none"),
    ("--gamma 2", "gamma"),
    ("--gae-lambda -1", "gae-lambda"),
    ("--td-lambda 1.5", "td-lambda"),
    ("--norm-beta 1", "norm-beta"),
    ("--temperature 0", "temperature"),
    ("--num-envs 0", "num-envs"),
    ("--num-envs 1.5", "1.5"),
    ("--rollout-steps -5", "rollout-steps"),
    ("--chunk-length 7", "chunk-length"),
    ("--chunk-length 0", "chunk-length"),
    ("--num-minibatches 3", "num-minibatches"),
    ("--update-epochs 0", "update-epochs"),
    ("--learning-rate inf", "learning-rate"),
    ("--critic-lr -1", "critic-lr"),
    ("--ent-coef -0.1", "ent-coef"),
    ("--seed -1", "seed"),
    ("--total-timesteps 0", "total-timesteps"),
    ("--eval-episodes 0", "eval-episodes"),
    ("--grad-variance-every 1 --num-envs 1", "grad-variance-every"),
    ("--device abacus", "abacus"),
    ("--device cuda:99", "cuda:99"),
    ("--capture-video", "evaluate"),
    ("--resume nowhere", "nowhere"),
    ("--evaluate nowhere", "nowhere"),
    ("--resume damaged", "damaged"),
    ("--resume foreign", "foreign"),
    ("--resume whole --nu 0.2", "nu"),
    ("--resume whole --num-envs 4", "num-envs"),
]


@pytest.mark.parametrize("command, word", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(command, word, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SC2PATH", raising=False)
    (tmp_path / "whole").symlink_to(whole)
    for name in ("damaged", "foreign"):
        (tmp_path / name).mkdir()
    content = (whole / "checkpoint.pt").read_bytes()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign" / "checkpoint.pt")
    before = sorted(tmp_path.rglob("*"))
    resuming = "--resume" in command or "--evaluate" in command
    base = [] if resuming else SMALL
    assert maipg.main([*base, *command.split()]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and word in out.err
    assert "Traceback" not in out.err and sorted(tmp_path.rglob("*")) == before


def test_a_run_writes_what_the_readme_says(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = table(whole)
    assert [row["global_step"] for row in rows] == ["40", "80", "120", "160"]
    expected = "charts/episodic_return charts/win_rate eval/win_rate eval/win_rate_stderr losses/q "
    expected += (
        "losses/policy losses/critic losses/entropy diagnostics/approx_kl diagnostics/sigma_a "
    )
    expected += "diagnostics/clip_fraction diagnostics/policy_grad_norm variance/r_var_pi "
    expected += "variance/r_var_v variance/corr variance/gradient diagnostics/explained_variance_q"
    assert set(expected.split()) <= rows[0].keys()
    assert [bool(row["eval/win_rate"]) for row in rows] == [False, True, False, True]
    assert [bool(row["variance/gradient"]) for row in rows] == [True, False, True, False]
    events = EventAccumulator(str(whole)).Reload()
    for name in ("losses/q", "diagnostics/sigma_a", "variance/corr"):
        logged = [(str(e.step), e.value) for e in events.Scalars(name)]
        assert logged == [(r["global_step"], pytest.approx(float(r[name]))) for r in rows]
    result = json.loads((whole / "result.json").read_text())
    rates = [e["eval/win_rate"] for e in result["evaluations"]]
    assert result["final_win_rate"] == pytest.approx(sum(rates) / 2) and result["step"] == 160
    assert json.loads((whole / "args.json").read_text())["backend"] == "smax"


def test_resume_is_bit_for_bit(whole, tmp_path):
    flags = "--eval-every 80 --checkpoint-every 1 --grad-variance-every 2".split()
    code, path = run(tmp_path, "--total-timesteps", "80", *flags)
    with open(path / "progress.csv", "a") as file:
        file.write("120,1.0,")  # a torn line, as kill -9 can leave it
    assert code == 0
    assert maipg.main(["--resume", str(path), "--total-timesteps", "160"]) == 0
    assert same(whole, path) == []
    assert table(whole) == table(path)


def test_same_seed_same_run_and_another_seed_another_run(whole, tmp_path):
    flags = ["--total-timesteps", "160", "--grad-variance-every", "0"]
    _, again = run(tmp_path, *flags, "--eval-every", "40")  # evaluation leaves training alone
    _, other = run(tmp_path, *flags, "--seed", "2")
    differs = [k for k in same(whole, again) if not k.startswith("/done/evaluations")]
    assert differs == []
    assert any(k.startswith("/agent/policy") for k in same(whole, other))


def test_evaluation_of_a_saved_policy_and_its_film(whole, capsys, monkeypatch):
    from PIL import Image

    assert maipg.main(["--evaluate", str(whole), "--eval-episodes", "20"]) == 0
    first = capsys.readouterr().out
    assert "95% interval" in first and "20 greedy episodes" in first
    assert maipg.main(["--evaluate", str(whole), "--eval-episodes", "20"]) == 0
    assert capsys.readouterr().out == first
    save = maipg.SMAXEnvs.save_film

    def short(envs, folder):  # drawing a whole episode takes half a minute
        envs.film = envs.film[:2]
        return save(envs, folder)

    monkeypatch.setattr(maipg.SMAXEnvs, "save_film", short)
    assert maipg.main(["--evaluate", str(whole), "--eval-episodes", "2", "--capture-video"]) == 0
    assert Image.open(whole / "film.gif").n_frames > 8


def start(folder, *flags):
    """A training in a process of its own, once it has written a checkpoint; and its run folder."""
    command = [sys.executable, str(ROOT / "maipg_smac.py"), *SMALL, "--runs-dir", str(folder)]
    command += ["--total-timesteps", "1000000", "--checkpoint-every", "1", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process, next(folder.glob("*/checkpoint.pt")).parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on(number, tmp_path):
    process, path = start(tmp_path)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out.startswith("backend smax (asked for)")
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    step = maipg.load_checkpoint(path)["done"]["step"]
    if number != signal.SIGKILL:
        assert int(table(path)[-1]["global_step"]) == step
    assert maipg.main(["--resume", str(path), "--total-timesteps", str(step + 80)]) == 0
    steps = [int(row["global_step"]) for row in table(path)]
    assert steps == list(range(40, step + 81, 40)) and (path / "result.json").exists()
    assert not list(path.glob("*.tmp"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    code, path = run(tmp_path, "--total-timesteps", "40")
    before = (path / "checkpoint.pt").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert maipg.main(["--resume", str(path), "--total-timesteps", "80"]) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "Traceback" not in error
    assert (path / "checkpoint.pt").read_bytes() == before and not list(path.glob("*.tmp"))


def test_nan_stops_the_run_before_the_weights_are_touched(tmp_path, monkeypatch, capsys):
    code, path = run(tmp_path, "--total-timesteps", "40")
    before, step, agents = maipg.load_checkpoint(path)["agent"], maipg.SMAXEnvs.step, []

    def broken(envs, actions):
        *seen, reward, done, info = step(envs, actions)
        return *seen, reward * float("nan"), done, info

    build = maipg.Agent.__init__
    monkeypatch.setattr(maipg.SMAXEnvs, "step", broken)
    monkeypatch.setattr(
        maipg.Agent, "__init__", lambda self, *x: (build(self, *x), agents.append(self))[0]
    )
    assert maipg.main(["--resume", str(path), "--total-timesteps", "80"]) == 1
    assert "not finite" in capsys.readouterr().err
    for name, weight in agents[0].state_dict().items():
        assert "moments" in name or torch.equal(weight, before[name])
    assert maipg.load_checkpoint(path)["done"]["step"] == 40


def test_the_readme_snippet_loads_the_policy(whole):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    space = {}
    exec(code.replace("RUN_DIR", str(whole)), space)
    saved = maipg.load_checkpoint(whole)["agent"]
    for name, weight in space["policy"].state_dict().items():
        assert torch.equal(weight, saved[f"policy.{name}"])


def test_importing_does_nothing():
    code = "import sys, maipg_smac; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
