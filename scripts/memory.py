"""
The memory that processes really hold, for tests and measurements. What a run will need: lib/memory.py.
"""
import contextlib
import os
import threading
import time
from types import SimpleNamespace


def held():
    """Anonymous and shared memory of this process in bytes; mapped files, which the system may drop, are neither."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * sum(int(status[k].split()[0]) for k in ("RssAnon", "RssShmem"))


def watch():
    """A list of one number: the most that this process has held since, looked at every 2 ms."""
    peak = [held()]

    def look():
        while True:
            peak[0] = max(peak[0], held())
            time.sleep(0.002)

    threading.Thread(target=look, daemon=True).start()
    return peak


def family(pid):
    """pid -> bytes of a process and all those it has started; what they share is shared out among them (Pss)."""
    found = {}
    with contextlib.suppress(OSError, IndexError, StopIteration):  # a process may end while it is looked at
        pss = next(line for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))
        found[pid] = 1024 * int(pss.split()[1])
        for child in open(f"/proc/{pid}/task/{pid}/children").read().split():
            found |= family(int(child))
    return found


@contextlib.contextmanager
def peak_memory():
    """The most bytes that this process and those it starts hold meanwhile: .together at one moment, .each by pid."""
    peak, stop = SimpleNamespace(together=0, each={}), threading.Event()

    def look():
        while not stop.wait(0.05):
            found = family(os.getpid())
            peak.together = max(peak.together, sum(found.values()))
            peak.each |= {pid: max(n, peak.each.get(pid, 0)) for pid, n in found.items()}

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
