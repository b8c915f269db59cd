"""
Kills runs of miniature recipes at random moments, lets them go on, and compares them with runs that nothing stopped.

    python -m tests.faults.kills --kills 40 --output_dir runs/faults

In two fifths of the cases the run is killed (SIGKILL) while it saves a checkpoint, in the others at a random moment
after a random number of steps. Half of the cases make several updates with a generation batch. A run that goes on must
end with the weights, scores and logs of the whole run, to the bit. The result of each case is a line of
`<output_dir>/kills.jsonl`. Cases that have one are not run again. The exit status is 1 if a case failed.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trl_dpg.checkpoints import checkpoints, why_not_whole
from trl_dpg.files import append_line


ROOT = Path(__file__).parents[2]
RECIPES = ("uuid", "pattern_67", "new_language")
ONE_UPDATE = ["--per_device_train_batch_size", "32", "--max_steps", "6"]
SEVERAL_UPDATES = ["--per_device_train_batch_size", "16", "--steps_per_generation", "2", "--num_iterations", "2"]
SEVERAL_UPDATES += ["--max_steps", "14"]
SMALL = ["--num_generations", "16", "--student_batch_size", "16", "--evaluate", "false", "--save_strategy", "steps"]
TIMES = ("seconds", "step_time", "runtime", "per_second")  # figures of a clock
CONTEXT = multiprocessing.get_context("forkserver")  # runs need not import everything again
CONTEXT.set_forkserver_preload(["trl_dpg.scripts.dpg", "trl_dpg.trainer"])


@dataclass(frozen=True)
class Case:
    """A run to kill: its recipe, if a generation batch serves several updates, and if it is killed while it saves."""

    number: int
    recipe: str
    several: bool
    saving: bool


def plan(number: int) -> list[Case]:
    return [Case(k, RECIPES[k % 3], k % 2 == 0, k // 6 % 3 == 0) for k in range(number)]


def start(case: Case, folder: Path, *arguments: str) -> multiprocessing.process.BaseProcess:
    """Start a run. Its output is appended to `<folder>.log`."""
    updates = SEVERAL_UPDATES if case.several else ONE_UPDATE
    recipe = ROOT / "recipes" / case.recipe / "mini.yaml"
    argv = ["dpg", "--config", str(recipe), "--output_dir", str(folder), *updates, *SMALL, *arguments]
    process = CONTEXT.Process(target=_run, args=(argv, f"{folder}.log"))
    process.start()
    return process


def _run(argv: list[str], log: str) -> None:
    from trl_dpg import cli

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    cli.main(argv)


def whole_run(case: Case, output_dir: Path) -> Path:
    """The run that nothing stops. It is made once for all cases alike."""
    folder = output_dir / f"{case.recipe}{'_several' * case.several}"
    if not (folder / "summary.json").exists():
        process = start(case, folder, "--save_steps", "2")
        process.join()
        if process.exitcode:
            raise RuntimeError(f"The run that nothing stopped failed, see {folder}.log")
    return folder


def kill(process, case: Case, folder: Path, save_steps: int, chance: random.Random) -> None:
    """Kill a run at a random moment: while it writes one of its checkpoints, or after a number of steps."""
    steps = 14 if case.several else 6
    wanted = chance.randint(1, steps // save_steps) if case.saving else chance.randint(0, steps - 1)
    pause = chance.uniform(0, 0.06 if case.saving else 0.5)
    saved: set[int] = set()
    while process.is_alive():
        saved |= set(checkpoints(folder))
        if wanted <= (len(saved) if case.saving else num_logged(folder)):
            break
        time.sleep(0.001)
    process.join(pause)
    process.kill()
    process.join()


def num_logged(folder: Path) -> int:
    log = folder / "dpg_log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def outcome(folder: Path) -> tuple[str, str, str, bytes]:
    """What must be the same in two runs, without the figures of a clock."""

    def steady(figures: dict) -> str:
        kept = {name: value for name, value in figures.items() if not any(time in name for time in TIMES)}
        return json.dumps(kept, sort_keys=True)

    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "dpg_log.jsonl").read_text().splitlines()]
    logs = [line | {"scalars": steady(line["scalars"])} for line in lines if "train_runtime" not in line["scalars"]]
    steps = json.dumps([line["step"] for line in lines])
    return steady(summary["curves"]), json.dumps(logs), steps, (folder / "model.safetensors").read_bytes()


def run_case(case: Case, output_dir: Path) -> dict:
    """Kill a run, let it go on, and compare."""
    whole = whole_run(case, output_dir)
    chance = random.Random(case.number)
    folder = output_dir / f"case_{case.number}"
    for path in (folder, folder.with_name(f"{folder.name}_world")):
        shutil.rmtree(path, ignore_errors=True)
    save_steps = chance.randint(1, 3)
    keep = ["--save_steps", str(save_steps), "--save_total_limit", str(chance.randint(1, 3))]
    kill(start(case, folder, *keep), case, folder, save_steps, chance)
    found = [why_not_whole(path) is None for path in checkpoints(folder).values()]
    finished = (folder / "summary.json").exists()
    process = start(case, folder, *keep, "--resume_from_checkpoint", "auto")
    process.join()
    same = process.exitcode == 0 and outcome(folder) == outcome(whole)
    result = {"whole": sum(found), "half_written": len(found) - sum(found), "finished": finished}
    result |= {"exit": process.exitcode, "same": same}
    if same:
        for path in (folder, folder.with_name(f"{folder.name}_world")):
            shutil.rmtree(path)
    return asdict(case) | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/faults"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    journal = args.output_dir / "kills.jsonl"
    done = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    for case in plan(args.kills):
        if case.number not in {result["number"] for result in done}:
            done.append(run_case(case, args.output_dir))
            append_line(journal, done[-1])
            print(json.dumps(done[-1]), flush=True)
    same, half = sum(result["same"] for result in done), sum(result["half_written"] > 0 for result in done)
    print(f"{same} of {len(done)} runs ended as those that nothing stopped; {half} were killed while they saved.")
    sys.exit(same < len(done))


if __name__ == "__main__":
    main()
