"""Exporting onto a full disk is one error of ours, and leaves what was there."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.export import export
from tests.test_export import FORMATS, make_images, make_mixture

LIMITED = """
import resource, sys
from pathlib import Path
from equipoise.export import export
from tests.test_export import FORMATS, make_images, make_mixture

model, mixture = make_images(), make_mixture()
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
for to in FORMATS:
    try:
        export(model, mixture, to, Path(sys.argv[1]))
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_does_not_end_the_process(tmp_path):
    """A real limit, which native code meets, too: torch's own writer aborts there."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(FORMATS)
    for line, name in zip(lines, ("encoder.pt2", "encoder.onnx"), strict=True):
        assert line.startswith("OSError")
        assert name in line
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".equipoise.")] == []


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_what_was_exported_before_is_kept(tmp_path, monkeypatch, to):
    model, mixture = make_images(), make_mixture()
    before = {file.path: file.path.read_bytes() for file in export(model, mixture, to, tmp_path)}

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"no space left to write .*encoder\.(pt2|onnx)"):
            export(model, mixture, to, tmp_path)

    assert {path: path.read_bytes() for path in before} == before
    export(model, mixture, to, tmp_path)
