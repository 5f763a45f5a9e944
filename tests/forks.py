"""Runs scripts in forks of a process that has imported torch once: starting one takes no time.

Reads a JSON line {"argv", "cwd", "out", "err", "processes", "port"} a run from stdin and answers
with its exit status. Of several processes each gets what torchrun sets, and ends with the others.
"""

import json
import os
import runpy
import signal
import sys

import torch._dynamo  # noqa: F401  every optimizer imports it

import train_finetune  # noqa: F401
import train_pretrain  # noqa: F401


def start(job, rank):
    """Forks; the child comes back as 0, and becomes the run."""
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, number in (job["out"], 1), (job["err"], 2):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(job["cwd"])
        if job["processes"] > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
                "LOCAL_WORLD_SIZE": str(job["processes"])}
        sys.argv = job["argv"]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    return child


for line in sys.stdin:
    job, failed = json.loads(line), 0
    running = {start(job, rank) for rank in range(job["processes"])}
    while running:
        child, status = os.wait()
        running.remove(child)
        failed = failed or os.waitstatus_to_exitcode(status)
        for other in running if failed else ():
            os.kill(other, signal.SIGKILL)
    print(failed, flush=True)
