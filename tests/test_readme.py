"""Every command of README.md and benchmark/README.md is run, as cheaply as it can be."""

import importlib
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import maipg_mpe as mpe
import maipg_smac as smac
from benchmark import plot, variance

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmark/README.md"]
BEGINS = ("python ", "pip ", "pytest", "tensorboard ", "benchmark/install", "AGREE_TO_EULA=1 ")
BEGINS += ("echo ", "LD_PRELOAD")

PLAY = "--device cpu --num-envs 2 --eval-episodes 2"
TRAIN = f"{PLAY} --rollout-steps 10 --total-timesteps 20 --eval-every 20"
SMAC = f"{TRAIN} --backend smax"
WORLDS = f"{PLAY} --total-timesteps 50 --eval-every 50"
VALUE = f"{PLAY} --backend smax --total-timesteps 20 --eval-every 20"
MATRIX = "--num-games 2 --seeds 1 --iterations 2"
GRID = "python benchmark/launch.py --scenarios 2s3z 3m --nus 0 0.4"

# {command: what makes it cheap; an option that stands twice has its last value}
COMMANDS = {
    "python maipg_smac.py --map-name 2s3z --nu 0.4": SMAC,
    "python maipg_smac.py --map-name 2s3z --nu 0": SMAC,
    "python maipg_smac.py --map-name 2s3z --nu 0.4 --mixer vdn": SMAC,
    "python maipg_smac.py --map-name 2s3z --nu 0.4 --critic paper --mu gumbel": SMAC,
    "python maipg_smac.py --map-name 2s3z --nu 0.4 --num-envs 1024 --rollout-steps 128"
    " --chunk-length 16": f"{SMAC} --rollout-steps 16 --seed 2",  # another folder's name
    "python maipg_smac.py --resume RUN_DIR": "",
    "python maipg_smac.py --resume RUN_DIR --total-timesteps 20000000": "--total-timesteps 40",
    "python maipg_mpe.py --scenario spread": WORLDS,
    "python maipg_mpe.py --scenario line --continuous": WORLDS,
    "python maipg_mpe.py --mixer joint": WORLDS,
    "python maipg_mpe.py --env-id pettingzoo.sisl.pursuit_v5:parallel_env --rollout-steps 100"
    " --num-envs 8 --eval-episodes 8": "--rollout-steps 25 --total-timesteps 25 --num-envs 1"
    " --eval-episodes 1 --device cpu",
    "python maipg_matrix.py": MATRIX,
    "python maipg_matrix.py --game table5a": MATRIX,
    "python maipg_matrix.py --game payoff.npy": MATRIX,
    "python maipg_matrix.py --mixer qmix --critic-lr 0.02": MATRIX,
    "python maipg_matrix.py --estimator exact --mu expectation": MATRIX,
    "python maipg_grf.py --scenario academy_3_vs_1_with_keeper": TRAIN,
    "python benchmark/baselines/happo.py --map-name 2s3z": SMAC,
    "python benchmark/baselines/qmix.py --map-name 2s3z": VALUE,
    "python benchmark/baselines/facmac.py --map-name 2s3z": VALUE,
    "python benchmark/evaluate.py RUN_DIR --episodes 200 --capture-video": "--episodes 2",
    "python benchmark/variance.py RUN_DIR --nus 0 0.3 0.5": "--rollouts 2",
    "python benchmark/variance.py RUN_DIR --cosine": "--rollouts 2 --reference-rollouts 2",
    "python benchmark/variance.py RUN_DIR --truth": "--rollouts 2 --copies 2",
    "python benchmark/variance.py --games 10 --rollouts 100": "--games 2 --rollouts 2",
    "python benchmark/throughput.py": "--scripts mpe --smoke --rounds 2",
    "python benchmark/launch.py --seeds 1 2 3 4 5 --nus 0 0.4 -- --backend smax"
    " --learning-rate 0.002 --total-timesteps 300000 --eval-every 10000": "",
    f"{GRID} --out runs/grid -- --total-timesteps 300000": "",
    f"{GRID} --seeds 1 2 3 --out runs/grid -- --total-timesteps 1000000": "",
    "python benchmark/plot.py runs/grid": "--out results",
    "python benchmark/plot.py runs/grid --style iqm --out results": "",
    "python benchmark/plot.py --markdown": "",
    "python benchmark/plot.py benchmark/results/readme/curves.csv --summary": "",
    "tensorboard --logdir runs": "--inspect",
}
CPU = Path("/proc/cpuinfo").read_text()
ON_AMD = "AuthenticAMD" in CPU and "avx512f" in CPU and "BLAS_INFO=mkl" in torch.__config__.show()
MKL = "echo 'int mkl_serv_intel_cpu_true() { return 1; }' | gcc -shared -fPIC -xc - -o mkl_amd.so"
ELSEWHERE = {
    "pip install -r requirements.txt": ".ci/run",
    "pytest -n 2 --dist loadfile": ".ci/run",
    "pip install smac": "the README warns of it",
    "python benchmark/figures.py fig5 --scale smoke": "test_figures.py",
    "benchmark/install_grf.sh": ".ci/run, test_install.py",
    "AGREE_TO_EULA=1 benchmark/install_sc2.sh": "needs the game; test_install.py",
    "benchmark/install_sc2.sh --check": "test_install.py",
    "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": "internet",
    'pip install "jax[cuda13]==0.10.2"': "a GPU",
    MKL: "test_mkl_asks_the_recipe",
    "LD_PRELOAD=./mkl_amd.so python maipg_smac.py --map-name 2s3z --nu 0.4": "the same",
}


