"""The command line of maipg_smac.py: bad input, resume, signals, faults, and what a run leaves."""

import csv
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import maipg_smac as maipg

SCRIPT = Path(maipg.__file__)
TINY = "--map-name 3m --backend smax --num-envs 2 --rollout-steps 20 --hidden-dim 16"
TINY += " --mixer-dim 16 --eval-episodes 2 --threads 1 --device cpu"
PLAN = "--nu 0.4 --mixer qmix --update-epochs 2 --eval-every 80 --checkpoint-every 1"
PLAN += " --grad-variance-every 1"
STEP = 40  # environment steps of an update
CLOCK = ("charts/SPS", "time/")  # the scalars that tell the time


def call(*words):
    """The exit code of a command line."""
    return maipg.main([x for word in words for x in str(word).split()])


def train(folder, *words):
    """A new run; its folder, which must be the only one in `folder`."""
    assert call(TINY, PLAN, f"--runs-dir {folder}", *words) == 0
    (path,) = folder.iterdir()
    return path


def read(path):
    """checkpoint.pt by torch alone."""
    return torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)


def rows(path):
    with open(path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(path):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows(path)]


def leaves(x, name=""):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(x, dict | list | tuple):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, part in items for k, v in leaves(part, f"{name}/{key}").items()}
    return {name: x}


def bits(x):
    """A tensor as bytes: nan equals nan, and 0.0 is not -0.0."""
    if not isinstance(x, torch.Tensor):
        return x
    return str(x.dtype), tuple(x.shape), bytes(x.contiguous().flatten().view(torch.uint8).tolist())


def differing(a, b, *parts):
    """Names of the leaves that are not the same in two checkpoints, in the parts given."""
    a, b = (leaves({part: read(path)[part] for part in parts}) for path in (a, b))
    assert a and a.keys() == b.keys()
    return [name for name in a if bits(a[name]) != bits(b[name])]


