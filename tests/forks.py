"""Runs scripts in forks of a process that has imported torch once: starting one takes no time.

Reads a JSON line {"argv", "cwd", "out", "err", "processes", "port"} a run from stdin and answers
with its exit status. Of several processes each gets what torchrun sets, and ends with the others;
each has a folder of its own to work in if "cwd" is a list. A job with "signal" is sent it, or the
last worker process that it started is ("worker"), when its "log" has three steps.
"""

import atexit
import json
import os
import pathlib
import runpy
import signal
import sys
import time
import warnings

import torch._dynamo  # noqa: F401  every optimizer imports it

import data
import train_finetune  # noqa: F401
import train_pretrain

LATER = DeprecationWarning, FutureWarning  # what they warn of is an error in a run


def prepare():
    """Makes the built-in clips that most runs need before the first; each fork has them."""
    window = train_pretrain.window_of(train_pretrain.parse_args([]))
    for seed, count in (0, 40), (1_000_000, train_pretrain.HELD_OUT), (2_000_000, 64):
        for i in range(count):
            data.generated(seed, i, window, data.MODALITIES)


def start(job, rank):
    """Forks; the child comes back as 0, and becomes the run."""
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, number in (job["out"], 1), (job["err"], 2):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(job["cwd"][rank] if isinstance(job["cwd"], list) else job["cwd"])
        if job["processes"] > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
                "LOCAL_WORLD_SIZE": str(job["processes"])}
        sys.argv = job["argv"]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for kind in LATER:
            warnings.simplefilter("error", kind)
        leave(sys.argv[0])
    return child


def leave(script):
    """Runs a script and ends the process; without freeing all of torch, which takes 1.5 s."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def interrupt(job, running):
    """Sends a job its signal when it is time."""
    log = pathlib.Path(job["log"])
    if not log.exists() or log.read_text().count('"loss"') < 3:
        time.sleep(0.01)
        return

    to = list(running)
    if job["worker"]:
        to = pathlib.Path(f"/proc/{to[0]}/task/{to[0]}/children").read_text().split()[-1:]
    for process in to:
        os.kill(int(process), job["signal"])
    job["signal"] = 0


def wait(job, running):
    """Waits for all processes of a job -> 0, or how the first failed; then the others are ended."""
    failed = 0
    while running:
        child, status = os.waitpid(-1, os.WNOHANG if job["signal"] else 0)
        if not child:
            interrupt(job, running)
            continue

        running.remove(child)
        failed = failed or os.waitstatus_to_exitcode(status)
        for other in running if failed and not job["log"] else ():
            os.kill(other, signal.SIGKILL)
    return failed


warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
prepare()
for line in sys.stdin:
    job = {"signal": 0, "log": "", "worker": False, **json.loads(line)}
    print(wait(job, {start(job, rank) for rank in range(job["processes"])}), flush=True)
