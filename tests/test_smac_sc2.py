"""The StarCraft II backend of maipg_smac.py, with tests/standin in place of the smac package."""

import contextlib
import csv
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import maipg_smac as m

STANDIN = str(Path(__file__).with_name("standin"))
SMALL = "--map-name 3m --backend sc2 --device cpu --rollout-steps 20 --hidden-dim 8 --seed 3"
SMALL += " --eval-episodes 1 --eval-every 100000 --update-epochs 1 --checkpoint-every 1"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def forget_smac():
    for name in [name for name in sys.modules if name.split(".")[0] == "smac"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def standin(monkeypatch, tmp_path):
    """The stand-in in sys.path, an SC2PATH, a log, and a temporary folder of this test's own."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.syspath_prepend(STANDIN)
    from fake_install import make_fake_sc2

    monkeypatch.setenv("PYTHONPATH", STANDIN)
    monkeypatch.setenv("SC2PATH", str(make_fake_sc2(tmp_path / "sc2")))
    monkeypatch.setenv("STANDIN_SMAC_LOG", str(tmp_path / "log"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path
    forget_smac()
    for log in tmp_path.rglob("log"):  # whatever a failed test has left
        for pid in filter(alive, processes(log.parent)):
            os.kill(pid, signal.SIGKILL)
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)


def order(monkeypatch, *faults):
    monkeypatch.setenv("STANDIN_SMAC_FAULTS", json.dumps(faults))


def read_log(folder, *calls):
    """The calls that workers made; the last line may be in the making."""
    path = folder / "log"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return [e for e in entries if e["call"] in calls and e["pid"] != os.getpid()]


def processes(folder):
    """Every worker and every game that the log tells of."""
    pids = {e["pid"] for e in read_log(folder, "init")}
    return pids | {e["child"] for e in read_log(folder, "launch")}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def leftovers(folder, polite=True):
    """Processes that are still there after some seconds; after a polite end, folders too."""
    assert processes(folder)
    deadline = time.monotonic() + 10
    while True:
        left = [pid for pid in processes(folder) if alive(pid)]
        left += [path.name for path in (folder / "tmp").glob("sc-*") if polite]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def progress(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def same(seen, games):
    """What the trainer sees is what the games show; returns how many agents are dead."""
    obs, state, avail = (x.numpy() for x in seen)
    dead = np.array([game._battle.allies.health == 0 for game in games])
    index = [np.eye(game.n_agents) for game in games]
    expected = np.concatenate([[game.get_obs() for game in games], index], -1)
    np.testing.assert_array_equal(obs, np.float32(expected))
    np.testing.assert_array_equal(state, np.stack([game.get_state() for game in games]))
    np.testing.assert_array_equal(avail, np.array([g.get_avail_actions() for g in games]) > 0)
    # The dead see their index only, and have their no-op only; the living have no no-op.
    assert (obs[dead].sum(-1) == 1).all() and (avail[dead].sum(-1) == 1).all()
    np.testing.assert_array_equal(avail[..., 0], dead)
    return dead.sum()


# ----------------------------------------------------------------------------------- healthy games
def test_equals_the_package_driven_directly(standin, monkeypatch):
    from fake_install import flee, focus_fire, stand_still
    from smac.env import StarCraft2Env

    plans = [(stand_still, flee, focus_fire), (focus_fire, stand_still, flee)]
    games, ends, saw_dead = [StarCraft2Env("3m", seed=seed) for seed in (7, 1007)], [[], []], 0
    # A start may take longer than a game may be silent.
    order(monkeypatch, {"reset": 1, "kind": "slow", "seconds": 4})
    args = m.Args(map_name="3m", device="cpu", num_envs=2, game_timeout=3.0)
    with contextlib.closing(m.SC2Envs(args)) as envs, contextlib.ExitStack() as stack:
        for game in games:
            stack.enter_context(contextlib.closing(game)).reset()
        same(envs.reset(7), games)
        while min(map(len, ends)) < 3:
            actions = [
                plan[len(end) % 3](game.get_avail_actions())
                for plan, end, game in zip(plans, ends, games)
            ]
            *seen, reward, done, won = envs.step(torch.tensor(actions))
            assert (reward.dtype, done.dtype, won.dtype) == (torch.float32, torch.bool, torch.bool)
            for k, game in enumerate(games):
                expected, over, info = game.step(actions[k])
                assert reward[k].item() == np.float32(expected) and done[k].item() == over
                assert won[k].item() == info["battle_won"]
                if over:
                    late = game._episode_steps == game.episode_limit
                    ends[k].append("won" if won[k] else "late" if late else "lost")
                    game.reset()
            saw_dead += same(seen, games)
    assert ends[0][:3] == ["lost", "late", "won"] and ends[1][:3] == ["won", "lost", "late"]
    assert saw_dead > 0
    resets = [e["seed"] for e in read_log(standin, "reset")]
    assert [resets.count(seed) for seed in (7, 1007)] == [len(end) + 1 for end in ends]
    # 3 * 10 + 200 + 135: never grown by a second reset of the first episode.
    assert {e["max_reward"] for e in read_log(standin, "step")} == {365.0}
    assert len(read_log(standin, "close")) == 2  # by themselves, not killed
    assert leftovers(standin) == []


# ------------------------------------------------------------------------------------------ faults
def test_a_broken_rollout_is_played_again_in_new_games(standin, monkeypatch, capfd):
    from smac.env import StarCraft2Env

    seeds = [3 + 100_003 * restarts for restarts in range(4)]  # of game 0; game 1: 1000 more
    order(
        monkeypatch,
        {"seed": seeds[0] + 1000, "step": 8, "kind": "crash"},  # in the first rollout
        {"seed": seeds[1], "step": 28, "kind": "die"},  # in the second, the games' second as well
        {"seed": seeds[2] + 1000, "step": 30, "kind": "hang"},  # in the third
    )
    rollouts, estimate, join = [], m.estimate, multiprocessing.process.BaseProcess.join

    def spy(agent, buffer, *args):
        rollouts.append({name: x.clone() for name, x in buffer.items()})
        return estimate(agent, buffer, *args)

    monkeypatch.setattr(m, "estimate", spy)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    less = lambda worker, timeout=None: join(worker, min(timeout, 2))  # to wait for what hangs
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "join", less)
    words = f"{SMALL} --num-envs 2 --game-timeout 3 --runs-dir {standin / 'runs'}"
    assert m.main([*words.split(), "--total-timesteps", "160"]) == 0
    (run,) = (standin / "runs").iterdir()
    assert [float(row["charts/env_restarts"]) for row in progress(run)] == [1, 2, 3, 3]
    assert [int(row["global_step"]) for row in progress(run)] == [40, 80, 120, 160]
    assert all(math.isfinite(float(row["losses/policy"])) for row in progress(run))
    said = re.findall(r"^game (\d): (.+); new games begin$", capfd.readouterr().err, re.M)
    assert said == [("1", "its process ended"), ("0", "its process ended"), ("1", "silent for 3 s")]
    assert leftovers(standin, polite=False) == []

    # What was trained on is what new games give, played directly, from their beginning on.
    monkeypatch.delenv("STANDIN_SMAC_FAULTS")
    assert len(rollouts) == 4
    for seed, played in zip(seeds[1:], (rollouts[:1], rollouts[1:2], rollouts[2:])):
        games = [StarCraft2Env("3m", seed=seed + extra) for extra in (0, 1000)]
        for game in games:
            game.reset()
        assert not played[0]["keep"][0].any() and not played[0]["policy_hidden"][0].any()
        for rollout in played:
            for t in range(20):
                same((rollout[name][t] for name in ("obs", "state", "avail")), games)
                for k, game in enumerate(games):
                    reward, done, _ = game.step(rollout["actions"][t, k].argmax(-1).tolist())
                    assert rollout["reward"][t, k].item() == np.float32(reward)
                    assert rollout["done"][t, k].item() == done
                    assert rollout["keep"][t + 1, k].item() == 1 - done
                    if done:
                        game.reset()
            same((rollout[name][20] for name in ("obs", "state", "avail")), games)
        for game in games:
            game.close()


def test_five_failures_in_a_row_then_resume_with_a_fault_in_the_evaluation(
    standin, monkeypatch, capfd
):
    faults = [{"seed": 3 + 100_003 * k, "step": 5, "kind": "raise"} for k in range(5)]
    faults[0] |= {"step": 25, "builtin": False}  # after the first update
    order(monkeypatch, *faults)
    words = (
        f"{SMALL} --num-envs 1 --runs-dir {standin / 'runs'} --eval-episodes 5 --total-timesteps 40"
    )
    assert m.main(words.split()) == 1
    error = capfd.readouterr().err
    assert error.endswith("\nerror: game 0: its process ended\n")
    assert len(re.findall(r"^game 0: [^;].*; new games begin$", error, re.M)) == 4
    assert error.count("stand-in: raise") == 5
    (run,) = (standin / "runs").iterdir()
    assert run.name.startswith("sc2-3m__maipg_smac__nu0.4__compatible__s3__")
    saved = m.load_checkpoint(run)
    assert (saved["progress"]["step"], saved["progress"]["restarts"]) == (20, 5)
    assert len(progress(run)) == 1 and leftovers(standin, polite=False) == []

    order(monkeypatch, {"seed": 10**9 + 3 + 40, "step": 2, "kind": "crash"})
    assert m.main(["--resume", str(run)]) == 0
    first, last = progress(run)
    assert int(last["global_step"]) == 40 and first["eval/win_rate"] == "nan"
    assert float(last["eval/win_rate"]) == 0 and float(last["eval/episodic_return"]) > 0
    seeds = [e["seed"] for e in read_log(standin, "init")]
    # New episodes after the resume, and in the evaluation, twice.
    assert seeds[-3:] == [3 + 20, 10**9 + 43, 10**9 + 44]
    resumed = m.load_checkpoint(run)
    assert resumed["progress"]["step"] == 40 and resumed["progress"]["restarts"] == 6
    weights = saved["agent"]["policy.head.weight"], resumed["agent"]["policy.head.weight"]
    assert not torch.equal(*weights)
    assert float(last["charts/env_restarts"]) == 6
    assert leftovers(standin, polite=False) == []


def test_a_first_start_that_fails(standin, monkeypatch, capfd):
    order(monkeypatch, {"kind": "no_launch", "builtin": False})
    words = f"{SMALL} --num-envs 1 --runs-dir {standin / 'runs'}"
    assert m.main(words.split()) == 1
    error = capfd.readouterr().err
    assert "stand-in: no_launch" in error and "game 0: its process ended" in error
    assert error.splitlines()[-1].startswith("error: ") and not (standin / "runs").exists()
    assert leftovers(standin) == []


@pytest.mark.parametrize(
    "fault, says",
    [
        ({"reset": 2, "kind": "dead_reset"}, "the game did not restart"),
        ({"step": 4, "kind": "crash"}, "the game crashed"),
    ],
)
def test_a_worker_sends_nothing_of_a_broken_game(fault, says, standin, monkeypatch):
    """play_sc2 itself, in this process."""
    sent = []

    class Pipe:
        send = staticmethod(sent.append)

        def recv(self):
            assert len(sent) < 200
            return [0 if dead else 1 for dead in sent[-1][2][:, 0]]

    monkeypatch.setattr(os, "setsid", lambda: None)
    order(monkeypatch, fault)
    with pytest.raises(RuntimeError, match=says):
        m.play_sc2(Pipe(), "3m", 1)
    assert len(sent) == 4 if "step" in fault else len(sent) > 5
    assert not any(done or avail[:, 0].all() for _, _, avail, _, done, _ in sent[1:])
    assert not list((standin / "tmp").glob("sc-*"))  # the game was closed


# ----------------------------------------------------------------------------------- the processes
@pytest.fixture
def trainers(standin, monkeypatch):
    """Two trainers that play, each in a session of its own, as in a terminal: (process, folder)."""
    started = []
    command = [sys.executable, m.__file__, *SMALL.split(), "--num-envs", "1"]
    for name in ("a", "b"):
        folder = standin / name
        (folder / "tmp").mkdir(parents=True)
        own = {"STANDIN_SMAC_LOG": str(folder / "log"), "TMPDIR": str(folder / "tmp")}
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored
        with open(folder / "out", "w") as out:
            streams = {"stdout": out, "stderr": out, "start_new_session": True}
            process = subprocess.Popen(command, env=os.environ | own, cwd=folder, **streams)
        signal.signal(signal.SIGINT, handler)
        started.append((process, folder))
    try:
        deadline = time.monotonic() + 200
        while not all(read_log(folder, "step") for _, folder in started):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process, _ in started)
            time.sleep(0.1)
        yield started
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


def test_no_process_outlives_the_trainer(trainers):
    (killed, killed_folder), (stopped, folder) = trainers
    assert all(len(processes(f)) == 2 and all(map(alive, processes(f))) for _, f in trainers)
    killed.kill()
    os.killpg(stopped.pid, signal.SIGINT)  # Ctrl-C in a terminal
    assert leftovers(killed_folder, polite=False) == []
    assert stopped.wait(100) == 128 + signal.SIGINT
    assert leftovers(folder) == [] and "Traceback" not in (folder / "out").read_text()
    (run,) = (folder / "runs").iterdir()
    assert m.load_checkpoint(run)["progress"]["step"] == 20 * len(progress(run))


# ------------------------------------------------------------------------------------- the set-up
def no_smac(monkeypatch, folder):
    forget_smac()
    monkeypatch.setitem(sys.modules, "smac", None)


def namesake(monkeypatch, folder):
    package = folder / "automl" / "smac"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    forget_smac()
    monkeypatch.syspath_prepend(str(package.parent))


def no_home(monkeypatch, folder):
    monkeypatch.setenv("SC2PATH", str(folder / "nowhere"))


def no_map(monkeypatch, folder):
    (folder / "sc2/Maps/SMAC_Maps/3m.SC2Map").unlink()


MISSING = [  # how it comes to be missing, what the line must say
    (no_smac, "oxwhirl's smac is not installed (PyPI's smac is another project)"),
    (namesake, "oxwhirl's smac is not installed (PyPI's smac is another project)"),
    (no_home, "no StarCraft II with the map 3m in {folder}/nowhere (SC2PATH)"),
    (no_map, "no StarCraft II with the map 3m in {folder}/sc2 (SC2PATH)"),
]


@pytest.mark.parametrize("spoil, says", MISSING)
def test_what_is_missing_has_its_own_line(standin, monkeypatch, capsys, spoil, says):
    spoil(monkeypatch, standin)
    says = says.format(folder=standin)
    assert m.main([*SMALL.split(), "--runs-dir", str(standin / "runs")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --backend sc2: {says}; run benchmark/")
    assert not (standin / "runs").exists()
    assert m.resolve(m.Args(map_name="3m", device="cpu")).backend == "smax"
    assert capsys.readouterr().out == f"backend smax: {says}\n"


def test_auto_takes_the_game_where_it_is_there(capsys):
    assert m.resolve(m.Args(map_name="3m", device="cpu")).backend == "sc2"
    assert capsys.readouterr().out == "backend sc2: StarCraft II is installed\n"
    assert m.main(["--backend", "sc2", "--map-name", "4m"]) == 2
    assert "the map 4m" in capsys.readouterr().err