def commands_of(text):
    """Commands in `...`, and in blocks indented by four; both sides of && by themselves."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    found = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (.+)$", text, flags=re.M)
    parts = [part.strip() for line in found for part in line.split("&&")]
    return {part for part in parts if part.startswith(BEGINS)}


def test_every_command_has_its_test():
    found = commands_of("\n".join(page.read_text() for page in PAGES))
    assert found == COMMANDS.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory, compiled_once):
    """A folder with what the commands want."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.save("payoff.npy", np.random.default_rng(0).random((3, 3)))
        assert smac.main(f"{SMAC} --map-name 3m --runs-dir smac".split()) == 0
        assert mpe.main(f"{WORLDS} --runs-dir mpe".split()) == 0
        for runs in ["smac", "mpe"]:
            (run,) = Path(runs).iterdir()
            shutil.copytree(run, f"runs/grid/{run.name}")
            run.rename(f"RUN_DIR.{runs}")
        patch.setattr(plot, "HERE", folder / "benchmark")  # --markdown writes there
        patch.setattr(variance, "SAMPLES", (32, 2048))  # the larger ones take 15 s
        shutil.copytree(ROOT / "benchmark/results", "benchmark/results")
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, place, capfd):
    if "maipg_grf" in command and not find_spec("gfootball"):
        pytest.skip("gfootball is not installed")
    kind = "mpe" if "--truth" in command else "smac"
    shutil.rmtree("RUN_DIR", ignore_errors=True)
    shutil.copytree(f"RUN_DIR.{kind}", "RUN_DIR")
    words = f"{command} {COMMANDS[command]}".split()
    if "--" in words:
        words.insert(words.index("--"), "--dry-run")
    if words[0] == "tensorboard":
        tool = [sys.executable, "-m", "tensorboard.main", *words[1:]]
        answer = subprocess.run(tool, capture_output=True, text=True, timeout=100)
        assert answer.returncode == 0 and "charts/SPS" in answer.stdout
        return
    module = words[1].removesuffix(".py").replace("/", ".")
    assert importlib.import_module(module).main(words[2:]) == 0
    assert "error" not in capfd.readouterr().err


def test_the_results_are_up_to_date(place):
    written = plot.markdown(ROOT / "benchmark/results", place / "RESULTS.md")
    assert Path(written).read_text() == (ROOT / "benchmark/RESULTS.md").read_text()


@pytest.mark.skipif(not shutil.which("gcc") or not ON_AMD, reason="no AMD CPU with AVX-512, or gcc")
@pytest.mark.parametrize("answer", ["return 1", "__builtin_trap()"])
def test_mkl_asks_the_recipe(answer, tmp_path):
    """Products are right; with a function that crashes they crash, so that it is what counts."""
    subprocess.run(MKL.replace("return 1", answer), shell=True, check=True, cwd=tmp_path)
    code = "import torch; x = torch.rand(99, 99); y = x.double() @ x.double()\n"
    code += "assert torch.allclose(x @ x, y.float(), rtol=1e-4)"
    run = [sys.executable, "-c", code]
    ended = subprocess.run(run, env={"LD_PRELOAD": str(tmp_path / "mkl_amd.so")}).returncode
    assert ended == (0 if answer == "return 1" else -signal.SIGILL)


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_the_loss_to_copy():
    """Its gradient is that of Eq. (10), written out once more."""
    (code,) = [x for x in blocks_of(ROOT / "README.md") if "interpolate" in x]
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    logits = names["logits"].detach().requires_grad_()
    log_pi, advantages = logits.log_softmax(-1), names["advantages"]
    ratio = (log_pi.gather(-1, names["actions"])[..., 0] - names["old_log_probs"]).exp()
    first = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    second = (log_pi.exp() * names["utilities"]).sum(-1).mean()
    (0.6 * first + 0.4 * second).backward()
    assert names["logits"].grad.abs().max() > 1e-5
    assert torch.allclose(-logits.grad, names["logits"].grad, atol=1e-9)


def test_what_the_readme_names_is_there():
    text, tests = (
        PAGES[0].read_text(),
        "".join(p.read_text() for p in (ROOT / "tests").glob("*.py")),
    )
    rows = [row.split("|") for row in text.splitlines() if re.match(r"\|.*\|.*`test_\w+`", row)]
    assert len(rows) >= 10
    for _, _, where, test, _ in rows:
        assert all(hasattr(smac, name) for name in re.findall(r"`(\w+)`", where)), where
        assert all(f"def {name}(" in tests for name in re.findall(r"`(\w+)`", test)), test
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), link


def test_the_lines_of_the_scripts():
    rows = re.findall(r"`(\w+\.py)` \| (\d+) \(\d+\)", PAGES[0].read_text())
    assert len(rows) == 4
    for name, lines in rows:
        assert abs((ROOT / name).read_text().count("\n") - int(lines)) <= 20
