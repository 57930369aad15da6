"""ListOps files: the cache of generated examples, and the published tab-separated files."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from lineara.tasks.long_range_arena.generated_files import SPLITS, GeneratedFiles, check_sizes, cut
from lineara.tasks.long_range_arena.listops import (
    ListOpsExamples,
    ListOpsGrammar,
    encode,
    evaluate,
    generate,
)

_BENCHMARK = ListOpsGrammar()
_FILES = GeneratedFiles("listops", "ListOps", 1, ListOpsExamples, ("tokens", "offsets", "labels"))
_HEADER = "Source\tTarget"


def prepare_listops(
    data_root: Path | str,
    *,
    num_train: int = 96_000,
    num_val: int = 2_000,
    num_test: int = 2_000,
    grammar: ListOpsGrammar = _BENCHMARK,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Generate the three splits into `<data_root>/listops/`, or find them there, and return the file's path.

    No expression occurs twice, within a split or across them. The file appears whole or not at all. One that
    is damaged is reported by a warning and generated again.

    Args:
        data_root: folder, made if missing.
        num_train, num_val, num_test: examples of each split, at least 0.
        grammar, seed, num_workers, progress: as for `listops.generate`.

    Raises:
        ValueError: an argument is out of range, or the grammar has too few different expressions.
        OSError: the file cannot be read or written; noticed before the work, but for a disk that fills up.

    Cost: for the benchmark's sizes, about 60 MB on disk and 400 MB of memory.
    """
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    check_sizes(sizes)
    path = Path(data_root) / "listops" / _file_name(grammar, seed, sizes)

    def draw() -> dict[str, ListOpsExamples]:
        examples = generate(sum(sizes.values()), grammar=grammar, seed=seed, num_workers=num_workers, progress=progress)
        return cut(examples, sizes)

    return _FILES.prepare(path, {**asdict(grammar), "seed": seed, **sizes}, draw)


def load_listops(path: Path | str) -> dict[str, ListOpsExamples]:
    """The splits "train", "val" and "test" of a file that `prepare_listops` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another format version.
    """
    return _FILES.load(Path(path))


def load_listops_folder(folder: Path | str) -> dict[str, ListOpsExamples]:
    """The splits "train", "val" and "test": the published `basic_{train,val,test}.tsv` of a folder.

    Raises:
        FileNotFoundError, ValueError: as for `read_listops_tsv`.
    """
    return {split: read_listops_tsv(Path(folder) / f"basic_{split}.tsv") for split in SPLITS}


def read_listops_tsv(path: Path | str) -> ListOpsExamples:
    """Examples of one published file: a header, then an expression, a tab and its value 0..9 on each line.

    A mark of the byte order, blank lines, quotes around a field and values such as 5.0, as spreadsheets write them, are
    no fault.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is broken, or a value is not its expression's; names the file and the line, the header being
            line 1.
    """
    path = Path(path)
    try:
        file = path.open(encoding="utf-8-sig", errors="replace", newline="\n")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be one of the published files basic_{{train,val,test}}.tsv, got no such file; "
            "put them there or generate examples with `lineara data listops`"
        ) from None
    tokens, labels = [np.zeros(0, np.uint8)], list[int]()
    with file:
        if (header := "\t".join(_fields(file.readline()))) != _HEADER:
            raise ValueError(f"{path}, line 1: the header must be {_HEADER!r}, got {header[:80]!r}")
        for number, line in enumerate(file, start=2):
            if not line.strip():
                continue
            try:
                expression, label = _parse(line)
                tokens.append(encode(expression))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            labels.append(label)
    offsets = np.cumsum([len(each) for each in tokens], dtype=np.int64)
    return ListOpsExamples(np.concatenate(tokens), offsets, np.array(labels, np.uint8))


def _parse(line: str) -> tuple[str, int]:
    expression, *labels = _fields(line)
    if len(labels) != 1:
        raise ValueError(
            f"a line must be an expression, a tab and a label, got {len(labels)} tabs in {line.strip()[:80]!r}"
        )
    if not expression.strip(" ()"):
        raise ValueError(f"the expression must not be empty, got {expression[:80]!r}")
    label = labels[0].removesuffix(".0")
    if label not in list("0123456789"):
        raise ValueError(f"the label must be one of 0..9, got {label[:80]!r}")
    value = evaluate(expression)
    if value != int(label):
        raise ValueError(f"the label must be the value of the expression, {value}, got {label}")
    return expression, value


def _fields(line: str) -> list[str]:
    """The fields between tabs, without quotes around them."""
    fields = [field.strip(" ") for field in line.rstrip("\r\n").split("\t")]
    return [field[1:-1] if len(field) > 1 and field[0] == field[-1] == '"' else field for field in fields]


def _file_name(grammar: ListOpsGrammar, seed: int, sizes: dict[str, int]) -> str:
    drawn = f"len{grammar.min_len}-{grammar.max_len}-depth{grammar.max_depth}"
    drawn += f"-op{grammar.operator_probability}-args{grammar.max_args}"
    return f"listops-{drawn}-seed{seed}-{'-'.join(map(str, sizes.values()))}.npz"
