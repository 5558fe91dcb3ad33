"""The horizontal mode against the same arithmetic in a plain loop, and against Flower's simulation.

    python benchmarks/horizontal.py --json horizontal.json --flower-python out/flower/bin/python

One workload in three programs (horizontal_programs.py), each a process of its own, with one thread for linear algebra:
scikit-learn's logistic regression on digits, dealt by Dirichlet shares, averaged after every round. `over_bare_loop` is
of the loops alone, `over_bare_program` of the programs with all that they import; both in CPU seconds. Then thousands
of simulated clients, the cost of a secure sum, and of a round over sockets. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
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
from vfl.horizontal.context import Company
from vfl.horizontal.secure_aggregation import aggregate, contribute

HERE = Path(__file__).parent
LOOPS = 80  # over the clients, times the repeats of the programs: a loop of ten takes a fraction of a second
TARGETS = {
    "over_bare_loop": (1.2, "at most"),
    "over_bare_loop_100": (1.2, "at most"),
    "over_bare_program": (1.2, "at most"),
    "over_bare_program_100": (1.2, "at most"),
    "over_flower": (5.0, "at least"),
    "over_flower_100": (5.0, "at least"),
    "rss_mb": (280.0, "at most"),
    "round_overhead_ms": (50.0, "at most"),
    "simulate_1000_seconds": (180.0, "at most"),
}


def run(python: str, folder: Path, program: str, *arguments: object) -> dict[str, float]:
    """What a program prints, with the seconds and CPU seconds of all its processes, imports included, and the most
    memory that they had."""
    result, output = folder / "result.json", folder / "output"
    command = [sys.executable, str(HERE / "measured.py"), str(result), python]
    command += [str(HERE / "horizontal_programs.py"), program, str(folder), *map(str, arguments)]
    with output.open("wb") as file, (folder / "log").open("wb") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=file, stderr=log, env=one_thread)
    if done.returncode:
        raise SystemExit((folder / "log").read_text()[-2000:])
    found = json.loads(result.read_text())
    told = json.loads(output.read_text().splitlines()[-1])
    return {"seconds": found["end"] - found["start"], "cpu": found["cpu"], "rss": found["rss"], **told}


def workload(clients: int, rounds: int, flower: str | None, repeats: int) -> dict[str, Any]:
    """The same rounds in each program, the fastest of some runs, taken in turn; then the loops alone, likewise."""
    from sklearn.datasets import load_digits

    from vfl.horizontal.partition import Partition

    images = load_digits()
    parts = Partition.parse("dirichlet:0.3").deal(images.target, clients, 0)
    programs = {"bare": sys.executable, "ours": sys.executable} | ({"flower": flower} if flower else {})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "x.npy", images.data / 16)
        np.save(folder / "y.npy", images.target)
        (folder / "parts.json").write_text(json.dumps([rows.tolist() for rows in parts]))
        for _ in range(repeats):
            for program, python in programs.items():
                if program == "flower" and program in found:
                    continue  # once: it takes long and varies little
                one = run(python, folder, program, rounds)
                before = found.get(program, one)
                found[program] = {key: min(value, before[key]) for key, value in one.items()}
        loops = run(sys.executable, folder, "alternate", rounds, max(3, LOOPS // clients) * repeats)
    for program, one in found.items():
        if not np.isclose(one["norm"], found["bare"]["norm"], rtol=1e-6):
            raise SystemExit(
                f"{program} ends with other weights than the bare loop: {one['norm']}, {found['bare']['norm']}"
            )
    return found | {"loops": {name: loops[name] for name in ("bare", "ours")}}


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
    context = Company(session, 0, 0, names, clients // 2 + 1).within(2.0**24)
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
    """Seconds of a round over real sockets, a process a client, secure aggregation on.

    From the start of the first round to that of the last, all included: tasks, masks, ledgers, what the clients train.
    That is one step on 20 rows, next to nothing, so the whole counts as overhead.
    """
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
        begun: list[tuple[int, float]] = []

        def note(name: str, line: str) -> None:
            event = json.loads(line) if name == "lead" and line.startswith('{"phase"') else {"phase": ""}
            if event["phase"] == "train" and event["done"] < rounds:
                begun.append((event["done"], time.perf_counter()))

        codes = launch(commands, timeout=300, on_output=note)
        if any(codes.values()):
            raise RuntimeError(f"a run of eleven processes ended with {codes}")
    (first, start), (last, end) = begun[0], begun[-1]
    return (end - start) / (last - first)


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
    rounds_ms: dict[int, list[float]] = {10: [], 9: []}  # by clients, besides the coordinator

    def measure_rounds() -> None:
        """Now and then, since what else the machine does comes and goes, and only adds."""
        for clients, found in rounds_ms.items():
            found.append(1000 * round_overhead(clients))

    for clients, rounds, suffix in ((10, 10, ""), (100, 5, "_100")):
        found = workload(clients, rounds, flower, args.repeats)
        loops = found.pop("loops")
        for program, one in found.items():
            text = f"{clients} clients x {rounds} rounds, {program}:"
            loop = f", its loop {loops[program]:.2f} s of CPU" if program in loops else ""
            print(f"{text:36} {one['seconds']:6.2f} s, {one['rss'] / 1e6:5.0f} MB{loop}", flush=True)
        figures[f"over_bare_loop{suffix}"] = loops["ours"] / loops["bare"]
        figures[f"over_bare_program{suffix}"] = found["ours"]["cpu"] / found["bare"]["cpu"]
        if flower:
            figures[f"over_flower{suffix}"] = found["flower"]["seconds"] / found["ours"]["seconds"]
        if not suffix:
            figures["rss_mb"] = found["ours"]["rss"] / 1e6
        figures[f"programs{suffix}"] = found
        measure_rounds()
    figures["secure_sum"] = cost = secure_sum(50, 100_000, 5)
    print(
        f"secure sum, 50 clients x 100,000 numbers, 5 dropped: {cost['seconds']:.1f} s; CPU: coordinator "
        f"{cost['coordinator_cpu_seconds']:.2f} s, a client {cost['client_cpu_seconds']:.3f} s; a client sends "
        f"{cost['client_bytes'] / 1e6:.2f} MB where the plain numbers are {cost['plain_bytes'] / 1e6:.2f} MB",
        flush=True,
    )
    measure_rounds()
    figures["simulate_1000_seconds"] = simulated(secure=False)
    print(f"1,000 clients x 20 rounds: {figures['simulate_1000_seconds']:.1f} s", flush=True)
    measure_rounds()
    figures["simulate_1000_secure_seconds"] = simulated(secure=True)
    print(f"1,000 clients, one secure round with 32 neighbours each: {figures['simulate_1000_secure_seconds']:.1f} s")
    measure_rounds()
    figures |= {"round_overhead_ms": min(rounds_ms[10]), "round_overhead_runs_ms": rounds_ms[10]}
    figures |= {
        "round_overhead_ten_processes_ms": min(rounds_ms[9]),
        "round_overhead_ten_processes_runs_ms": rounds_ms[9],
    }
    for clients, found_ms in rounds_ms.items():
        runs = ", ".join(f"{one:.0f}" for one in found_ms)
        print(f"a round over sockets, {clients} clients and a coordinator: {runs} ms")
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
