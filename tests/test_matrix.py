"""maipg_matrix.py: closed forms against brute force, batching, Table 5, the command line."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch

import maipg_matrix as maipg

SMALL = "--settings 2x3 --num-games 4 --iterations 3 --nus 0 0.5 --batch-size 8"
SMALL += " --device cpu"


def call(*words):
    return maipg.main([x for word in words for x in str(word).split()])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("n, m", [(2, 3), (3, 4), (5, 2)])
def test_expected_reward_and_individual_values(n, m):
    rng = torch.Generator().manual_seed(0)
    payoffs = torch.rand(3, *[m] * n, generator=rng)
    pi = torch.randn(3, n, m, generator=rng).softmax(-1)
    value, values = np.zeros(3), np.zeros((3, n, m))
    for a in itertools.product(range(m), repeat=n):
        reward = payoffs[(slice(None), *a)].numpy()
        p = np.stack([pi[:, i, a[i]].numpy() for i in range(n)])
        value += reward * p.prod(0)
        for i in range(n):
            values[:, i, a[i]] += reward * np.delete(p, i, 0).prod(0)
    np.testing.assert_allclose(maipg.expected_reward(payoffs, pi), value, atol=1e-6)
    critic = maipg.Critic(3, n, m, maipg.Args(device="cpu"), rng)
    maipg.fit_vdn_exactly(critic, payoffs, pi)
    np.testing.assert_allclose(critic.tables + critic.bias[:, None, None], values, atol=1e-6)
    index = torch.randint(m, (3, 7, n), generator=rng)
    actions = torch.nn.functional.one_hot(index, m).float()
    got = maipg.rewards_of(payoffs, actions)
    for r, b in itertools.product(range(3), range(7)):
        assert got[r, b] == payoffs[(r, *index[r, b].tolist())]
    joint = maipg.all_joint_actions(n, m, "cpu")[None].expand(3, -1, -1, -1)
    assert torch.equal(maipg.rewards_of(payoffs, joint), payoffs.flatten(1))


def test_sampled_gradient_is_unbiased_for_the_exact_one():
    """The first epoch's PPO gradient, averaged over many batches, against the closed form."""
    args, rng = maipg.Args(device="cpu"), torch.Generator().manual_seed(0)
    payoffs = torch.rand(1, 3, 3, generator=rng)
    logits = torch.randn(1, 2, 3, generator=rng).requires_grad_()
    exact = torch.autograd.grad(maipg.expected_reward(payoffs, logits.softmax(-1)).sum(), logits)[0]
    samples = 400_000
    log_pi = logits.log_softmax(-1)
    draws = log_pi.detach().unsqueeze(1).expand(-1, samples, -1, -1)
    index = maipg.gumbel_max(draws, rng).argmax(-1)
    actions = torch.nn.functional.one_hot(index, 3).float()
    rewards = maipg.rewards_of(payoffs, actions)
    old = (draws * actions).sum(-1)
    loss = maipg.sampled_term(log_pi, actions, old, rewards - rewards.mean(), args)
    got = -torch.autograd.grad(loss.sum(), logits)[0]
    torch.testing.assert_close(got, exact, atol=3e-3, rtol=0)
    assert exact.abs().max() > 0.02


def test_qmix_is_monotonic_and_fits():
    args, rng = maipg.Args(mixer="qmix", device="cpu"), torch.Generator().manual_seed(0)
    critic = maipg.Critic(6, 3, 4, args, rng)
    joint = maipg.all_joint_actions(3, 4, "cpu")[None].expand(6, -1, -1, -1)
    tables = torch.rand(6, 3, 4, generator=rng)  # a monotonic game: an increasing function of sums
    rewards = torch.einsum("rbnm,rnm->rb", joint, tables).square()
    optimizer = torch.optim.Adam(critic.parameters, 0.02)
    before = (critic(joint) - rewards).square().mean()
    maipg.fit(critic, optimizer, joint, rewards, torch.full_like(rewards, 1 / 64), 500)
    assert (critic(joint) - rewards).square().mean() < 0.01 * before
    assert not any(parameter.requires_grad for parameter in critic.parameters)
    base = critic(joint)
    for i, k in itertools.product(range(3), range(4)):
        critic.tables[:, i, k] += 0.1
        assert (critic(joint) >= base - 1e-6).all()
        critic.tables[:, i, k] -= 0.1


