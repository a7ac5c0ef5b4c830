"""Chaos: whole jobs are killed at every file operation, and every call of the system fails once.

``python -m tests.chaos`` (``just chaos``) tries everything, ``--sample 3`` some of it. After each
fault the driver goes on as a user would, and compares the result with that of an undisturbed job,
tensor by tensor and figure by figure.

The injection of kills is that of ckpt-chaos. Its own driver, ``ckpt-chaos run``, is not used: it
starts Python with torch three times for each point, which takes ten seconds in place of three; it
knows one command to go on with, where a user has two; it compares names of events, and our
temporary files have random ones; and it does not let calls fail.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from equipoise.provenance import provenance
from tests.chaos import children, jobs
from tests.chaos.calls import ERRORS, Calls, events_of, install

KILLS = ("before", "torn", "term", "unsynced")
"""Ways to kill at a file operation: before it; after it, its file cut in half; by SIGTERM; as a
loss of power does, which undoes what was not flushed to the disk."""
FULL = ("limit", "full")
"""Real limits, which native code meets, too: a largest size of a file; a full file system."""
FAULTS = (*KILLS, "calls", *FULL)
GRACE = "30"
"""Seconds from SIGTERM to SIGKILL."""
PAGE = 4096


class Stage:
    """One job with its start, its undisturbed result, and its points.

    Args:
        name: Name of the job.
        work: Folder of all jobs.
    """

    def __init__(self, name, work):
        self.name, self.job = name, jobs.JOBS[name]
        self.work = work
        self.done = work / f"{name}.done"
        self.start = work / f"{self.job.needs[-1]}.done" if self.job.needs else None

    def prepare(self, *, is_tried):
        """Run the job undisturbed, twice, and note its file operations and calls.

        Args:
            is_tried: Whether it is more than the start of another job. If not, once is enough.

        Raises:
            SystemExit: if that fails, or if the two results differ.
        """
        ended = self.run(self.job.command, self.done, partial(self._arm, self.done, None, "before"))
        if ended.code != 0:
            raise SystemExit(f"{self.name} fails by itself: {ended.out}{ended.err}")
        log = self._log(self.done, "events.rank0")
        self.events = [line.split("\t") for line in log.read_text().splitlines()]
        self.expected = self.result(self.done)
        self.hidden = jobs.hidden_files(self.done)
        if not is_tried:
            return

        again = self.work / f"{self.name}.control"
        ended = self.run(self.job.command, again, partial(self._fail, again, None, "EIO"))
        self.calls = events_of(self._log(again, "calls"))
        different = jobs.differences(self.result(again), self.expected)
        if ended.code != 0 or different:
            raise SystemExit(f"{self.name} is not reproducible: {ended.err} {different}")

    def result(self, folder):
        """Digest a result in a process of its own, so that this one keeps no threads."""
        file = folder.with_name(folder.name + ".json")

        def digest():
            file.write_text(json.dumps(jobs.result_of(folder)))

        ended = children.run(digest, folder)
        if ended.code != 0:
            return {"result": ended.err}
        return json.loads(file.read_text())

    def run(self, command, folder, before=None, *, is_fresh=True):
        """Run a command in a folder, which is made anew first."""
        if is_fresh:
            jobs.fresh(folder, self.start)
        return children.run(jobs.action_of(command), folder, self.job.processes, before)

    def points(self, fault):
        """List the points of a fault.

        Args:
            fault: One of the faults.

        Returns:
            What :meth:`attempt` takes, with a label for a person.
        """
        if fault in KILLS:
            return [
                (fault, (int(number),), f"{kind} {file}")
                for number, kind, file, is_tornable in self.events
                if fault != "torn" or is_tornable == "1"
            ]
        if fault == "calls":
            return [
                (fault, (number, error), f"{kind} {file}: {error}")
                for number, (kind, file) in enumerate(self.calls, 1)
                for error in ERRORS[kind]
            ]

        files = [path for path in self.done.rglob("*") if path.is_file()]
        if fault == "limit":
            before = {path.name for path in self.start.rglob("*")} if self.start else set()
            sizes = {path.stat().st_size for path in files if path.name not in before}
            limits = sorted({1} | {size // 2 for size in sizes} | {size - 1 for size in sizes})
            return [(fault, (limit,), f"files up to {limit} bytes") for limit in limits]

        used = _pages(self.start) if self.start else 1
        return [
            (fault, (pages,), f"file system of {pages * PAGE} bytes")
            for pages in range(used, _pages(self.done) + 1)
        ]

    def attempt(self, fault, arguments, folder):
        """Try one point, go on, and compare.

        Args:
            fault: One of the faults.
            arguments: Its place, from :meth:`points`.
            folder: Working folder.

        Returns:
            What is wrong, a list of sentences; and what happened, a word.
        """
        if fault in KILLS:
            ended = self.run(
                self.job.command, folder, partial(self._arm, folder, *arguments, fault)
            )
            return self._judge_kill(ended, folder, fault, *arguments)
        if fault == "calls":
            ended = self.run(self.job.command, folder, partial(self._fail, folder, *arguments))
            kind = self.calls[arguments[0] - 1][0]
            return self._judge_error(ended, folder, may_leave=kind == "unlink")
        if fault == "limit":
            ended = self.run(self.job.command, folder, partial(_limit, *arguments))
            return self._judge_error(ended, folder)
        return self._fill(folder, *arguments)

    def _judge_kill(self, ended, folder, mode, number):
        problems = []
        log = [
            line.split("\t") for line in self._log(folder, "events.rank0").read_text().split("\n")
        ]
        if len(log) < number or log[number - 1][1] != self.events[number - 1][1]:
            problems.append("another operation than in the undisturbed job was hit")
        if ended.code == 0 and mode in ("term", "torn"):
            # The signal came when all was done, or the file to tear was there and was not opened.
            return jobs.differences(self.result(folder), self.expected), "done all the same"
        if ended.code not in (137, 143, -15):
            problems.append(f"it ended with {ended.code}: {ended.err[-500:]}")
        if "Traceback" in ended.err:
            problems.append(f"a traceback: {ended.err[-500:]}")

        left = jobs.hidden_files(folder) - self.hidden
        problems += self._go_on(folder)
        swept = "" if not left else "left" if jobs.hidden_files(folder) & left else "swept"
        return problems, f"killed {swept}".strip()

    def _judge_error(self, ended, folder, *, may_leave=False):
        """A failing call is one line, leaves nothing behind, and the job can go on."""
        problems = []
        left = jobs.hidden_files(folder) - self.hidden
        if left and not may_leave:
            problems.append(f"temporary files were left: {sorted(left)}")
        if ended.code == 0:
            problems += jobs.differences(self.result(folder), self.expected)
            return problems, "did without"

        lines = ended.err.splitlines()
        if ended.code is None:
            problems.append(f"it hung: {ended.err[-500:]}")
        elif ended.code < 0 or len(lines) != 1 or not lines[0].startswith("equipoise: "):
            problems.append(f"not one line, but exit code {ended.code} and: {ended.err[-1500:]}")
        problems += self._go_on(folder)
        return problems, f"{_kind_of_message(ended.err)}: {ended.err.strip()[:300]}"

    def _go_on(self, folder):
        """Go on as a user would, and compare the result."""
        newest = jobs.newest_checkpoint(folder)
        refusals = []
        for command in self.job.again or (self.job.command,):
            ended = self.run(command, folder, is_fresh=False)
            if ended.code == 0:
                break
            refusals.append(f"{ended.code}: {ended.err[-700:]}")
        else:
            return [f"it cannot go on: {refusals}"]

        problems = jobs.differences(self.result(folder), self.expected)
        if newest and self.name.startswith("train") and newest not in ended.out:
            problems.append(f"work was lost: {newest} was there, but {ended.out[:300]}")
        return problems

    def _fill(self, folder, pages):
        """Run the job on a file system of so many pages, then make it larger and go on."""
        folder.mkdir(parents=True)
        _mount(folder, f"size={pages * PAGE}")
        try:
            if self.start:
                shutil.copytree(self.start, folder, dirs_exist_ok=True)
            ended = self.run(self.job.command, folder, is_fresh=False)
            _mount(folder, "remount,size=64m")
            return self._judge_error(ended, folder)
        finally:
            subprocess.run(["umount", folder], check=True)

    def _log(self, folder, name):
        log = folder.with_name(folder.name + ".log")
        log.mkdir(parents=True, exist_ok=True)
        return log / name

    def _arm(self, folder, number, mode):
        """In the process that is to die: let ckpt-chaos kill it at a file operation."""
        from ckpt_chaos import inject

        class Torn(inject._TornFile):
            """A file of which half of what is written stays; what was there before stays, too."""

            def __init__(self, file, path):
                super().__init__(file, path)
                object.__setattr__(self, "_before", os.path.getsize(path))

            def close(self):
                self._f.close()
                written = os.path.getsize(self._path) - self._before
                os.truncate(self._path, self._before + written // 2)
                os._exit(137)

        os.environ["CKPT_CHAOS_GRACE_S"] = GRACE
        inject._TornFile = Torn
        log = self._log(folder, "events.rank0")
        inject.arm(str(folder), number, mode, str(log), torn_python=True)

    def _fail(self, folder, number, error):
        """In the process whose call is to fail: count its calls."""
        install(Calls(folder, self._log(folder, "calls"), number, error))


def _kind_of_message(text):
    """Tell whether a message names a file, and one that the user knows."""
    if re.search(r"\.[\w-]+-\d+-[0-9a-f]{8}\b", text):
        return "one line with a temporary name"
    is_named = re.search(r"run\b|\.\w*npy\b|\.safetensors\b", text)
    return "one line" if is_named else "one line without a name"


def _pages(folder):
    """Pages that the files and folders in a folder take."""
    return 1 + sum(
        1 if path.is_dir() else -(-path.stat().st_size // PAGE) for path in folder.rglob("*")
    )


def _limit(size):
    """In the process that is to fail: no file may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _mount(folder, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def can_mount():
    """Tell whether this user may make small file systems."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["mount", "-t", "tmpfs", "-o", f"size={PAGE}", "tmpfs", folder]
        if subprocess.run(options, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def sampled(points, count, offset):
    """Some of a list, evenly spread; all if ``count`` is None."""
    if count is None or count >= len(points):
        return points
    return [points[(int(i * len(points) / count) + offset) % len(points)] for i in range(count)]


def work_off(points, stages, work, worker, workers):
    """Try every so-many-th point, and write what happened as lines of JSON.

    Args:
        points: All points: name of the job, fault, place, label.
        stages: The jobs by name.
        work: Folder of all jobs.
        worker: Number of this worker.
        workers: Number of workers.
    """
    with open(work / f"outcomes-{worker}.jsonl", "w") as outcomes:
        for number in range(worker, len(points), workers):
            name, fault, place, label = points[number]
            folder = work / f"point-{worker}"
            for old in (folder, folder.with_name(folder.name + ".log")):
                shutil.rmtree(old, ignore_errors=True)
            problems, what = stages[name].attempt(fault, place, folder)
            print(
                json.dumps([name, fault, place, label, problems, what]), file=outcomes, flush=True
            )
            if problems:
                print(f"FAILED {name} {fault} {place}: {label}: {problems}", flush=True)


def main():
    """Try the faults that were asked for, and print a table.

    Raises:
        SystemExit: with the code 1 if anything did not survive.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--jobs", nargs="+", default=jobs.KILLED, choices=jobs.KILLED)
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS)
    parser.add_argument("--sample", type=int, help="points of each job and fault; all by default")
    parser.add_argument("--total", type=int, help="points in all, evenly spread over the others")
    parser.add_argument("--offset", type=int, default=0, help="which points are sampled")
    parser.add_argument("--points", nargs="+", help="only these, for example 17 or 17,ENOSPC")
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args()

    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    work = options.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["EQUIPOISE_CACHE"] = str(work / "cache")
    try:
        failed = _try_all(options, work)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(int(failed))


