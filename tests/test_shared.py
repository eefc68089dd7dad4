"""What the scripts share is the same text: a fix in one cannot be forgotten in another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOSSES = "masked_mean gumbel_max stochastic_pg_loss gumbel_softmax interpolate UsageError"
TRAINER = LOSSES + " masked_var masked_log_softmax backward_sum gae td_lambda value_loss orthogonal"
TRAINER += " deterministic_pg_loss Mixer ValueNorm unroll estimate_v gradient_variance update"
TRAINER += " RunError evaluation_games replacing Log stop_signals new_folder saved_on parse main"
FOOTBALL = TRAINER + " Recurrent Agent rollout estimate_q estimate compute_losses load_checkpoint"
DIFFERENT = {  # allowed, with the reason
    "Log": "the progress line of SMAC has a win rate",
    "main": "SMAC has --check",
}


def blocks(script):
    """{name: syntax tree without positions} of a script's functions and classes."""
    tree = ast.parse((ROOT / f"{script}.py").read_text().replace(script, "SCRIPT"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize(
    "script, names", [("maipg_matrix", LOSSES), ("maipg_mpe", TRAINER), ("maipg_grf", FOOTBALL)]
)
def test_shared_blocks_are_identical(script, names):
    reference, other = blocks("maipg_smac"), blocks(script)
    differing = [n for n in names.split() if reference[n] != other[n] and n not in DIFFERENT]
    assert differing == []


def test_nothing_else_is_called_the_same_and_differs():
    """Functions of one name are the same function, but for the environment's and these."""
    reference, other = blocks("maipg_smac"), blocks("maipg_mpe")
    common = {n for n in reference.keys() & other.keys() if reference[n] != other[n]}
    own = "Args resolve make_envs GameError Recurrent Agent rollout estimate_q estimate"
    own += " compute_losses evaluate load_checkpoint train report"
    assert common - set(own.split()) <= set(DIFFERENT)


def test_the_scripts_import_nothing_from_one_another():
    names = {path.stem for path in ROOT.glob("maipg_*.py")}
    assert {"maipg_smac", "maipg_mpe", "maipg_matrix"} <= names
    for path in ROOT.glob("maipg_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in getattr(node, "names", []) if alias.name]
            modules += [getattr(node, "module", None) or ""]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {name.split(".")[0] for name in modules} & (names | {"benchmark"})
