"""Which clips there are, in which order they come, and what happens to unreadable ones."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

import data
import media
from data import Augment, Clips, Loader, UserError, Window, batch_keys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = Window(frames=8, step=0.16, size=32, seconds=1.28, mels=32)
TINY = Window(frames=2, step=0.16, size=16, seconds=0.32, mels=16)


def labeled_clips(folder, clips_csv=""):
    """Return the indices of `train_and_val` as finetuning calls it."""
    return dict(zip(("train", "val"), data.train_and_val(
        folder, clips_csv, share=0.1, labeled=True)))


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def labels_of(index, i):
    return [index.classes[k] for k in index.labels[i] if k >= 0]


def named(index):
    return {index.name(i): labels_of(index, i) for i in range(len(index))}


def listed(folder, text, split=None, **how):
    (folder / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return data.read_clips(folder / "a.csv", folder, split=split, **how)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return media.write(folder / "good.mp4", seconds=1.5, clicks=(0.2,)).read_bytes()


# ------------------------------------------------------------------------------------------ folders


def test_the_label_is_the_first_folder(tmp_path, capsys):
    touch(tmp_path, "dog/g01/x.mp4", "dog/g02/x.MP4", "cat/a/b/y.mkv", "cat/z.webm", "loose.mp4",
          ".Trash-1000/files/t.mp4", "dog/.ipynb_checkpoints/c.mp4", "dog/.hidden.mp4",
          "readme.txt", "dog/a.jpg", "dog/b.JPG", "dog/sound.wav", "LICENSE")
    index = data.find_clips(tmp_path)
    assert named(index) == {
        "cat/a/b/y.mkv": ["cat"], "cat/z.webm": ["cat"], "dog/g01/x.mp4": ["dog"],
        "dog/g02/x.MP4": ["dog"], "loose.mp4": []}
    assert index.labels.dtype == np.int32 and not index.shared.any()
    ignored = "ignored 5 files: .jpg 2, "
    assert ignored in capsys.readouterr().out and index.segment(0)[2] is False
    assert data.describe_classes(index) == "2 classes: cat 2, dog 2"
    assert data.find_clips(tmp_path, ("audio",)).name(4) == "dog/sound.wav"

    one = data.find_clips(tmp_path / "cat" / "z.webm")
    assert one.path(0) == str(tmp_path / "cat" / "z.webm") and len(one) == 1 and not one.classes


def test_more_folders_than_16_bits_count(tmp_path, monkeypatch):
    names = [f"{i:05d}/a.mp4".encode() for i in range(33_000)]
    monkeypatch.setattr(data, "list_files", lambda *_: names)
    index = data.find_clips(tmp_path)
    assert (index.labels[:, 0] == np.arange(33_000)).all()
    assert data.describe_classes(index).startswith("33000 classes: 00000 1, 00001 1")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "cat/a.mp4", "dog/b.mp4")
    with pytest.raises(UserError, match="there is no folder"):
        data.find_clips(tmp_path / "nowhere")
    touch(tmp_path / "empty", "a.txt")
    with pytest.raises(UserError, match="no video files .*, but: .txt 1"):
        data.find_clips(tmp_path / "empty")

    scandir = os.scandir

    def locked(path):
        if os.path.basename(path) == b"dog":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match="cannot read the folder .*dog .Permission denied"):
        data.find_clips(tmp_path)


def test_links_are_followed_once_and_loops_end(tmp_path):
    touch(tmp_path, "clips/cat/a.mp4", "clips/zebra/c.mp4", "elsewhere/dog/b.mp4")
    os.symlink(tmp_path / "elsewhere" / "dog", tmp_path / "clips" / "dog")
    os.symlink(tmp_path / "clips" / "zebra", tmp_path / "clips" / "cat" / "horse")
    os.symlink(tmp_path / "clips", tmp_path / "clips" / "cat" / "again")
    os.symlink(tmp_path, tmp_path / "elsewhere" / "dog" / "up")
    index = data.find_clips(tmp_path / "clips")
    assert named(index) == {
        "cat/a.mp4": ["cat"], "dog/b.mp4": ["dog"], "zebra/c.mp4": ["zebra"]}


@pytest.mark.parametrize("folders, expected", [
    ("train val", ("train", "val")), ("Train Validation test", ("Train", "Validation")),
    ("training TESTING", ("training", "TESTING")), ("train eval extra", ("train", "eval")),
    ("train bus", None), ("val test", None), ("cat dog", None)])
def test_folders_named_by_split(tmp_path, folders, expected, capsys):
    touch(tmp_path, *(f"{name}/cat/{name}.mp4" for name in folders.split()))
    touch(tmp_path, *(f"{name}/dog/{name}.mp4" for name in folders.split()))
    splits = data.find_splits(tmp_path)
    if expected is None:
        assert splits == {} and set(data.split_clips(tmp_path)) == {"train"}
        return

    parts = labeled_clips(tmp_path)
    assert [os.path.basename(x.folder) for x in (parts["train"], parts["val"])] == [*expected]
    assert parts["train"].classes == parts["val"].classes == ("cat", "dog")
    assert {s: len(x) for s, x in parts.items()} == {"train": 2, "val": 2}
    out = capsys.readouterr().out
    assert "train is {}, val is {}".format(*expected) in out
    others = set(folders.split()) - set(expected)
    assert ("ignored: " + ", ".join(others) in out) == bool(others)


def test_labels_of_both_parts_agree(tmp_path):
    touch(tmp_path, "train/cat/a.mp4", "train/dog/b.mp4", "test/dog/c.mp4")
    parts = labeled_clips(tmp_path)
    assert parts["train"].classes == parts["val"].classes == ("cat", "dog")
    assert parts["train"].labels.tolist() == [[0], [1]] and parts["val"].labels.tolist() == [[1]]
    touch(tmp_path, "test/fox/c.mp4")
    with pytest.raises(UserError, match="1 labels of the clips .* not among the classes: fox"):
        labeled_clips(tmp_path)

    touch(tmp_path / "flat", "train/cat/a.mp4", "train/dog/b.mp4", "test/c.mp4", "test/d.mp4")
    with pytest.raises(UserError, match="2 of 2 clips of .*test have no label, such as c.mp4"):
        labeled_clips(tmp_path / "flat")
    touch(tmp_path / "beside", "cat/a.mp4", "dog/b.mp4", "c.mp4")
    with pytest.raises(UserError, match="1 of 3 clips .* no label, such as c.mp4"):
        labeled_clips(tmp_path / "beside")


def test_a_tenth_is_for_validation(tmp_path):
    touch(tmp_path, *(f"{c}/{i}.mp4" for c in ("cat", "dog") for i in range(100)))
    parts = labeled_clips(tmp_path)
    train, val = (set(parts[s].names) for s in ("train", "val"))
    assert len(train | val) == 200 and not train & val and 5 < len(val) < 40
    assert parts["train"].classes == parts["val"].classes


def test_is_validation_and_take_fraction(tmp_path):
    names = [f"{i}.mp4" for i in range(2000)]
    touch(tmp_path, *names)
    index = data.find_clips(tmp_path)
    mask = data.is_validation(index)
    assert 20 < mask.sum() < 65
    fewer = index.subset(np.arange(0, 2000, 2))
    assert (data.is_validation(fewer) == mask[::2]).all()  # whatever other clips there are
    quarter, half = (set(data.take_fraction(index, f).names) for f in (0.25, 0.5))
    assert quarter < half and 0.45 < len(half) / 2000 < 0.55
    assert data.take_fraction(index, 1.0) is index

    def split(*names, share=0.5):
        whole = np.full(len(names), np.nan)
        names = np.array([*map(os.fsencode, names)])
        return data.is_validation(data.Index("", names, whole, whole, whole[:, None]), share)

    same = split(*(f"{i:03d}/video.mp4" for i in range(200)))
    assert 60 < same.sum() < 140  # one name in every folder
    whole = split(*(f"a/{i}.mp4" for i in range(200)))
    parts = split(*(f"a/{i}_{1000 * i}_{2000 * i + 1}.mkv" for i in range(200)))
    assert (whole == parts).all()  # also after tools/prepare_clips.py
    assert split("a.mp4", "b.mp4", share=0).sum() == 1 and not split("a.mp4", share=0).any()


# -------------------------------------------------------------------------------------- a clips csv

TIMED, NONE = [(1, 2.5, ["dog"]), (0, 1, ["cat"])], (None, None)


@pytest.mark.parametrize("text, task, expected", [
    ("path,start,end,label\nx/a.mp4,1,2.5,dog\nb.mp4,0,1,cat\n", "single_label", TIMED),
    ("label,end,start,path\ndog,2.5,1,x/a.mp4\n\ncat,1,0,./b.mp4\n", "single_label", TIMED),
    ("path,start,end,label\nx/../x/a.mp4,1,2.5, dog \nb.mp4,0,1,cat", "single_label", TIMED),
    ("path,label\nx/a.mp4,dog\nb.mp4,7\n", "single_label", [(*NONE, ["dog"]), (*NONE, ["7"])]),
    ("path,split,label\nx/a.mp4,Training,dog\nb.mp4,val,cat\n", "single_label",
     [(*NONE, ["dog"])]),
    ('path,labels\nx/a.mp4,"dog, big|loud"\nb.mp4,loud\n', "multi_label",
     [(*NONE, ["dog, big", "loud"]), (*NONE, ["loud"])]),
    ("path\nx/a.mp4\nb.mp4\n", "single_label", [(*NONE, []), (*NONE, [])]),
    ('\ufeffpath,label\r\n"x/a.mp4","say ""dog"""\r\n', "single_label",
     [(*NONE, ['say "dog"'])])])
