import json
from dataclasses import replace

import pytest
from attention import rows
from attention.rows import RowsFile, read_rows, write_text


def test_rows_are_on_the_disk_after_every_addition(row, tmp_path):
    path = tmp_path / "new" / "attention.json"
    file = RowsFile(path)
    assert read_rows(path) == []
    for number, one in enumerate((row(), row("eager"), row("compile", seconds=None)), 1):
        file.add([one])
        assert read_rows(path) == file.rows
        assert len(file.rows) == number


def test_a_second_file_on_top_goes_on_from_the_first(row, tmp_path):
    path = tmp_path / "attention.json"
    RowsFile(path).add([row(), row("eager", seconds=None)])
    second = RowsFile(path)
    assert second.has(row(seconds=5.0))
    assert not second.has(row("eager"))  # it did not run
    assert not second.has(row(pass_name="backward"))
    assert not second.has(row(dtype="float16"))
    assert not second.has(row(machine="Another"))
    assert not second.has(row(code="other"))
    assert not second.has(row(versions="torch 3"))
    second.add([row(seconds=5.0), row(seconds=6.0, code="other")])
    assert [one.seconds for one in read_rows(path)] == [5.0, None, 6.0]


def test_a_killed_write_leaves_the_old_file(row, tmp_path, monkeypatch):
    path = tmp_path / "attention.json"
    file = RowsFile(path)
    file.add([row()])
    before = path.read_text()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file.add([row("eager")])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["no json", "{}1", '[{"contender": 1}]', "[1]"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "attention.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a file written by the attention suite.* choose another folder"):
        RowsFile(path)
    assert path.read_text() == content


def test_fields_of_later_versions_are_ignored(row, tmp_path):
    path = tmp_path / "attention.json"
    RowsFile(path).add([row()])
    path.write_text(json.dumps([one | {"later": 1} for one in json.loads(path.read_text())]))
    assert read_rows(path) == [row()]


def test_a_case_is_the_same_whatever_was_found(row, tmp_path):
    assert row().case == replace(row(), seconds=2.0, status="not run: late", commit="other", date="later").case
    assert row().case != row("eager").case


def test_text_is_written_into_new_folders(tmp_path):
    write_text(tmp_path / "a" / "b.md", "text")
    assert (tmp_path / "a" / "b.md").read_text() == "text"