def _try_all(options, work):
    """Prepare the jobs, share their points among workers, and print a table."""
    children.import_everything()
    jobs.write_data(work)
    stages = {}
    for name in jobs.JOBS:
        is_needed = any(name in jobs.JOBS[wanted].needs for wanted in options.jobs)
        if name in options.jobs or is_needed:
            stages[name] = Stage(name, work)
            stages[name].prepare(is_tried=name in options.jobs)

    faults = list(options.faults)
    if "full" in faults and not can_mount():
        print("Note: no file system can be mounted here, so the fault 'full' is left out.")
        faults.remove("full")
    points = []
    for name in options.jobs:
        for index, fault in enumerate(faults):
            found = stages[name].points(fault)
            offset = options.offset + 7 * index
            if options.points:
                found = [p for p in found if ",".join(map(str, p[1])) in options.points]
            points += [(name, *p) for p in sampled(found, options.sample, offset)]
    points = sampled(points, options.total, options.offset)
    print(f"{len(points)} points", flush=True)

    workers = []
    for worker in range(options.workers):
        child = os.fork()
        if not child:
            code = 1
            try:
                work_off(points, stages, work, worker, options.workers)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        workers.append(child)
    codes = [os.waitpid(child, 0)[1] for child in workers]

    outcomes = []
    for worker in range(options.workers):
        lines = (work / f"outcomes-{worker}.jsonl").read_text().splitlines()
        outcomes += map(json.loads, lines)
    return _print_table(outcomes, len(points), options) or any(codes)


def _print_table(outcomes, expected, options):
    """Print how many points of each job and fault survived; True if one did not."""
    tried, survived, happened = Counter(), Counter(), {}
    for name, fault, _, _, problems, what in outcomes:
        tried[name, fault] += 1
        survived[name, fault] += not problems
        kind = what.split(":")[0]
        happened.setdefault((name, fault), Counter())[kind] += 1

    for key, count in tried.items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(happened[key].items()))
        print(f"{key[0]:20} {key[1]:9} {survived[key]:5} of {count:5} survived ({kinds})")
    if options.json:
        rows = [
            {"job": job, "fault": fault, "tried": count, "survived": survived[job, fault]}
            for (job, fault), count in tried.items()
        ]
        command = "python -m tests.chaos"
        if options.sample:
            command += f" --sample {options.sample} --offset {options.offset}"
        content = {**provenance(), "command": command, "rows": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")

    total = survived.total()
    print(f"{total} of {expected} survived")
    return total < expected


if __name__ == "__main__":
    main()
