"""The lists that data sets' authors publish, and how people name the files."""

import csv
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import data
import media
from data import UserError
from test_clips import SMALL, labels_of, named, touch

ROOT = pathlib.Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared/annotations"
sys.path.insert(0, str(ROOT / "tools"))
import list_clips  # noqa: E402


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Runs the tool on a list, given as text or a path -> Index of what it writes."""

    def go(data_set, text, *flags, folder=tmp_path):
        path = text
        if isinstance(text, str):
            path = tmp_path / "list.txt"
            path.write_text(text)
        out = tmp_path / "out.clips.csv"
        arguments = [data_set, path, folder, "--out", out, *flags]
        monkeypatch.setattr(sys, "argv", ["list_clips.py", *map(str, arguments)])
        list_clips.main()
        return data.read_clips(out, folder)

    return go


CUT = ("30000_40000", "000030", "30", "000030_000040", "30_40", "30.000", "30.000_40.000",
       "30.0_40.0", "30.0-40.0", "30.000-40.000")
VGGSOUND = (
    '--0PQM4-hqg,30,"waterfall, burbling",train\n--0PQM4-hqg,40,rain & wind,train\n'
    "---g-f_I2yQ,1,male singing,test\n--missing0_x,2,bagpipes,train\n#NAME?,4,rain,train\n"
    "---g-f_I2yQ,7,rain,val\nshort,1\n")


@pytest.mark.parametrize("prefix", ["", "Y", "sub/", "a/b/Y"])
def test_vggsound_and_how_its_files_are_named(tmp_path, prefix, capsys, listed):
    for k, cut in enumerate(["", *(f"_{cut}" for cut in CUT)]):
        file = f"{prefix}--0PQM4-hqg{cut}.{('mp4', 'MP4', 'mkv', 'webm')[k % 4]}"
        touch(tmp_path / str(k), file, f"{prefix}unlisted000_30.mp4")
        index = listed("vggsound", VGGSOUND, "--split", "train", folder=tmp_path / str(k))
        assert index.classes == (
            "bagpipes", "male singing", "rain", "rain & wind", "waterfall, burbling")
        out = capsys.readouterr().out
        if cut:  # that file is of the row at 30 s, and no other's
            assert index.labels.tolist() == [[4]] and np.isnan(index.start[0])
            assert "1 of 7 rows have a file" in out and "2 without a file (first: --0" in out
        else:
            assert index.start.tolist() == [30, 40] and index.end.tolist() == [40, 50]
            assert index.shared.all()
        for words in (
            "1 without a name (first: #NAME?,4,rain,train)", "1 of split val", "1 of split test",
            "1 with too few or too many cells (first: short,1)"):
            assert words in out


def test_splits_of_the_list_and_of_the_command(tmp_path, listed):
    touch(tmp_path, "--0PQM4-hqg.mp4", "---g-f_I2yQ.mp4")
    listed("vggsound", VGGSOUND)
    parts = data.read_splits(tmp_path / "out.clips.csv", tmp_path)
    assert {split: len(x) for split, x in parts.items()} == {
        None: 4, "train": 2, "test": 1, "val": 1}
    listed("ave", "Dog&--0PQM4-hqg&good&2&5\n", "--split", "val")
    assert set(data.read_splits(tmp_path / "out.clips.csv", tmp_path)) == {None, "val"}


def test_a_file_cut_for_one_row_is_no_other_rows(tmp_path, capsys, listed):
    touch(tmp_path, "abc_30.mp4", "abc_30_41.mp4", "one/def.mp4")
    with pytest.raises(UserError, match="0 of 2 .* 2 without a file .first: abc.*ID_000030, "):
        listed("vggsound", "abc,31,dog,train\nabc,30.5,cat,train\n")

    (tmp_path / "class_labels_indices.csv").write_text(
        "index,mid,display_name\n0,/m/1,Dog\n1,/m/2,Cat\n")
    text = 'abc, 30, 40, "/m/1"\nabc, 30, 45, "/m/2"\ndef, 1, 2, "/m/2"\n'
    index = listed("audioset", text)  # abc_30 may be the first's or the second's
    assert named(index) == {"one/def.mp4 [1.00-2.00 s]": ["Cat"]} and not index.shared.any()
    assert "2 with a file that is another row's, too (first: abc_30" in capsys.readouterr().out


def test_a_short_file_that_rows_share_is_not_already_cut(tmp_path, listed):
    media.write(tmp_path / "abc.mp4", seconds=2.0)
    rows = "abc,1,dog,train\nabc,30,cat,train\n"
    one = data.Clips(listed("vggsound", rows[16:]), SMALL)
    assert not one[0, 0, 0]["bad"]  # ten seconds of which two were left
    two = data.Clips(listed("vggsound", rows), SMALL)
    assert not two[0, 0, 0]["bad"] and "starts at 30.00 s" in two[0, 1, 0]["bad"][0][1]


def test_vggsound_as_published_with_two_columns(tmp_path, listed):
    touch(tmp_path, "video/x/glLQrEijrKg_000300.mp4", "video/LDoXsip0BEQ_177_187.mkv")
    index = listed(
        "vggsound", "glLQrEijrKg_000300.mp4,playing hammond organ\n"
        "LDoXsip0BEQ_000177.mp4,parrot talking\n6jiO0tPLK7U_000090.mp4,basketball bounce\n")
    assert named(index) == {
        "video/x/glLQrEijrKg_000300.mp4": ["playing hammond organ"],
        "video/LDoXsip0BEQ_177_187.mkv": ["parrot talking"]}


@pytest.mark.parametrize("head", [
    "# Segments csv\n# YTID, start_seconds, positive_labels\n", "",
    "YTID, start_seconds, end_seconds, positive_labels\n"])
def test_audioset(tmp_path, head, capsys, listed):
    touch(tmp_path, "Yaaaaaaaaaaa.mp4", "bbbbbbbbbbb_20000_30000.mp4", "Yccccccccccc_30.0_40.0.mp4")
    text = head + (
        'aaaaaaaaaaa, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n'
        'bbbbbbbbbbb, 20.000, 30.000, "/m/09x0r"\nccccccccccc, 30.000, 40.000, "/m/05zppz"\n'
        'ddddddddddd, 40.000, 30.000, "/m/05zppz"\n')
    with pytest.raises(UserError, match="class_labels_indices.csv must lie beside"):
        listed("audioset", text)

    published = tmp_path / "class_labels_indices.csv"
    published.write_text('index,mid,display_name\n0,/m/09x0r,"Speech"\n')
    with pytest.raises(UserError, match="a label that is not among the classes, '/m/05zppz'"):
        listed("audioset", text)
    published.write_text(
        published.read_text() + '1,/m/0ytgt,Child\n2,/m/05zppz,"Male speech, man speaking"\n')

    index = listed("audioset", text)
    out = capsys.readouterr().out
    assert "3 of 4 rows" in out and "1 with an end before its start (first: ddddddddddd" in out
    assert index.labels.tolist() == [[0, 2], [0, -1], [2, -1]] and index.task == "multi_label"
    assert index.classes == ("Speech", "Child", "Male speech, man speaking")
    assert index.start[0] == 30 and np.isnan(index.start[1:]).all()


EPIC = textwrap.dedent("""\
    narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,\
