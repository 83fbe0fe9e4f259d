"""Fixtures for the tests of tools that take the package by configuration."""

from importlib.metadata import entry_points

import pytest

from tests.plugins.launched import ROOT, TRAIN, execute


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder that makes the entry point known where the package is on the path without being installed."""
    import tomllib  # of Python 3.11; without these tools the tests are collected on 3.10, too

    folder = tmp_path_factory.mktemp("site")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    if not any(e.name in declared for e in entry_points(group="torch.backends")):
        info = folder / "hf_adaclip_entry-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf_adaclip_entry\nVersion: 0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in declared.items())
        (info / "entry_points.txt").write_text(f"[torch.backends]\n{lines}")
    return folder


@pytest.fixture
def start(site, tmp_path):
    """Runs a command beside `train.py`, a script that knows nothing of the package."""

    def started(*command, folder=tmp_path, check=0, **variables):
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(TRAIN)
        return execute(command, folder, site, check=check, **variables)

    return started
