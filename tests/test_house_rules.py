"""The plan of the house, enforced: where code lives, what it may import, what it must carry.

First the tables, then the rules over this repository, then the proofs that every rule can fail (each on a
small tree planted in a temporary folder), last the checkers: functions from a folder or a text to a list of
violations. Where the plan changes, change the tables here for every room at once.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lineara"

# The tables.


@dataclass(frozen=True)
class Row:
    """What the files of one room may import: nothing else, tests and benchmarks included.

    The standard library is always allowed.
    """

    files: str  # pattern of the path below src/lineara; the first row that matches the whole path counts
    libraries: str = ""
    libraries_inside_functions: str = ""
    rooms: str = ""  # "lineara" stands for the package's own public names
    never: str = ""  # parts of an allowed library, or modules of a drawer, that stay out all the same


DATA_LIBRARIES = "torchvision PIL skimage sklearn scipy cv2 pycocotools faster_coco_eval hotcoco datasets"

WHICH_WAY_IMPORTS_POINT = (
    Row(r"__init__\.py", rooms="ops nn models"),
    Row(r"ops/(.*/)?triton_kernels\.py", "torch triton", rooms="ops", never="reference"),
    Row(r"ops/dispatch\.py", "torch", libraries_inside_functions="triton", rooms="ops"),
    Row(r"ops/.*", "torch", rooms="ops"),
    Row(r"nn/.*", "torch", rooms="nn ops"),
    # Files of weights come in that format too; nothing depends on the package.
    Row(r"models/pretrained\.py", "torch", libraries_inside_functions="safetensors"),
    Row(
        r"models/.*",
        "torch torchvision",
        rooms="models nn ops",
        never="torchvision.datasets torch.utils.data",
    ),
    # The parser is the training command's own; a picture's type is matplotlib's.
    Row(r"tasks/training\.py", "torch lightning jsonargparse yaml", rooms="tasks"),
    Row(r"tasks/[^/]+/pictures\.py", "torch numpy matplotlib", rooms="tasks models nn ops viz"),
    Row(
        r"tasks/.*",
        f"torch lightning torchmetrics numpy tqdm {DATA_LIBRARIES}",
        rooms="tasks models nn ops viz measure",
    ),
    Row(r"viz/.*", "torch numpy matplotlib", rooms="viz nn ops"),
    # Not in the first plan: an installed `lineara bench` cannot import the repository's benchmarks/.
    Row(r"measure/.*", "torch numpy", rooms="measure models nn ops"),
    Row(r"integrations/__init__\.py", rooms="integrations"),
    Row(r"integrations/hf_transformers\.py", "torch transformers", rooms="ops nn models"),
    Row(r"integrations/timm_models\.py", "torch timm", rooms="ops nn models"),
    Row(
        r"cli\.py",
        "jsonargparse lightning",
        libraries_inside_functions="torch",
        rooms="lineara cli tasks viz measure",
    ),
)
ROOMS = ("ops", "nn", "models", "tasks", "viz", "measure", "integrations", "cli")
ROOMS_OF_SEPARATE_DRAWERS = ("tasks",)

FORBIDDEN_NAMES = ["utils", "common", "core", "helpers", "legacy", "experiments"]
# fmt: off
# And whatever pyproject.toml names as a dependency.
OUTSIDE_NAMES = [
    "torch", "torchvision", "timm", "transformers", "lightning", "triton", "numpy", "matplotlib",
    "torchmetrics", "jsonargparse", "tensorboard", "tqdm",
]
FILE_LINES = 300

ROOMS_WITH_MIRRORED_TESTS = ("nn", "models", "tasks", "viz", "measure")

PUBLIC_NAMES = {
    "ops": [
        "efficient_attention", "kernel_attention", "multiresolution_attention", "softmax_attention",
        "summarize_context", "merge_contexts", "attend_context", "explain_implementation",
    ],
    "nn": [
        "EfficientAttention", "EfficientAttention1d", "EfficientAttention2d",
        "EfficientAttention3d", "MultiresolutionAttention", "AdaMRA", "MultiresolutionAttention2d",
        "SoftmaxAttention", "EncoderBlock",
    ],
    "models": ["SequenceClassifier", "resnet", "mask_rcnn", "PSMNet"],
}
DOCSTRING_SECTIONS = ("Args:", "Returns:", "Raises:", "Cost:", "Source:")

# numpy is not among them: torch itself may need it.
ABSENT_IN_A_COLD_PROCESS = [
    "triton", "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning",
    "torchvision", "timm", "transformers", "matplotlib", "torchmetrics", "jsonargparse", "tqdm",
]
IMPORT_BRINGS_ONLY = {"lineara"}

RECIPE_LABELS = ("Reproduces:", "Expected:", "Hardware:", "Time:", "Command:", "Last confirmed run:")
DATE_AND_COMMIT = r"\d{4}-\d{2}-\d{2}\b.*\b[0-9a-f]{7,40}\b"

README_BLOCK_STARTS_BY = 20
TEXTS = ["src", "tests", "docs", "recipes", "benchmarks", ".ci", "README.md", "Makefile", "constraints.txt"]
# fmt: on
HOSTS_IN_MARKDOWN = ("arxiv.org", "github.com")

# The rules over this repository.

RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def hold(violations: list[str]) -> None:
    assert not violations, f"{len(violations)} against the house:\n" + "\n".join(violations)


def test_imports_point_the_planned_way() -> None:
    assert list((ROOT / "src" / PACKAGE).rglob("*.py"))
    hold(import_violations(ROOT))


def test_names_say_what_a_file_is_for() -> None:
    hold(name_violations(ROOT))


def test_source_files_stay_short() -> None:
    hold(length_violations(ROOT))


def test_every_operation_layer_model_and_task_has_its_test_at_the_mirrored_path() -> None:
    hold(missing_tests(ROOT))


def test_works_with_every_optional_library_absent(tmp_path: Path) -> None:
    hold(cold_process_violations(tmp_path))


def test_import_brings_only_the_package_itself(tmp_path: Path) -> None:
    hold(import_cost_violations(tmp_path))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
class TestRecipe:
    def test_header_and_place_follow_the_plan(self, recipe: Path) -> None:
        hold(recipe_violations(ROOT, recipe))

    def test_parses_and_no_misspelt_key_does(self, recipe: Path, tmp_path: Path) -> None:
        parse_recipe = importlib.import_module(f"{PACKAGE}.cli").parse_recipe
        parse_recipe(recipe)
        misspelt = tmp_path / recipe.name
        for settings in with_an_unknown_key(yaml.safe_load(recipe.read_text())):
            misspelt.write_text(yaml.safe_dump(settings))
            with pytest.raises(Exception, match="no_such_key"):
                parse_recipe(misspelt)


def test_readme_shows_code_at_once() -> None:
    hold(readme_violations((ROOT / "README.md").read_text()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_python_block_of_a_document_runs(document: Path, tmp_path: Path) -> None:
    hold(document_violations(document, tmp_path))


@pytest.mark.parametrize("room", PUBLIC_NAMES)
def test_room_exports_the_contract_and_nothing_else(room: str) -> None:
    package = importlib.import_module(f"{PACKAGE}.{room}")
    defined = defined_names(ROOT / "src" / PACKAGE / room)
    hold(export_violations(package, PUBLIC_NAMES[room], defined))


def test_package_re_exports_public_names_only() -> None:
    package = importlib.import_module(PACKAGE)
    allowed = {*PUBLIC_NAMES, "__version__", *(name for names in PUBLIC_NAMES.values() for name in names)}
    exported = getattr(package, "__all__", ())
    assert set(exported) <= allowed
    assert [name for name in exported if not hasattr(package, name)] == []


@pytest.mark.parametrize("room", PUBLIC_NAMES)
def test_public_names_have_docstrings(room: str) -> None:
    hold(missing_docstrings(importlib.import_module(f"{PACKAGE}.{room}")))


def test_public_operations_document_their_arguments_cost_and_source() -> None:
    ops = importlib.import_module(f"{PACKAGE}.ops")
    assert ops.__all__
    hold([line for name in ops.__all__ for line in section_violations(name, getattr(ops, name).__doc__ or "")])


def test_every_dependency_is_pinned() -> None:
    hold(pin_violations(ROOT))


def test_no_text_names_an_outside_address_or_a_path_of_one_machine() -> None:
    hold(address_violations(ROOT))


# The proofs that each rule can fail.

CLEAN = {
    "src/lineara/__init__.py": "import typing\nif typing.TYPE_CHECKING:\n    from . import nn, ops\n",
    "src/lineara/ops/__init__.py": "from .efficient_attention import efficient_attention\n",
    "src/lineara/ops/dispatch.py": "def _f():\n    import triton\n    from .linear import triton_kernels\n",
    "src/lineara/ops/checks.py": "import math\nimport torch._prims\n",
    "src/lineara/ops/efficient_attention.py": (
        "from . import checks, dispatch\nfrom .linear.reference import forward\ndef efficient_attention(): ...\n"
    ),
    "src/lineara/ops/linear/reference.py": "import torch\ndef forward(): ...\n",
    "src/lineara/ops/linear/triton_kernels.py": (
        "import torch\nimport triton.language\nfrom .tiles import tiles_of\n" + "\n" * FILE_LINES
    ),
    "src/lineara/ops/softmax_attention.py": "from .checks import x\nfrom lineara.ops import kernel_attention\n",
    "src/lineara/nn/attention.py": "from torch import nn\nfrom lineara.ops import efficient_attention\n",
    "src/lineara/models/psmnet.py": "import torchvision.models\nfrom ..nn import EfficientAttention3d\n",
    "src/lineara/tasks/stereo_depth/task.py": "import lightning\nfrom . import data\nfrom ... import viz\n",
    "src/lineara/tasks/stereo_depth/data.py": "import skimage\nimport lineara.ops.efficient_attention\n",
    "src/lineara/viz/maps.py": "import matplotlib.pyplot as plt\nimport numpy as np\n",
    "src/lineara/measure/memory.py": "import tracemalloc\nfrom lineara import models\n",
    "src/lineara/integrations/timm_models.py": "import timm\nfrom lineara.nn import EfficientAttention\n",
    "src/lineara/cli.py": (
        "import lineara\nimport jsonargparse\nfrom lineara import efficient_attention\n"
        "def main():\n    if True:\n        import torch\n"
    ),
    "tests/ops/test_efficient_attention.py": "def test_attends(): ...\n",
    "tests/ops/test_softmax_attention.py": "class TestAttention:\n    def test_attends(self): ...\n",
    "tests/nn/test_attention.py": "def test_attends(): ...\n",
    "tests/models/test_psmnet.py": "def test_matches(): ...\n",
    "tests/tasks/stereo_depth/test_task.py": "def test_learns(): ...\n",
    "tests/tasks/stereo_depth/test_data.py": "def test_reads(): ...\n",
    "tests/viz/test_maps.py": "def test_draws(): ...\n",
    "tests/measure/test_memory.py": "def test_weighs(): ...\n",
    "pyproject.toml": '[project]\ndependencies = ["torch>=2.11"]\n',
    "constraints.txt": "# exact\ntorch==2.11.0\n",
    "docs/efficient.md": "See https" + "://arxiv.org/abs/1812.01243 and tensors/tmp, and/or root.\n",
}


def plant(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_clean_tree_passes_every_rule(tmp_path: Path) -> None:
    plant(tmp_path, CLEAN)
    for rule in (
        import_violations,
        name_violations,
        length_violations,
        missing_tests,
        pin_violations,
        address_violations,
    ):
        assert rule(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/efficient_attention.py", "import triton"),
        ("ops/efficient_attention.py", "from .linear import triton_kernels"),
        ("ops/efficient_attention.py", "def f():\n    from .linear import triton_kernels"),
        ("ops/efficient_attention.py", "if TYPE_CHECKING:\n    from .linear.triton_kernels import launch"),
        ("ops/efficient_attention.py", "def f():\n    import lightning"),
        ("ops/efficient_attention.py", "import numpy"),
        ("ops/efficient_attention.py", "from .. import nn"),
        ("ops/efficient_attention.py", "from lineara import efficient_attention"),
        ("ops/efficient_attention.py", "import importlib\nimportlib.import_module('triton')"),
        ("ops/linear/reference.py", "def f():\n    import triton"),
        ("ops/linear/streaming.py", "def f():\n    from . import triton_kernels"),
        ("ops/linear/streaming.py", "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("ops/dispatch.py", "import triton"),
        ("ops/dispatch.py", "class Pick:\n    import triton"),
        ("ops/linear/triton_kernels.py", "from .reference import forward"),
        ("ops/linear/triton_kernels.py", "def f():\n    from . import reference"),
        ("nn/attention.py", "from lineara.models import resnet"),
        ("nn/attention.py", "from .. import tasks"),
        ("nn/attention.py", "def f():\n    import torchvision"),
        ("nn/attention.py", "def f():\n    import triton"),
        ("nn/attention.py", "def f():\n    from lineara.ops.linear import triton_kernels"),
        ("models/psmnet.py", "import pytorch_lightning"),
        ("models/psmnet.py", "from lightning import LightningModule"),
        ("models/psmnet.py", "from torchvision import datasets"),
        ("models/psmnet.py", "from torch.utils.data import Dataset"),
        ("models/psmnet.py", "from ..tasks.stereo_depth import task"),
        ("tasks/stereo_depth/task.py", "from ..long_range_arena.data import Batch"),
        ("tasks/stereo_depth/task.py", "from lineara.tasks import long_range_arena"),
        ("tasks/stereo_depth/task.py", "import matplotlib"),
        ("tasks/stereo_depth/task.py", "from ... import cli"),
        ("viz/maps.py", "from lineara.tasks.stereo_depth.data import read"),
        ("viz/maps.py", "from ..models import PSMNet"),
        ("measure/memory.py", "import psutil"),
        ("measure/memory.py", "from lineara import viz"),
        ("measure/memory.py", "import lineara.tasks"),
        ("measure/memory.py", "from lightning import Trainer"),
        ("integrations/timm_models.py", "import transformers"),
        ("integrations/timm_models.py", "from timm.layers import _private"),
        ("integrations/timm_models.py", "from timm._builder import build"),
        ("integrations/other.py", "import torch"),
        ("nn/api.py", "def f():\n    from lineara.ops.linear import triton_kernels"),
        ("nn/attention.py", "from importlib import import_module\nimport_module('torchvision')"),
        ("cli.py", "import torch"),
        ("cli.py", "from lineara import integrations"),
        ("cli.py", "def main():\n    import benchmarks.cost"),
        ("__init__.py", "def __getattr__(name):\n    from lineara import tasks"),
        ("__init__.py", "import numpy"),
        ("viz/maps.py", "from tests.ops import tolerance"),
        ("data/__init__.py", "x = 1"),
        ("attention.py", "x = 1"),
    ],
)
def test_import_against_the_table_is_caught(file: str, source: str, tmp_path: Path) -> None:
    plant(tmp_path, CLEAN | {"src/lineara/tasks/long_range_arena/data.py": ""})
    assert import_violations(tmp_path) == []
    plant(tmp_path, {f"src/lineara/{file}": source})
    (violation,) = import_violations(tmp_path)
    assert violation.startswith(f"src/lineara/{file}:")


@pytest.mark.parametrize(
    "file",
    [
        "src/lineara/nn/utils.py",
        "src/lineara/nn/_core.py",
        "src/lineara/legacy/attention.py",
        "tests/helpers.py",
        "tests/nn/test_utils.py",
        "benchmarks/common/cost.py",
        "recipes/experiments/listops.yaml",
        "src/lineara/integrations/timm.py",
        "src/lineara/models/torchvision/resnet.py",
        "tests/triton.py",
        "benchmarks/einops_parts.py",
    ],
)
def test_forbidden_name_is_caught(file: str, tmp_path: Path) -> None:
    project = '[project.optional-dependencies]\nextra = ["Einops-Parts[all]>=1"]\n'
    harmless = {"recipes/timm/vit.yaml": "", "src/lineara/nn/__pycache__/utils.pyc": ""}
    plant(tmp_path, {"pyproject.toml": project, **harmless})
    assert name_violations(tmp_path) == []
    plant(tmp_path, {file: ""})
    assert len(name_violations(tmp_path)) == 1


def test_long_file_is_caught(tmp_path: Path) -> None:
    plant(tmp_path, {"src/lineara/nn/attention.py": "\n" * (FILE_LINES - 1)})
    assert length_violations(tmp_path) == []
    plant(tmp_path, {"src/lineara/nn/attention.py": "\n" * FILE_LINES})
    assert len(length_violations(tmp_path)) == 1


@pytest.mark.parametrize("test_file", [name for name in CLEAN if name.startswith("tests/")])
def test_missing_or_empty_test_is_caught(test_file: str, tmp_path: Path) -> None:
    plant(tmp_path, CLEAN)
    (tmp_path / test_file).write_text("import pytest\ndef helper(): ...\n")
    assert len(missing_tests(tmp_path)) == 1
    (tmp_path / test_file).unlink()
    assert len(missing_tests(tmp_path)) == 1


SMALLEST_PACKAGE = """
class ops:
    def efficient_attention(query, key, value, impl):
        return value.new_zeros(2, 3, 5, 13)

