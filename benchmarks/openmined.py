"""Both parties of openmined-psi in one process; runs in an environment of its own, see `make bench`.

    python benchmarks/openmined.py CLIENT_IDS SERVER_IDS > RESULT.json

The files hold one id a line. The client learns which of its ids are common (raw list, no Bloom filter or Golomb set).
Every message is serialised by its sender and parsed by its receiver. CPU seconds are of this process, files not
counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import private_set_intersection.python as psi


def main() -> None:
    ours, theirs = (Path(name).read_text().split() for name in sys.argv[1:3])
    seconds: dict[str, float] = {}
    sent = 0

    def step(name: str, since: float) -> float:
        seconds[name] = time.process_time() - since
        return time.process_time()

    wall, start = time.perf_counter(), time.process_time()
    client, server = psi.client.CreateWithNewKey(True), psi.server.CreateWithNewKey(True)
    setup = server.CreateSetupMessage(1e-12, len(ours), theirs, psi.DataStructure.RAW).SerializeToString()
    now = step("setup", start)
    request = client.CreateRequest(ours).SerializeToString()
    now = step("request", now)
    received = psi.Request()
    received.ParseFromString(request)
    response = server.ProcessRequest(received).SerializeToString()
    now = step("response", now)
    known, answer = psi.ServerSetup(), psi.Response()
    known.ParseFromString(setup)
    answer.ParseFromString(response)
    common = client.GetIntersection(known, answer)
    step("intersection", now)
    wall, sent = time.perf_counter() - wall, len(setup) + len(request) + len(response)
    found = sorted(ours[i] for i in common)
    print(
        json.dumps(
            {
                "cpu": sum(seconds.values()),
                "wall": wall,
                "seconds": seconds,
                "bytes": sent,
                "size": len(found),
                "digest": hashlib.sha256("\n".join(found).encode()).hexdigest(),
                "version": psi.__version__,
                "python": sys.version.split()[0],
                "suite": "P-256, SHA-256, raw",
            }
        )
    )


if __name__ == "__main__":
    main()
