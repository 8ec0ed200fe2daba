"""Do two hosts make the bytes of one process? Rehearsed on one machine.

    python benchmarks/two_hosts.py                        # two agents that meet over localhost
    sudo -E python benchmarks/two_hosts.py --namespaces   # and in two network namespaces (Linux)

A "host" is an agent of its own (``torchrun`` with ``--nnodes 2`` and a c10d rendezvous), which starts
its worker processes. In the second form each agent lives in a network namespace with one virtual
cable to the other, so that all traffic crosses an interface and nothing is reachable as localhost.
The file system is shared, as docs/cluster.md asks. Commands: ``csm run`` and ``das index`` on the
bundled digits, small. Writes two_hosts.json.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _environment import environment

COMMANDS = {
    "csm run": [
        *("csm", "run", "--preset", "digits", "--device", "cpu"),
        "--set=generate.plan.groups=12",
        "--set=generate.groups_per_shard=2",
        "--set=generate.generation.sampler.preset=fast",
        "--set=annotation.real.rows=400",
    ],
    "das index": [
        *("das", "index", "--preset", "digits", "--device", "cpu"),
        "--set=data.rows=120",
        "--set=features.timesteps=[400]",
        "--set=features.params=dec.8x8_block1",
        "--set=features.projection.dim=256",
        "--set=store.shard_rows=24",
    ],
}
NAMES = (f"diffcal-a-{os.getpid()}", f"diffcal-b-{os.getpid()}")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LIMIT = 1500  # seconds for one launch


def artefacts(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that holds results (summaries name folders and are left out)."""
    kinds = (".parquet", ".safetensors", ".png")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in kinds
    }


def torchrun(host: int, workers: int, endpoint: str) -> list[str]:
    """Arguments of the agent on one host.

    An agent finds out by name whether the endpoint is its own host, which fails where the name leads
    to another interface; so it is told.
    """
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", str(workers)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "rehearsal"),
        *("--rdzv-conf", f"is_host={host == 0},read_timeout=300"),
        *("-m", "diffcal"),
    ]


def launch(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    """Run all commands at once and wait for them.

    Raises:
        RuntimeError: one failed; with what it said.
    """
    common = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "DIFFCAL_PROGRESS": "0"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | common | environment_,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environment_ in zip(commands, environments, strict=True)
    ]
    said = [process.communicate(timeout=LIMIT)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(process.args)}\n{text[-3000:]}")  # type: ignore[arg-type]


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def network_namespaces() -> Iterator[None]:
    """Two network namespaces joined by a virtual cable; removed at the end."""

    def run(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    made = []
    try:
        for name in NAMES:
            run("netns", "add", name)
            made.append(name)
        run(
            *("link", "add", "cable", "netns", NAMES[0]),
            *("type", "veth", "peer", "name", "cable", "netns", NAMES[1]),
        )
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            inside = ("-n", name)
            run(*inside, "addr", "add", f"{address}/24", "dev", "cable")
            run(*inside, "link", "set", "cable", "up")
            run(*inside, "link", "set", "lo", "up")
        yield
    finally:
        for name in made:
            run("netns", "del", name)


def main() -> None:
    """Compare one process with two hosts and write the result."""
    parser = argparse.ArgumentParser(description="Two hosts against one process.")
    parser.add_argument("--namespaces", action="store_true", help="also over network namespaces")
    parser.add_argument("--command", choices=list(COMMANDS), help="only this one")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each host")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.command] if args.command else COMMANDS:
            command = COMMANDS[name]
            alone = Path(folder) / "alone" / name.replace(" ", "-")
            launch([[sys.executable, "-m", "diffcal", *command, "--out", str(alone)]], [{}])
            wanted = artefacts(alone)
            workers = args.workers
            for form in ("localhost", "namespaces") if args.namespaces else ("localhost",):
                out = Path(folder) / f"{form}-{workers}" / name.replace(" ", "-")
                out.parent.mkdir(parents=True, exist_ok=True)
                started = time.monotonic()
                if form == "localhost":
                    endpoint = f"127.0.0.1:{free_port()}"
                    agents = [torchrun(host, workers, endpoint) for host in range(2)]
                    # Beside other things it may be that the host's own name leads nowhere.
                    environments = [{"GLOO_SOCKET_IFNAME": "lo"}] * 2
                    agents = [
                        [*agent[:-2], "--local-addr", "127.0.0.1", *agent[-2:]] for agent in agents
                    ]
                    launch([[*a, *command, "--out", str(out)] for a in agents], environments)
                else:
                    with network_namespaces():
                        agents = [
                            [
                                *("ip", "netns", "exec", NAMES[node]),
                                *torchrun(node, workers, f"{ADDRESSES[0]}:29400")[:-2],
                                *("--local-addr", ADDRESSES[node], "-m", "diffcal"),
                            ]
                            for node in range(2)
                        ]
                        environments = [{"GLOO_SOCKET_IFNAME": "cable"}] * 2
                        launch([[*a, *command, "--out", str(out)] for a in agents], environments)
                found = artefacts(out)
                results.append(
                    {
                        "command": name,
                        "hosts": 2,
                        "over": form,
                        "workers_per_host": workers,
                        "files": len(wanted),
                        "same_bytes": found == wanted,
                        "differing": sorted(
                            key for key in {*found, *wanted} if found.get(key) != wanted.get(key)
                        ),
                        "seconds": round(time.monotonic() - started, 1),
                    }
                )
                sys.stderr.write(f"{json.dumps(results[-1])}\n")
    if args.command and args.out.exists():  # keep what other commands gave
        earlier = json.loads(args.out.read_text("utf-8"))["results"]
        results = [row for row in earlier if row["command"] != args.command] + results
    data = {"results": results, "environment": environment()}
    args.out.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
