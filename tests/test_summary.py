"""plot.py --summary: steps to half of curves whose crossing is known; the table; bad input."""

import pandas as pd
import pytest

from benchmark import plot

NAMES = ["MAPPO", "MAIPG 0.4 compatible"]


def write(folder, rows, metric="win rate", names=NAMES):
    """curves.csv and runs.csv of a task; rows: {(method's index, seed): 30 scores}."""
    parts, runs = [], []
    for (which, seed), scores in rows.items():
        key = {"scenario": "SMAX 3m", "method": names[which], "seed": seed}
        steps = range(1000, 1000 * len(scores) + 1, 1000)
        for name in [metric, "sampled return"]:
            table = {"metric": name, "global_step": steps, "hours": 0.1, "value": scores}
            parts.append(pd.DataFrame(table).assign(**key))
        runs.append(key | {"steps": 1000 * len(scores)})
    pd.concat(parts).to_csv(folder / "curves.csv", index=False)
    pd.DataFrame(runs).to_csv(folder / "runs.csv", index=False)
    return str(folder / "curves.csv")


def ramp(at, low=0.0, high=0.8):
    """Low before the k-th evaluation, high from it on."""
    return [low if k < at else high for k in range(1, 31)]


def halves(path):
    half, reached = plot.steps_to_half(*plot.read([plot.Path(path)]))
    return half.to_dict(), reached.to_dict()


def test_half_of_a_win_rate_counts_from_0(tmp_path):
    # MAPPO ends at 0.8 and 0.4, so that 0.3 is half of the way; its first evaluation has 0.2.
    rows = {(0, 1): ramp(10, low=0.2), (0, 2): ramp(20, low=0.2, high=0.4)}
    rows |= {(1, 1): ramp(5, high=0.3), (1, 2): ramp(5, high=0.29)}
    half, reached = halves(write(tmp_path, rows))
    assert half[NAMES[0], 1] == 10_000 and half[NAMES[0], 2] == 20_000
    assert half[NAMES[1], 1] == 5_000 and reached[NAMES[1], 1]
    assert half[NAMES[1], 2] == 30_000 and not reached[NAMES[1], 2]  # never


def test_half_of_a_return_counts_from_the_first_evaluation(tmp_path):
    # From -10 to -2: -6 is half of the way, though -5 is half of the first and -1 of the last.
    rows = {(0, 1): ramp(12, low=-10, high=-2), (1, 1): ramp(7, low=-10, high=-6)}
    half, _ = halves(write(tmp_path, rows, "return"))
    assert half == {(NAMES[0], 1): 12_000, (NAMES[1], 1): 7_000}


def test_the_table(tmp_path, capsys):
    rows = {(0, seed): ramp(10 + seed) for seed in range(1, 6)}
    rows |= {(1, seed): ramp(7 + seed) for seed in range(1, 5)} | {(1, 5): ramp(30, high=0.1)}
    assert plot.main([write(tmp_path, rows), "--summary"]) == 0
    head, line, mappo, ours, less = capsys.readouterr().out.splitlines()
    assert head.count("|") == line.count("|") == mappo.count("|") == less.count("|") == 8
    assert mappo.startswith("|SMAX 3m, 30,000|MAPPO (5)|") and "|13,000 [" in mappo
    # 8, 9, 10, 11 and all 30 thousand; area: (23 + 22 + 21 + 20) * 0.8 / 30 and 0.1 / 30, over 5
    assert ours.startswith("||MAIPG 0.4 compatible (5)|0.459 [") and "13,600 [" in ours
    assert ours.endswith("], 1 did not||")
    assert less.startswith("||less MAPPO|-0.021 [") and "|+600 [" in less
    assert less.endswith("|4 of 5|")


def test_seeds_are_paired(tmp_path, capsys):
    """Seeds that MAPPO has not are left out of the difference."""
    rows = {(0, 1): ramp(10), (0, 2): ramp(20), (1, 2): ramp(16), (1, 3): ramp(2)}
    assert plot.main([write(tmp_path, rows), "--summary"]) == 0
    ours, less = capsys.readouterr().out.splitlines()[-2:]
    assert "|9,000 [-]|" in ours and "|-4,000 [-]|1 of 1|" in less


@pytest.mark.parametrize(
    "names, count, metric",
    [(NAMES, 9, "win rate"), (["MAPPO, clip_eps 0.1", NAMES[1]], 30, "win rate"), (NAMES, 30, "x")],
)
def test_bad_input(names, count, metric, tmp_path, capsys):
    scores = ramp(5)[:count]
    path = write(tmp_path, {(0, 1): scores, (1, 1): scores}, metric, names)
    says = "SMAX 3m: there is no MAPPO, or it has no final score"
    assert plot.main([path, "--summary"]) == 2
    out, err = capsys.readouterr()
    assert not out and err == f"error: {says}\n"
