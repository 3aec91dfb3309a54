"""Fixtures shared by all tests."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets():
    """Folder of real checkpoints and data; not part of a clone, so that tests which need it may skip."""
    folder = pathlib.Path(os.environ.get("MINIDISTIL_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip("real assets are absent: set MINIDISTIL_ASSETS to their folder")
    return folder
