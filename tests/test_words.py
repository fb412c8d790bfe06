"""Words that the texts no longer use: README, docs, help texts, and the code's docstrings, comments and
messages."""
import re

import pytest

from conftest import ROOT

OLD = re.compile(r"\b(" + "|".join([
    # images, evaluate, target encoder
    "pictures?", "judge[sd]?", "judging", "teach(es|ers?)?", "taught",
    "memory (ends|ended|is not enough)", "afresh", "anew", "(go|goes|going) on",  # OOM, from scratch, resumes
    # min-max, rFD, consecutive
    "least to greatest", "FD of these", "their PSNR", "in a row", "error of chroma",
    # PCA, dummy data
    "(latents|them|pictures) in colour", "stand-ins?", "rehears\\w*", "hold (it |them )?against",
    "reckon\\w*", "without network", "not to be had", "package index", "whole or not at all",  # offline, PyPI
    "images an? (GPU|second|step)", "learn(s|t|ed)? nothing", "the same holds for",
    "the other way round"]) + r")\b",
    re.IGNORECASE)
PLACES = ["README.md CONTRIBUTING.md docs/*.md", "train.py vae.py sit.py repa.py sample.py fid.py",
          "data/*.py",
          "support/*.py", "experiments/*.py experiments/*.sh", "benchmarks/*.py benchmarks/*.sh"]


def old_words(text):
    """Those in a text, also where a line, a comment or a string that ends is in between."""
    return [found.group() for found in OLD.finditer(re.sub(r'\s*"?\s*\n\s*(#\s*|f?")?', " ", text))]


@pytest.mark.parametrize("patterns", PLACES)
def test_texts_are_without_old_words(patterns):
    files = [file for pattern in patterns.split() for file in ROOT.glob(pattern)]
    assert files
    assert {file.name: words for file in files if (words := old_words(file.read_text()))} == {}


@pytest.mark.parametrize("words", ["train", "sample", "fid", "vae", "vae export"])
def test_help_texts_are_without_old_words(words, command):
    assert old_words(command(*words.split(), "--help")) == []


def test_old_words_are_found():
    assert old_words('Judged by a\n    # Teacher; "memory is "\n    "not enough", pictured') == [
        "Judged", "Teacher", "memory is not enough"]