class nn:
    def EfficientAttention(dim, num_heads):
        return lambda x: x
"""


def test_cold_calls_that_work_pass(tmp_path: Path) -> None:
    assert cold_process_violations(plant(tmp_path, {"lineara/__init__.py": SMALLEST_PACKAGE})) == []


@pytest.mark.parametrize("needs", ["import tqdm", "from lightning.pytorch import Trainer", "import triton.language"])
def test_need_of_an_optional_library_is_caught(needs: str, tmp_path: Path) -> None:
    package = SMALLEST_PACKAGE.replace("return", f"{needs}; return", 1)
    (violation,) = cold_process_violations(plant(tmp_path, {"lineara/__init__.py": package}))
    assert "ModuleNotFoundError" in violation


@pytest.mark.parametrize(
    ("source", "brought"),
    [
        ("import matplotlib", "matplotlib"),
        ("from . import ops", "lineara.ops"),
        ("import torch.utils.benchmark", "torch.utils"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_costly_import_is_caught(source: str, brought: str, tmp_path: Path) -> None:
    plant(tmp_path, {"lineara/__init__.py": "import colorsys", "lineara/ops.py": ""})
    assert import_cost_violations(tmp_path) == []
    plant(tmp_path, {"lineara/__init__.py": source})
    violations = import_cost_violations(tmp_path)
    assert any(brought in violation for violation in violations)


GOOD_HEADER = (
    "# Reproduces: table 1\n# Expected: 37 % accuracy\n# Hardware: one H200\n# Time: 20 min\n"
    "# Command: lineara fit\n# Last confirmed run: 2026-01-31, commit 0123abc\nseed: 1\n"
)


@pytest.mark.parametrize(
    ("found", "replaced", "count"),
    [
        ("", "", 0),
        ("2026-01-31, commit 0123abc", "not yet run", 0),
        ("2026-01-31, commit 0123abc", "2026-01-31", 1),
        ("37 % accuracy", "", 1),
        ("# Expected: 37 % accuracy\n", "", 1),
        ("# Hardware: one H200\n# Time: 20 min\n", "", 2),
        ("# Time", "name: x\n# Time", 3),
    ],
)
def test_incomplete_recipe_header_is_caught(found: str, replaced: str, count: int, tmp_path: Path) -> None:
    recipe = "recipes/stereo_depth/pair.yaml"
    plant(tmp_path, CLEAN | {recipe: GOOD_HEADER.replace(found, replaced) if found else GOOD_HEADER})
    assert len(recipe_violations(tmp_path, tmp_path / recipe)) == count


@pytest.mark.parametrize(
    "recipe",
    [
        "recipes/pair.yaml",
        "recipes/sound/pair.yaml",
        "recipes/stereo_depth/pair.yml",
        "recipes/stereo_depth/deep/pair.yaml",
    ],
)
def test_misplaced_recipe_is_caught(recipe: str, tmp_path: Path) -> None:
    plant(tmp_path, CLEAN | {recipe: GOOD_HEADER})
    assert len(recipe_violations(tmp_path, tmp_path / recipe)) == 1


def test_unknown_keys_are_put_at_every_level() -> None:
    settings = {
        "seed": 1,
        "model": {"class_path": "x", "init_args": {"dim": 2}},
        "trainer": {"max_steps": 3},
    }
    assert list(with_an_unknown_key(settings)) == [
        {**settings, "no_such_key": 1},
        {**settings, "model": {"class_path": "x", "init_args": {"dim": 2, "no_such_key": 1}}},
        {**settings, "trainer": {"max_steps": 3, "no_such_key": 1}},
    ]


def test_python_blocks_are_found_with_their_lines() -> None:
    text = "one\n```python\na = 1\n\nb = 2\n```\n```sh\nls\n```\n- item\n  ```py\n  c = 3\n  ```\n"
    assert python_blocks(text) == [(2, "a = 1\n\nb = 2"), (11, "c = 3")]
    with pytest.raises(ValueError, match="line 1"):
        python_blocks("```python\na = 1\n")


def test_readme_without_early_code_is_caught() -> None:
    block = "```python\na = 1\n```\n"
    assert readme_violations("\n" * (README_BLOCK_STARTS_BY - 1) + block) == []
    assert len(readme_violations("\n" * README_BLOCK_STARTS_BY + block)) == 1
    assert len(readme_violations("```sh\nls\n```\n")) == 1


@pytest.mark.parametrize("code", ["1 / 0", "import warnings\nwarnings.warn('old')", "a =", "b = a"])
def test_block_that_fails_or_warns_is_caught(code: str, tmp_path: Path) -> None:
    page = "```python\na = 1\n```\n\n"
    plant(tmp_path, {"page.md": page})
    assert document_violations(tmp_path / "page.md", tmp_path) == []
    plant(tmp_path, {"page.md": f"{page}```python\n{code}\n```\n"})
    (violation,) = document_violations(tmp_path / "page.md", tmp_path)
    assert violation.startswith("page.md:5:")


def test_wrong_exports_are_caught(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {"ops/api.py": "def attend(): ...\ndef merge(): ...\nAlias = attend\nif 1:\n    def inner(): ...\n"},
    )
    defined = defined_names(tmp_path / "ops")
    assert defined == {"attend", "merge", "Alias"}

    def attend() -> None: ...

    attend.__module__ = "lineara.ops.api"
    package = ModuleType("lineara.ops")
    package.__dict__.update(__all__=["attend"], attend=attend, _private=attend, api=ModuleType("lineara.ops.api"))
    assert export_violations(package, ["attend", "later"], defined) == []
    assert len(export_violations(package, ["attend", "merge"], defined)) == 1
    assert len(export_violations(package, [], defined)) == 1
    package.__dict__["Path"] = Path
    assert export_violations(package, ["attend"], {"attend"}) == []
    package.__dict__["loose"] = attend
    assert len(export_violations(package, ["attend"], defined)) == 1
    del package.__dict__["loose"]
    package.__dict__["__all__"] = ["attend", "api", "gone"]
    assert len(export_violations(package, ["attend", "api", "gone"], defined)) == 2
    del package.__dict__["__all__"]
    assert len(export_violations(package, ["attend"], defined)) == 1


def test_missing_docstring_is_caught() -> None:
    class Described:
        """Has a docstring that its children do not inherit."""

    class Bare(Described): ...

    def bare() -> None: ...

    package = ModuleType("lineara.nn")
    package.__dict__.update(__all__=["Described", "Bare", "bare"], Described=Described, Bare=Bare, bare=bare)
    assert missing_docstrings(package) == [
        "lineara.nn.Bare has no docstring",
        "lineara.nn.bare has no docstring",
    ]


def test_incomplete_docstring_is_caught() -> None:
    doc = "Attend.\n\n    " + "\n    ".join(f"{section} something" for section in DOCSTRING_SECTIONS)
    assert section_violations("attend", doc) == []
    for section in DOCSTRING_SECTIONS:
        assert len(section_violations("attend", doc.replace(f"{section} something", ""))) == 1
        assert len(section_violations("attend", doc.replace(f"{section} something", section))) == 1
    swapped = doc.replace("Cost:", "C").replace("Source:", "Cost:").replace("C some", "Source: some")
    assert len(section_violations("attend", swapped)) == 1
    assert len(section_violations("attend", "")) == len(DOCSTRING_SECTIONS)


@pytest.mark.parametrize(
    ("constraints", "count"),
    [
        ("torch==2.11.0\nTorch_Metrics==1.5.0\npytest==8.0.0\n", 0),
        ("torch==2.11.0  # newest\n\ntorch-metrics==1.5.0\npytest==8.0.0 ; python_version > '3'\n", 0),
        ("torch==2.11.0\ntorch-metrics==1.5.0\n", 1),
        ("torch==2.10.0\ntorch-metrics==1.5.0\npytest==8.0.0\n", 1),
        ("torch>=2.11\ntorch-metrics==1.5.0\npytest==8.0.0\n", 2),
        ("torch==2.*\ntorch-metrics==1.5.0\npytest==8.0.0\n", 2),
        ("--index" + "-url x\ntorch==2.11.0\ntorch-metrics==1.5.0\npytest==8.0.0\n", 1),
    ],
)
def test_unpinned_dependency_is_caught(constraints: str, count: int, tmp_path: Path) -> None:
    project = (
        '[project]\nname = "lineara"\ndependencies = ["torch>=2.11"]\n[project.optional-dependencies]\n'
        'train = ["torch-metrics[image]>=1"]\ndev = ["lineara[train]", "pytest>=8"]\nother = ["elsewhere"]\n'
    )
    plant(tmp_path, {"pyproject.toml": project})
    assert len(pin_violations(tmp_path)) == 1
    plant(tmp_path, {"constraints.txt": constraints})
    assert len(pin_violations(tmp_path)) == count


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("src/lineara/nn/attention.py", "# https" + "://github.com/x"),
        ("docs/page.md", "http" + "://example.org/page"),
        ("docs/page.md", "https" + "://arxiv.org.example.org"),
        ("README.md", "from pypi" + ".org"),
        ("constraints.txt", "--extra-index" + "-url x"),
        ("Makefile", "\tpip install -f download.pytorch" + ".org"),
        (".ci/run", "cd /" + "work/main"),
        ("recipes/stereo_depth/pair.yaml", "root: /" + "home/me"),
        ("tests/nn/test_attention.py", "open('/" + "tmp/x')"),
        ("benchmarks/cost.py", "PATH = '/" + "root'"),
    ],
)
def test_outside_address_or_machine_path_is_caught(file: str, text: str, tmp_path: Path) -> None:
    (violation,) = address_violations(plant(tmp_path, {file: f"one\n{text}\n", "docs/figure.png": f"\0{text}"}))
    assert violation.startswith(f"{file}:2")


# The checkers.

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    module: str  # with the imported name behind it: "torch.nn", "lineara.ops.efficient.api.efficient_attention"
    line: int
    inside_function: bool

    def starts_with(self, name: str) -> bool:
        return f"{self.module}.".startswith(f"{name}.")


def import_violations(root: Path) -> list[str]:
    found = []
    package = root / "src" / PACKAGE
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        where = file.relative_to(root).as_posix()
        row = next((row for row in WHICH_WAY_IMPORTS_POINT if re.fullmatch(row.files, path.as_posix())), None)
        if row is None:
            found.append(f"{where}: is in no room of the plan; a new room is a design decision")
            continue
        for item in imports_of(file.read_text(), (PACKAGE, *path.parent.parts)):
            why = refusal(item, row, path, drawers(package))
            if why:
                found.append(f"{where}:{item.line}: imports {item.module}: {why}")
    return sorted(set(found))


def refusal(item: Import, row: Row, path: Path, drawers_of: Mapping[str, set[str]]) -> str | None:
    """Why the file at `path` may not do this import, or None."""
    top = item.module.split(".")[0]
    if top == PACKAGE:
        return refusal_within_package(item, row, path, drawers_of)
    if top in sys.stdlib_module_names:
        return None
    if top not in f"{row.libraries} {row.libraries_inside_functions}".split():
        return f"only {row.libraries or 'the standard library'} is allowed here"
    if top not in row.libraries.split() and not item.inside_function:
        return "allowed only inside a function here"
    if any(item.starts_with(name) for name in row.never.split()):
        return "this part of the library stays out of the room"
    if path.parts[0] == "integrations" and re.search(r"\._(?!_)", item.module):
        return "a private name of the library"
    return None


def refusal_within_package(item: Import, row: Row, path: Path, drawers_of: Mapping[str, set[str]]) -> str | None:
    parts = item.module.split(".")[1:]
    room = parts[0] if parts and parts[0] in ROOMS else PACKAGE
    if room not in row.rooms.split():
        return f"only these rooms are allowed here: {row.rooms}"
    if set(parts) & set(row.never.split()):
        return "must not be imported here"
    if "triton_kernels" in parts and path.name != "triton_kernels.py":
        if path.as_posix() != "ops/dispatch.py":
            return "kernels are imported only by dispatch.py"
        if not item.inside_function:
            return "kernels are imported only inside a function"
    own = path.parts[1] if len(path.parts) > 2 else None
    other = parts[1] if len(parts) > 1 and parts[1] in drawers_of.get(room, ()) else None
    if room == path.parts[0] and own and other and own != other:
        return f"the drawer {other} is not for the drawer {own}"
    return None


def drawers(package: Path) -> dict[str, set[str]]:
    """The sub-folders with code of those rooms whose drawers must not know each other."""
    return {room: {file.parent.name for file in (package / room).glob("*/*.py")} for room in ROOMS_OF_SEPARATE_DRAWERS}


def imports_of(source: str, package: tuple[str, ...]) -> Iterator[Import]:
    """Every import of a file, wherever it stands; `package` is the package that the file belongs to."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            yield from (Import(module, child.lineno, inside) for module in imported_by(child, package))
            yield from visit(child, inside or isinstance(child, (*FUNCTIONS, ast.Lambda)))

    yield from visit(ast.parse(source), False)