def test_clips_csv(tmp_path, text, task, expected):
    touch(tmp_path, "x/a.mp4", "b.mp4")
    index = listed(tmp_path, text, "train" if "split" in text else None)
    times = [NONE if np.isnan(index.start[i]) else index.segment(i)[:2] for i in range(len(index))]
    assert [(*pair, labels_of(index, i)) for i, pair in enumerate(times)] == expected
    assert [*index.names] == [b"x/a.mp4", b"b.mp4"][: len(expected)] and index.task == task
    assert index.labels.dtype == np.int32 and index.labels.shape[1] >= 1


def test_clips_csv_of_verbs_and_nouns_and_of_events(tmp_path):
    touch(tmp_path, "a.mp4")
    text = "path,start,end,verb,noun\na.mp4,1,2,take,tap\na.mp4,2,3,put,tap\n"
    index = listed(tmp_path, text)
    assert index.task == "verb_noun" and index.classes == (("put", "take"), ("tap",))
    assert index.labels.tolist() == [[1, 0], [0, 0]] and index.shared.all()
    assert data.describe_classes(index) == "2 verbs: put 1, take 1; 1 nouns: tap 2"
    (tmp_path / "a.classes.csv").write_text("column,class\nverb,take\nverb,put\nnoun,cup\n")
    with pytest.raises(UserError, match="not among the classes: tap"):
        listed(tmp_path, text)
    (tmp_path / "a.classes.csv").write_text(
        "column,class\nverb,take\nverb,put\nnoun,cup\nnoun,tap\n")
    index = listed(tmp_path, text)
    assert index.classes == (("take", "put"), ("cup", "tap"))
    assert index.labels.tolist() == [[0, 1], [1, 1]]

    (tmp_path / "a.classes.csv").unlink()
    index = listed(tmp_path, "path,label,event_start,event_end\na.mp4,zoo,2,5\na.mp4,Ant,0,10\n")
    assert index.classes == ("Ant", "zoo", "background") and index.task == "segments"
    assert index.labels[0].tolist() == [2, 2, 1, 1, 1, 2, 2, 2, 2, 2] and not index.labels[1].any()


