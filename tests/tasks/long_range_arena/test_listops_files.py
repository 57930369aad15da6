import errno
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lineara.tasks.long_range_arena import listops_files
from lineara.tasks.long_range_arena.listops import ListOpsGrammar, decode, evaluate, generate
from lineara.tasks.long_range_arena.listops_files import (
    load_listops,
    load_listops_folder,
    prepare_listops,
    read_listops_tsv,
)

GRAMMAR = ListOpsGrammar(min_len=5, max_len=30)
SIZES = {"num_train": 40, "num_val": 20, "num_test": 10}
SETTINGS = {**SIZES, "grammar": GRAMMAR, "progress": False}


def words(examples):
    return [decode(tokens) for tokens, _ in examples]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail(*_args, **_settings):
    pytest.fail("examples were generated")


# The cache


def test_prepared_splits_are_the_generated_examples_in_order(tmp_path):
    path = prepare_listops(tmp_path / "data", seed=3, **SETTINGS)
    assert path == tmp_path / "data/listops/listops-len5-30-depth10-op0.25-args10-seed3-40-20-10.npz"
    splits = load_listops(path)
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 40,
        "val": 20,
        "test": 10,
    }
    everything = [expression for examples in splits.values() for expression in words(examples)]
    assert everything == words(generate(70, grammar=GRAMMAR, seed=3, progress=False))
    for examples in splits.values():
        assert [evaluate(expression) for expression in words(examples)] == examples.labels.tolist()


def test_a_second_preparation_leaves_the_file_alone(tmp_path, monkeypatch):
    path = prepare_listops(tmp_path, **SETTINGS)
    before = path.stat()
    monkeypatch.setattr(listops_files, "generate", fail)
    assert prepare_listops(str(tmp_path), **SETTINGS) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_each_parameter_has_a_file_of_its_own(tmp_path):
    grammar = {"min_len": 5, "max_len": 30, "max_depth": 9, "operator_probability": 0.3, "max_args": 8}
    others = [SIZES | {"seed": 1}, *(SIZES | {name: 11} for name in SIZES)]
    paths = [prepare_listops(tmp_path, **SETTINGS | other) for other in others]
    for name in grammar:
        changed = ListOpsGrammar(**grammar | {name: ListOpsGrammar(6, 31).__dict__[name]})
        paths.append(prepare_listops(tmp_path, **SETTINGS | {"grammar": changed}))
    assert len(set(paths)) == len(names(tmp_path / "listops")) == 9


def damage_by_truncation(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_by_emptying(path):
    path.write_bytes(b"")


def damage_by_one_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"train_tokens") + 300] ^= 0x10
    path.write_bytes(content)


def damage_by_text(path):
    path.write_text("Source\tTarget\n")


def damage_by_one_array(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"val_offsets": arrays["val_offsets"][:-1]})


def damage_by_another_format(path):
    with np.load(path) as file:
        arrays = dict(file)
    parameters = str(arrays["parameters"]).replace('"format": 1', '"format": 999')
    np.savez(path, **arrays | {"parameters": np.array(parameters)})


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation,
        damage_by_emptying,
        damage_by_one_byte,
        damage_by_text,
        damage_by_one_array,
        damage_by_another_format,
    ],
)
def test_a_damaged_file_is_noticed_and_generated_again(tmp_path, damage):
    path = prepare_listops(tmp_path, **SETTINGS)
    whole = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()
    (tmp_path / "link").hardlink_to(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} must .*; run `lineara data listops` again"):
        load_listops(path)
    with pytest.warns(RuntimeWarning, match=f"{re.escape(str(path))} must .*; generating it again now"):
        prepare_listops(tmp_path, **SETTINGS)
    assert path.read_bytes() == whole
    assert (tmp_path / "link").read_bytes() == damaged  # the new file took the place of the old one at once


def test_a_file_under_the_name_of_another_is_generated_again(tmp_path):
    other = prepare_listops(tmp_path, seed=1, **SETTINGS)
    path = other.rename(str(other).replace("seed1", "seed0"))
    prepare_listops(tmp_path, seed=0, **SETTINGS)
    assert words(load_listops(path)["train"]) == words(generate(40, grammar=GRAMMAR, progress=False))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz .*make it with `lineara data listops`"):
        load_listops(tmp_path / "nothing.npz")


