"""The layers: imports go one way, and no other package of the same name wins over a folder of ours."""
import ast
import sys

import pytest

from conftest import ROOT, run

# From low to high; each may import those of the lines above, and itself.
LAYERS = ["support", "data", "vae", "sit repa", "sample", "fid", "train", "experiments benchmarks test_repae"]


def imported(file):
    """The top-level packages and modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(file.parent.name if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer):
    below = " ".join(LAYERS[:LAYERS.index(layer)]).split()
    ours = {*" ".join(LAYERS).split(), "tests", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
    for name in layer.split():
        files = sorted((ROOT / name).glob("*.py")) or [ROOT / f"{name}.py"]
        assert all(imported(file) & ours <= {*below, name} for file in files)


def test_every_file_belongs_to_a_layer():
    folders = {"data", "support", "experiments", "benchmarks"}
    assert {file.stem for file in ROOT.glob("*.py")} | folders == set(" ".join(LAYERS).split())


def test_packages_of_the_same_names_elsewhere_are_not_imported(tmp_path):
    for name in ("data", "support"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the other {name}')\n")
    out = run(sys.executable, ROOT / "data/openmoji.py", "--help", cwd=tmp_path,
              env={"PYTHONPATH": str(tmp_path)})
    assert "--help" in out
