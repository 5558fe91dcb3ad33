"""The horizontal mode against the same arithmetic in a plain loop, and against Flower's simulation.

    python benchmarks/horizontal.py --json horizontal.json --flower-python out/flower/bin/python

One workload in three programs, each a process of its own, with one thread for linear algebra:
scikit-learn's logistic regression on digits, dealt by Dirichlet shares, averaged after every round. Then thousands of
simulated clients, and the cost of a secure sum. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

if not sys.flags.safe_path:
    sys.path.pop(0)

from parties.channel import Channel
from parties.horizontal import Clients, Horizontal
from parties.identity import Identity
from parties.launch import launch
from parties.ledger import Ledger
from parties.memory import links
from parties.message import CLASSES
from parties.party_file import Party
from parties.workers import Workers
from vfl.horizontal.context import Context, Quantisation
from vfl.horizontal.secure_aggregation import aggregate, contribute

HERE = Path(__file__).parent
TARGETS = {
    "over_bare_loop": (1.2, "at most"),
    "over_bare_loop_100": (1.2, "at most"),
    "over_flower": (5.0, "at least"),
    "over_flower_100": (5.0, "at least"),
    "rss_mb": (280.0, "at most"),
    "round_overhead_ms": (50.0, "at most"),
    "simulate_1000_seconds": (180.0, "at most"),
}
STEPS = 5  # of L-BFGS that a client takes in a round

# ---- the workload, as a program: its folder has x.npy, y.npy and each client's row numbers

COMMON = """
import sys, json, time
import numpy as np
folder, rounds, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x, y = np.load(folder + "/x.npy"), np.load(folder + "/y.npy")
parts = [(x[rows], y[rows]) for rows in json.load(open(folder + "/parts.json"))]
classes = list(range(10))
"""

# Every client scores the weights that it receives, trains from them and sends its own; a last score at the end.
LOCAL = """
import warnings
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
warnings.simplefilter("ignore", ConvergenceWarning)

class Local:
    def __init__(self, x, y):
        missing = [label for label in classes if label not in y]  # rows of weight zero for classes it has not
        self.x, self.y = x, y
        self.padded = np.vstack([x, np.zeros((len(missing), x.shape[1]))]), np.append(y, missing)
        self.weight = np.repeat([1.0, 0.0], [len(y), len(missing)])
        self.model = LogisticRegression(max_iter=steps, warm_start=True)
        self.model.fit(np.zeros((10, x.shape[1])), classes)  # every attribute

    def get(self):
        return [self.model.coef_, self.model.intercept_]

    def set(self, weights):
        self.model.coef_, self.model.intercept_ = (part.copy() for part in weights)

    def fit(self):
        self.model.fit(*self.padded, self.weight)

    def score(self):
        right = float(np.mean(self.model.predict(self.x) == self.y))
        chances = self.model.predict_proba(self.x)[np.arange(len(self.y)), self.y]
        return float(-np.mean(np.log(np.maximum(chances, 1e-300)))), right
"""

BARE = (
    COMMON
    + LOCAL
    + """
begin = time.process_time()
locals_ = [Local(*part) for part in parts]
weights = [np.zeros((10, x.shape[1])), np.zeros(10)]
scores = []
for number in range(rounds + 2):
    means, rows = [0.0, 0.0], 0
    for one in locals_:
        one.set(weights)
        scores.append(one.score())
        if 0 < number <= rounds:  # before the first and after the last there is a score alone
            one.fit()
            means = [mean + len(one.y) * part for mean, part in zip(means, one.get())]
            rows += len(one.y)
    if rows:
        weights = [mean / rows for mean in means]
norm = float(np.sqrt(sum((part**2).sum() for part in weights)))
print(json.dumps({"norm": norm, "rounds_cpu": time.process_time() - begin}))
"""
)

OURS = (
    COMMON
    + """