@pytest.mark.parametrize("name", SIZES)
def test_a_negative_size_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        prepare_listops(tmp_path, **SETTINGS | {name: -1})
    assert names(tmp_path) == []


# Runs that end early, or meet


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupt(*_args, **_settings):
        assert [name.endswith(".tmp") for name in names(tmp_path / "listops")] == [True]
        raise error

    monkeypatch.setattr(listops_files, "generate", interrupt)
    with pytest.raises(error):
        prepare_listops(tmp_path, **SETTINGS)
    assert names(tmp_path / "listops") == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"seed0.*npz must be .*, got {os.strerror(errno.EFBIG)}; free some space"):
            prepare_listops(tmp_path, **SETTINGS | {"num_train": 4000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "listops") == []


KILLED = """
import sys
from lineara.tasks.long_range_arena.listops_files import prepare_listops
if __name__ == "__main__":
    prepare_listops(sys.argv[1], num_train=20_000, num_val=10, num_test=10, num_workers=2)
"""


@pytest.mark.parametrize("moment", ["drawing", "writing"])
def test_a_killed_run_leaves_no_broken_file_and_the_next_one_cleans_up(tmp_path, moment):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    folder = tmp_path / "listops"
    with subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL) as process:
        while not (found := list(folder.glob("*.tmp")) if folder.exists() else []):
            assert process.poll() is None
            time.sleep(0.002)
        while moment == "writing" and found[0].stat().st_size == 0:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert [name.endswith(".tmp") for name in names(folder)] == [True]
    settings = {"num_train": 20_000, "num_val": 10, "num_test": 10, "num_workers": 1, "progress": False}
    path = prepare_listops(tmp_path, **settings)
    assert names(folder) == [path.name]
    assert len(load_listops(path)["train"]) == 20_000


def test_only_abandoned_temporary_files_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    folder = tmp_path / "listops"
    folder.mkdir()
    start, here = "listops-len5-30-seed0.npz", socket.gethostname()
    kept = [
        f"{start}.{here}.{os.getpid()}.0123abcd.tmp",
        f"{start}.other.host.{gone.pid}.0123abcd.tmp",
        "listops-my.tmp",
    ]
    removed = [f"{start}.{here}.{gone.pid}.0123abcd.tmp", f"{start}.other.host.{os.getpid()}.89abcdef.tmp"]
    for name in kept + removed:
        (folder / name).touch()
    yesterday = time.time() - 25 * 60 * 60
    os.utime(folder / removed[1], (yesterday, yesterday))
    path = prepare_listops(tmp_path, **SETTINGS)
    assert names(folder) == sorted([path.name, *kept])


