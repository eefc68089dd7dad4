"""The command line of maipg_smac.py: bad input, what a run leaves, resume, signals, faults."""

import contextlib
import copy
import csv
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import maipg_smac as maipg

SCRIPT = Path(maipg.__file__)
SMAX = maipg.SMAXEnvs
TINY = "--map-name 3m --backend smax --device cpu --num-envs 2 --rollout-steps 20 --hidden-dim 16"
TINY += " --eval-episodes 2 --update-epochs 2 --eval-every 80 --checkpoint-every 1"
STEP = 40  # environment steps of an update
KINDS = {
    "mappo": "--nu 0",
    "paper": "--nu 0.4 --critic paper --mu gumbel",
    "compatible": "--nu 0.4",
    "vdn": "--nu 0.4 --mixer vdn",
}
LEARNED = ("agent", "optimizer", "rngs", "games", "now")  # of a checkpoint
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """SMAX is compiled once for all runs in this process: a copy has games of its own."""
    built = {}

    def games(args):
        if args.map_name not in built:
            built[args.map_name] = SMAX(args)
        envs = copy.copy(built[args.map_name])
        envs.args = args
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maipg, "SMAXEnvs", games)
        yield


def call(*words, **replaced):
    """The exit code of a command line. The handlers of signals that main() sets do not stay."""

    def unhandled(number, frame):
        raise AssertionError(f"nobody handles signal {number}")

    before = {number: signal.signal(number, unhandled) for number in SIGNALS}
    try:
        return maipg.main([x for word in words for x in str(word).split()], **replaced)
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(folder, *words):
    """A new run; its folder, which must be the only one in `folder`."""
    assert call(TINY, f"--runs-dir {folder}", *words) == 0
    (path,) = folder.iterdir()
    return path


def read(path):
    """checkpoint.pt by torch alone."""
    return torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)


def checksum(path):
    """Of checkpoint.pt; an assertion on its bytes themselves would be slow to explain."""
    return hashlib.sha256((path / "checkpoint.pt").read_bytes()).hexdigest()


def rows(path):
    with open(path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(path):
    return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows(path)]


def check_progress(path, last):
    """Every update once, up to `last`, and every line whole."""
    table = rows(path)
    assert [int(row["global_step"]) for row in table] == list(range(STEP, last + 1, STEP))
    assert all(None not in row and None not in row.values() for row in table)
    assert all(math.isfinite(float(row["losses/policy"])) for row in table)
    assert "\0" not in (path / "progress.csv").read_text()


def leaves(x, name=""):
    """{path: leaf} of nested dicts and lists, a tensor as its bits: nan equals nan."""
    if isinstance(x, torch.Tensor):
        return {name: (x.dtype, x.shape, hashlib.sha256(x.numpy().tobytes()).hexdigest())}
    if isinstance(x, dict | list | tuple):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, part in items for k, v in leaves(part, f"{name}/{key}").items()}
    return {name: x}


def differing(a, b, *parts):
    """Names of the leaves that are not the same in two checkpoints, in the parts given."""
    a, b = (leaves({part: read(path)[part] for part in parts}) for path in (a, b))
    assert a and a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


def the_error(text):
    """What went wrong, in the last line of stderr, and nowhere else."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith("error: ")]
    assert len(lines) == 1 and text.endswith(lines[0]) and "Traceback" not in text, text
    return lines[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(kind, updates) -> the folder of a run in one go."""

    def run(kind, updates=4):
        words = f"{KINDS[kind]} --total-timesteps {updates * STEP}"
        return train(tmp_path_factory.mktemp(kind), words)

    return functools.cache(run)


@pytest.fixture
def fresh(whole, tmp_path):
    """A run folder after one update, of this test's own."""
    return Path(shutil.copytree(whole("vdn", 1), tmp_path / "fresh"))


