"""Takes the place of ``finetune train`` for a tenth of a second: the seed of its run says how it ends."""

import json
import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1]).parent
seed = int(folder.name.split("-s")[-1].split("-")[0])
metrics, started = folder / "metrics.jsonl", folder / "started"
with started.open("a") as file:
    file.write(
        f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('OMP_NUM_THREADS')}\n"
    )
print("a warning", file=sys.stderr)
if seed == 101:
    print("Error: no data here", file=sys.stderr)
    sys.exit(2)
if seed == 102 and len(started.read_text().splitlines()) == 1:
    os.kill(os.getpid(), 9)
if seed == 103:
    raise OSError(28, "No space left on device")
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0  # it goes on where it was
pause = 0.02 if seed < 50 else 0.5
for step in range(done + 1, 11):
    time.sleep(pause)
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "seconds": pause, "loss": seed / step}) + "\n")
if seed == 104:
    raise ValueError("odd")
known = {
    "params": {"trained": 5},
    "stored_bytes": 20,
    "cost": {"step_seconds_median": 0.02, "peak_memory_bytes": 10**8},
    "group_hash": "g",
}
result = known | {
    "format": 1,
    "status": "finished",
    "error": None,
    "steps": 10,
    "seed": seed,
    "metrics": {"test": {"accuracy": seed / 100}},
}
temporary = folder / f".{os.getpid()}"
temporary.write_text(json.dumps(result))
temporary.replace(folder / "result.json")