def test_two_runs_at_once_both_end_well(tmp_path, monkeypatch):
    both_are_drawing = threading.Barrier(2, timeout=20)
    paths = []

    def generate_together(*args, **settings):
        both_are_drawing.wait()
        return generate(*args, **settings)

    monkeypatch.setattr(listops_files, "generate", generate_together)
    threads = [threading.Thread(target=lambda: paths.append(prepare_listops(tmp_path, **SETTINGS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths[0] == paths[1]
    assert names(tmp_path / "listops") == [paths[0].name]
    assert len(load_listops(paths[0])["train"]) == 40


# Places that cannot be written


@pytest.fixture
def folder_and_lock():
    """A folder, and a call that makes it read-only, to root as well by acting as an ordinary user."""
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()

    def lock():
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    yield folder, lock
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_root_is_refused_before_the_work(folder_and_lock, monkeypatch):
    folder, lock = folder_and_lock
    lock()
    monkeypatch.setattr(listops_files, "generate", fail)
    with pytest.raises(PermissionError, match=rf"{folder}/listops/.* must be .*, got Permission denied; free"):
        prepare_listops(folder, **SETTINGS)


def test_a_finished_file_in_a_read_only_root_is_used(folder_and_lock, monkeypatch):
    folder, lock = folder_and_lock
    folder.chmod(0o755)
    path = prepare_listops(folder, **SETTINGS)
    lock()
    monkeypatch.setattr(listops_files, "generate", fail)
    assert prepare_listops(folder, **SETTINGS) == path


def test_a_file_in_place_of_the_root_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listops_files, "generate", fail)
    (tmp_path / "data").touch()
    with pytest.raises(OSError, match=r"data/listops/.* must be .*, got Not a directory; free some space"):
        prepare_listops(tmp_path / "data", **SETTINGS)


# The published files


def publish(expression):
    """An expression with the published files' parentheses around each argument that an operator takes in."""
    stack = [""]
    for word in expression.split():
        if word.startswith("["):
            stack.append(word)
            continue
        argument = f"( {stack.pop()} ] )" if word == "]" else word
        stack[-1] = f"( {stack[-1]} {argument} )" if stack[-1] else argument
    return stack[0]


def write_tsv(path, examples, end="\n"):
    lines = ["Source\tTarget", *(f"{publish(decode(tokens))}\t{label}" for tokens, label in examples)]
    path.write_bytes("".join(line + end for line in lines).encode())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_published_folder_is_read_without_its_parentheses(tmp_path, end):
    assert publish("[MAX 2 [SM 1 5 ] 9 ]") == "( ( ( ( [MAX 2 ) ( ( ( [SM 1 ) 5 ) ] ) ) 9 ) ] )"
    examples = generate(60, grammar=GRAMMAR, progress=False)
    parts = {"train": examples.part(0, 40), "val": examples.part(40, 55), "test": examples.part(55, 60)}
    for split, part in parts.items():
        write_tsv(tmp_path / f"basic_{split}.tsv", part, end)
    splits = load_listops_folder(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    for split, part in parts.items():
        assert words(splits[split]) == words(part)
        assert splits[split].labels.tolist() == part.labels.tolist()


@pytest.mark.parametrize(
    ("content", "number", "reason"),
    [
        ("", 1, "the header must be 'Source.tTarget', got ''"),
        ("[MIN 1 2 ]\t1\n", 1, "the header must be"),
        ("Source\tTarget\n[MIN 1 2 ]\t1\n[MIN 1 2 ] 1\n", 3, "got 0 tabs in '.MIN 1 2 . 1'"),
        ("Source\tTarget\n[MIN 1 2 ]\t1\n\n[MIN 1 2\t1", 4, "one closed operator, got '.MIN 1 2'"),
        ("Source\tTarget\n[MIN 1 2 ]\t2\n", 2, "the label must be the value of the expression, 1, got 2"),
        ("Source\tTarget\n[MIN 1 2 ]\t1.5\n", 2, "the label must be one of 0..9, got '1.5'"),
        ("Source\tTarget\n[MIN 1 23 ]\t1\n", 2, "got '23'"),
        ("Source\tTarget\n[MIN 1 \xff ]\t1\n", 2, "got '\ufffd'"),
        ("Source\tTarget\n[MIN 1 2 ]\t10\n", 2, "the label must be one of 0..9, got '10'"),
        ("Source\tTarget\n[MIN 1 2 ]\t\n", 2, "the label must be one of 0..9, got ''"),
        ("Source\tTarget\n[MIN 1 2 ]\t1\t1\n", 2, "got 2 tabs in"),
        ("Source\tTarget\n( )\t1\n", 2, "the expression must not be empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path, content, number, reason):
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line {number}: .*{reason}"):
        read_listops_tsv(path)


def test_what_spreadsheets_change_is_no_fault(tmp_path):
    path = tmp_path / "basic_val.tsv"
    text = '"Source"\t"Target"\r\n"[MIN 1 2 ]"\t1.0\r\n\r\n[MAX 1 2 ] \t"2"\r\n\r\n'
    path.write_text(text, encoding="utf-8-sig", newline="")
    examples = read_listops_tsv(path)
    assert [decode(tokens) for tokens, _ in examples] == ["[MIN 1 2 ]", "[MAX 1 2 ]"]
    assert examples.labels.tolist() == [1, 2]


def test_a_missing_published_file_is_named(tmp_path):
    write_tsv(tmp_path / "basic_train.tsv", generate(3, grammar=GRAMMAR, progress=False))
    with pytest.raises(FileNotFoundError, match=r"basic_val\.tsv must be .* got no such file; put them there"):
        load_listops_folder(tmp_path)