# --------------------------------------------------------------------------------------- bad input
# Command lines; stderr must name their words, or those after the arrow. First what tyro finds:
TYRO = """
--no-such-flag 1; --map-nam 3m; --evaluate run; --mixer-dim 16; stray; -x; --nu; --nu half; --resume
--backend sc3 -> sc3 auto smax; --mixer sum -> sum qmix vdn; --critic none -> none paper compatible
--mu mean -> mean expectation gumbel; --q-scale none; --device abacus -> abacus cpu cuda
--num-envs 2.5; --total-timesteps 1e6
"""
# What the script finds, and says in one line:
OWN = """
--num-envs 0; --rollout-steps -20; --total-timesteps 0; --update-epochs 0; --critic-epochs -1
--hidden-dim 0; --threads 0; --threads 99999999999; --seed -1; --eval-episodes 0; --eval-every 0
--checkpoint-every 0; --learning-rate -0.001; --learning-rate nan; --max-grad-norm inf
--ent-coef -0.1; --clip-eps -0.2; --gae-lambda -1; --gae-lambda 1.5; --gamma 99
--td-lambda 2; --target-tau 5; --forgetting 1.01; --ridge 0; --game-timeout -1; --nu nan
--nu inf; --nu 1.01; --nu -0.1; --chunk-length 7 -> --chunk-length --rollout-steps
--chunk-length 0; --chunk-length 40 -> --chunk-length --rollout-steps; --num-minibatches 0
--num-minibatches 3 -> minibatches; --num-minibatches 8 -> minibatches
--map-name nowhere -> nowhere 3m 2s3z 5m_vs_6m; --map-name MMM2 -> MMM2 3m 27m_vs_30m
--resume missing; --resume empty; --resume file; --resume truncated; --resume garbage
--resume zero; --resume flipped; --resume foreign; --resume tensor; --resume pickle
--resume sibling; --resume former -> former mixer_dim
--critic compatible --mixer qmix -> --mixer paper; --q-scale raw -> --q-scale paper
--resume whole --nu 0.3 -> --nu cannot; --resume=whole --nu 0.3 -> --nu cannot
--resume whole --num-envs 4 -> --num-envs cannot; --resume whole --mixer vdn -> --mixer cannot
--resume whole --critic compatible -> --critic cannot; --resume whole --seed 7 -> --seed cannot
--resume whole --map-name 8m -> --map-name cannot
--resume whole --total-timesteps -1 -> --total-timesteps -1
"""
if not torch.cuda.is_available():
    OWN += "--device cuda"
if not find_spec("smac"):
    OWN += "; --backend sc2 -> sc2 smac PyPI"
BAD = [(own, case.strip()) for own in (TYRO, OWN) for case in re.split("[;\n]", own.strip())]


class Foreign:
    """Something that torch.load(weights_only=True) must refuse."""


