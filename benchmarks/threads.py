"""Steps with one thread and with all, by the size of the network and the load of the machine.

    python benchmarks/threads.py

Each row is a network on synthetic data. Its training steps are timed with one thread and with all,
in turns, in a process of its own for each OMP_WAIT_POLICY. "Busy" is the number of processes that
compute beside it, as on a shared machine. The least time is the one that others disturbed least.
The rule of equipoise.training.threads lies between the rows: it takes all threads from a number of
floating-point operations on.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

from command import Command

from equipoise.files import write_json
from equipoise.provenance import provenance

NETWORKS = {
    "table of 16, width 2": ((16,), {"batch_size": 256, "width": 2}),
    "table of 16, width 16": ((16,), {"batch_size": 256, "width": 16}),
    "table of 100, width 32": ((100,), {"batch_size": 256, "width": 32}),
    "table of 100, width 128": ((100,), {"batch_size": 256, "width": 128}),
    "1 x 8 x 8, width 4": ((1, 8, 8), {"batch_size": 64, "width": 4}),
    "1 x 8 x 8, width 32": ((1, 8, 8), {"batch_size": 64, "width": 32}),
    "1 x 28 x 28, width 8": ((1, 28, 28), {"batch_size": 64, "width": 8}),
    "1 x 28 x 28, width 32": ((1, 28, 28), {"batch_size": 128, "width": 32}),
    "3 x 64 x 64, width 16": ((3, 64, 64), {"batch_size": 64, "width": 16}),
}
POLICIES = ("default", "active", "passive")
SPIN = "while True: pass"


def measure(name, rounds):
    """Print the seconds of a step with one thread and with all, as JSON."""
    import numpy as np
    import torch

    from equipoise.config import make_config
    from equipoise.data import load
    from equipoise.training.setup import make_model
    from equipoise.training.threads import step_operations
    from equipoise.training.trainer import Trainer

    shape, values = NETWORKS[name]
    steps = 5
    n = steps * values["batch_size"]
    images = np.random.default_rng(0).normal(size=(round(n / 0.8), *shape)).astype(np.float32)
    fixed = {"latent_dim": 8, "accelerator": "cpu", "noise_correlation": "none"}
    config = make_config(values | fixed)
    data = load(images)

    threads = torch.get_num_threads()
    model = make_model(data, config)
    trainer = Trainer(model, data, config)
    trainer._look_at_data()
    trainer._enter_stage()

    seconds = {1: [], threads: []}
    for turn in range(rounds + 1):
        for number, times in seconds.items():
            torch.set_num_threads(number)
            started = time.perf_counter()
            trainer._train_epoch()
            if turn:  # the first warms up
                times.append((time.perf_counter() - started) / len(trainer.training))

    row = {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations": step_operations(model, config.batch_size),
        "threads": threads,
    }
    for name, times in {"one": seconds[1], "all": seconds[threads]}.items():
        row[f"milliseconds_with_{name}"] = 1000 * statistics.median(times)
        row[f"least_milliseconds_with_{name}"] = 1000 * min(times)
    print(json.dumps(row))


@contextmanager
def busy(number):
    """Let other processes compute meanwhile."""
    with ExitStack() as stack:
        for _ in range(number):
            process = subprocess.Popen([sys.executable, "-c", SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def child(name, policy, rounds):
    """Measure in a new process, since the policy is read once."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    if policy != "default":
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, __file__, "--measure", name, "--rounds", str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main():
    """Measure, print and write the JSON."""
    parser = Command(__doc__, "results/benchmark-threads.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--measure", metavar="NETWORK", help="what the subprocess runs")
    options = parser.parse_args()

    if options.measure:
        measure(options.measure, options.rounds)
        return
    if options.tiny:
        options.networks, options.policies = ["1 x 8 x 8, width 4"], ["default"]
        options.busy, options.rounds = [0], 1

    rows = []
    for number in options.busy:
        with busy(number):
            for name in options.networks:
                for policy in options.policies:
                    load = os.getloadavg()[0]
                    row = {"busy": number, "policy": policy, "load_before": load}
                    rows.append(row | child(name, policy, options.rounds))
                    times = (f"milliseconds_with_{word}" for word in ("one", "all"))
                    one, every = (
                        f"{rows[-1][time]:.2f} (least {rows[-1][f'least_{time}']:.2f}) ms"
                        for time in times
                    )
                    print(
                        f"busy {number}, {policy:7}, {name:28}: "
                        f"{rows[-1]['operations']:.1e} operations, "
                        f"{one} with one, {every} with all",
                        flush=True,
                    )

    result = provenance() | {
        "cores": os.cpu_count(),
        "nice": os.nice(0),
        "rows": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
