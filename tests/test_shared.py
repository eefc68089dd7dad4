"""What the scripts share is the same text: a fix in one cannot be forgotten in another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOSSES = "masked_mean gumbel_max stochastic_pg_loss gumbel_softmax deterministic_pg_loss"
LOSSES += " interpolate UsageError"
TRAINER = LOSSES + " orthogonal Recurrent Mixer hypernetwork CompatibleCritic ValueNorm"
TRAINER += " masked_log_softmax backward_sum gae td_lambda value_loss unroll critic_loss update"
TRAINER += " descend write_checkpoint load_checkpoint"
FOOTBALL = TRAINER + " Agent begin rollout estimate policy_losses with_retries"
SHARED = {"maipg_matrix": LOSSES, "maipg_mpe": TRAINER, "maipg_grf": FOOTBALL}


def blocks(script):
    """{name: syntax tree without positions} of a script's functions and classes."""
    tree = ast.parse((ROOT / f"{script}.py").read_text().replace(script, "SCRIPT"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize("script", SHARED)
def test_shared_blocks_are_identical(script):
    reference, other = blocks("maipg_smac"), blocks(script)
    assert [name for name in SHARED[script].split() if reference[name] != other[name]] == []


def test_nothing_else_is_called_the_same_and_differs():
    """Functions of one name are the same function, but for the environment's and these."""
    reference, other = blocks("maipg_smac"), blocks("maipg_mpe")
    differing = {n for n in reference.keys() & other.keys() if reference[n] != other[n]}
    own = "Args resolve Agent begin rollout estimate policy_losses train evaluate Log parse main"
    assert differing <= set(own.split())


def test_the_scripts_import_nothing_from_one_another():
    names = {path.stem for path in ROOT.glob("maipg_*.py")}
    assert {"maipg_smac", "maipg_mpe", "maipg_matrix"} <= names
    for path in ROOT.glob("maipg_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in getattr(node, "names", []) if alias.name]
            modules += [getattr(node, "module", None) or ""]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {name.split(".")[0] for name in modules} & (names | {"benchmark"})