@pytest.fixture(scope="module")
def corner(whole, tmp_path_factory):
    """A folder with a good run and with all kinds of checkpoints that are not one."""
    folder, whole = tmp_path_factory.mktemp("corner"), whole("paper")
    good, saved = (whole / "checkpoint.pt").read_bytes(), read(whole)
    weight = saved["agent"]["policy.gru.weight_hh"].numpy().tobytes()
    place = good.index(weight) + len(weight) // 2
    contents = {"truncated": good[: len(good) // 2], "garbage": b"\x00\xffgarbage" * 50}
    flipped = bytes([good[place] ^ 1])
    contents |= {"zero": b"", "flipped": good[:place] + flipped + good[place + 1 :]}
    objects = {"foreign": {"model": torch.ones(2)}, "tensor": torch.ones(2), "pickle": Foreign()}
    former = saved["args"] | {"mixer_dim": 16}
    objects |= {"sibling": saved | {"script": "maipg_mpe"}, "former": saved | {"args": former}}
    for name in [*contents, *objects, "empty"]:
        (folder / name).mkdir()
    for name, text in contents.items():
        (folder / name / "checkpoint.pt").write_bytes(text)
    for name, x in objects.items():
        torch.save(x, folder / name / "checkpoint.pt")
    (folder / "file").write_text("a file\n")
    (folder / "whole").symlink_to(whole)
    return folder


def content(folder):
    """Every file below `folder`, through links, with its time of change."""
    found = (Path(top, f) for top, _, files in os.walk(folder, followlinks=True) for f in files)
    return {str(path): path.stat().st_mtime_ns for path in found} | {"": os.listdir(folder)}


@pytest.mark.parametrize("table, case", BAD, ids=[case for _, case in BAD])
def test_bad_input(table, case, corner, monkeypatch, capsys):
    monkeypatch.chdir(corner)
    before, (command, *words) = content(corner), case.split(" -> ")
    accepted = lambda *_: pytest.fail("it is accepted")
    assert call("" if "--resume" in command else TINY, command, train=accepted) == 2
    error = capsys.readouterr().err.replace("_", "-")  # tyro takes both spellings
    words = (words or [command.replace("--resume ", "")])[0].replace("_", "-").split()
    assert all(word in error for word in words) and "Traceback" not in error, error
    assert table is TYRO or error.startswith("error: ") and error.count("\n") == 1, error
    assert content(corner) == before


def test_importing_does_nothing_and_bad_input_in_a_process_of_its_own(tmp_path):
    code = f"import signal, sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    code += "handlers = lambda: [signal.getsignal(number) for number in (1, 2, 15)]\n"
    code += "before = handlers()\nimport maipg_smac\n"
    code += "assert not {'jax', 'jaxmarl', 'smac', 'wandb'} & set(sys.modules)\n"
    code += "assert before == handlers()\n"
    code += "assert maipg_smac.main(['--nu', '2', '--backend', 'smax']) == 2\n"
    # JaxMARL's other environments take seconds.
    code += "assert maipg_smac.main(['--map-name', 'no_map', '--backend', 'smax']) == 2\n"
    code += "assert 'jaxmarl.environments.smax' in sys.modules\n"
    code += "assert not {'matplotlib', 'jaxmarl.environments.storm'} & set(sys.modules)\n"
    code += "maipg_smac.main(['--no-such-flag'])\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    own, map_name, *tyro = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
    assert own.startswith("error: --nu 2") and "--no-such-flag" in "".join(tyro), done.stderr
    assert map_name.startswith("error: --map-name no_map: one of 3m 2s3z"), done.stderr
    assert "Traceback" not in done.stderr


def test_track_without_wandb(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert call(TINY, f"--track --total-timesteps {STEP} --runs-dir {tmp_path}") in (1, 2)
    assert "wandb" in the_error(capfd.readouterr().err)


def test_smax_without_jaxmarl(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(maipg, "SMAXEnvs", SMAX)
    monkeypatch.setitem(sys.modules, "jaxmarl", None)
    monkeypatch.delitem(sys.modules, "jaxmarl.environments", raising=False)
    assert call(TINY, f"--total-timesteps {STEP} --runs-dir {tmp_path}") == 1
    assert "jaxmarl" in the_error(capfd.readouterr().err) and not list(tmp_path.iterdir())


def test_help_names_every_flag_and_map(capsys):
    assert not call("--help")
    out = " ".join(capsys.readouterr().out.split())
    flags = [name.replace("_", "-") for name in maipg.Args.__dataclass_fields__ if name != "script"]
    assert len(flags) > 30
    assert [flag for flag in flags if not re.search(rf"--{flag}(?![\w-])", out)] == []
    simple = "2m_vs_1z 2s_vs_1sc 2s3z 3m 3s_vs_3z 3s_vs_4z 3s5z 8m 1c3s5z 10m_vs_11m MMM"
    hard = "2c_vs_64zg 3s_vs_5z 5m_vs_6m 8m_vs_9m 25m so_many_baneling bane_vs_bane"
    hardest = "27m_vs_30m 3s5z_vs_3s6z 6h_vs_8z corridor MMM2"
    for nu, epochs, maps in [(0.4, 5, simple), (0.3, 10, hard), (0.3, 15, hardest)]:
        assert f"nu {nu} and {epochs} epochs on {maps}" in out
        for name in maps.split():
            words = ["--map-name", name, "--backend", "smax", "--device", "cpu"]
            args = maipg.resolve(maipg.parse(words))
            assert (args.nu, args.update_epochs) == (nu, epochs)
    args = maipg.resolve(maipg.parse([*words, "--nu", "0", "--update-epochs", "7"]))
    assert (args.nu, args.update_epochs) == (0, 7)


@pytest.mark.parametrize("words", ["", "--mixer qmix", "--mixer vdn", "--critic paper"])
def test_a_mixer_asks_for_the_papers_critic(words):
    args = maipg.resolve(maipg.parse(f"--backend smax {words}".split()))
    assert args.critic == ("paper" if words else "compatible")


# -------------------------------------------------------------------------------- what a run leaves
CHARTS = "global_step charts/episodic_return charts/win_rate charts/env_restarts charts/SPS"
CHARTS += " eval/win_rate eval/episodic_return losses/policy losses/critic losses/entropy"
CHARTS += " diagnostics/sigma_a diagnostics/approx_kl diagnostics/clip_fraction"
CHARTS += " diagnostics/policy_grad_norm diagnostics/critic_grad_norm"
FIT = " variance/corr variance/slope"
COLUMNS = {"mappo": CHARTS, "compatible": CHARTS + FIT}
COLUMNS["paper"] = COLUMNS["vdn"] = CHARTS + FIT + " losses/q diagnostics/q_grad_norm"
NAMES = {"mappo": "nu0", "paper": "nu0.4__qmix", "vdn": "nu0.4__vdn"}
NAMES["compatible"] = "nu0.4__compatible"


@pytest.mark.parametrize("kind", KINDS)
def test_run_folder(kind, whole):
    whole = whole(kind)
    assert whole.name.startswith(f"smax-3m__maipg_smac__{NAMES[kind]}__s1__")
    files = sorted(path.name[:19] for path in whole.iterdir())
    assert files == ["args.json", "checkpoint.pt", "events.out.tfevents", "progress.csv"]
    table = rows(whole)
    assert table[0].keys() == set(COLUMNS[kind].split())
    assert [int(row["global_step"]) for row in table] == [STEP * k for k in (1, 2, 3, 4)]
    evaluated = [math.isfinite(float(row["eval/win_rate"])) for row in table]
    assert evaluated == [False, True, False, True]
    some = {"charts/episodic_return", "charts/win_rate", "eval/win_rate", "eval/episodic_return"}
    for key in table[0].keys() - some:
        assert all(math.isfinite(float(row[key])) for row in table), key
    assert all(row["eval/win_rate"] == "nan" for row in table[::2])

    saved = read(whole)
    assert saved.keys() == {*LEARNED, "progress", "script", "args"}
    size = (whole / "progress.csv").stat().st_size
    assert saved["progress"] == {"step": 4 * STEP, "restarts": 0, "csv_size": size}
    args = json.loads((whole / "args.json").read_text())
    assert args == saved["args"] and saved["script"] == "maipg_smac"
    asked = {"map_name": "3m", "backend": "smax", "total_timesteps": 4 * STEP, "seed": 1}
    assert args | asked == args and args["nu"] == (0 if kind == "mappo" else 0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_holds_what_progress_csv_holds(kind, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = whole(kind)
    events = EventAccumulator(str(whole), size_guidance={"scalars": 0}).Reload()
    written = {}
    for row in rows(whole):
        for key in row.keys() - {"global_step"}:
            if not math.isnan(float(row[key])):
                written.setdefault(key, []).append((int(row["global_step"]), float(row[key])))
    assert sorted(events.Tags()["scalars"]) == sorted(written)
    for key, pairs in written.items():
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in logged] == [step for step, _ in pairs], key
        assert [x for _, x in logged] == pytest.approx([x for _, x in pairs], rel=1e-6), key
    (text,) = events.Tensors("hyper-parameters/text_summary")
    (text,) = text.tensor_proto.string_val
    assert json.loads(text.decode().strip("`\n")) == read(whole)["args"]


# ---------------------------------------------------------------------------- the same result again
@pytest.mark.parametrize("kind", ["mappo", "paper", "compatible"])
def test_resume_is_bit_for_bit(kind, whole, tmp_path):
    path = train(tmp_path, KINDS[kind], f"--total-timesteps {2 * STEP}")
    half = read(path)
    # In the middle of an episode, or the state of games and networks would not matter.
    assert half["now"]["keep"].all() and half["now"]["critic_hidden"].abs().sum() > 0
    assert differing(whole(kind), path, "agent")
    assert call(f"--resume {path} --total-timesteps {4 * STEP}") == 0
    assert list(tmp_path.iterdir()) == [path]
    assert differing(whole(kind), path, *LEARNED) == []
    assert untimed(whole(kind)) == untimed(path)


def test_same_seed_same_result_and_evaluation_does_not_matter(whole, tmp_path):
    words = f"{KINDS['paper']} --total-timesteps {4 * STEP} --eval-every {STEP} --eval-episodes 3"
    again = train(tmp_path / "again", words)
    assert differing(whole("paper"), again, *LEARNED) == []
    assert all(math.isfinite(float(row["eval/win_rate"])) for row in rows(again))
    other = train(tmp_path / "other", words, "--seed 2")
    changed = differing(whole("paper"), other, *LEARNED)
    assert {name.split("/")[1] for name in changed} == set(LEARNED)


def test_resume_of_a_finished_run_changes_nothing_learned(fresh, whole, capfd):
    for _ in range(2):
        assert call(f"--resume={fresh}") == 0
        said = "done, until --total-timesteps is raised"
        assert said in capfd.readouterr().out.splitlines()
    assert differing(fresh, whole("vdn", 1), *LEARNED, "progress") == []
    assert rows(fresh) == rows(whole("vdn", 1))


def test_resume_of_a_copied_checkpoint_begins_a_new_table(fresh, tmp_path):
    (tmp_path / "copy").mkdir()
    shutil.copy(fresh / "checkpoint.pt", tmp_path / "copy")
    assert call(f"--resume {tmp_path / 'copy'} --total-timesteps {2 * STEP}") == 0
    assert [row["global_step"] for row in rows(tmp_path / "copy")] == [str(2 * STEP)]


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_update_and_saves(number, whole, tmp_path, monkeypatch, capfd):
    rollout, played = maipg.rollout, []

    def signalled(policy, envs, buffer, now, steps, rng=None):
        played.append(rng is not None)  # evaluation has none
        if played[-1] and sum(played) == 3:
            os.kill(os.getpid(), number)
        return rollout(policy, envs, buffer, now, steps, rng)

    with monkeypatch.context() as patch:
        patch.setattr(maipg, "rollout", signalled)
        words = f"{KINDS['paper']} --total-timesteps {4 * STEP} --checkpoint-every 100"
        assert call(TINY, words, f"--runs-dir {tmp_path}") == 128 + number
    said, (path,) = capfd.readouterr(), tmp_path.iterdir()
    assert "stopping after this update" in said.err
    assert said.out.endswith(f"stopped at step {3 * STEP}; --resume {path} goes on\n")
    assert read(path)["progress"]["step"] == 3 * STEP
    check_progress(path, 3 * STEP)
    assert call(f"--resume {path}") == 0
    assert differing(whole("paper"), path, *LEARNED) == []
    assert untimed(whole("paper")) == untimed(path)


def test_no_evaluation_begins_after_a_signal(fresh, signalled):
    signalled(maipg)
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}") == 128 + 15
    check_progress(fresh, 2 * STEP)


def test_a_game_that_fails_after_a_signal_ends_the_run(fresh, monkeypatch, capfd):
    """No new games: a signal may have been for all processes."""

    def fail(envs, actions):
        os.kill(os.getpid(), signal.SIGTERM)
        raise maipg.GameError("gone")

    monkeypatch.setattr(SMAX, "step", fail)
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}") == 1
    assert the_error(capfd.readouterr().err) == "error: gone\n"
    check_progress(fresh, STEP)


def test_a_second_signal_ends_at_once_and_saves_no_half_update(fresh, capfd):
    before = checksum(fresh)

    def endless(agent, *_):
        agent.policy.head.bias.data += 1
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second signal has no effect")

    stuck = functools.partial(maipg.train, update=endless)
    assert call(f"--resume {fresh} --total-timesteps {3 * STEP}", train=stuck) == 128 + 15
    assert "Traceback" not in capfd.readouterr().err
    assert checksum(fresh) == before
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}") == 0
    check_progress(fresh, 2 * STEP)


def test_a_signal_ends_an_evaluation(fresh, monkeypatch):
    evaluate, steps = maipg.evaluate, []

    def judged(policy, envs, *rest):
        def step(actions):
            steps.append(1)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            assert len(steps) < 5, "the evaluation goes on"
            return SMAX.step(envs, actions)

        envs.step = step
        return evaluate(policy, envs, *rest)

    monkeypatch.setattr(maipg, "evaluate", judged)
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}") == 128 + signal.SIGINT
    assert len(steps) >= 3 and rows(fresh)[-1]["eval/win_rate"] == "nan"
    assert read(fresh)["progress"]["step"] == 2 * STEP
    check_progress(fresh, 2 * STEP)


def test_a_signal_before_the_first_update_of_a_resumed_run(fresh):
    def at_once(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        maipg.train(*args)

    with open(fresh / "progress.csv", "a") as file:  # of updates after the last checkpoint
        file.write((fresh / "progress.csv").read_text().splitlines()[-1] + "\n")
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}", train=at_once) == 128 + 15
    check_progress(fresh, STEP)
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}") == 0
    check_progress(fresh, 2 * STEP)


