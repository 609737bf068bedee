"""Schemathesis on the live OpenAPI description: no 5xx, no undocumented status, over thousands of requests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.mark.fuzz
@pytest.mark.timeout(900)
def test_no_request_breaks_the_service(live, tmp_path):
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{live.url}/openapi.json"]
    options = ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "150"]
    quiet = ["--seed", "1", "--continue-on-failure", "--no-shrink", "--suppress-health-check", "all"]
    done = subprocess.run([*command, *options, *quiet], cwd=tmp_path, capture_output=True, text=True)
    cases = re.search(r"(\d+) generated", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    assert cases is not None
    assert int(cases[1]) >= 2_000
    assert live.process.poll() is None
