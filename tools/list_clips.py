"""List the clips of a published data set: its authors' list + a folder of files -> clips csv.

    python tools/list_clips.py vggsound vggsound.csv clips/ --out vggsound.clips.csv
    python tools/list_clips.py audioset eval_segments.csv clips/ --out eval.csv --split val
    python tools/list_clips.py epic EPIC_100_train.csv videos/ --out train.csv --split train

Files may lie anywhere below the folder. A file may hold the clip of one row alone, or a whole video
of which rows are segments; NAMES below says how both are named. Labels of AudioSet need
class_labels_indices.csv beside the list; EPIC-Kitchens is named by EPIC_100_verb_classes.csv and
EPIC_100_noun_classes.csv beside it, if they are there. The classes of both go to OUT.classes.csv.
"""

import argparse
import csv
import os
import pathlib
import re
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data  # noqa: E402

NAMES = {
    "vggsound": "ID, ID_000030, ID_30, ID_30_40, ID_30.0-40.0 (s), ID_30000_40000 (ms)",
    "audioset": "ID, YID, ID_000030, YID_30.000_40.000, ID_30.0-40.0 (s), ID_30000_40000 (ms)",
    "epic": "VIDEO_ID, NARRATION_ID, VIDEO_ID_30000_40000 (ms)", "ave": "ID, YID"}


class Row(NamedTuple):
    """The meaning of a row of a list."""

    cut: tuple  # of `names_of` a file that holds this clip alone, best first
    whole: str  # name of the file that has the clip somewhere
    start: float  # s, in the whole file; "" for all of it
    end: float
    labels: tuple  # cells of `label_columns`
    split: str = ""


def seconds(text):
    """Return a time in s: 83.5, or 00:01:23.5."""
    return round(sum(float(part) * 60**k for k, part in enumerate(reversed(text.split(":")))), 3)


def check_times(start, end):
    if not 0 <= start < end:
        raise ValueError("with an end before its start")


# ---------------------------------------------------------------------------------------------
# Readers: what a row of each list means


class Reader:
    """The meaning of one data set's list. `folder` holds the files that belong to the list."""

    columns = ()  # of files without a header, told apart by their number
    settings = {}  # of csv.reader
    label_columns = ("label",)  # of the clips csv
    classes = ()  # (column, class) pairs if these are fixed

    def __init__(self, folder):
        pass