@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]])
def test_a_closed_pipe_loses_nothing(streams, fresh, monkeypatch):
    """As with `| head -2`; and with `2>&1 | head -2`, where the progress bar cannot be written."""
    rollout, (end, pipe) = maipg.rollout, os.pipe()

    def unread(*args):
        with contextlib.suppress(OSError):
            os.close(end)
        return rollout(*args)

    writer = os.fdopen(pipe, "w")
    with monkeypatch.context() as patch:
        patch.setattr(maipg, "rollout", unread)
        for name in streams:
            patch.setattr(sys, name, writer)
        code = call(f"--resume {fresh} --total-timesteps {3 * STEP}")
    with contextlib.suppress(OSError):
        writer.close()
    step = read(fresh)["progress"]["step"]
    # The bar is next written at the evaluation of step 80, when that update is counted.
    assert (code, step) == ((0, 3 * STEP) if len(streams) == 1 else (1, 2 * STEP))
    check_progress(fresh, step)
    assert call(f"--resume {fresh} --total-timesteps {4 * STEP}") == 0
    check_progress(fresh, 4 * STEP)


# -------------------------------------------------------------------------- processes of their own
def wait_for(happened, process):
    """Until happened(); the process must live until then."""
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """(process, run folder, what it says) of trainings without end that have a checkpoint."""
    folders, found = [tmp_path_factory.mktemp(name) for name in ("kill", "nohup")], {}
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--runs-dir"]
    with contextlib.ExitStack() as stack:
        for folder in folders:  # at once: the start takes long
            out = stack.enter_context(open(folder / "out", "w"))
            words = ["nohup", *command] if folder.name[:5] == "nohup" else command
            words = [*words, str(folder / "runs")]
            process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
            stack.enter_context(process)
            stack.callback(process.kill)
            found[folder] = process
        for folder, process in found.items():
            wait_for(lambda folder=folder: list(folder.glob("runs/*/checkpoint.pt")), process)
        yield [(x, *folder.glob("runs/*"), folder / "out") for folder, x in found.items()]


