"""Two processes in network namespaces of their own, joined by a pair of virtual interfaces with a set bandwidth.

The namespaces have no names and end with the processes. The bandwidth is the kernel's token bucket (``tc … tbf``) at
both ends; its bucket holds a quarter of a millisecond, so that small messages have to keep to it, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import IO

from fedmpi.errors import ConfigError

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "pair"
_MTU = 1500


class Pair:
    """``command`` twice, each time in its own namespace; a context manager that ends them.

    Attributes:
      processes: their standard inputs and outputs are pipes of text; errors go to ours.

    Raises:
      ConfigError: namespaces cannot be made here; says what is missing.
    """

    def __init__(self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> None:
        require()
        self.processes = [self._start(c, e) for c, e in zip(commands, environments, strict=True)]
        try:
            ids = [str(process.pid) for process in self.processes]
            run(
                "ip",
                "link",
                "add",
                DEVICE,
                "netns",
                ids[0],
                "type",
                "veth",
                "peer",
                "name",
                DEVICE,
                "netns",
                ids[1],
            )
            for process, address in zip(self.processes, ADDRESSES, strict=True):
                self._inside(process, "ip", "address", "add", f"{address}/24", "dev", DEVICE)
                self._inside(process, "ip", "link", "set", DEVICE, "gso_max_size", "16384", "up")
            self.tell("go")
        except BaseException:
            self.close()
            raise

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """It starts when a line comes: then its interface is there."""
        waiting = 'ip link set lo up && echo up && read -r go && exec "$@"'
        process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", waiting, "sh", *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if _pipe(process.stdout).readline() != "up\n":
            raise ConfigError("link study: `unshare --net` made no network namespace")
        return process

    def _inside(self, process: subprocess.Popen[str], *command: str) -> None:
        run("nsenter", f"--net=/proc/{process.pid}/ns/net", *command)

    def tell(self, line: str) -> None:
        """Write a line to each process."""
        for process in self.processes:
            try:
                _pipe(process.stdin).write(line + "\n")
                _pipe(process.stdin).flush()
            except BrokenPipeError:
                pass  # it has ended: heard() says so

    def heard(self) -> list[str]:
        """The next line of each process; empty of one that has ended."""
        return [_pipe(process.stdout).readline() for process in self.processes]

    def shape(self, bits: float | None) -> None:
        """The bandwidth of both directions, in bits a second; None for what the kernel can do."""
        for process in self.processes:
            if bits is None:
                self._inside(process, "tc", "qdisc", "replace", "dev", DEVICE, "root", "noqueue")
                continue
            burst = max(2 * _MTU, round(bits / 8 / 4000))
            rate = f"tbf rate {round(bits)}bit burst {burst} limit {max(burst, 1 << 22)}".split()
            self._inside(process, "tc", "qdisc", "replace", "dev", DEVICE, "root", *rate)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"link study: {' '.join(command)}: {done.stderr.strip()}")


def require() -> None:
    """
    Raises:
      ConfigError: what keeps this machine from having two namespaces.
    """
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"link study: needs {', '.join(missing)} (Debian, Ubuntu: apt-get install iproute2 util-linux)"
        )
    if os.geteuid():
        raise ConfigError(
            "link study: making network namespaces needs root, or a user namespace in which you are: "
            "unshare --user --map-root-user --net python -m configs.studies link"
        )