def read_table(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


class VGGSound(Reader):
    columns = ("id", "start", "label", "split"), ("file", "label")

    def read(self, label, id="", start="", split="", file=""):
        if file:  # data/test.csv: ID_000030.mp4,label
            id, _, start = os.path.splitext(file)[0].rpartition("_")
        start = float(start)
        return Row(((id, start, start + 10), (id, start)), id, start, start + 10, (label,), split)


class AudioSet(Reader):
    columns = ("YTID", "start_seconds", "end_seconds", "positive_labels"),
    settings, label_columns = {"skipinitialspace": True}, ("labels",)

    def __init__(self, folder):
        path = folder / "class_labels_indices.csv"
        if not path.exists():
            raise data.UserError(f"{path.name} must lie beside the list, in {folder}")
        self.names = {row["mid"]: row["display_name"] for row in read_table(path)}
        self.classes = [("labels", name) for name in self.names.values()]

    def read(self, YTID, start_seconds, end_seconds, positive_labels):
        start, end = float(start_seconds), float(end_seconds)
        check_times(start, end)
        labels = "|".join([self.names[mid.strip()] for mid in positive_labels.split(",")])
        return Row(((YTID, start, end), (YTID, start)), YTID, start, end, (sys.intern(labels),))


class EpicKitchens(Reader):
    label_columns = ("verb", "noun")

    def __init__(self, folder):
        self.names, self.classes = {"": ""}, []  # of a list for testing
        for kind, count in ("verb", 97), ("noun", 300):
            path = folder / f"EPIC_100_{kind}_classes.csv"
            numbered = [{"id": i, "key": f"{kind} {i}"} for i in range(count)]
            rows = read_table(path) if path.exists() else numbered
            self.names |= {f"{kind} {row['id']}": row["key"] for row in rows}
            self.classes += [(kind, row["key"]) for row in rows]

    def read(self, narration_id, video_id, start_timestamp, stop_timestamp, verb_class="",
             noun_class="", **_):
        start, end = seconds(start_timestamp), seconds(stop_timestamp)
        check_times(start, end)
        labels = verb_class and f"verb {verb_class}", noun_class and f"noun {noun_class}"
        return Row((narration_id, (video_id, start, end)), video_id, start, end,
                   tuple(self.names[label] for label in labels))


class AVE(Reader):
    columns = ("Category", "VideoID", "Quality", "StartTime", "EndTime"),
    settings = {"delimiter": "&", "quoting": csv.QUOTE_NONE}
    label_columns = ("label", "event_start", "event_end")

    def read(self, Category, VideoID, Quality, StartTime, EndTime):
        labels = Category, float(StartTime), float(EndTime)  # of the event; the clip is the file
        return Row((), VideoID, "", "", labels)


DATA_SETS = {"vggsound": VGGSound, "audioset": AudioSet, "epic": EpicKitchens, "ave": AVE}


# ---------------------------------------------------------------------------------------------
# Rows and files


def parse(reader, columns, cells):
    """Return the Row of a list's cells, or the reason why it cannot be used."""
    if len(cells) != len(columns):
        return "with too few or too many cells"
    try:
        row = reader.read(**dict(zip(columns, cells)))
        return row if row.whole not in ("", "#NAME?") else "without a name"
    except ValueError as error:
        return str(error)
    except KeyError as error:
        raise data.UserError(f"a label that is not among the classes, {error}: {','.join(cells)}")
    except TypeError:
        raise data.UserError(f"columns that this data set's lists have not: {','.join(columns)}")


def read_rows(path, reader):
    """Yield (cells, Row or reason) of each row of a list but its header and comments."""
    columns, cells = None, ()
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = (line for line in file if not line.startswith("# "))
            for cells in csv.reader(lines, **{"strict": True, **reader.settings}):
                if columns is None:
                    columns = next((c for c in reader.columns if len(c) == len(cells)), cells)
                    if [*columns] == cells:
                        continue
                if cells:
                    yield cells, parse(reader, columns, cells)

    except csv.Error as error:
        raise data.UserError(f"{path}, after the row {','.join(cells)}: {error}") from None
    except OSError as error:
        raise data.UserError(f"cannot read {path}: {error.strerror}") from None


NUMBER = r"(\d+(?:\.\d+)?)"
SPAN, START = re.compile(rf"(.+)_{NUMBER}[_-]{NUMBER}"), re.compile(rf"(.+)_{NUMBER}")


def names_of(stem):
    """Yield what a file may be: the name of a video, or (name, start, end) or (name, start), s."""
    for name in {stem, stem.removeprefix("Y")}:
        yield name
        if span := SPAN.fullmatch(name):
            start, end = float(span[2]), float(span[3])
            yield span[1], start, end
            yield span[1], start / 1000, end / 1000  # as tools/prepare_clips.py names it
        if part := START.fullmatch(name):
            yield part[1], float(part[2])


def find_files(folder, modalities):
    """Return {name: path below the folder}, by all that each file may be."""
    paths = [path.decode(**data.UTF8) for path in data.list_files(folder, modalities)]
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    files = dict(zip(reversed(stems), reversed(paths)))  # of two with one name, the first

    for stem, path in zip(stems, paths):
        for name in names_of(stem):
            files.setdefault(name, path)
    return files


def match(rows, files, split=""):
    """Return [cells of the clips csv], {why others are not used: [cells of the first, count]}, and
    the set of first labels of all rows. A file that is cut for one row is no other's."""
    found, owners, disputed, unused, labels = [], {}, set(), {}, set()
    for cells, row in rows:
        reason, name = row if isinstance(row, str) else "", None
        if not reason:
            labels.add(row.labels[0])
            name = next((name for name in (*row.cut, row.whole) if name in files), None)
            wrong = split and row.split and row.split != split
            reason = f"of split {row.split}" if wrong else "" if name else "without a file"
        if reason:
            unused.setdefault(reason, [cells, 0])[1] += 1
            continue

        cut, path = name in row.cut, files[name]
        owner = (row.whole, row.start, row.end) if cut else row.whole
        if owners.setdefault(path, owner) != owner:
            disputed.add(path)
        times = ("", "") if cut else (row.start, row.end)
        found.append((path, *times, row.split or split, *row.labels))

    for cells in found if disputed else ():
        if cells[0] in disputed:
            unused.setdefault("with a file that is another row's, too", [cells, 0])[1] += 1
    return [cells for cells in found if cells[0] not in disputed], unused, labels


def write(out, rows, header, classes):
    """Write the clips csv, and its classes beside it."""
    classes_out = os.path.splitext(out)[0] + ".classes.csv"
    for path, lines in (out, [header, *rows]), (classes_out, [("column", "class"), *classes]):
        with open(path, "w", newline="", **data.UTF8) as file:
            csv.writer(file).writerows(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data_set", choices=DATA_SETS)
    add("list", help="csv or text file as its authors publish it")
    add("folder", help="folder of the files: --data of the training scripts")
    add("--out", default="clips.csv", help="clips csv to write")
    add("--split", default="", help="use rows of this split only; rows of a list without "
        "splits all get it")
    add("--modalities", nargs="+", choices=data.MODALITIES, default=data.MODALITIES,
        help="audio alone takes sound files, too")

    args = parser.parse_args()
    reader = DATA_SETS[args.data_set](pathlib.Path(args.list).parent)
    files = find_files(args.folder, args.modalities)
    rows, unused, labels = match(read_rows(args.list, reader), files, args.split)

    count = len(rows) + sum(count for _, count in unused.values())
    message = f"{args.list}: {len(rows)} of {count} rows have a file below {args.folder}"
    for reason, (cells, count) in unused.items():
        message += f"; {count} {reason} (first: {','.join(map(str, cells))})"
    if not rows:
        raise data.UserError(f"{message}. Names of files: {NAMES[args.data_set]}")

    header = "path", "start", "end", "split", *reader.label_columns
    write(args.out, rows, header, reader.classes or [("label", x) for x in sorted(labels)])
    print(message)


if __name__ == "__main__":
    sys.excepthook = data.excepthook
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be in any encoding
    main()
