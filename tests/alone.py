"""Tests that leave something behind in their process, and so need one that is theirs alone."""

from __future__ import annotations

import os

import pytest

ALONE = "FEWSTEP_TESTS_ALONE"
alone = pytest.mark.skipif(ALONE not in os.environ, reason="run by tests/test_make_believe.py, in a process of its own")
