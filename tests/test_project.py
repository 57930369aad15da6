"""What must hold of the whole project: its public names, its documents and recipes, and what an import brings.

Which package may import which is checked by import-linter, form and docstrings by ruff, spelling by codespell; all of
them run in `make check`.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lineara.cli import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_NAMES = {
    "ops": {
        *("efficient_attention", "kernel_attention", "multiresolution_attention", "softmax_attention"),
        *("summarize_context", "merge_contexts", "attend_context", "explain_implementation"),
    },
    "nn": {
        *("EfficientAttention", "EfficientAttention1d", "EfficientAttention2d", "EfficientAttention3d"),
        *("MultiresolutionAttention", "AdaMRA", "MultiresolutionAttention2d", "SoftmaxAttention", "EncoderBlock"),
    },
    "models": {"SequenceClassifier", "resnet", "mask_rcnn", "PSMNet"},
}
DOCSTRING_SECTIONS = ["Args:", "Returns:", "Raises:", "Cost:", "Source:"]
# numpy is not among them: torch itself may need it.
OPTIONAL = [
    *("triton", "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torchvision", "timm"),
    *("transformers", "matplotlib", "torchmetrics", "jsonargparse", "tqdm"),
]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
RECIPE_LABELS = ("Reproduces:", "Expected:", "Hardware:", "Time:", "Command:", "Last confirmed run:")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_python(code, folder):
    """Run code in a fresh process inside `folder`, warnings as errors; its output."""
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", code],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# What an import brings, and needs.

# A library that is not installed: importing it raises, and importlib.util.find_spec answers None.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in ABSENT:
    sys.modules.pop(name, None)
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported all the same")
"""


def test_operations_and_layers_need_torch_alone(tmp_path):
    run_python(
        f"ABSENT = {OPTIONAL}\n{WITHOUT}\n"
        "import lineara, torch\n"
        "q, k, v = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 11, 7), torch.randn(2, 3, 11, 13)\n"
        "assert lineara.ops.efficient_attention(q, k, v, impl='reference').shape == (2, 3, 5, 13)\n"
        "assert lineara.nn.EfficientAttention(8, 2)(torch.randn(2, 5, 8)).shape == (2, 5, 8)\n",
        tmp_path,
    )


def test_an_import_brings_the_package_itself_and_nothing_else(tmp_path):
    brought = run_python(
        "import sys, torch\nbefore = set(sys.modules)\nimport lineara\nprint(*set(sys.modules) - before)", tmp_path
    )
    assert {name for name in brought.split() if name.partition(".")[0] not in sys.stdlib_module_names} == {"lineara"}


def test_training_is_imported_where_there_is_no_fcntl(tmp_path):
    """As on Windows. (filelock, which is written for it, is imported before fcntl goes.)"""
    run_python(
        f"import filelock, lightning.pytorch, torchmetrics\nABSENT = ['fcntl']\n{WITHOUT}\n"
        "import lineara.runs.training, lineara.tasks.long_range_arena, lineara.cli\n",
        tmp_path,
    )


# Public names.


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_a_package_exports_its_public_names_and_nothing_else(name):
    package = importlib.import_module(f"lineara.{name}")
    assert set(package.__all__) <= PUBLIC_NAMES[name]
    assert all(callable(getattr(package, exported)) for exported in package.__all__)
    ours = {
        key
        for key, value in vars(package).items()
        if not key.startswith("_") and str(getattr(value, "__module__", "")).startswith("lineara")
    }
    assert ours == set(package.__all__)


def test_the_package_re_exports_public_names_only():
    import lineara

    assert set(lineara.__all__) <= {*PUBLIC_NAMES, "__version__", *set().union(*PUBLIC_NAMES.values())}
    assert all(hasattr(lineara, name) for name in lineara.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES["ops"]))
def test_an_operation_documents_its_arguments_cost_and_source(name):
    docstring = inspect.getdoc(getattr(importlib.import_module("lineara.ops"), name))
    pieces = re.split(f"^({'|'.join(DOCSTRING_SECTIONS)})", docstring, flags=re.MULTILINE)
    assert pieces[1::2] == DOCSTRING_SECTIONS
    assert all(text.strip() for text in pieces[2::2])


# Recipes.


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_parsed_and_says_what_to_expect(recipe):
    parse_recipe(recipe)
    lines = recipe.read_text().splitlines(keepends=True)
    header = "".join(takewhile(lambda line: line.startswith("#") or not line.strip(), lines))
    pieces = re.split(f"({'|'.join(RECIPE_LABELS)})", header)
    said = {label: text.strip("# \n") for label, text in zip(pieces[1::2], pieces[2::2])}
    assert all(said.get(label) for label in RECIPE_LABELS), header
    last = said[RECIPE_LABELS[-1]]
    assert "not yet run" in last or re.search(r"\d{4}-\d{2}-\d{2}\b.*\b[0-9a-f]{7,40}\b", last), last


@pytest.mark.parametrize(
    "recipe", {path.parent.name: path for path in RECIPES}.values(), ids=lambda path: path.parent.name
)
def test_a_misspelt_key_is_refused_in_every_section(recipe, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    misspelt = tmp_path / "misspelt.yaml"
    for name in ("", *(name for name, section in settings.items() if isinstance(section, dict))):
        changed = yaml.safe_load(recipe.read_text())
        section = changed[name] if name else changed
        section.get("init_args", section)["no_such_key"] = 1
        misspelt.write_text(yaml.safe_dump(changed))
        with pytest.raises(Exception, match="no_such_key"):
            parse_recipe(misspelt)


# Documents.


def python_blocks(text):
    """The line and the code of every fenced block of Python."""
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, block.start()) + 1, block[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_python_block_of_a_document_runs(document, tmp_path):
    text = document.read_text()
    assert text.count("```") % 2 == 0, "a block never ends"
    for line, code in python_blocks(text):
        print(f"{document.name}:{line}")  # shown where it fails
        run_python(code, tmp_path)


def test_the_readme_shows_code_within_its_first_lines():
    assert next(python_blocks((ROOT / "README.md").read_text()))[0] <= 20


# What is released.


def test_every_dependency_of_the_tests_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [Requirement(line) for line in (*project["dependencies"], *extras["train"], *extras["dev"])]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    for requirement in needed:
        if requirement.name != "lineara":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


# Written so that none of them finds itself in this file.
ADDRESSES = (
    r"\b(?:https?|ftp|s3|gs|git\+\w+)://(?!arxiv\.org|github\.com)",
    r"\b(?:pypi|anaconda|pythonhosted|download\.pytorch)\.org|\bindex[-_]url",
    r"(?<![\w.\-*)}\]>])/(?:work|tmp|home|root)\b",
)


def test_no_text_names_a_registry_or_a_path_of_one_machine():
    names = ("src", "tests", "docs", "recipes", "benchmarks", ".ci", "README.md", "Makefile", "constraints.txt")
    files = [file for name in names for file in (ROOT / name, *(ROOT / name).rglob("*")) if file.is_file()]
    assert len(files) > 100
    for file in files:
        content = file.read_bytes()
        if b"\0" not in content and "__pycache__" not in file.parts:
            for pattern in ADDRESSES:
                assert not (found := re.search(pattern, content.decode())), f"{file}: {found}"