def imported_by(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = absolute("." * node.level + (node.module or ""), package)
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(name, str):
            return [absolute(name, package)]
    return []


def absolute(name: str, package: tuple[str, ...]) -> str:
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    return ".".join([*package[: len(package) - dots + 1], *name[dots:].split(".")]).rstrip(".")


def name_violations(root: Path) -> list[str]:
    outside = {*OUTSIDE_NAMES, *(name.replace("-", "_") for name in requirements(root))}
    found = []
    for top in ("src", "tests", "benchmarks", "recipes", "docs"):
        for path in files_below(root / top):
            for part in path.relative_to(root / top).parts:
                stem = re.sub(r"^(test)?_+", "", part.split(".")[0])
                where = f"{path.relative_to(root).as_posix()}: {part!r}"
                if stem in FORBIDDEN_NAMES:
                    found.append(f"{where} does not say what it is for")
                if path.suffix == ".py" and part.removesuffix(".py") in outside:
                    found.append(f"{where} is the import name of an outside library")
    return found


def files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def length_violations(root: Path) -> list[str]:
    lengths = {
        file: len(file.read_text().splitlines())
        for file in sorted((root / "src").rglob("*.py"))
        if file.name != "triton_kernels.py"
    }
    return [
        f"{file.relative_to(root).as_posix()}: {lines} lines, a file stays under {FILE_LINES}"
        for file, lines in lengths.items()
        if lines >= FILE_LINES
    ]


def missing_tests(root: Path) -> list[str]:
    package, tests = root / "src" / PACKAGE, root / "tests"
    # Of operations every public door; what lies behind them is tested through them.
    found = [
        f"tests/ops/test_{file.name}: missing, or without a test"
        for file in sorted((package / "ops").glob("*_attention.py"))
        if not has_a_test(tests / "ops" / f"test_{file.name}")
    ]
    for room in ROOMS_WITH_MIRRORED_TESTS:
        for file in sorted((package / room).rglob("[!_]*.py")):
            mirrored = (tests / file.relative_to(package)).with_name(f"test_{file.name}")
            if not has_a_test(mirrored):
                found.append(f"{mirrored.relative_to(root).as_posix()}: missing, or without a test")
    return found


def has_a_test(file: Path) -> bool:
    return file.exists() and any(
        isinstance(node, FUNCTIONS) and node.name.startswith("test") for node in ast.walk(ast.parse(file.read_text()))
    )


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process inside `folder`, warnings as errors."""
    return subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", code],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=240,
    )


# A library that is not installed: importing it raises, and importlib.util.find_spec answers None.
ABSENCE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {ABSENT_IN_A_COLD_PROCESS}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {ABSENT_IN_A_COLD_PROCESS}:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{{name}} could be imported all the same")
"""

COLD_CALLS = """
import lineara
import torch

q, k, v = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 11, 7), torch.randn(2, 3, 11, 13)
assert lineara.ops.efficient_attention(q, k, v, impl="reference").shape == (2, 3, 5, 13)
assert lineara.nn.EfficientAttention(8, 2)(torch.randn(2, 5, 8)).shape == (2, 5, 8)
"""


def cold_process_violations(folder: Path) -> list[str]:
    done = run_python(ABSENCE + COLD_CALLS, folder)
    return [] if done.returncode == 0 else [done.stderr]


def import_cost_violations(folder: Path) -> list[str]:
    """What `import lineara` brings into a process that has torch, beyond the standard library and itself."""
    done = run_python(
        "import sys, torch\nbefore = set(sys.modules)\nimport lineara\nprint(*set(sys.modules) - before)",
        folder,
    )
    if done.returncode:
        return [done.stderr]
    brought = {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}
    return [f"import {PACKAGE} also imports {name}" for name in sorted(brought - IMPORT_BRINGS_ONLY)]


def recipe_violations(root: Path, recipe: Path) -> list[str]:
    found = []
    where = recipe.relative_to(root)
    tasks = drawers(root / "src" / PACKAGE)["tasks"]
    if len(where.parts) != 3 or where.parts[1] not in tasks or where.suffix != ".yaml":
        found.append(f"{where.as_posix()}: a recipe is recipes/<task>/<name>.yaml, <task> one of {sorted(tasks)}")
    lines = recipe.read_text().splitlines(keepends=True)
    header = "".join(takewhile(lambda line: line.startswith("#") or not line.strip(), lines))
    said = labelled(header, RECIPE_LABELS)
    found += [
        f"{where.as_posix()}: the header does not say {label!r}" for label in RECIPE_LABELS if not said.get(label)
    ]
    last = said.get(RECIPE_LABELS[-1])
    if last and "not yet run" not in last and not re.search(DATE_AND_COMMIT, last):
        found.append(f"{where.as_posix()}: {RECIPE_LABELS[-1]} names neither date and commit nor 'not yet run'")
    return found


def labelled(text: str, labels: Iterable[str], start: str = "") -> dict[str, str]:
    """What stands behind each label, up to the next one."""
    pieces = re.split(f"{start}({'|'.join(re.escape(label) for label in labels)})", text, flags=re.MULTILINE)
    return {label: said.strip("# \n") for label, said in zip(pieces[1::2], pieces[2::2])}


def with_an_unknown_key(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings with one key too many: at the top, then in each section (its init_args if it has any)."""
    extra = {"no_such_key": 1}
    yield {**settings, **extra}
    for name, section in settings.items():
        if isinstance(section, dict) and isinstance(section.get("init_args"), dict):
            yield {**settings, name: {**section, "init_args": {**section["init_args"], **extra}}}
        elif isinstance(section, dict):
            yield {**settings, name: {**section, **extra}}


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The line and the code of every fenced block of Python."""
    blocks: list[tuple[int, str]] = []
    language, start, lines = None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```+\s*([\w-]*)", line)
        if not fence:
            lines.append(line)
        elif language is None:
            language, start, lines = fence.group(1), number, []
        else:
            if language in ("python", "python3", "py"):
                blocks.append((start, inspect.cleandoc("\n" + "\n".join(lines))))
            language = None
    if language is not None:
        raise ValueError(f"the block that starts on line {start} never ends")
    return blocks


def document_violations(document: Path, folder: Path) -> list[str]:
    """The Python blocks of a document that do not run, each in a process of its own inside `folder`."""
    runs = [(line, run_python(code, folder)) for line, code in python_blocks(document.read_text())]
    return [f"{document.name}:{line}: {done.stderr}" for line, done in runs if done.returncode]


def readme_violations(text: str) -> list[str]:
    if any(line <= README_BLOCK_STARTS_BY for line, _ in python_blocks(text)):
        return []
    return [f"README.md: no Python block starts within the first {README_BLOCK_STARTS_BY} lines"]


def defined_names(folder: Path) -> set[str]:
    """Every name that a file of the folder defines at its top level by def, class or assignment."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def export_violations(package: ModuleType, contract: Iterable[str], defined: set[str]) -> list[str]:
    name, contract = package.__name__, set(contract)
    if not hasattr(package, "__all__"):
        return [f"{name} has no __all__"]
    exported = set(package.__all__)
    loose = {
        key
        for key, value in vars(package).items()
        if not key.startswith("_") and str(getattr(value, "__module__", "")).startswith(PACKAGE)
    }
    return [
        *(f"{name}.{key} is public, but not in the plan" for key in sorted((exported | loose) - contract)),
        *(f"{name}.{key} exists, but is not in __all__" for key in sorted((contract & defined) - exported)),
        *(
            f"{name}.{key} is in __all__, but is no function or class"
            for key in sorted(exported & contract)
            if not callable(getattr(package, key, None))
        ),
    ]


def missing_docstrings(package: ModuleType) -> list[str]:
    return [
        f"{package.__name__}.{name} has no docstring"
        for name in package.__all__
        if not (getattr(package, name).__doc__ or "").strip()
    ]


def section_violations(name: str, docstring: str) -> list[str]:
    said = labelled(inspect.cleandoc(docstring), DOCSTRING_SECTIONS, start="^")
    missing = [section for section in DOCSTRING_SECTIONS if not said.get(section)]
    if not missing and tuple(said) != DOCSTRING_SECTIONS:
        return [f"{name}: the order of its docstring is not {' '.join(DOCSTRING_SECTIONS)}"]
    return [f"{name}: its docstring does not say {section!r}" for section in missing]


def requirements(root: Path, extras: Iterable[str] | None = None) -> dict[str, Requirement]:
    """What the project needs by itself and for the extras named, or for all of them."""
    project = tomllib.loads((root / "pyproject.toml").read_text()).get("project", {})
    optional = project.get("optional-dependencies", {})
    chosen = [optional[extra] for extra in (optional if extras is None else extras) if extra in optional]
    lines = [line for group in (project.get("dependencies", []), *chosen) for line in group]
    needed = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    needed.pop(canonicalize_name(PACKAGE), None)
    return needed


def pin_violations(root: Path) -> list[str]:
    file = root / "constraints.txt"
    if not file.exists():
        return ["constraints.txt: missing"]
    found, pinned = [], {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        pin = re.fullmatch(r"([\w.-]+)==([\w.!+-]+)(\s*;.*)?", text)
        if pin:
            pinned[canonicalize_name(pin.group(1))] = pin.group(2)
        elif text:
            found.append(f"constraints.txt:{number}: {text!r} is not name==version")
    for name, requirement in requirements(root, ("train", "dev")).items():
        if name not in pinned:
            found.append(f"constraints.txt: {name} is not pinned")
        elif not requirement.specifier.contains(pinned[name], prereleases=True):
            found.append(f"constraints.txt: {name}=={pinned[name]} is outside {requirement.specifier}")
    return found


# Written so that none of them finds itself in this file.
ADDRESSES = {
    r"\b(?:https?|ftp|s3|gs|git\+\w+)://([\w.-]*)": "an address",
    r"\b(?:pypi|anaconda|pythonhosted|download\.pytorch)\.org|\bindex[-_]url": "a package registry",
    r"(?<![\w.\-*)}\]>])/(?:work|tmp|home|root)\b": "a path of one machine",
}


def address_violations(root: Path) -> list[str]:
    found = []
    files = [
        file for name in TEXTS for file in ([root / name] if (root / name).is_file() else files_below(root / name))
    ]
    for file in files:
        content = file.read_bytes()
        if b"\0" in content:
            continue
        where = file.relative_to(root).as_posix()
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            for pattern, what in ADDRESSES.items():
                for match in re.finditer(pattern, line):
                    host = match.group(1) if match.re.groups else None
                    if not (file.suffix == ".md" and host in HOSTS_IN_MARKDOWN):
                        found.append(f"{where}:{number}: {what}: {match.group()}")
    return found