def test_a_run_in_use_is_refused_until_kill_9(victims, capsys):
    process, path, _ = victims[0]
    args, count = (path / "args.json").read_bytes(), len(rows(path))
    assert call(f"--resume {path} --total-timesteps {STEP}") == 2
    error = capsys.readouterr().err
    assert "in use" in error and error.startswith("error: ") and error.count("\n") == 1
    wait_for(lambda: len(rows(path)) > count + 3, process)
    assert (path / "args.json").read_bytes() == args

    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    step = read(path)["progress"]["step"]
    with open(path / "progress.csv", "a") as file:  # rows of a future that is lost; a torn one
        file.write(",".join([str(step + 30 * STEP), *["0.5"] * (len(rows(path)[0]) - 1)]) + "\n")
        file.write(f"{step + 31 * STEP},0.1")
    (path / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    assert call(f"--resume {path} --total-timesteps {step + 2 * STEP}") == 0
    check_progress(path, step + 2 * STEP)


def test_nohup_then_sigterm_then_resume(victims):
    process, path, out = victims[1]
    count = len(rows(path))
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(rows(path)) > count + 3, process)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in out.read_text() and f"--resume {path} goes on" in out.read_text()
    step = read(path)["progress"]["step"]
    check_progress(path, step)
    assert call(f"--resume {path} --total-timesteps {step + STEP}") == 0
    check_progress(path, step + STEP)