LEARNED = ("agent", "policy", "critic", "q", "rngs", "now", "envs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four updates in one go."""
    return train(tmp_path_factory.mktemp("whole"), f"--total-timesteps {4 * STEP}")


# --------------------------------------------------------------------------------------- bad input
BAD = [  # command line, what the line on stderr must mention
    ("--map-name nowhere", "nowhere 3m 2s3z 5m_vs_6m"),
    ("--map-name MMM2", "MMM2 3m 27m_vs_30m"),
    ("--map-name nowhere --backend sc2", "nowhere MMM2 corridor"),
    ("--no-such-flag 1", "no-such-flag"),
    ("--map-nam 3m", "map-nam"),
    ("stray", "stray"),
    ("-x", "-x"),
    ("--backend sc3", "backend sc3 smax"),
    ("--mixer sum", "mixer sum qmix vdn"),
    ("--q-scale none", "q-scale none raw"),
    ("--nu", "nu"),
    ("--nu half", "nu half"),
    ("--num-envs 2.5", "num-envs 2.5"),
    ("--num-envs many", "num-envs many"),
    ("--total-timesteps 1e6", "total-timesteps 1e6"),
    ("--nu half --seed 1.5", "Error parsing"),
    ("--num-envs 0", "num-envs 0"),
    ("--rollout-steps -20", "rollout-steps -20"),
    ("--total-timesteps 0", "total-timesteps"),
    ("--update-epochs 0", "update-epochs"),
    ("--hidden-dim 0", "hidden-dim"),
    ("--mixer-dim -1", "mixer-dim"),
    ("--threads 0", "threads"),
    ("--threads 99999999999", "threads"),
    ("--seed -1", "seed"),
    ("--eval-episodes 0", "eval-episodes"),
    ("--eval-every 0", "eval-every"),
    ("--checkpoint-every 0", "checkpoint-every"),
    ("--grad-variance-every -1", "grad-variance-every"),
    ("--grad-variance-every 1 --num-envs 1", "grad-variance-every"),
    ("--learning-rate 0", "learning-rate"),
    ("--critic-lr -1e-3", "critic-lr"),
    ("--q-lr nan", "q-lr nan"),
    ("--max-grad-norm inf", "max-grad-norm inf"),
    ("--ent-coef -0.1", "ent-coef"),
    ("--temperature 0", "temperature"),
    ("--nu nan", "nu nan"),
    ("--nu inf", "nu inf"),
    ("--nu 1.01", "nu 1.01"),
    ("--nu -0.1", "nu -0.1"),
    ("--gamma 1.5", "gamma"),
    ("--gae-lambda -1", "gae-lambda"),
    ("--td-lambda 2", "td-lambda"),
    ("--target-tau 1.1", "target-tau"),
    ("--clip-eps -0.2", "clip-eps"),
    ("--norm-beta 1", "norm-beta"),
    ("--chunk-length 7", "chunk-length rollout-steps"),
    ("--chunk-length 40", "chunk-length"),
    ("--num-minibatches 3", "num-minibatches"),
    ("--num-minibatches 0", "num-minibatches"),
    ("--num-minibatches 8", "num-minibatches"),
    ("--game-timeout 0", "game-timeout"),
    ("--capture-video", "capture-video evaluate"),
    ("--device abacus", "abacus"),
    ("--device cuda:99", "cuda:99"),
    ("--device meta", "meta"),
    ("--runs-dir file", "file"),
    ("--resume", "resume"),
    ("--resume missing", "missing"),
    ("--evaluate missing", "missing"),
    ("--resume empty", "empty"),
    ("--resume file", "file"),
    ("--resume truncated", "truncated damaged"),
    ("--evaluate truncated", "truncated damaged"),
    ("--resume garbage", "garbage"),
    ("--evaluate garbage", "garbage"),
    ("--resume zero", "zero"),
    ("--resume foreign", "foreign maipg_smac"),
    ("--evaluate foreign", "foreign"),
    ("--resume tensor", "tensor"),
    ("--resume pickle", "pickle"),
    ("--resume old", "old"),
    ("--resume whole --nu 0.3", "nu"),
    ("--resume whole --num-envs 4", "num-envs"),
    ("--resume whole --mixer vdn", "mixer"),
    ("--resume whole --seed 7", "seed"),
    ("--resume whole --map-name 8m", "map-name"),
    ("--resume whole --capture-video", "capture-video"),
    ("--resume=whole --nu 0.3", "nu"),
    ("--evaluate whole --hidden-dim 32", "hidden-dim"),
    ("--evaluate whole --map-name 8m", "map-name"),
    ("--evaluate whole --nu 0", "nu"),
]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", "cuda"))
if not find_spec("smac"):
    BAD.append(("--backend sc2", "sc2 smac PyPI"))
if not find_spec("wandb"):
    BAD.append(("--track", "wandb"))


class Foreign:
    """Something that torch.load(weights_only=True) must refuse."""


@pytest.fixture(scope="module")
def corner(whole, tmp_path_factory):
    """A folder with a good run and with all kinds of checkpoints that are not one."""
    folder, good = tmp_path_factory.mktemp("corner"), (whole / "checkpoint.pt").read_bytes()
    contents = {"truncated": good[: len(good) // 2], "garbage": b"\x00\xffgarbage" * 50}
    for name, content in (contents | {"zero": b""}).items():
        (folder / name).mkdir()
        (folder / name / "checkpoint.pt").write_bytes(content)
    old = read(whole)
    del old["args"]["mixer_dim"]  # as a former version of the script may have written it
    others = {"foreign": {"model": torch.ones(2)}, "tensor": torch.ones(2), "old": old}
    for name, content in (others | {"pickle": Foreign()}).items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "checkpoint.pt")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file\n")
    (folder / "whole").symlink_to(whole)
    return folder


def content(folder):
    """Every file below `folder`, through links, with its time of change."""
    found = (Path(top, f) for top, _, files in os.walk(folder, followlinks=True) for f in files)
    return {str(path): path.stat().st_mtime_ns for path in found} | {"": os.listdir(folder)}


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input(command, words, corner, monkeypatch, capsys):
    monkeypatch.chdir(corner)
    before = content(corner)
    saved = "--resume" in command or "--evaluate" in command
    argv = command.split() if saved else [*TINY.split(), "--total-timesteps", "40"]
    assert maipg.main(argv if saved else argv + command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert "Traceback" not in error and all(word in error for word in words.split()), error
    assert content(corner) == before


MISTAKES = [(command, words) for command, words in BAD if "whole" not in command][:20]


@pytest.mark.parametrize("columns", ["", "40"])
def test_bad_input_in_a_process_of_its_own(columns, corner, tmp_path):
    """Outside pytest tyro writes its errors differently; and as the terminal is wide."""
    code = "import sys, maipg_smac\nfor line in sys.stdin:\n"
    code += "    print(maipg_smac.main(line.split()), file=sys.stderr)\n"
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "COLUMNS": columns}
    env = {key: value for key, value in env.items() if value and not key.startswith("PYTEST")}
    lines = "".join(f"{TINY} --total-timesteps 40 {command}\n" for command, _ in MISTAKES)
    command = [sys.executable, "-c", code]
    given = {"input": lines, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, env=env, **given)
    assert "Traceback" not in done.stderr, done.stderr
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == 2 * len(MISTAKES), done.stderr
    for (command, words), error, code in zip(MISTAKES, said[::2], said[1::2]):
        assert code == "2" and error.startswith("error: "), (command, error)
        assert all(word in error for word in words.split()), (command, error)
    assert not list(tmp_path.iterdir())


def test_bad_input_of_the_script_itself(tmp_path):
    command = [sys.executable, str(SCRIPT), "--no-such-flag", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "no-such-flag" in done.stderr


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        maipg.main(["--help"])
    out = capsys.readouterr().out
    assert not end.value.code
    flags = [
        name.replace("_", "-") for name, f in maipg.Args.__dataclass_fields__.items() if f.init
    ]
    assert [flag for flag in flags if f"--{flag}" not in out] == []


# -------------------------------------------------------------------------------- what a run leaves
def test_run_folder(whole):
    assert {"progress.csv", "args.json", "checkpoint.pt", "result.json"} < set(os.listdir(whole))
    assert len(list(whole.glob("events.out.tfevents.*"))) == 1 and not list(whole.glob("*.tmp"))
    table = rows(whole)
    names = "charts/episodic_return charts/win_rate charts/SPS charts/env_restarts eval/win_rate "
    names += "losses/policy losses/critic losses/q losses/entropy diagnostics/sigma_a "
    names += "diagnostics/approx_kl diagnostics/clip_fraction diagnostics/explained_variance_v "
    names += "diagnostics/explained_variance_q variance/r_var_pi variance/r_var_v variance/corr "
    assert set((names + "variance/gradient").split()) <= table[0].keys()
    assert [int(row["global_step"]) for row in table] == [STEP * k for k in (1, 2, 3, 4)]
    assert [row["eval/win_rate"] != "" for row in table] == [False, True, False, True]
    always = ["losses/policy", "losses/critic", "losses/q", "diagnostics/sigma_a"]
    for key in [*always, "variance/gradient", "charts/SPS"]:
        assert all(math.isfinite(float(row[key])) for row in table), key
    assert all(float(row["variance/gradient"]) > 0 for row in table)
    args, result = (json.loads((whole / f"{name}.json").read_text()) for name in ("args", "result"))
    assert (args["backend"], args["nu"], args["map_name"]) == ("smax", 0.4, "3m")
    assert result["step"] == 4 * STEP and result["args"] == args
    assert 0 <= result["final_win_rate"] <= 1 and len(result["evaluations"]) == 2


def test_tensorboard_holds_what_progress_csv_holds(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole), size_guidance={"scalars": 0}).Reload()
    table = rows(whole)
    keys = [key for key in table[0] if key != "global_step"]
    assert sorted(events.Tags()["scalars"]) == sorted(keys)
    for key in keys:
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        written = [(int(row["global_step"]), float(row[key])) for row in table if row[key]]
        assert [step for step, _ in logged] == [step for step, _ in written], key
        values = ([value for _, value in pairs] for pairs in (logged, written))
        torch.testing.assert_close(*map(torch.tensor, values), equal_nan=True, rtol=1e-6, atol=0)


def test_the_first_line_names_the_backend_and_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SC2PATH", str(tmp_path / "nothing"))
    folder = tmp_path / "runs"
    assert call(TINY, f"--backend auto --runs-dir {folder} --total-timesteps {STEP}") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "smax" in first and "no StarCraft II" in first
    (path,) = folder.iterdir()
    args = json.loads((path / "args.json").read_text())
    assert path.name.startswith("smax-3m") and "no StarCraft II" in args["backend_reason"]
    assert read(path)["args"]["backend"] == "smax"
    columns = rows(path)[0].keys()
    assert {"variance/gradient", "eval/win_rate"} < columns  # the same columns in every run


def test_the_policy_alone_from_a_checkpoint(whole):
    saved = read(whole)
    state = {k[len("policy.") :]: v for k, v in saved["agent"].items() if k.startswith("policy.")}
    obs_dim, dim = state["obs_in.0.weight"].numel(), saved["args"]["hidden_dim"]
    policy = maipg.Recurrent(obs_dim, dim, state["head.1.bias"].numel(), 0.01)
    policy.load_state_dict(state)
    logits, hidden = policy(torch.zeros(1, 2, 3, obs_dim), torch.zeros(2, 3, dim), torch.ones(1, 2))
    assert logits.shape[:3] == (1, 2, 3) and logits.isfinite().all() and hidden.shape[-1] == dim


def test_importing_does_nothing(tmp_path):
    code = f"import signal, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    code += "before = signal.getsignal(signal.SIGINT)\n"  # a background job ignores it
    code += "import maipg_smac\n"
    code += "assert not {'jax', 'jaxmarl', 'smac', 'wandb'} & set(sys.modules)\n"
    code += "assert signal.getsignal(signal.SIGINT) == before\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- the same result again
def test_resume_is_bit_for_bit(whole, tmp_path):
    path = train(tmp_path, f"--total-timesteps {2 * STEP}")
    assert differing(whole, path, "agent")  # the first half is not yet the whole
    assert call(f"--resume {path} --total-timesteps {4 * STEP}") == 0
    assert list(tmp_path.iterdir()) == [path]
    assert differing(whole, path, *LEARNED) == []
    assert untimed(whole) == untimed(path)
    a, b = (json.loads((x / "result.json").read_text()) for x in (whole, path))
    assert a["evaluations"] == b["evaluations"] and a["step"] == b["step"]


def test_a_resumed_run_can_be_resumed_and_evaluated(tmp_path, capsys):
    path = train(tmp_path, f"--total-timesteps {STEP}")
    for k in (2, 3):
        assert call(f"--resume {path} --total-timesteps {k * STEP}") == 0
    capsys.readouterr()
    assert call(f"--evaluate {path}") == 0, capsys.readouterr().err
    assert [int(row["global_step"]) for row in rows(path)] == [STEP, 2 * STEP, 3 * STEP]


def test_resume_with_an_equals_sign(tmp_path, capsys):
    path = train(tmp_path, f"--total-timesteps {STEP}")
    assert call(f"--resume={path} --total-timesteps {2 * STEP}") == 0, capsys.readouterr().err
    assert read(path)["done"]["step"] == 2 * STEP


def test_resume_of_a_finished_run_changes_nothing_learned(tmp_path):
    path = train(tmp_path, f"--total-timesteps {2 * STEP}")
    before, table = (path / "checkpoint.pt").read_bytes(), (path / "progress.csv").read_text()
    assert call(f"--resume {path}") == 0
    assert (path / "checkpoint.pt").read_bytes() == before
    assert (path / "progress.csv").read_text() == table


def test_same_seed_same_result_and_evaluation_does_not_matter(whole, tmp_path):
    again = train(tmp_path / "again", f"--total-timesteps {4 * STEP} --eval-every {STEP}")
    assert differing(whole, again, *LEARNED) == []
    assert sum(row["eval/win_rate"] != "" for row in rows(again)) == 4
    other = train(tmp_path / "other", f"--total-timesteps {4 * STEP} --seed 2")
    assert any(name.startswith("/agent/policy") for name in differing(whole, other, "agent"))
    assert any(name.startswith("/envs") for name in differing(whole, other, "envs"))


# --------------------------------------------------------------------------------------- evaluation
def test_evaluate_equals_the_evaluation_before_saving(tmp_path, monkeypatch, capsys):
    agents, build = [], maipg.Agent.__init__

    def remember(agent, *args):
        build(agent, *args)
        agents.append(agent)

    with monkeypatch.context() as patch:
        patch.setattr(maipg.Agent, "__init__", remember)
        path = train(tmp_path, f"--total-timesteps {2 * STEP}")
    args = maipg.parse(["--evaluate", str(path), "--eval-episodes", "7"])
    with maipg.evaluation_games(args, 0) as games:
        before = maipg.evaluate(agents[0].policy, games, args)
    capsys.readouterr()
    assert call(f"--evaluate {path} --eval-episodes 7") == 0
    out = capsys.readouterr().out
    assert f"win rate {before['eval/win_rate']:.3f}" in out and "95% interval [" in out
    assert f"return {before['eval/episodic_return']:.2f}" in out and "7 " in out
    low, high = (float(x) for x in out.split("interval [")[1].split("]")[0].split(","))
    assert 0 <= low <= before["eval/win_rate"] <= high <= 1 and high - low > 0.2


def test_a_film(whole, tmp_path, monkeypatch, capsys):
    from PIL import Image

    record = maipg.SMAXEnvs.record
    few = lambda envs, actions: len(envs.film) < 2 and record(envs, actions)  # drawing is slow
    monkeypatch.setattr(maipg.SMAXEnvs, "record", few)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    assert call(f"--evaluate {folder} --capture-video --eval-episodes 1") == 0
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "film.gif"]
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames > 1 and min(film.size) > 50
        film.seek(film.n_frames - 1)
        assert len(film.convert("RGB").getcolors(10**6)) > 1  # something is drawn


# ------------------------------------------------------------------------------------------- faults
@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """{signal: (process, run folder)}: trainings without end, each of which has a checkpoint."""
    found, started = {}, {}
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):  # at once: compiling is slow
        folder = tmp_path_factory.mktemp(number.name)
        command = [sys.executable, str(SCRIPT), *TINY.split(), *PLAN.split()]
        command += ["--runs-dir", str(folder), "--total-timesteps", "10000000"]
        with open(folder.with_suffix(".out"), "w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        started[number] = process, folder
    try:
        deadline = time.monotonic() + 120
        for number, (process, folder) in started.items():
            while not list(folder.glob("*/checkpoint.pt")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            found[number] = process, next(folder.iterdir())
        yield found
    finally:
        for process, _ in started.values():
            process.kill()
            process.wait()


def check_progress(path, last):
    """Every update once, up to `last`, and every line whole."""
    table = rows(path)
    assert [int(row["global_step"]) for row in table] == list(range(STEP, last + 1, STEP))
    assert all(None not in row and None not in row.values() for row in table)
    assert all(math.isfinite(float(row["losses/policy"])) for row in table)


def test_kill_9_then_resume(victims):
    process, path = victims[signal.SIGKILL]
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    step = read(path)["done"]["step"]
    with open(path / "progress.csv", "a") as file:  # rows of a future that is lost; a torn one
        file.write(",".join([str(step + 30 * STEP), *["0.5"] * (len(rows(path)[0]) - 1)]) + "\r\n")
        file.write(f"{step + 31 * STEP},0.1")
    (path / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    assert call(f"--resume {path} --total-timesteps {step + 2 * STEP}") == 0
    check_progress(path, step + 2 * STEP)
    assert json.loads((path / "result.json").read_text())["step"] == step + 2 * STEP
    assert not (path / "checkpoint.tmp").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_then_resume(number, victims):
    process, path = victims[number]
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    said = path.parent.with_suffix(".out").read_text()
    assert "Traceback" not in said and f"--resume {path}" in said
    assert not (path / "result.json").exists()
    step = read(path)["done"]["step"]
    check_progress(path, step)  # nothing that was learned is lost
    assert call(f"--resume {path} --total-timesteps {step + STEP}") == 0
    check_progress(path, step + STEP)
    assert (path / "result.json").exists()


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "write"])
def test_a_full_disk_leaves_the_old_checkpoint(where, tmp_path, monkeypatch, capsys):
    path = train(tmp_path, f"--total-timesteps {STEP}")
    before = (path / "checkpoint.pt").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    capsys.readouterr()
    if where == "write":  # a real one: every write beyond 50 kB fails
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    else:
        monkeypatch.setattr(
            *{"torch.save": (torch, "save"), "os.fsync": (os, "fsync")}[where], full
        )
    try:
        code = call(f"--resume {path} --total-timesteps {2 * STEP}")
    finally:
        if where == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    monkeypatch.undo()
    assert len(before) > 50_000 and (path / "checkpoint.pt").read_bytes() == before
    assert not list(path.glob("*.tmp"))
    assert call(f"--resume {path} --total-timesteps {2 * STEP}") == 0  # there is room again
    check_progress(path, 2 * STEP)


def test_a_full_disk_while_resuming_keeps_progress_csv(tmp_path, monkeypatch, capsys):
    path = train(tmp_path, f"--total-timesteps {2 * STEP}")
    table = (path / "progress.csv").read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerow", full)
        patch.setattr(csv.DictWriter, "writerows", full)
        assert call(f"--resume {path} --total-timesteps {3 * STEP}") == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert (path / "progress.csv").read_text() == table


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_reward_that_is_not_finite(poison, tmp_path, monkeypatch, capsys):
    path = train(tmp_path, f"--total-timesteps {STEP}")
    before, step, agents = read(path), maipg.SMAXEnvs.step, []
    build = maipg.Agent.__init__

    def remember(agent, *args):
        build(agent, *args)
        agents.append(agent)

    def poisoned(envs, actions):
        obs, state, avail, reward, done, info = step(envs, actions)
        return obs, state, avail, torch.full_like(reward, poison), done, info

    monkeypatch.setattr(maipg.Agent, "__init__", remember)
    monkeypatch.setattr(maipg.SMAXEnvs, "step", poisoned)
    capsys.readouterr()
    assert call(f"--resume {path} --total-timesteps {3 * STEP}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "finite" in error
    after, live = read(path), agents[0].state_dict()
    for name, weight in before["agent"].items():
        assert weight.isfinite().all() and bits(weight) == bits(after["agent"][name]), name
        if "norm.moments" not in name:  # nor are the networks in memory touched
            assert bits(weight) == bits(live[name]), name
    assert after["done"]["step"] == STEP


def test_nan_after_good_updates_in_the_same_run(tmp_path, monkeypatch, capsys):
    step, calls = maipg.SMAXEnvs.step, []

    def poisoned(envs, actions):
        obs, state, avail, reward, done, info = step(envs, actions)
        calls.append(1)
        reward = reward * math.nan if len(calls) == 3 * 20 else reward  # in the third update
        return obs, state, avail, reward, done, info

    monkeypatch.setattr(maipg.SMAXEnvs, "step", poisoned)
    words = f"--eval-every 1000 --total-timesteps {5 * STEP} --runs-dir {tmp_path}"
    assert call(TINY, PLAN, words) == 1
    assert capsys.readouterr().err.startswith("error: not finite")
    (path,) = tmp_path.iterdir()
    saved = leaves({key: read(path)[key] for key in ("agent", "policy", "critic", "q")})
    tensors = [x for x in saved.values() if isinstance(x, torch.Tensor)]
    assert tensors and all(x.isfinite().all() for x in tensors)
    assert read(path)["done"]["updates"] == 2
    monkeypatch.undo()
    assert call(f"--resume {path} --total-timesteps {3 * STEP}") == 0
    check_progress(path, 3 * STEP)


def test_two_runs_that_begin_in_the_same_second(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    for _ in range(2):
        code = call(TINY, f"--runs-dir {tmp_path} --total-timesteps {STEP}")
        assert code == 0, capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_without_evaluations_ends_with_valid_json(tmp_path, monkeypatch):
    rollout = maipg.rollout

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return rollout(*args)

    with monkeypatch.context() as patch:
        patch.setattr(maipg, "rollout", stopped)
        words = f"--runs-dir {tmp_path} --total-timesteps {9 * STEP} --eval-every 1000"
        assert call(TINY, words) == 128 + signal.SIGTERM
    (path,) = tmp_path.iterdir()
    assert call(f"--resume {path} --total-timesteps {STEP}") == 0  # which it has reached already
    invalid = lambda word: pytest.fail(f"result.json holds {word}, which JSON does not know")
    json.loads((path / "result.json").read_text(), parse_constant=invalid)
