"""The rooms: imports go one way, and no other package of the same name wins over a folder of ours."""
import ast
import sys

import pytest

from conftest import ROOT, run

NETWORKS = {"vae", "sit", "repa", "sample"}
MAY_IMPORT = {                                              # {folder or module: what it may import of ours}
    "support": {"support"},
    "data": {"data", "support"},
    "vae": {"data", "support"},
    "sit": {"vae", "data", "support"},
    "repa": {"vae", "data", "support"},
    "sample": {"vae", "sit", "repa", "data", "support"},
    "train": NETWORKS | {"fid", "data", "support"},
    "fid": NETWORKS | {"data", "support"},
    "experiments": NETWORKS | {"train", "fid", "experiments", "data", "support"},
    "benchmarks": NETWORKS | {"train", "fid", "benchmarks", "data", "support"},
    "test_repae": NETWORKS | {"train", "fid", "data", "support"},
}


def imported(file):
    """The top-level packages and modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(file.parent.name if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = sorted((ROOT / room).glob("*.py")) or [ROOT / f"{room}.py"]
    ours = MAY_IMPORT.keys() | {"tests"} | {file.stem for file in (ROOT / "tests").glob("*.py")}
    assert all(file.is_file() for file in files)
    for file in files:
        assert imported(file) & ours <= MAY_IMPORT[room], file


def test_every_file_belongs_to_a_room():
    folders = {"data", "support", "experiments", "benchmarks"}
    assert {file.stem for file in ROOT.glob("*.py")} | folders == MAY_IMPORT.keys()


def test_packages_of_the_same_names_elsewhere_are_not_imported(tmp_path):
    for name in ("data", "support"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the other {name}')\n")
    out = run(sys.executable, ROOT / "data/openmoji.py", "--help", cwd=tmp_path,
              env={"PYTHONPATH": str(tmp_path)})
    assert "--help" in out