# ------------------------------------------------------------------------------------------- faults
def test_a_full_disk_leaves_the_old_checkpoint(fresh, capsys):
    before = checksum(fresh)
    assert (fresh / "checkpoint.pt").stat().st_size > 50_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file gets larger
    try:
        code = call(f"--resume {fresh} --total-timesteps {2 * STEP}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1 and "File too large" in the_error(capsys.readouterr().err)
    assert checksum(fresh) == before
    assert call(f"--resume {fresh} --total-timesteps {2 * STEP}") == 0  # there is room again
    check_progress(fresh, 2 * STEP)


def test_one_flipped_bit_is_refused(fresh):
    """Anywhere in what was saved. Between the records a bit may mean nothing: then all is there."""
    path, rng, refused = fresh / "checkpoint.pt", random.Random(1), set()
    good, saved = path.read_bytes(), leaves(maipg.load_checkpoint(fresh))
    spans = []
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            begin = record.header_offset
            lengths = good[begin + 26 : begin + 30]  # of the name and of the extra field
            begin += 30 + sum(struct.unpack("<HH", lengths))
            spans.append(range(begin, begin + record.file_size))
            assert good[begin : begin + record.file_size] == file.read(record)
    inside = [rng.choice(span) for span in rng.sample([x for x in spans if x], 15)]
    inside += rng.choices(max(spans, key=len), k=5)
    inside += rng.choices(spans[0], k=5)  # the pickle
    for place in inside + rng.choices(range(len(good)), k=25):
        bit = bytes([good[place] ^ 1 << rng.randrange(8)])
        path.write_bytes(good[:place] + bit + good[place + 1 :])
        try:
            assert leaves(maipg.load_checkpoint(fresh)) == saved, place
        except maipg.UsageError:
            refused.add(place)
    assert set(inside) <= refused
    path.write_bytes(good)
    assert leaves(maipg.load_checkpoint(fresh)) == saved


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_reward_that_is_not_finite(poison, fresh, monkeypatch, capsys):
    step, steps, agents, kept = SMAX.step, [], [], []

    def remembered(*args):
        agents.append(maipg.Agent(*args))
        return agents[0]

    def poisoned(envs, actions):
        *seen, reward, done, won = step(envs, actions)
        steps.append(1)
        if len(steps) == 30:  # in the second rollout of the resumed run
            kept.append(checksum(fresh))
            reward[1] = poison
        return *seen, reward, done, won

    with monkeypatch.context() as patch:
        patch.setattr(SMAX, "step", poisoned)
        words = f"--resume {fresh} --total-timesteps {5 * STEP}"
        run = functools.partial(maipg.train, agent_class=remembered)
        # An evaluation's steps must not be counted: there is one at step 80.
        patch.setattr(maipg, "evaluate", lambda *_: {})
        assert call(words, train=run) == 1
    assert "not finite" in the_error(capsys.readouterr().err)
    assert kept == [checksum(fresh)]
    saved, live = leaves(read(fresh)["agent"]), leaves(agents[0].state_dict())
    assert read(fresh)["progress"]["step"] == 2 * STEP
    weights = [name for name in saved if "_norm." not in name]
    assert len(weights) > 50 and all(live[name] == saved[name] for name in weights)
    assert all(x.isfinite().all() for x in read(fresh)["agent"].values())
    assert call(f"--resume {fresh} --total-timesteps {3 * STEP}") == 0
    check_progress(fresh, 3 * STEP)
