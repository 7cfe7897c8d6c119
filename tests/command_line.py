"""The command line, called in the process of a test."""

import sys

import pytest

from hvlite import cli


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `hvlite ARGUMENTS` in this process."""
    before = sys.argv
    sys.argv = ["hvlite", *arguments]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err