def test_a_file_of_several_segments_is_shared(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    index = listed(
        tmp_path, "path,start,end,split\na.mp4,0,1,train\nb.mp4,0,1,train\na.mp4,1,2,test\n"
        "c.mp4,,,train\nb.mp4,0,1,train\n")
    assert index.shared.tolist() == [True, False, True, False, False]
    assert index.subset([0]).shared.all()  # also where the other segment is in another part


@pytest.mark.parametrize("text, words", [
    ("", "line 1: the columns must be"), ("path,label\n", "has no rows"),
    ("a.mp4,dog\n", "line 1: the columns must be .*: a.mp4,dog"),
    ("path,label,fold\na.mp4,dog,1\n", "line 1: the columns must be .*: path,label,fold"),
    ("Path,label\na.mp4,dog\n", "line 1: the columns must be .*: Path,label"),
    ("path,label,label\na.mp4,b,c\n", "line 1: the columns must be .*"),
    ("path;label\na.mp4;dog\n", "line 1: the columns must be .*: path;label"),
    ("path,start,label\na.mp4,1,x\n", "line 1: the columns must be"),
    ("path,label,labels\na.mp4,1,x\n", "line 1: the columns must be .*: path,label,labels"),
    ("path,verb\na.mp4,x\n", "line 1: the columns must be"),
    ("path,label\na.mp4,dog\na.mp4\n", "line 3: 1 cells, not 2: a.mp4"),
    ("path,label\na.mp4,dog,1\n", "line 2: 3 cells"),
    ("path,start,end\na.mp4,1,\n", "line 2: start and end must be seconds.*: a.mp4,1,"),
    ("path,start,end\na.mp4,,3\n", "line 2: start and end"),
    ("path,start,end\na.mp4,0,1\na.mp4,5,2\n", "line 3: start and end .*: a.mp4,5,2"),
    ("path,start,end\na.mp4,0:30,0:40\n", "line 2: could not convert .*'0:30'"),
    ("path,label\na.mp4,dog\na.mp4,\n", "1 of 2 clips .* no label, such as a.mp4"),
    ("path,verb,noun\na.mp4,take,\n", "line 2: a part of the label is empty: a.mp4,take,"),
    ("path,label,event_start,event_end\na.mp4,x,5,2\n", "line 2: event_start and"),
    ('path,label\na.mp4,"y\na.mp4,z\n', "line 2: unexpected end"),
    ('path,label\na.mp4,"y\na.mp4,"z"\n', "line 2: .* expected after"),
    ('path,label\na.mp4,"y\nz"\n', "line 2: a quote is not closed"),
    ("path,label\n,dog\n", "line 2: the path is empty"),
    ("path,label\nz.mp4,dog\ny.mp4,cat\n", "none of the first 2 clips .* there is no .*z.mp4"),
    ("path,label\na.wav,dog\n", "lists sound, such as .*a.wav: give --modalities audio"),
    ("path,split\na.mp4,val\n", "no rows of split train, only of: val"),
    ("path\na.mp4\n", "no rows of split train, only of: .no column")])
def test_clips_csvs_that_are_refused(tmp_path, text, words):
    touch(tmp_path, "a.mp4", "a.wav")
    with pytest.raises(UserError, match=words):
        listed(tmp_path, text, "train" if "split train" in words else None)
    with pytest.raises(UserError, match="cannot read .*none.csv: No such file"):
        data.read_clips(tmp_path / "none.csv", tmp_path)


@pytest.mark.parametrize("path", [
    "../secret.mp4", "/etc/secret.mp4", "sub/../../secret.mp4", "..", "./../secret.mp4", "."])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    touch(tmp_path, "secret.mp4", "data/sub/a.mp4")
    with pytest.raises(UserError, match="line 2: .*leads out of the data folder: "):
        listed(tmp_path / "data", f"path,label\n{path},x\n")


@pytest.mark.parametrize("splits, expected, said", [
    ("train test val", ([0], [2]), "train is train, val is val; ignored: test"),
    ("train train test", ([0, 1], [2]), "train is train, val is test"),
    ("train Valid x", ([0], [1]), "train is train, val is val; ignored: x"),
    ("train val ", ([0], [1]), "ignored: (empty)"), ("test test val", None, "no rows of split")])
def test_splits_of_a_clips_csv(tmp_path, splits, expected, said, capsys):
    touch(tmp_path, "0.mp4", "1.mp4", "2.mp4")
    rows = "".join(f"{i}.mp4,{split},x\n" for i, split in enumerate(splits.split(" ")))
    (tmp_path / "a.csv").write_text("path,split,label\n" + rows)
    if expected is None:
        with pytest.raises(UserError, match=said):
            labeled_clips(tmp_path, tmp_path / "a.csv")
        return

    parts = labeled_clips(tmp_path, tmp_path / "a.csv")
    found = [[int(n[:1]) for n in parts[s].names.tolist()] for s in ("train", "val")]
    assert found == [*expected] and said in capsys.readouterr().out


def test_a_class_that_was_not_trained_on_is_refused(tmp_path):
    touch(tmp_path, "0.mp4", "1.mp4")
    (tmp_path / "a.csv").write_text("path,split,label\n0.mp4,train,dog\n1.mp4,val,dgo\n")
    with pytest.raises(UserError, match="no training clip has .*dgo"):
        labeled_clips(tmp_path, tmp_path / "a.csv")
    (tmp_path / "a.classes.csv").write_text("column,class\nlabel,dog\nlabel,dgo\n")
    assert labeled_clips(tmp_path, tmp_path / "a.csv")["val"].labels.tolist() == [[1]]


def test_names_in_other_encodings(tmp_path, good):
    name = b"caf\xe9.mp4"
    folder = tmp_path / "b\u00e4r"
    folder.mkdir()
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(good)

    index = data.find_clips(tmp_path)
    assert "video" in Clips(index, SMALL)[0, 0, 0]
    line = index.name(0).encode(**data.UTF8)
    assert line == "b\u00e4r/".encode() + name  # what is written is what is on the disk
    assert Clips(listed(tmp_path, b"path,label\n" + line + b",x\n"), SMALL).read(0)
    assert data.find_clips(tmp_path).classes == ("b\u00e4r",)


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8), (1, 4), (64, 64)])
def test_every_epoch_has_each_clip_once(count, batch):
    keys = sum(batch_keys(count, batch, 5, range(3 * count)), [])
    first, second = ([i for e, i, _ in keys if e == epoch] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second or count < 10
    assert [e for e, *_ in keys] == sorted(e for e, *_ in keys)


def test_the_order_is_that_of_older_runs():
    keys = sum(batch_keys(7, 3, 5, range(4), repeat=2), [])
    order = [np.random.default_rng([5, epoch]).permutation(7).tolist() for epoch in range(2)]
    assert keys == [(0, i, d) for i in order[0] for d in range(2)][:12]
    assert sum(batch_keys(7, 3, 5, range(2, 4)), [])[1:] == [(1, i, 0) for i in order[1][:5]]


@pytest.mark.parametrize("repeat", [1, 4])
def test_processes_micro_batches_and_resuming_change_nothing(repeat):
    def batches(first=0, rows=None, micro=0, seed=7):
        return list(batch_keys(50, 12, seed, range(first, 20), rows, micro, repeat))

    whole = batches()
    assert batches(13) == whole[13:] and batches(seed=8) != whole
    assert [k[2] for k in sum(whole, [])] == 240 // repeat * [*range(repeat)]
    for cuts in (0, 6, 12), (0, 1, 7, 12):
        parts = zip(*(batches(rows=range(*pair)) for pair in zip(cuts, cuts[1:])))
        assert [sum(p, []) for p in parts] == whole

    for micro in 3, 4:  # rows of a process, two micro-batches a step
        parts = batches(rows=range(6, 12), micro=micro)
        assert [a + b for a, b in zip(parts[::2], parts[1::2])] == [b[6:] for b in whole]


@pytest.mark.parametrize("count, batch, world", [
    (10, 4, 1), (9, 4, 2), (3, 2, 1), (1, 8, 2), (5, 1, 1)])
def test_evaluation_has_each_clip_once(count, batch, world):
    parts = [data.in_order(count, batch, rank, world) for rank in range(world)]
    keys = sum(sum(parts, []), [])
    assert sorted(keys) == [(0, i, 0) for i in range(count)]
    sizes = [len(b) for part in parts for b in part]
    assert max(sizes) - min(sizes) <= 1 and (min(sizes) > 1 or count == 1)


# ---------------------------------------------------------------------------- clips that are bad


def test_bad_clips_are_replaced_and_counted_by_clip(tmp_path, good):
    """Of 42 clips two are bad, next to each other: their stand-ins are spread."""
    for i in range(42):
        (tmp_path / f"{i:02d}.mp4").write_bytes(b"" if i in (20, 21) else good)
    clips, told = Clips(data.find_clips(tmp_path), TINY, augment=Augment(), seed=3), []
    loader = Loader(clips, batch_keys(42, 14, 3, range(9)), warn=told.append)
    seen = np.concatenate([batch["index"].numpy() for batch in loader])
    assert (loader.num_loaded, loader.num_unreadable) == (126, 6)  # 2 of 42 in each of 3 epochs
    assert sorted(loader.bad) == ["20.mp4", "21.mp4"] and len(told) == 2
    assert all(re.match("unreadable, replaced: 2[01].mp4: cannot be ", line) for line in told)

    counts = np.bincount(seen, minlength=42)
    assert not counts[20:22].any() and (np.delete(counts, [20, 21]) >= 3).all()
    stands_in = {clips[epoch, i, 0]["index"] for epoch in range(6) for i in (20, 21)}
    assert len(stands_in) > 5
    one, same = clips[4, 20, 0], clips[4, 20, 0]
    assert one["unreadable"] and one["index"] == same["index"] and one["video"].equal(same["video"])
    own = clips[4, one["index"], 0]  # a clip as it is, not a mixture
    assert not own["unreadable"] and own["video"].equal(one["video"])
    assert one["label"].equal(own["label"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_bad_files_is_an_error_in_one_sentence(tmp_path, workers):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes(b"")
    clips = Clips(data.find_clips(tmp_path), SMALL, augment=Augment())
    with pytest.raises(UserError, match="^none of 2 clips .*; the first: a.mp4: cannot "):
        next(iter(Loader(clips, [[(0, 0, 0)]], workers=workers)))


def test_in_evaluation_nothing_takes_the_place_of_a_bad_file(tmp_path, good):
    for i in range(9):
        (tmp_path / f"{i}.mp4").write_bytes(good if i in (1, 4, 8) else b"")
    clips, told = Clips(data.find_clips(tmp_path), TINY), []
    loader = Loader(clips, data.in_order(9, 2), warn=told.append)
    batches = list(loader)
    assert [i for b in batches for i in b["index"].tolist()] == [1, 4, 8]
    assert [len(b["video"]) for b in batches] == [len(b["index"]) for b in batches]
    assert 0 < len(batches) < len(loader)  # a batch without a clip is skipped
    assert (loader.num_loaded, loader.num_unreadable) == (9, 6)
    assert len(told) == 6 and told[0].startswith("unreadable, left out: 0.mp4: cannot ")


def test_every_row_of_a_batch_is_of_the_file_that_it_names(tmp_path):
    """Of files of different grey and different sound, every second one bad."""
    grey = {}
    for i in range(12):
        path = tmp_path / f"{i:02d}.mp4"
        if i % 2:
            path.write_bytes(bytes(1000))
            continue
        grey[i] = 20 + 18 * i
        picture = np.full((48, 64, 3), grey[i], np.uint8)
        media.write(
            path, seconds=2.0, picture=lambda t, picture=picture: picture,
            clicks=[0.05 + k * 1.9 / (i + 1) for k in range(i + 1)])

    clips = Clips(data.find_clips(tmp_path), SMALL, augment=Augment())
    own = {i: clips.read(i)["audio"] for i in grey}
    loader = Loader(clips, batch_keys(12, 6, 0, range(2), micro=2), "cpu", 2, [].append)
    for batch in loader:
        assert len(batch["index"]) == 2 and batch.keys() == {"video", "audio", "label", "index"}
        for row, i in enumerate(batch["index"].tolist()):
            assert abs(batch["video"][row].float().mean() - grey[i]) < 3
            assert batch["audio"][row].equal(own[i])
    assert (loader.num_loaded, loader.num_unreadable) == (12, 6) and loader.waited > 0


def test_repeated_draws_share_a_window_and_nothing_else(tmp_path, monkeypatch):
    for i in range(3):
        media.write(tmp_path / f"{i}.mp4", seconds=4.0, size=(96, 64))
    strong = Augment(frequency_masks=(1, 16), time_masks=(2, 40), color=True)
    clips = Clips(data.find_clips(tmp_path), SMALL, augment=strong, seed=2)
    keys = sum(batch_keys(3, 4, 0, range(6), repeat=2), [])
    assert keys[::2] == [(e, i, 0) for e, i, _ in keys[1::2]]
    assert sorted(keys[:12]) == [(e, i, d) for e in range(2) for i in range(3) for d in range(2)]

    reads, read = [], Clips.read
    monkeypatch.setattr(Clips, "read", lambda *args: (reads.append(1), read(*args))[1])
    together = clips.__getitems__(keys)
    assert len(reads) == 12
    for key, item in zip(keys, together):
        alone = clips[key]
        assert all(item[k].equal(alone[k]) for k in ("video", "audio", "color", "label"))
    starts = {round(float(media.times_of(item["video"])[0]), 1) for item in together[:6:2]}
    assert len(starts) > 1  # clips of an epoch start at different times
    for one, two in zip(together[::2], together[1::2]):
        times = [media.times_of(x["video"]) for x in (one, two)]
        assert np.abs(times[0] - times[1]).max() < 0.02  # the same moments
        assert not one["audio"].equal(two["audio"]) and not one["color"].equal(two["color"])
    assert any(not a["video"].equal(b["video"]) for a, b in zip(together[::2], together[1::2]))


# ---------------------------------------------------------------------------- workers and machines


class Slow:
    """Items that take a while, and that say which process made them."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        time.sleep(0.02)
        return os.getpid()


def test_workers_ignore_the_signals_that_stop_a_run():
    items = iter(data.Workers(Slow(), 2, batch_size=None))
    workers = [worker.pid for worker in items._workers]
    for number in "-TERM", "-INT":  # at once, before a worker has set up anything
        subprocess.run(["kill", number, *map(str, workers)], check=True)
    made = [next(items)]
    subprocess.run(["kill", "-TERM", *map(str, workers)], check=True)
    made += items
    assert len(made) == 40 and set(made) == set(workers)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & data.STOP_SIGNALS


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "raise data.UserError('so')", "pass"])
def test_workers_end_with_the_program(end):
    """Also where an error keeps the loader alive until the program ends."""
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import data, test_clips
        sys.excepthook = data.excepthook
        kept = iter(data.Workers(test_clips.Slow(), 2, batch_size=None))
        print(*[worker.pid for worker in kept._workers], flush=True)
        next(kept)
        {end}
        """)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == {"raise SystemExit(3)": 3, "pass": 0}.get(end, 1)
    assert done.stderr == ("error: so\n" if "UserError" in end else "")
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_is_kept_of_a_batch_holds_no_file_open(tmp_path, good):
    for i in range(24):
        (tmp_path / f"{i}.mp4").write_bytes(good)
    loader = Loader(Clips(data.find_clips(tmp_path), TINY), data.in_order(24, 2), workers=1)
    before, kept = len(os.listdir("/proc/self/fd")), []
    for batch in loader:
        kept.append((batch["index"], batch["label"]))
    del batch
    assert len(kept) == 12 and len(os.listdir("/proc/self/fd")) <= before + 4


@pytest.mark.parametrize("message, words", [
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", "--ipc=host"),
    ("unable to write to file </torch_1_2_3>: No space left on device (28)", "lower --workers"),
    ("unable to allocate shared memory(shm) for file </torch_1>: Success", "--ipc=host"),
    ("unable to open shared memory object </torch_1>: Too many open files (24)", "ulimit -n")])
def test_too_little_memory_for_workers(message, words, capsys):
    class Broken(Clips):
        def __getitems__(self, keys):
            raise RuntimeError(message)

    with pytest.raises(UserError, match=words):
        next(iter(Loader(Broken(None, SMALL), [[(0, 0, 0)]])))
    data.excepthook(RuntimeError, RuntimeError(message), None)  # raised in the middle of a step
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("files, count", [
    ({}, 8), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "250000 100000"}, 2),
    ({"cpu.max": "50000 100000"}, 1), ({"cpu.max": "9900000 100000"}, 8),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3)])
def test_a_containers_quota_of_cpus(tmp_path, files, count, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(data, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert data.cpu_count() == count


@pytest.mark.parametrize("error, shown", [
    (UserError("so"), "error: so\n"), (OSError(28, "full"), "error: [Errno 28] full\n"),
    (ValueError("a bug"), "ValueError: a bug\n"), (OSError(2, "a bug"), "FileNotFoundError: ")])
def test_only_mistakes_and_full_disks_are_shown_in_a_line(error, shown, capsys):
    data.excepthook(type(error), error, None)
    assert capsys.readouterr().err.startswith(shown)


def test_copies_block_unless_from_pinned_memory(monkeypatch):
    kinds, to = [], torch.Tensor.to

    def watched(tensor, device, **how):
        kinds.append(how)
        return to(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    window = Window(2, 0.32, 16, 0.64, 16)
    next(iter(Loader(data.Builtin(2, window), [[(0, 0, 0)]])))
    assert kinds and not any(how.get("non_blocking") for how in kinds)
