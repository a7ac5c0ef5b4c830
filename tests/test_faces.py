"""What a user meets when something goes wrong: no traceback, and no work lost to the terminal."""

import fcntl
import io
import os
import pty
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time

import numpy as np
import pytest

from equipoise.bugs import bug_report
from equipoise.cli import main
from equipoise.cli.parser import COMMANDS
from equipoise.run import Run
from equipoise.terminal import PlainTerminal
from equipoise.text import visible

EQUIPOISE = [sys.executable, "-m", "equipoise"]
QUICK = [
    *("--set", "latent_dim=2", "width=4", "stage_1_epochs=2", "stage_2_epochs=1"),
    *("n_components=2", "batch_size=128"),
]
HELP = [["--version"], ["--help"], ["train", "--help"], []]


# ---- the last handler


def ended(monkeypatch, capsys, action, *, command="report"):
    """Let a command do something, and return its exit code and what it said."""
    monkeypatch.setitem(COMMANDS, command, COMMANDS[command]._replace(run=lambda _: action()))
    with pytest.raises(SystemExit) as end:
        main([command, "x"])
    return end.value.code, capsys.readouterr().err


def raising(error):
    def action():
        raise error

    return action


def endless(depth=0):
    return endless(depth + 1)


UNEXPECTED = {
    "KeyError": raising(KeyError("epochs_done")),
    "TypeError": lambda: len(3),
    "RuntimeError": raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied\n(2x3, 4x5)")),
    "RecursionError": endless,
    "AssertionError": raising(AssertionError()),
    "ValueError": raising(ValueError()),
    "Surrogate": raising(type("Surrogate", (Exception,), {})("\udcff\x1b[2J")),
    "ExceptionGroup": raising(ExceptionGroup("several", [KeyError("a"), TypeError("b")])),
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_a_bug_is_one_line_and_a_file_with_the_traceback(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    codes = []
    for _ in range(2):
        code, told = ended(monkeypatch, capsys, UNEXPECTED[name])
        codes.append(code)
        assert told.count("\n") == 1
        assert f"this is a bug of equipoise: {name}; please report it" in told

    assert codes == [70, 70]
    files = list(tmp_path.iterdir())
    assert len(files) == 2, "none is overwritten"
    assert str(files[0]) in told or str(files[1]) in told
    for file in files:
        content = file.read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" in content
        assert "torch " in content
        assert content.startswith("command    'equipoise'")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_traceback_goes_to_the_working_folder_if_need_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    monkeypatch.chdir(tmp_path)
    _, told = ended(monkeypatch, capsys, UNEXPECTED["KeyError"])
    (file,) = tmp_path.iterdir()
    assert str(file) in told


def test_a_bug_is_told_even_if_no_file_can_hold_it(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    code, told = ended(monkeypatch, capsys, UNEXPECTED["KeyError"])
    assert code == 70
    assert re.search(r"KeyError in test_faces.py, line \d+; no file could hold", told)


def test_a_file_of_a_bug_that_cannot_be_completed_is_removed(tmp_path, monkeypatch):
    def fill(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.open", fill)
    assert "no file could hold" in bug_report(KeyError("a"), ["equipoise"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9,), np.dtype(float)),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_says_what_to_lower(error, monkeypatch, capsys):
    code, told = ended(monkeypatch, capsys, raising(error), command="train")
    assert (code, told.count("\n")) == (1, 1)
    assert "out of memory; lower batch_size, width or image_size" in told


def test_a_file_for_which_there_is_no_memory_is_no_bug(monkeypatch, capsys):
    error = RuntimeError("unable to mmap 300080 bytes from file <m>: Cannot allocate memory (12)")
    code, told = ended(monkeypatch, capsys, raising(error), command="sample")
    assert (code, told) == (1, "equipoise: out of memory; lower -n\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConnectionError("process 1 has ended"), 1, "process 1 has ended"),
        (TimeoutError("nobody came"), 1, "nobody came"),
        (
            PermissionError(13, "Permission denied", "a\nb\x1b[2J"),
            2,
            "Permission denied: a\\nb\\x1b[2J",
        ),
        (OSError(), 2, "OSError"),
        (ArithmeticError("diverged"), 1, "diverged"),
    ],
)
def test_expected_errors_keep_their_codes(error, code, text, monkeypatch, capsys):
    assert ended(monkeypatch, capsys, raising(error)) == (code, f"equipoise: {text}\n")


def test_interruptions_that_libraries_turn_into_other_errors_are_interruptions(tmp_path):
    script = (
        "import signal, sys\n"
        "from equipoise.cli import main\n"
        "from equipoise.cli.parser import COMMANDS\n"
        "def run(_):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('half imported')\n"
        "COMMANDS['report'] = COMMANDS['report']._replace(run=run)\n"
        "sys.argv = ['equipoise', 'report', 'x']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)
    assert done.stderr.startswith("equipoise: interrupted; ")


def test_interruptions_that_libraries_swallow_are_sent_again(tmp_path):
    script = (
        "import signal, sys, time\n"
        "from equipoise.cli import main\n"
        "from equipoise.cli.parser import COMMANDS\n"
        "def run(_):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except BaseException:\n"
        "        pass\n"
        "    time.sleep(30)\n"
        "COMMANDS['report'] = COMMANDS['report']._replace(run=run)\n"
        "sys.argv = ['equipoise', 'report', 'x']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)


def test_interruptions_and_bugs_where_python_cannot_raise_are_told(tmp_path):
    script = (
        "import signal, sys, threading, time\n"
        "from equipoise.cli import main\n"
        "from equipoise.cli.parser import COMMANDS\n"
        "class Removed:\n"
        "    def __init__(self, act): self.act = act\n"
        "    def __del__(self): self.act()\n"
        "def run(_):\n"
        "    Removed(lambda: 1 / 0)\n"
        "    thread = threading.Thread(target=lambda: [][1])\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    Removed(lambda: signal.raise_signal(signal.SIGINT))\n"
        "    time.sleep(30)\n"
        "COMMANDS['report'] = COMMANDS['report']._replace(run=run)\n"
        "sys.argv = ['equipoise', 'report', 'x']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 130
    assert [line.split(";")[0].removeprefix("equipoise: ") for line in lines] == [
        "this is a bug of equipoise: ZeroDivisionError",
        "this is a bug of equipoise: IndexError",
        "interrupted",
    ]


def interrupted_at_random(count, seed, longest, *arguments):
    """Interrupt a command at random times, once or twice, and return what it said and its code."""
    rng = random.Random(seed)
    for _ in range(count):
        with subprocess.Popen(
            [*EQUIPOISE, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            time.sleep(rng.uniform(0.1, longest))
            process.send_signal(signal.SIGINT)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.1))
                process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=60)[1]
        yield told, process.returncode


@pytest.mark.parametrize(
    "count", [3, pytest.param(60, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_an_interruption_at_any_time_is_one_line(count, tmp_path):
    """Before the first line of equipoise runs, which takes 0.05 s, Python itself answers."""
    arguments = ["train", "--quiet", "--out", tmp_path / "run", *QUICK, "stage_1_epochs=500"]
    for told, code in interrupted_at_random(count, count, 3.0, *map(str, arguments)):
        assert code in (130, -signal.SIGINT)
        assert re.fullmatch(r"(equipoise: interrupted; [^\n]*\n)?", told)


# ---- the streams of the process


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def full():
    return os.open("/dev/full", os.O_WRONLY)


def run_into(make_output, *arguments, stderr=subprocess.PIPE, **more):
    output = make_output()
    try:
        return subprocess.run(
            [*EQUIPOISE, *map(str, arguments)], stdout=output, stderr=stderr, text=True, **more
        )
    finally:
        os.close(output)


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_into_broken_streams(arguments, tmp_path):
    done = run_into(closed_pipe, *arguments)
    assert (done.returncode, done.stderr) == (141, "")

    done = run_into(full, *arguments)
    assert done.returncode == 1
    assert "standard output cannot be written (No space left on device)" in done.stderr
    assert done.stderr.count("\n") == 1

    shell = " ".join([*EQUIPOISE, *arguments])
    for redirection, code in ((">&-", 0), ("<&- >&- 2>&-", 0), ("2>&-", 0), (">/dev/full 2>&1", 1)):
        done = subprocess.run(f"{shell} {redirection}", shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")

    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONUNBUFFERED": "1"}):
        narrow = os.environ | environment | {"COLUMNS": "1"}
        done = subprocess.run(
            [*EQUIPOISE, *arguments], capture_output=True, text=True, env=narrow, check=True
        )
        assert done.stdout
        assert not done.stderr


def test_a_message_that_cannot_be_printed_leaves_the_code():
    for make_error in (full, closed_pipe):
        error = make_error()
        done = run_into(full, "report", "absent", stderr=error)
        os.close(error)
        assert done.returncode == 2


def test_closed_descriptors_do_not_become_files_of_the_run(tmp_path):
    """The next file that is opened would be standard output, and hold what libraries print."""
    script = (
        "import os\n"
        "from equipoise.cli.streams import lasting_streams\n"
        "with lasting_streams():\n"
        f"    with open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "        os.write(1, b'printed')\n"
        "        os.write(2, b'complained')\n"
        "        assert file.fileno() > 2\n"
    )
    done = subprocess.run(f'{sys.executable} -c "{script}" <&- >&- 2>&-', shell=True)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.fixture(scope="module")
def into_a_closed_pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "run"
    return run_into(closed_pipe, "train", "--out", folder, *QUICK), Run(folder)


def test_a_training_outlives_its_terminal(into_a_closed_pipe):
    done, run = into_a_closed_pipe
    assert (done.returncode, done.stderr) == (141, "")
    assert len(run.history()) == 3
    assert run.model().latent_dim == 2
    assert run.evaluation_file.is_file()


COMMANDS_OF_A_RUN = {
    "evaluate": ["evaluate", "RUN", "--sections", "likelihood"],
    "report": ["report", "RUN"],
    "sample": ["sample", "RUN", "-n", "4"],
    "reconstruct": ["reconstruct", "RUN", "-n", "4"],
    "export": ["export", "RUN", "--to", "torch"],
    "resume": ["train", "--resume", "RUN"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS_OF_A_RUN)
def test_every_command_does_its_work_into_broken_streams(name, into_a_closed_pipe):
    folder = into_a_closed_pipe[1].folder
    arguments = [folder if word == "RUN" else word for word in COMMANDS_OF_A_RUN[name]]
    done = run_into(closed_pipe, *arguments)
    assert (done.returncode, done.stderr) == (141, "")
    done = run_into(full, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    both = full()
    assert run_into(full, *arguments, stderr=both).returncode == 1
    os.close(both)
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*EQUIPOISE, *map(str, arguments)], capture_output=True, text=True, env=ascii_only
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_figures_are_shown_in_ascii_where_need_be(into_a_closed_pipe):
    done = subprocess.run(
        [*EQUIPOISE, "evaluate", into_a_closed_pipe[1].folder, "--sections", "likelihood"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| ELBO +\| +-?[\d.]+ \+- [\d.]+ \|", done.stdout)
    assert "(model unit)^2" in done.stdout


def on_a_terminal(width, *arguments):
    """Run a command on a pseudo-terminal, and return its exit code and what it showed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", min(width, 24), width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*EQUIPOISE, *map(str, arguments)],
        stdout=slave,
        stderr=slave,
        env=environment | {"TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    return process.wait(), shown


@pytest.mark.parametrize(
    "width", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_terminal_may_be_as_narrow_as_it_likes(width, into_a_closed_pipe):
    code, shown = on_a_terminal(width, "sample", into_a_closed_pipe[1].folder, "-n", "4")
    assert code == 0
    assert b"Traceback" not in shown
    assert shown


@pytest.mark.slow
def test_a_training_outlives_a_terminal_window_that_is_closed(tmp_path):
    """The window is closed in the middle of the training, which ignores the hang-up."""
    master, slave = pty.openpty()
    folder = tmp_path / "run"
    command = [*EQUIPOISE, "train", "--out", str(folder), *QUICK, "stage_1_epochs=10"]
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' HUP; exec {' '.join(command)}"],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    while not (folder / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    os.close(master)
    assert process.wait() == 1
    assert len(Run(folder).history()) == 11
    assert Run(folder).model_file.is_file()


@pytest.mark.slow
def test_a_terminal_window_that_is_closed_stops_a_training_with_a_checkpoint(tmp_path):
    run = Run(tmp_path / "run")
    command = [*EQUIPOISE, "train", "--quiet", "--out", str(run.folder), *QUICK]
    with subprocess.Popen(
        [*command, "stage_1_epochs=500"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while len(run.history()) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        told = process.communicate()[1]
    assert process.returncode == 143
    assert re.search(r"with the checkpoint .*step-\d+", told)


# ---- what is printed


class Breaks(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed")])
def test_a_sink_whose_stream_breaks_goes_on(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Breaks(error))
    terminal = PlainTerminal()
    for _ in range(2):
        terminal.message("text")
    assert terminal.is_lost


def test_a_sink_in_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    PlainTerminal().message("± 3")
    assert stream.buffer.getvalue() == b"\\xb1 3\n"


def test_names_do_not_steer_the_terminal(capsys):
    PlainTerminal().message("a\x1b]0;title\x07\u202eb\udcff\x9b2J\tc\nd é±²\u00a0")
    assert capsys.readouterr().out == (
        "a\\x1b]0;title\\x07\\u202eb\\udcff\\x9b2J\tc\nd é±²\u00a0\n"
    )
    assert visible("x" * 300, 200) == "x" * 199 + "…"
