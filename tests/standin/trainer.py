"""A trainer's run folder, checkpoint and signals without the training: STEPS steps of 0.05 s each.

Every step that is done leaves a line in steps.txt beside the run folder, so that a test sees what
was done twice or not at all.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass
class Args:
    map_name: str = "3m"
    nu: float = 0.4
    mixer: str = "qmix"
    seed: int = 1
    threads: int = 1
    runs_dir: str = "runs"
    resume: str = ""
    steps: int = 20
    track: bool = False


def main():
    parser = argparse.ArgumentParser()
    for field in fields(Args):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if field.type is bool:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=field.type, default=default)
    args = parser.parse_args()
    if args.map_name == "nowhere":
        sys.exit("error: --map-name nowhere: there is no such map")
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(143))
    folder, step = Path(args.resume or Path(args.runs_dir, "run")), 0
    if args.resume:
        saved = json.loads((folder / "checkpoint.pt").read_text())
        step, args.steps = saved["step"], saved["steps"]
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps({"total_timesteps": args.steps}))
    print("begins at", step, flush=True)
    while step < args.steps and not stopped:
        time.sleep(0.05)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with open(folder.parent / "steps.txt", "a") as file:
            file.write(f"{step}\n")
        step += 1
        temporary = folder / "checkpoint.tmp"
        temporary.write_text(json.dumps({"step": step, "steps": args.steps}))
        temporary.replace(folder / "checkpoint.pt")
        (folder / "progress.csv").write_text(f"global_step,value\n{step},1\n")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    sys.exit(stopped[0] if stopped else 0)


if __name__ == "__main__":
    main()
