import json

import numpy as np
import pandas as pd
import pytest

from cytossl_monai.data.slide_table import SlideRecord, encode_labels, read_slide_table, write_slide_table
from cytossl_monai.utils.errors import TableError


def write(tmp_path, text, name="slides.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_fields(tmp_path):
    path = write(
        tmp_path,
        "slide_id,path,label,patient_id,fold,mpp,stain\na,s/a.tif,1,p1,0,0.25,Pap\nb,/abs/b.svs,,p2,,,\n",
    )
    a, b = read_slide_table(path)
    assert a == SlideRecord("a", tmp_path / "s/a.tif", "1", "p1", 0, 0.25, {"stain": "Pap"})
    assert (b.path.as_posix(), b.label, b.fold, b.mpp) == ("/abs/b.svs", None, None, None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_spreadsheet_exports(tmp_path, delimiter):
    text = "slide_id,path,label\r\n a ,x.tif,NILM\r\n,,\r\nb,y.tif,HSIL\r\n".replace(",", delimiter)
    records = read_slide_table(write(tmp_path, text, encoding="utf-8-sig"))
    assert [(r.slide_id, r.label, r.patient_id) for r in records] == [("a", "NILM", "a"), ("b", "HSIL", "b")]


def test_labels_that_pandas_would_change(tmp_path):
    records = read_slide_table(write(tmp_path, "slide_id,path,label\n001,a.tif,01\n2,b.tif,None\n"))
    assert [(r.slide_id, r.label) for r in records] == [("001", "01"), ("2", "None")]


@pytest.mark.parametrize("nothing", ["nan", "NaN", "NA", "N/A", "<NA>", "null"])
def test_words_for_no_value_are_no_label_and_no_patient(tmp_path, nothing, caplog):
    text = f"slide_id,path,label,patient_id\na,a.tif,{nothing},{nothing}\nb,b.tif,1,{nothing}\n"
    a, b = read_slide_table(write(tmp_path, text))
    assert (a.label, b.label) == (None, "1")
    assert (a.patient_id, b.patient_id) == ("a", "b")  # not one patient of the name "nan"
    assert "label of 1 slides says that there is none" in caplog.text


def test_columns_without_a_name_are_passed_over(tmp_path):
    wanted = [("a", "a.tif", {}), ("b", "b.tif", {})]
    frame = pd.DataFrame({"slide_id": ["a", "b"], "path": ["a.tif", "b.tif"], "label": ["0", "1"]})
    frame.to_csv(tmp_path / "index.csv")
    pd.read_csv(tmp_path / "index.csv").to_csv(tmp_path / "twice.csv")  # "Unnamed: 0" beside an unnamed one
    for text in ("slide_id,path,\na,a.tif\nb,b.tif,\n", "slide_id,path,,\na,a.tif,,\nb,b.tif,,\n"):
        records = read_slide_table(write(tmp_path, text))
        assert [(r.slide_id, r.path.name, r.extra) for r in records] == wanted
    for text in ("slide_id,path\na,a.tif,\nb,b.tif,,\n",):  # commas in the rows alone
        assert [(r.slide_id, r.path.name, r.extra) for r in read_slide_table(write(tmp_path, text))] == wanted
    for name in ("index.csv", "twice.csv"):
        records = read_slide_table(tmp_path / name)
        assert [(r.slide_id, r.path.name, r.extra) for r in records] == wanted


def test_what_a_spreadsheet_would_run_is_written_as_text_and_read_back(tmp_path):
    cells = {"note": "=HYPERLINK(1)", "plus": "+1+cmd", "at": "@x", "minus": "-1.5", "quote": "'fine", "tab": "a"}
    record = SlideRecord("s", tmp_path / "s.tif", "-x", "p", extra=cells)
    path = write_slide_table(tmp_path / "out.csv", [record])
    for row in pd.read_csv(path, dtype=str).itertuples(index=False):
        assert not any(str(value)[0] in "=+@" for value in row)
    assert "'=HYPERLINK" in path.read_text()
    assert ",-1.5," in path.read_text()  # a number stays one
    assert read_slide_table(path) == [record]


def test_only_slides_of_a_datalist_are_slides(tmp_path):
    content = {
        "labels": ["neg", "pos"],
        "modality": ["RGB"],
        "classes": [{"name": "neg"}],
        "training": ["a.tif"],
        "extra": [{"image": "b.tif"}],
    }
    records = read_slide_table(write(tmp_path, json.dumps(content), "list.json"))
    assert [r.slide_id for r in records] == ["a", "b"]
    assert read_slide_table(write(tmp_path, "\ufeff" + json.dumps(["a.tif"]), "bom.json"))[0].slide_id == "a"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1, 2]", '[{"image": "a.tif", "fold": ' + "1" * 5000 + "}]", '{"training": [3]}']
)
def test_strange_json_is_refused_in_a_sentence(tmp_path, text):
    with pytest.raises(TableError, match=r"list\.json") as caught:
        read_slide_table(write(tmp_path, text, "list.json"))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_quoted_comma_and_newline(tmp_path):
    (record,) = read_slide_table(write(tmp_path, 'slide_id,path,note\na,"x, y.tif","one\ntwo"\n'))
    assert record.path.name == "x, y.tif"
    assert record.extra == {"note": "one\ntwo"}