from sklearn.linear_model import LogisticRegression
from parties.horizontal import Horizontal
from vfl.horizontal.models import Estimator
from vfl.horizontal.simulate import simulate
begin = time.process_time()
models = [Estimator(LogisticRegression(max_iter=steps), a, b, classes) for a, b in parts]
settings = Horizontal(model="own", strategy="fedavg", rounds=rounds, secure_aggregation="none", checkpoint=False)
outcome = simulate(settings, models)
norm = float(np.linalg.norm(outcome.weights))
print(json.dumps({"norm": norm, "rounds_cpu": time.process_time() - begin}))
"""
)

FLOWER = (
    COMMON
    + LOCAL
    + """
import logging
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
logging.getLogger("flwr").setLevel(logging.ERROR)

class Client(NumPyClient):
    def __init__(self, part):
        self.local = Local(*part)
    def fit(self, parameters, config):
        self.local.set(parameters)
        self.local.fit()
        return self.local.get(), len(self.local.y), {}
    def evaluate(self, parameters, config):
        self.local.set(parameters)
        loss, right = self.local.score()
        return loss, len(self.local.y), {"accuracy": right}

def client_fn(context):
    return Client(parts[int(context.node_config["partition-id"])]).to_client()

class Kept(FedAvg):
    def aggregate_fit(self, *given):
        found = super().aggregate_fit(*given)
        self.last = found[0]
        return found

start = [np.zeros((10, x.shape[1])), np.zeros(10)]
strategy = Kept(fraction_fit=1.0, fraction_evaluate=1.0, min_fit_clients=len(parts), min_available_clients=len(parts),
                initial_parameters=ndarrays_to_parameters(start))