start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes
    """)
EPIC_ROWS = [  # of the validation file: the first of these is a narration of the same number as
    ("P01_11_0", "00:00:00.00", "00:00:01.89", 0, 2),  # a second, at which others start
    ("P01_11_49", "00:03:23.09", "00:03:24.30", 2, 8),
    ("P01_11_10", "00:00:49.15", "00:00:50.95", 0, 49),
    ("P01_11_1", "00:00:01.56", "00:00:02.45", 1, 2)]


def epic_row(narration, start, end, verb, noun):
    video = narration.rsplit("_", 1)[0]
    return (f"{narration},P01,{video},x,{start},{end},1,9,take it,take,{verb},cup,{noun},['cup'],"
            "[1]\n")


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(
    "way", ["narration", "times", "P01_11.MP4", "P01/P01_11.MP4", "P01/videos/P01_11.MP4"])
def test_epic_kitchens(tmp_path, way, real, listed):
    if real and not REAL.exists():
        pytest.skip("no real lists here")
    path = tmp_path / "list.csv"
    path.write_text(EPIC + "".join(epic_row(*row) for row in EPIC_ROWS))
    path = REAL / "epic/EPIC_100_validation_head.csv" if real else path
    rows = list(csv.DictReader(path.read_text().splitlines()))
    times = [[list_clips.seconds(r[f"{w}_timestamp"]) for w in ("start", "stop")] for r in rows]
    files = {
        "narration": [f"{r['video_id'][:3]}/{r['narration_id']}.mp4" for r in rows],
        "times": [
            f"{r['video_id']}_{round(s * 1000)}_{round(e * 1000)}.mkv"
            for r, (s, e) in zip(rows, times)],
    }.get(way, [way.replace("P01_11", r["video_id"]) for r in rows])
    touch(tmp_path, *files)

    index = listed("epic", path)
    assert [os.fsdecode(n) for n in index.names] == files
    assert index.labels.tolist() == [[int(r["verb_class"]), int(r["noun_class"])] for r in rows]
    assert index.task == "verb_noun" and [len(c) for c in index.classes] == [97, 300]
    assert index.classes[0][3] == ("open" if real else "verb 3")
    if way.endswith("MP4"):
        assert np.array_equal([index.start, index.end], np.transpose(times)) and index.shared.any()
    else:
        assert np.isnan(index.start).all()


def test_epic_kitchens_that_do_not_fit(tmp_path, listed):
    touch(tmp_path, "P01_01_2.mp4", "P01_01_9.00_13.75.mp4", "P01_01_2.00.mp4")
    row = epic_row("P01_01_0", "00:00:02.00", "00:00:03.75", 3, 3)
    with pytest.raises(UserError, match="first: P01_01.*VIDEO_ID, NARRATION_ID, "):
        listed("epic", EPIC + row)  # never that of another narration, or second
    with pytest.raises(UserError, match="not among the classes, 'noun 300'"):
        listed("epic", EPIC + epic_row("P01_01_0", "0", "1", 3, 300))

    touch(tmp_path, "P01_01.mp4")
    head, row = (",".join(line.split(",")[:8]) for line in (EPIC.strip(), row))
    index = listed("epic", f"{head}\n{row}\n")  # the list for testing has no labels
    assert index.labels.tolist() == [[-1, -1]] and index.segment(0) == (2.0, 3.75, False)
    with pytest.raises(UserError, match="1 of 1 clips .* have no label"):
        data.train_and_val(tmp_path, tmp_path / "out.clips.csv", labeled=True)


@pytest.mark.parametrize("head", ["", "Category&VideoID&Quality&StartTime&EndTime\n"])
def test_ave(tmp_path, head, listed):
    touch(tmp_path, "abc.mp4", "Ydef.mp4")
    index = listed("ave", head + 'Dog, "bark"&abc&good&2&5\nzoo&def&good&0&10\n')
    assert index.classes == ('Dog, "bark"', "zoo", "background") and index.task == "segments"
    assert index.labels[0].tolist() == [2, 2, 0, 0, 0, 2, 2, 2, 2, 2]
    assert (index.labels[1] == 1).all()
    assert np.isnan(index.start).all()  # the times are of the event, not of the clip


@pytest.mark.skipif(not REAL.exists(), reason="no real lists here")
@pytest.mark.parametrize("data_set, path, count, classes", [
    ("vggsound", "vggsound/test_head.csv", 600, 264),
    ("vggsound", "vggsound/vggsound_head.csv", 15, 14),
    ("audioset", "audioset/eval_segments_head.csv", 600, 527),
    ("audioset", "audioset/balanced_train_segments_head.csv", 600, 527),
    ("ave", "ave/trainSet.txt", 3339, 29), ("ave", "ave/Annotations.txt", 4143, 29),
    ("epic", "epic/EPIC_100_test_timestamps_head.csv", 39, 2)])
def test_real_lists(tmp_path, data_set, path, count, classes, listed, capsys):
    reader = list_clips.DATA_SETS[data_set]((REAL / path).parent)
    rows = [row for _, row in list_clips.read_rows(REAL / path, reader)]
    assert len(rows) == count and not any(isinstance(row, str) for row in rows)
    touch(tmp_path, *{f"files/{row.whole}.mp4" for row in rows})
    index = listed(data_set, REAL / path, folder=tmp_path / "files")
    assert len(index) == count and len(index.classes) == classes
    assert f"{count} of {count} rows have a file" in capsys.readouterr().out


@pytest.mark.parametrize("data_set, text, words", [
    ("epic", "abc,1,dog,train\nabc,2,cat,train\n", "columns that this data set's lists have not"),
    ("ave", "abc,1,dog,train\nabc,2,cat,train\n", "columns that this data set's lists have not"),
    ("vggsound", "abc,x,dog,train\n", "0 of 1 rows .* 1 could not convert string to float: 'x'"),
    ("vggsound", 'abc,1,"dog,train\n', "list.txt, after the row : unexpected end"),
    ("vggsound", "", "0 of 0 rows")])
def test_lists_that_are_refused(tmp_path, data_set, text, words, listed):
    touch(tmp_path, "abc.mp4")
    with pytest.raises(UserError, match=words):
        listed(data_set, text)


def test_as_it_is_typed(tmp_path):
    name = b"caf\xe9/abc_30.wav"
    (tmp_path / "list.csv").write_text("abc,30,dog,train\n")
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    open(os.path.join(os.fsencode(tmp_path), name), "w").close()

    def run(*flags):
        return subprocess.run(
            [sys.executable, ROOT / "tools/list_clips.py", "vggsound", "list.csv", ".", *flags],
            cwd=tmp_path, capture_output=True, text=True)

    assert run().stderr.startswith("error: no video files (.mp4, ")
    out = run("--modalities", "audio").stdout
    assert out.endswith("list.csv: 1 of 1 rows have a file below .\n")
    written = (tmp_path / "clips.csv").read_bytes().split(b"\r\n")
    assert written[:2] == [b"path,start,end,split,label", name + b",,,train,dog"]
    assert labels_of(data.read_clips(tmp_path / "clips.csv", tmp_path, ("audio",)), 0) == ["dog"]