def test_datalist(tmp_path):
    content = {
        "name": "set",
        "training": [{"image": "a.tif", "label": 1, "patient_id": 7}, {"image": "b.ome.tif", "label": 0}],
        "testing": ["c.svs"],
    }
    records = read_slide_table(write(tmp_path, json.dumps(content), "list.json"))
    assert [(r.slide_id, r.label, r.patient_id, r.extra["split"]) for r in records] == [
        ("a", "1", "7", "training"),
        ("b", "0", "b", "training"),
        ("c", None, "c", "testing"),
    ]
    assert records[1].path == tmp_path / "b.ome.tif"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column slide_id"),
        ("slide_id,path\n", "no slides"),
        ("slide,path\na,b\n", "no column slide_id"),
        ("slide_id,path\na,x.tif\na,y.tif\n", "twice"),
        ("slide_id,path\na,x.tif\nA,y.tif\n", "twice"),
        ("slide_id,path\n,x.tif\n", "slide_id is empty"),
        ("slide_id,path\na/b,x.tif\n", "cannot be a file name"),
        ("slide_id,path\n..,x.tif\n", "cannot be a file name"),
        ("slide_id,path\na,\n", "no path"),
        ("slide_id,path\na,~nobody-of-this-name/x.tif\n", "home folder"),
        ("slide_id,path\nindex.html,x.tif\n", "name of another file"),
        ("slide_id,path\nReport.csv,x.tif\n", "name of another file"),
        ("slide_id,path\nNUL,x.tif\n", "name of another file"),
        ("slide_id,path\na.,x.tif\n", "cannot be a file name"),
        (f"slide_id,path\n{'a' * 300},x.tif\n", "too long"),
        ("slide_id,path\n\u00e9,x.tif\ne\u0301,y.tif\n", "one file name"),
        ("slide_id,path,label\na,x,1\nb,y,1.0\n", "label in two ways, '1' and '1.0'"),
        ("slide_id,path,patient_id\na,x,7.0\nb,y,7\n", "patient_id in two ways"),
        ("slide_id,path,patient_id\na,x,P0\nb,y,p0\n", "patient_id in two ways, 'P0' and 'p0'"),
        ("slide_id,path,patient_id\na,x,M\u00fcller\nb,y,Mu\u0308ller\n", r"'M\\xfcller' and 'Mu\\u0308ller'"),
        ("slide_id,path,patient_id\na,x,P 1\nb,y,P\u00a01\n", "patient_id in two ways"),
        ("slide_id,path,patient_id\na,x,P 1\nb,y,P  1\n", "patient_id in two ways"),
        ("slide_id,path,label\na,x,Positive\nb,y,positive\n", "label in two ways, 'Positive' and 'positive'"),
        ("slide_id,path,MPP\na,x,0.25\n", r"column 'MPP': did you mean mpp\?; rename it"),
        ("slide_id,path,Fold\na,x,0\n", "did you mean fold"),
        ("Slide ID,path\na,x\n", "did you mean slide_id"),
        ("slide_id,path,Patient ID\na,x,p\n", "did you mean patient_id"),
        ("slide_id,path,patient_id,PatientID\na,x,p,p\n", "did you mean patient_id"),
        ("slide_id,path,Split\na,x,train\n", "did you mean split"),
        ('slide_id,path\na,"x.tif\n', "check its quotes"),
        (f"slide_id,path,{'x' * 200_000}\na,x.tif\n", "check its quotes"),
        (f"{'x' * 1000},path\na,x.tif\n", "no column slide_id"),
        ("slide_id,path,mpp\na,x,abc\n", "no number"),
        ("slide_id,path,mpp\na,x,nan\n", "no number"),
        ("slide_id,path,mpp\na,x,0\n", "micrometres per pixel"),
        ("slide_id,path,fold\na,x,1.5\n", "whole number"),
        ("slide_id,path,fold\na,x,-1\n", "whole number"),
        ("slide_id,path,fold\na,x,1e300\n", "fold is 1e.300; give a whole number from 0 to 9999"),
        ("slide_id,path\na,x,y\n", "more values"),
        ("slide_id,path,path\na,x,y\n", "column .path. twice"),
        ("slide_id,path,patient_id,fold\na,x,p,0\nb,y,p,1\n", "patient p is on both sides"),
        ("slide_id,path,patient_id,split\na,x,p,train\nb,y,p,test\n", "patient p is on both sides"),
    ],
)
def test_malformed_tables(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(TableError, match=says) as caught:
        read_slide_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_a_datalist_are_spelt_as_columns_are(tmp_path):
    content = [{"image": "a.tif", "Label": 1}]
    with pytest.raises(TableError, match=r"list\.json, item 0: key 'Label': did you mean label\?; rename it"):
        read_slide_table(write(tmp_path, json.dumps(content), "list.json"))


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ('{"image": "\\udcfc.tif"}', "cannot be a file name"),
        ('{"image": "\\ud83d.tif", "slide_id": "a"}', "holds what no file name can"),
    ],
)
def test_halves_of_characters_in_a_datalist_are_refused(tmp_path, item, says):
    with pytest.raises(TableError, match=says):
        read_slide_table(write(tmp_path, f"[{item}]", "list.json"))