def test_mu_is_a_sample_or_the_expectation():
    rng = torch.Generator().manual_seed(0)
    log_pi = torch.randn(50, 2, 3, generator=rng).log_softmax(-1)
    args = maipg.Args(device="cpu", batch_size=1)
    assert args.mu == "gumbel"  # the paper's, which Figure 1 and Table 5 were run with
    critic = maipg.Critic(50, 2, 3, args, rng)
    critic.tables = torch.rand(50, 2, 3, generator=rng)
    sums = (critic.tables[:, 0, :, None] + critic.tables[:, 1, None]).flatten(1)
    sampled = -maipg.deterministic_term(critic, log_pi, args, rng)
    assert ((sums - sampled[:, None]).abs().amin(1) < 1e-5).all()
    args.mu = "expectation"
    got = -maipg.deterministic_term(critic, log_pi, args, rng)
    torch.testing.assert_close(got, (log_pi.exp() * critic.tables).sum((1, 2)))
    assert (got - sampled).abs().max() > 0.1


# ---------------------------------------------------------------------------------------- training
def test_a_batch_of_runs_equals_single_runs():
    """Without sampling, every (nu, game, seed) trains as if it were alone."""
    base = dict(estimator="exact", mu="expectation", iterations=30, device="cpu")
    payoffs = np.random.default_rng(0).uniform(size=(3, 4, 4))
    together = maipg.train(payoffs, maipg.Args(nus=(0.0, 1.0), seeds=2, **base, mixer="vdn"))
    start = torch.empty(3, 2, 2, 4).normal_(generator=torch.Generator().manual_seed(1))
    for game, seed in itertools.product(range(3), range(2)):
        logits = start[game, seed].double().requires_grad_()  # plain gradient ascent, by itself
        optimizer = torch.optim.Adam([logits], 0.05)
        table = torch.tensor(payoffs[game])
        for _ in range(30):
            pi = logits.softmax(-1)
            optimizer.zero_grad()
            (-pi[0] @ table @ pi[1]).backward()
            optimizer.step()
        pi = logits.detach().softmax(-1)
        value = (pi[0] @ table @ pi[1]).item()
        greedy = table[pi[0].argmax(), pi[1].argmax()].item()
        for k in range(2):  # Proposition 5: nu = 1 follows the same gradient
            assert together[0][k, game, seed] == pytest.approx(value, abs=2e-4)
            assert together[1][k, game, seed] == pytest.approx(greedy, abs=1e-6)


