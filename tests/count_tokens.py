"""How many tokens groups of files have, without comments and docstrings: python tests/count_tokens.py"""
import tokenize
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = {tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}
GROUPS = {"six modules, data/, support/": "train.py vae.py sit.py repa.py sample.py fid.py data/*.py support/*.py",
          "train.py": "train.py", "experiments/, benchmarks/": "experiments/*.py benchmarks/*.py",
          "tests": "test_repae.py tests/*.py"}


def count_tokens(file):
    with open(file, "rb") as f:
        types = [token.type for token in tokenize.tokenize(f.readline) if token.type not in LAYOUT]
    lines = [list(line) for is_end,
             line in groupby(types, lambda kind: kind == tokenize.NEWLINE) if not is_end]
    return sum(len(line) for line in lines if line != [tokenize.STRING])           # that alone is a docstring


for group, patterns in GROUPS.items():
    files = [file for pattern in patterns.split() for file in ROOT.glob(pattern)]
    print(f"{group}: {sum(map(count_tokens, files)):,}")
