"""Run scripts in forks of a process that has imported torch once: starting one takes no time."""

import atexit
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings

# The server looks for the module there: it does not take over sys.path.
TESTS = pathlib.Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preload"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_script(argv, cwd, out, err, environment):
    """Become the script: the target of a process."""
    signal.alarm(400)
    for name, number in (os.devnull, 0), (out, 1), (err, 2):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ |= environment
    sys.argv, code = argv, 1
    for kind in DeprecationWarning, FutureWarning:
        warnings.simplefilter("error", kind)

    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())

    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # without freeing all of torch, which takes a second


def send(number, processes, log, worker):
    """Send a signal to all processes, or to the first one's last worker, after three log lines."""
    while any(p.is_alive() for p in processes):
        if log.exists() and log.read_text().count('"loss"') >= 3:
            pids = [p.pid for p in processes]
            if worker:
                children = pathlib.Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text()
                pids = list(map(int, children.split()[-1:]))
            for pid in pids:
                os.kill(pid, number)
            return
        time.sleep(0.01)


def launch(argv, folders, number=0, log=None, worker=False):
    """Run a script in one process per folder, with the environment of torchrun if several.

    number: a signal to `send`. Returns a CompletedProcess; its code is that of the first failure.
    """
    count, port = len(folders), str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
        processes = []
        for rank, cwd in enumerate(folders):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count,
                     "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {k: str(v) for k, v in names.items()} if count > 1 else {}
            processes.append(
                context.Process(target=run_script, args=(argv, str(cwd), out, err, environment)))
            processes[-1].start()

        if number:
            send(number, processes, log, worker)
        while not number and any(p.exitcode is None for p in processes):
            if any(p.exitcode for p in processes):  # one failed: the others would wait for it
                for p in processes:
                    p.kill()
            time.sleep(0.01)

        for p in processes:
            p.join()
        code = next((p.exitcode for p in processes if p.exitcode not in (0, -signal.SIGKILL)), 0)
        code = code or next((p.exitcode for p in processes if p.exitcode), 0)
        texts = [pathlib.Path(x).read_text() if os.path.exists(x) else "" for x in (out, err)]
    return subprocess.CompletedProcess(argv, code, *texts)


def read_log(folder):
    """Return the lines of a run's log."""
    return list(map(json.loads, (pathlib.Path(folder) / "log.jsonl").read_text().splitlines()))
