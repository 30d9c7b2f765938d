"""The command line in the process of the tests: an interpreter of its own takes seconds to import the libraries."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from transformers.utils import logging

from forerun import cli


def run_here(*words: str) -> subprocess.CompletedProcess[str]:
    """What `forerun WORDS` writes, and its exit code; the state of this process is left as it was.

    Progress bars are off as in a new process, whose libraries read the environment when they are imported.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["forerun", *words]
    with (
        redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "excepthook", sys.excepthook),
    ):  # fmt: skip
        logging.disable_progress_bar()
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            logging.enable_progress_bar()
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