@pytest.mark.parametrize("mixer", ["vdn", "qmix"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_training_improves_every_nu(estimator, mixer):
    args = maipg.Args(estimator=estimator, mixer=mixer, device="cpu", seeds=2, iterations=60)
    args.nus, args.critic_lr = (0.0, 0.5, 1.0), 0.02
    payoffs = np.random.default_rng(0).uniform(size=(20, 3, 3))
    rewards, greedy, settled = maipg.train(payoffs, args)
    assert rewards.shape == greedy.shape == settled.shape == (3, 20, 2)
    for per_nu in rewards:
        assert 0.65 < per_nu.mean() <= payoffs.reshape(20, -1).max(1).mean() + 1e-6  # start: 0.5
    again = maipg.train(payoffs, args)
    assert all(np.array_equal(a, b) for a, b in zip((rewards, greedy, settled), again))


def test_nu_0_does_not_depend_on_the_critic():
    payoffs = np.random.default_rng(0).uniform(size=(5, 3, 3))
    args = dict(nus=(0.0,), seeds=1, iterations=5, device="cpu", estimator="exact")
    results = [maipg.train(payoffs, maipg.Args(**args, mixer="vdn", critic_lr=x)) for x in (0.1, 1)]
    assert np.array_equal(results[0][0], results[1][0])
    other = [
        maipg.train(payoffs, maipg.Args(**args, mixer=x, mu="expectation"))[0]
        for x in ("vdn", "qmix")
    ]
    np.testing.assert_allclose(*other, atol=1e-6)


def test_relative_gain_by_hand():
    rewards = np.array([[[1.0, 1.0], [0.6, 0.6]], [[0.9, 0.7], [0.8, 0.8]]])  # [nu, game, seed]
    eta, error, best = maipg.relative_gain(rewards, np.array([1.0, 1.0]))
    assert eta == pytest.approx([0, 0]) and best == pytest.approx(0.25)
    rewards[1] = [[0.4, 0.4], [0.4, 0.4]]  # half as good as nu = 0
    eta, error, _ = maipg.relative_gain(rewards, np.array([1.0, 1.0]))
    assert eta[1] == pytest.approx(-0.5) and error[1] == pytest.approx(0.2 / 0.8)


def test_a_policy_that_is_not_finite_ends_the_run(tmp_path, capsys):
    words = f"--mixer qmix --critic-lr 1e9 --out-dir {tmp_path}"
    assert call(SMALL, words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "finite" in error
    assert not list(tmp_path.iterdir())


def test_the_games_of_table_5():
    a, b = (np.array(maipg.TABLE_5[name]) for name in ("table5a", "table5b"))
    assert a.argmax() == 0 and b.argmax() == 0 and (a[0, 0], a[2, 2]) == (2, 1)
    difference = b - a
    assert difference[1, 1] == 0.5 and np.count_nonzero(difference) == 1
    for game in (a, b):  # (C, C) and, in (b), (B, B) are equilibria: no single agent gains
        assert game[2, 2] >= max(game[:, 2].max(), game[2].max())
    assert b[1, 1] >= max(b[:, 1].max(), b[1].max())


# ------------------------------------------------------------------------------------- command line
def test_figure_1(tmp_path, capsys):
    assert call(SMALL, "--settings 2x3 3x2", f"--out-dir {tmp_path}") == 0
    table = rows(tmp_path / "figure1.csv")
    assert [(r["game"], r["nu"]) for r in table][:3] == [
        ("2 agents, 3 actions", "0.0"),
        ("2 agents, 3 actions", "0.5"),
        ("3 agents, 2 actions", "0.0"),
    ]
    for row in table:
        assert row["games"] == "4" and float(row["optimum_gain_percent"]) > 0
    assert float(table[0]["relative_gain_percent"]) == 0
    assert (tmp_path / "figure1.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["seeds"] == 1 and saved["seconds"] > 0 and saved["threads"] == 1
    assert "3 agents, 2 actions  nu 0.5  eta" in capsys.readouterr().out


def test_eta_has_one_sign_everywhere(tmp_path, capsys, monkeypatch):
    """Text, table and picture of a nu = 1 that earns a quarter less than nu = 0."""
    drawn = {}
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, *a, **k: (drawn.update(axis=figure.axes[0]), savefig(figure, *a, **k)),
    )
    args = maipg.Args(nus=(0.0, 1.0), seeds=1, num_games=2)
    rewards = np.array([[[0.8], [0.8]], [[0.6], [0.6]]])
    result = (rewards, rewards, rewards, np.array([1.0, 1.0]))
    maipg.figure_1({"a game": result}, args, tmp_path)
    assert float(rows(tmp_path / "figure1.csv")[1]["relative_gain_percent"]) == pytest.approx(-25)
    out = capsys.readouterr().out
    assert "nu 1  eta -25.00%" in out and "(optimum +25.00%)" in out
    assert "eta(nu) = (R(nu) - R(0)) / R(0)" in out
    axis = drawn["axis"]
    curve, best = axis.containers[0].lines[0].get_ydata(), axis.lines[1].get_ydata()
    assert curve == pytest.approx([0, -25]) and best == pytest.approx([25, 25])
    assert axis.get_ylabel().startswith("eta") and not axis.yaxis_inverted()


@pytest.mark.parametrize("game, files", [("random", "figure1.csv figure1.png"), ("table5a", "")])
def test_it_says_where_it_wrote(game, files, tmp_path, capsys):
    assert call(SMALL, f"--game {game} --seeds 2 --out-dir {tmp_path}/out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert str(tmp_path / "out") in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"args.json", *(files or "table5a.csv").split()}
    assert all(name in said for name in written)


def test_table_5(tmp_path, capsys):
    words = "--game table5b --iterations 150 --nus 0 1 --seeds 4 --device cpu"
    assert call(words, f"--out-dir {tmp_path}") == 0
    table = rows(tmp_path / "table5b.csv")
    for row in table:
        payoffs = [float(row[f"seed_{k}"]) for k in range(1, 5)]
        assert set(payoffs) <= {2.0, 1.0, 0.5, 0.0, -2.0}
        assert float(row["mean"]) == pytest.approx(np.mean(payoffs))
        assert float(row["stderr"]) == pytest.approx(np.std(payoffs, ddof=1) / 2)
        counts = {k[6:]: int(v) for k, v in row.items() if k.startswith("count_")}
        assert sum(counts.values()) == 4
        assert all(payoffs.count(float(value)) == count for value, count in counts.items())
    assert "stderr" in capsys.readouterr().out


def test_table_5_tells_payoffs_apart_that_are_nearly_the_same(tmp_path):
    greedy = np.float32([[[1.00004, 1.0, 0.1, 3e-5]]])
    args = maipg.Args(nus=(0.0,), seeds=4)
    maipg.table_5("own", greedy, args, tmp_path)
    (row,) = rows(tmp_path / "own.csv")
    assert [row[f"seed_{k}"] for k in range(1, 5)] == ["1.00004", "1.0", "0.1", "3e-05"]
    assert [key for key in row if key.startswith("count_")] == [
        "count_1.00004",
        "count_1",
        "count_0.1",
        "count_3e-05",
    ]


def test_the_stored_table_5_is_reproduced(tmp_path):
    """Its own command: nu by nu and seed by seed, but for rounding on another machine."""
    stored = Path(__file__).parent.parent / "benchmark/results/matrix/table5a-vdn.csv"
    assert call(f"--game table5a --device cpu --out-dir {tmp_path}") == 0
    old, new = rows(stored), rows(tmp_path / "table5a.csv")
    same = [a[f"seed_{k}"] == b[f"seed_{k}"] for a, b in zip(old, new) for k in range(1, 11)]
    assert len(same) == 110 and np.mean(same) > 0.9


def test_a_file(tmp_path):
    game = np.zeros((2, 2, 2), dtype=np.uint8)
    game[1, 1, 1] = 3
    np.save(tmp_path / "mine.npy", game)
    words = f"--game {tmp_path}/mine.npy --iterations 100 --seeds 3 --nus 0 0.5"
    assert call(words, f"--device cpu --out-dir {tmp_path}/out") == 0
    table = rows(tmp_path / "out" / "mine.csv")
    assert {row[f"seed_{k}"] for row in table for k in (1, 2, 3)} <= {"3.0", "0.0"}
    assert "3.0" in {row["seed_1"] for row in table}


HUGE = 10**8
BAD = [
    ("--game nowhere", "nowhere table5a .npy"),
    ("--game missing.npy", "missing.npy"),
    ("--game oblong.npy", "oblong (2, 3)"),
    ("--game line.npy", "line (4,)"),
    ("--game scalar.npy", "scalar ()"),
    ("--game single.npy", "single m > 1"),
    ("--game nan.npy", "nan finite"),
    ("--game inf.npy", "inf finite"),
    ("--game 1e308.npy", "1e308 finite [-100, 100]"),
    ("--game wide.npy", "wide finite"),
    ("--game words.npy", "words"),
    ("--game complex.npy", "complex128"),
    ("--game objects.npy", "objects"),
    ("--game archive.npy", "archive"),
    ("--game garbage.npy", "garbage"),
    ("--game empty.npy", "empty"),
    ("--game header.npy", "header"),
    ("--game unclosed.npy", "unclosed"),
    ("--game descr.npy", "descr"),
    ("--game cut.npy", "cut"),
    ("--settings 3", "settings 3"),
    ("--settings", "settings 3x5"),
    ("--settings 1x3", "1x3"),
    ("--settings 9x2", "9x2"),
    ("--settings 2x1", "2x1"),
    ("--settings 2x3 7x9", "7x9"),
    ("--settings 2x" + "9" * 5000, "2x999"),
    ("--nus 0.5 1", "nus 0"),
    ("--nus 0 1.5", "nus"),
    ("--nus 0 nan", "nus"),
    ("--nus", "nus"),
    ("--num-games 1", "num_games"),
    ("--seeds 0", "seeds"),
    ("--iterations 0", "iterations"),
    ("--batch-size -1", "batch_size"),
    ("--learning-rate nan", "learning_rate"),
    ("--init-std inf", "init_std"),
    ("--threads 0", "threads"),
    ("--out-dir file", "file"),
    ("--out-dir file/below", "file"),
    # Beyond any memory: payoffs, runs, samples, mixing units, joint actions of the exact critic.
    (f"--num-games {HUGE} --settings 2x1000", "GB memory"),
    (f"--game table5a --seeds {HUGE}", "GB memory"),
    (f"--batch-size {HUGE * 10}", "GB memory"),
    (f"--mixer qmix --mixer-dim {HUGE * 10}", "GB memory"),
    ("--estimator exact --mixer qmix --num-games 1000 --settings 2x1000", "GB memory"),
]
TYRO = [
    ("--nus a", "nus"),
    ("--iterations 1.5", "iterations"),
    ("--estimator guess", "guess sampled"),
    ("--mixer sum", "sum vdn qmix"),
    ("--mu maybe", "maybe gumbel"),
    ("--temperature 1", "temperature"),
    ("--device abacus", "abacus"),
    ("--no-such-flag 1", "no-such-flag"),
    ("stray", "stray"),
]


def header(text):
    """A .npy file with that header and 32 bytes of data."""
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(32)


@pytest.fixture(scope="module")
def corner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corner")
    arrays = {
        "oblong": np.zeros((2, 3)),
        "line": np.zeros(4),
        "scalar": np.zeros(()),
        "single": np.zeros((1, 1)),
        "nan": np.full((2, 2), np.nan),
        "inf": np.array([[0, 1], [2, -np.inf]]),
        "1e308": np.array([[0, 1], [2, 1e308]]),
        "wide": np.array([[0, 1], [2, np.longdouble(1e308) * 10]], dtype=np.longdouble),
        "words": np.array([["a", "b"], ["c", "d"]]),
        "complex": np.zeros((2, 2), dtype=complex),
        "objects": np.full((2, 2), None),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.savez(folder / "archive.npz", np.zeros((2, 2)))
    (folder / "archive.npz").rename(folder / "archive.npy")
    (folder / "garbage.npy").write_bytes(b"\x93NUMPYgarbage")
    (folder / "empty.npy").write_bytes(b"")
    shape = "'fortran_order': False, 'shape': (2, 2)"
    (folder / "header.npy").write_bytes(header(f"{{'descr': '<f8', {shape}, 'more': 1}}"))
    (folder / "unclosed.npy").write_bytes(header(f"{{'descr': '<f8', {shape}"))
    (folder / "descr.npy").write_bytes(header(f"{{'descr': '<q9', {shape}}}"))
    (folder / "cut.npy").write_bytes(header(f"{{'descr': '<f8', {shape}}}")[:-8])
    (folder / "good.npy").write_bytes(header(f"{{'descr': '<f8', {shape}}}"))
    (folder / "file").write_text("a file\n")
    return folder


@pytest.mark.parametrize("command, words", BAD, ids=[command[:50] for command, _ in BAD])
def test_bad_input(command, words, corner, monkeypatch, capsys):
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(corner)
    before = sorted(os.listdir(corner))
    assert call(SMALL, command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words.split()), error
    assert sorted(os.listdir(corner)) == before


def test_the_files_of_bad_input_differ_from_a_good_one_by_their_fault(corner, tmp_path):
    assert call(SMALL, f"--game {corner}/good.npy --seeds 1 --out-dir {tmp_path}") == 0
    assert rows(tmp_path / "good.csv")[0]["mean"] == "0.0"


@pytest.mark.parametrize("command, words", TYRO, ids=[command for command, _ in TYRO])
def test_unknown_words(command, words, corner, monkeypatch, capsys):
    """tyro's own message, exit code 2, nothing written."""
    monkeypatch.chdir(corner)
    before = sorted(os.listdir(corner))
    with pytest.raises(SystemExit) as end:
        call(SMALL, command)
    error = capsys.readouterr().err
    assert end.value.code == 2 and all(word in error for word in words.split()), error
    assert sorted(os.listdir(corner)) == before


@pytest.mark.parametrize("mixer", ["vdn", "qmix"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_memory_lets_pass_what_fits(estimator, mixer, monkeypatch):
    """2 GB are enough for what needs 0.2 to 0.6, and 0.1 are not."""
    shape, size = (100, *[10] * 4), 300
    args = maipg.Args(seeds=1, device="cpu", estimator=estimator, mixer=mixer, batch_size=size)
    if (estimator, mixer) == ("exact", "qmix"):
        shape, args.batch_size = (10, *[8] * 4), 2
    for pages, fits in ((2 * 10**9, True), (10**8, False)):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
        if fits:
            maipg.check_memory(shape, args)
        else:
            with pytest.raises(maipg.UsageError, match="GB of memory"):
                maipg.check_memory(shape, args)


def test_control_c_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(maipg, "update", interrupt)
    assert call(SMALL, f"--out-dir {tmp_path}") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_script_itself(tmp_path):
    script = Path(maipg.__file__)
    run = lambda *words: subprocess.run(
        [sys.executable, str(script), *words], cwd=tmp_path, capture_output=True, text=True
    )
    bad = run("--settings")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "settings" in bad.stderr
    assert run("--help").returncode == 0 and not list(tmp_path.iterdir())
    assert run(*SMALL.split()).returncode == 0
    assert (tmp_path / "runs/matrix/figure1.csv").exists()
