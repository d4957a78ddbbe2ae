import csv
import os

import pytest

from cytossl_monai.utils.cells import plain_cell, stored_cell
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import file_fingerprint
from cytossl_monai.utils.report import RunReport

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, 1000, MIB - 1, MIB, MIB + 1, MIB + MIB // 2, 2 * MIB - 1, 2 * MIB])
def test_every_byte_of_a_small_file_counts(tmp_path, size):
    path = tmp_path / "slide.tif"
    content = bytearray(size)
    path.write_bytes(content)
    before = file_fingerprint(path)
    for place in {0, size // 2, min(size - 1, MIB), size - 1}:
        content[place] ^= 1
        path.write_bytes(content)
        assert file_fingerprint(path) != before
        content[place] ^= 1
    path.write_bytes(content)
    assert file_fingerprint(path) == before


def test_both_ends_of_a_large_file_count(tmp_path):
    path = tmp_path / "slide.tif"
    content = bytearray(3 * MIB)
    path.write_bytes(content)
    before = file_fingerprint(path)
    for place in (0, MIB - 1, 2 * MIB, 3 * MIB - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert file_fingerprint(path) != before
        content[place] ^= 1


def test_a_mirax_slide_is_its_folder(tmp_path):
    path, folder = tmp_path / "slide.mrxs", tmp_path / "slide"
    folder.mkdir()
    path.write_bytes(b"label")
    (folder / "Data0000.dat").write_bytes(bytes(300_000))
    before, whole = file_fingerprint(path), file_fingerprint(folder)
    (folder / "Data0000.dat").write_bytes(bytes(299_999) + b"x")  # the same size, another end
    assert file_fingerprint(path) != before
    assert file_fingerprint(folder) != whole


def test_a_pipe_has_no_fingerprint(tmp_path):
    os.mkfifo(tmp_path / "slide.tif")
    with pytest.raises(InputError, match=r"slide\.tif is no regular file"):
        file_fingerprint(tmp_path / "slide.tif")
    with pytest.raises(FileNotFoundError):
        file_fingerprint(tmp_path / "none.tif")


@pytest.mark.parametrize("text", ["=1+1", "+1+cmd", "-x", "@SUM(A1)", "\t=1", " =1", "\r=1", "-", "=", "-1-2"])
def test_formulas_become_text_and_come_back(text):
    assert plain_cell(text) == "'" + text
    assert stored_cell(plain_cell(text)) == text


@pytest.mark.parametrize("value", ["a=b", "-1.5", "+2e-3", "1", "'tis", "nan", "-inf", "", -1.5, None, 3])
def test_numbers_and_other_text_stay(value):
    assert plain_cell(value) == value
    if isinstance(value, str):
        assert stored_cell(value) == value


def test_a_report_runs_nothing_in_a_spreadsheet(tmp_path):
    report = RunReport("index", tmp_path / "report.csv")
    report.add("=cmd", "failed", "@evil")
    report.add("-x", "done", "-1 tiles")
    report.save()
    with open(tmp_path / "report.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert [row[0] for row in rows[1:]] == ["'=cmd", "'-x"]
    assert [row[2] for row in rows[1:]] == ["'@evil", "'-1 tiles"]