def test_halves_of_characters_that_are_kept_can_be_written(tmp_path):
    text = r'[{"image": "\udcfc.tif", "slide_id": "a", "patient_id": "p\udcfc", "n\udcfc": "\udcfc"}]'
    records = read_slide_table(write(tmp_path, text, "list.json"))
    assert records[0].path.name == "\udcfc.tif"  # as Python calls a file whose name is not UTF-8
    (back,) = read_slide_table(write_slide_table(tmp_path / "out.csv", records))
    assert (back.patient_id, back.extra) == (r"p\udcfc", {r"n\udcfc": r"\udcfc"})


def test_one_file_of_two_patients_is_said_once(tmp_path, caplog):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/x.tif").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "y.tif").symlink_to(tmp_path / "real/x.tif")
    rows = "a,real/x.tif,p\nb,link/x.tif,q\nc,y.tif,r\nd,real/z.tif,s\n"
    read_slide_table(write(tmp_path, "slide_id,path,patient_id\n" + rows))
    (said,) = [r.getMessage() for r in caplog.records if "both sides" in r.getMessage()]
    assert "2 slides are the file of another patient's slide, the first a of patient p and b of patient q" in said
    caplog.clear()
    read_slide_table(write(tmp_path, "slide_id,path,patient_id\na,real/x.tif,p\nb,real/./x.tif,p\nc,real/z.tif,q\n"))
    assert not caplog.records


def test_missing_and_binary_tables(tmp_path):
    with pytest.raises(TableError, match="does not exist"):
        read_slide_table(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(TableError, match="UTF-8"):
        read_slide_table(tmp_path / "x.csv")
    with pytest.raises(TableError, match="JSON"):
        read_slide_table(write(tmp_path, "{", "x.json"))
    with pytest.raises(TableError, match="no slides"):
        read_slide_table(write(tmp_path, "3", "x.json"))
    with pytest.raises(TableError, match="no path"):
        read_slide_table(write(tmp_path, '[{"label": 1}]', "x.json"))


def test_patient_column_missing_is_said(tmp_path, caplog):
    read_slide_table(write(tmp_path, "slide_id,path,label\na,x,0\nb,y,1\n"))
    assert "no column patient_id" in caplog.text


def test_encode_labels(tmp_path):
    table = "slide_id,path,label,patient_id\n" + "".join(f"s{i},x,{n},p\n" for i, n in enumerate([10, 2, 10, 0]))
    records = read_slide_table(write(tmp_path, table))
    numbers, classes = encode_labels(records)
    assert classes == ["0", "2", "10"]
    assert numbers.dtype == np.int64
    assert numbers.tolist() == [2, 1, 2, 0]
    assert encode_labels(records, ["10", "2", "0"])[0].tolist() == [0, 1, 0, 2]
    with pytest.raises(TableError, match=r"slide s1 has the label '2', which is none of the classes"):
        encode_labels(records, ["0", "10"])
    with pytest.raises(ValueError, match="twice"):
        encode_labels(records, ["0", "0"])


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ("HSIL NILM", ["NILM", "HSIL"]),
        ("carcinoma Benign atypical", ["Benign", "atypical", "carcinoma"]),
        ("benign Negative", ["Negative", "benign"]),
        ("case control", ["case", "control"]),
        ("-1 0 1", ["-1", "0", "1"]),
    ],
)
def test_a_class_that_is_called_negative_comes_first(tmp_path, labels, wanted):
    """Recall, specificity and one-class methods take the first of two classes for the negative one."""
    lines = "".join(f"s{i},x,{n},p{i}\n" for i, n in enumerate(labels.split()))
    records = read_slide_table(write(tmp_path, "slide_id,path,label,patient_id\n" + lines))
    assert encode_labels(records)[1] == wanted


def test_encode_labels_missing(tmp_path):
    records = read_slide_table(write(tmp_path, "slide_id,path,label\na,x,\nb,y,1\n"))
    with pytest.raises(TableError, match="slide a without a label"):
        encode_labels(records)


def test_write_then_read(tmp_path):
    records = [
        SlideRecord("a", tmp_path / "in/a.tif", "x,y", "p", 2, 0.25, {"note": "n"}),
        SlideRecord("b", tmp_path.parent / "b.tif", None, "q"),
    ]
    path = write_slide_table(tmp_path / "out.csv", records)
    back = read_slide_table(path)
    assert back[0] == records[0]
    assert (back[1].slide_id, back[1].path, back[1].fold) == ("b", records[1].path, None)
    assert pd.read_csv(path)["path"].tolist() == ["in/a.tif", str(tmp_path.parent / "b.tif")]