def server_fn(context):
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))
run_simulation(ServerApp(server_fn=server_fn), ClientApp(client_fn=client_fn), num_supernodes=len(parts),
               backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
from flwr.common import parameters_to_ndarrays
last = parameters_to_ndarrays(strategy.last)
print(json.dumps({"norm": float(np.sqrt(sum((part**2).sum() for part in last)))}))
"""
)


def run(python: str, program: str, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds and most memory of all processes; the norm of the weights, which must be the same in all programs; CPU
    seconds of a single process after its imports, by which a loop is compared with a loop."""
    result, output = folder / "result.json", folder / "output"
    command = [sys.executable, str(HERE / "measured.py"), str(result), python, "-c", program]
    with output.open("wb") as file, (folder / "log").open("wb") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command += [str(folder), str(rounds), str(STEPS)]
        done = subprocess.run(command, stdout=file, stderr=log, env=one_thread)
    if done.returncode:
        raise SystemExit((folder / "log").read_text()[-2000:])
    found = json.loads(result.read_text())
    told = json.loads(output.read_text().splitlines()[-1])
    return {"seconds": found["end"] - found["start"], "rss": found["rss"], **told}


def workload(clients: int, rounds: int, flower: str | None, repeats: int) -> dict[str, Any]:
    """The same rounds in each program; the fastest of some runs, taken in turn."""
    from sklearn.datasets import load_digits

    from vfl.horizontal.partition import Partition

    images = load_digits()
    parts = Partition.parse("dirichlet:0.3").deal(images.target, clients, 0)
    programs = {"bare": (sys.executable, BARE), "ours": (sys.executable, OURS)}
    if flower:
        programs["flower"] = flower, FLOWER
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", images.data / 16)
        np.save(folder / "y.npy", images.target)
        (folder / "parts.json").write_text(json.dumps([rows.tolist() for rows in parts]))
        for _ in range(repeats):
            for program, (python, text) in programs.items():
                if program == "flower" and program in found:
                    continue  # once: it takes long and varies little
                one = run(python, text, folder, rounds)
                before = found.get(program, one)
                found[program] = {key: min(value, before[key]) for key, value in one.items()}
    for program, one in found.items():
        if not np.isclose(one["norm"], found["bare"]["norm"], rtol=1e-6):
            raise SystemExit(
                f"{program} ends with other weights than the bare loop: {one['norm']}, {found['bare']['norm']}"
            )
    return found


def simulated(secure: bool) -> float:
    """Seconds for 1,000 clients with 180 rows of 64 columns each: 20 rounds, or one with secure aggregation."""
    from vfl.horizontal.simulate import simulate
    from vfl.horizontal.trainer import Data

    generator = np.random.default_rng(0)
    truth, names = generator.normal(size=(64, 10)), tuple(f"x{j}" for j in range(64))
    clients = []
    for _ in range(1000):
        x = generator.normal(size=(180, 64))
        clients.append(Data(x, (x @ truth).argmax(axis=1), names, tuple(range(10))))
    given: dict[str, Any] = {"strategy": "fedavg", "checkpoint": False}
    start = time.perf_counter()
    if secure:
        settings = Horizontal(**given, rounds=1, degree=32, clients=Clients(quorum=900, deadline=600.0))
        simulate(settings, clients)
    else:
        simulate(Horizontal(**given, rounds=20, secure_aggregation="none"), clients, workers=Workers(1))
    return time.perf_counter() - start


def secure_sum(clients: int, size: int, dropped: int) -> dict[str, float]:
    """One sum over links in memory; the dropped clients vanish when their masks are already in the others' numbers."""
    names = tuple(f"c{number:02}" for number in range(clients))
    keys = {name: Identity.generate(name) for name in ("hub", *names)}
    public = {name: key.public for name, key in keys.items()}
    mesh, session = links(["hub", *names]), bytes(32)
    context = Context(session, 0, 0, names, clients // 2 + 1, Quantisation.finest(2.0**24, clients))
    values = np.random.default_rng(0).normal(size=size)

    def channel(me: str, peer: str) -> Channel:
        ids = {"our_id": public[me].key_id, "peer_id": public[peer].key_id}
        made = Channel(mesh[me][peer], peer=peer, ledger=Ledger(keys[me], None, frozenset(CLASSES)), **ids)
        made.session = session
        return made

    busy: list[float] = []

    def client(name: str, steps: int) -> None:
        start, hub = time.thread_time(), channel(name, "hub")
        plain, left = hub.send, iter(range(steps))

        def send(message: Any, timeout: float | None = None) -> None:
            if next(left, None) is None:
                raise InterruptedError
            plain(message, timeout)

        hub.send = send  # type: ignore[method-assign]
        try:
            contribute(hub, keys[name], public, context, values, set())
            busy.append(time.thread_time() - start)
        except InterruptedError:
            mesh[name]["hub"].leave()

    threads = [
        threading.Thread(target=client, args=(name, 2 if place < dropped else 5)) for place, name in enumerate(names)
    ]
    start, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    used = time.thread_time()
    done = aggregate({name: channel("hub", name) for name in names}, public, context, size, {}, 600.0)
    used = time.thread_time() - used
    for thread in threads:
        thread.join()
    if not np.allclose(done.total, (clients - dropped) * values, atol=1e-6):
        raise SystemExit("the secure sum is not the sum")
    sent = [sum(len(header) + len(payload) for header, payload in mesh[name]["hub"].sent) for name in names[dropped:]]
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "coordinator_cpu_seconds": used,
        "client_cpu_seconds": float(np.median(busy)),
        "client_bytes": float(np.median(sent)),
        "plain_bytes": 8.0 * size,
    }


AGREEMENT = """
title = "Round overhead"
purpose = "to measure"
legal_basis = "made-up numbers"
expires = 2099-12-31
{parties}
[job]
mode = "horizontal"
[columns]
features = {features}
label = "y"
[horizontal]
classes = [0, 1]
strategy = "fedavg"
rounds = {rounds}
batch = 0
checkpoint = false
[deadlines]
connect = 120
"""


def round_overhead(clients: int = 10, rounds: int = 30, columns: int = 64) -> float:
    """Seconds of a round over real sockets, a process a client, secure aggregation on: next to nothing is computed."""
    names, generator = ["lead", *(f"site{number}" for number in range(clients))], np.random.default_rng(0)
    features = [f"x{number}" for number in range(columns)]
    with tempfile.TemporaryDirectory() as given, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, folder = free.getsockname()[1], Path(given)
        free.close()
        identities = {name: Identity.generate(name) for name in names}
        parties = "".join(
            f'[[parties]]\nname = "{name}"\nrole = "{"coordinator" if name == "lead" else "client"}"\n'
            f'public_key = "{one.public}"\n' + (f'endpoint = "tcp://127.0.0.1:{port}"\n' if name == "lead" else "")
            for name, one in identities.items()
        )
        text = AGREEMENT.format(parties=parties, features=json.dumps(features), rounds=rounds)
        (folder / "agreement.toml").write_text(text)
        for name, identity in identities.items():
            identity.save(folder / f"{name}.key")
            table = ""
            if name != "lead":
                rows = np.column_stack([generator.normal(size=(20, columns)), np.arange(20) % 2])
                header = ",".join([*features, "y"])
                np.savetxt(folder / f"{name}.csv", rows, delimiter=",", header=header, comments="", fmt="%.6g")
                table = f'[table]\npath = "{name}.csv"\n'
            own = folder / f"{name}.toml"
            own.write_text(f'agreement = "agreement.toml"\nkey = "{name}.key"\noutput = "out/{name}"\n{table}')
            Party(own).sign()
        commands = {
            name: [sys.executable, "-m", "vfl", "run", str(folder / f"{name}.toml"), "--events"] for name in names
        }
        codes = launch(commands, timeout=300)
        if any(codes.values()):
            raise RuntimeError(f"a run of eleven processes ended with {codes}")
        summary = json.loads((folder / "out" / "lead" / "summary.json").read_text())
    return statistics.median(one["seconds"] for one in summary["progress"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--flower-python", help="the interpreter of an environment with flwr[simulation] and scikit-learn"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    flower = args.flower_python if args.flower_python and Path(args.flower_python).exists() else None
    if flower is None:
        print("over_flower: skipped, --flower-python names no interpreter; `make bench` makes one")
    figures: dict[str, Any] = {}
    for clients, rounds, suffix in ((10, 10, ""), (100, 5, "_100")):
        found = workload(clients, rounds, flower, args.repeats)
        for program, one in found.items():
            text = f"{clients} clients x {rounds} rounds, {program}:"
            print(f"{text:36} {one['seconds']:6.2f} s, {one['rss'] / 1e6:5.0f} MB", flush=True)
        figures[f"over_bare_loop{suffix}"] = found["ours"]["rounds_cpu"] / found["bare"]["rounds_cpu"]
        if flower:
            figures[f"over_flower{suffix}"] = found["flower"]["seconds"] / found["ours"]["seconds"]
        if not suffix:
            figures["rss_mb"] = found["ours"]["rss"] / 1e6
        figures[f"programs{suffix}"] = found
    figures["secure_sum"] = cost = secure_sum(50, 100_000, 5)
    print(
        f"secure sum, 50 clients x 100,000 numbers, 5 dropped: {cost['seconds']:.1f} s; CPU: coordinator "
        f"{cost['coordinator_cpu_seconds']:.2f} s, a client {cost['client_cpu_seconds']:.3f} s; a client sends "
        f"{cost['client_bytes'] / 1e6:.2f} MB where the plain numbers are {cost['plain_bytes'] / 1e6:.2f} MB",
        flush=True,
    )
    figures["simulate_1000_seconds"] = simulated(secure=False)
    print(f"1,000 clients x 20 rounds: {figures['simulate_1000_seconds']:.1f} s", flush=True)
    figures["simulate_1000_secure_seconds"] = simulated(secure=True)
    print(f"1,000 clients, one secure round with 32 neighbours each: {figures['simulate_1000_secure_seconds']:.1f} s")
    figures["round_overhead_ms"] = 1000 * round_overhead()
    missed = False
    for name, (target, how) in TARGETS.items():
        if name not in figures:
            continue
        met = figures[name] <= target if how == "at most" else figures[name] >= target
        missed |= not met
        print(f"{name} = {figures[name]:.2f}, target {how} {target:g}: {'met' if met else 'MISSED'}")
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("cryptography", "numpy", "scikit-learn")}
        versions |= {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
        targets = TARGETS
        args.json.write_text(json.dumps({**figures, "targets": targets, "versions": versions}, indent=1) + "\n")
    sys.exit(missed)


if __name__ == "__main__":
    main()
