"""A launcher of ranks that load nothing: ``guarded.py GUARD TIMEOUT RANK …``, each RANK a shell's command.

``$WAIT`` of a command waits for the others within ``guarded`` of the file GUARD, as a rank that connects. Prints how
each rank ended; with a TERM it ends all ranks and exits with 1, as mpirun does.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def wait(guard: str, timeout: str, seconds: str) -> None:
    """``seconds``, within it; before that its process gets every signal that a launcher might send."""
    import time

    sys.path.insert(0, str(Path(guard).parent))
    module = __import__(Path(guard).stem)
    with module.guarded(2, float(timeout) or None):
        (child,) = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for number in NUMBERS:
            os.kill(int(child), number)
        time.sleep(float(seconds))


def main(guard: str, timeout: str, *ranks: str) -> None:
    waits = f"{sys.executable} -I -S {__file__} wait {guard} {timeout or 0}"
    processes = []
    for rank, command in enumerate(ranks):
        environ = {
            "PATH": os.environ["PATH"],
            "PMIX_NAMESPACE": f"here-{os.getpid()}",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(len(ranks)),
            "WAIT": waits,
        }
        if command.startswith("bare "):  # as one that has written over its variables
            environ = {}
        words = command.removeprefix("bare ").split() if not environ else ["sh", "-c", command + "\nexit $?"]
        processes.append(subprocess.Popen(words, env=environ, start_new_session=True))

    def end(number: int, frame: object) -> None:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    print(*(process.wait() for process in processes))


if __name__ == "__main__":
    if sys.argv[1] == "wait":
        wait(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
