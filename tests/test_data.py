"""Clips: the right moments of real files, and what happens with the wrong files."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import data
import media
import stress
from data import Augment, Batches, Clips, UserError, Window

SMALL = Window(frames=8, step=0.16, size=32, seconds=1.28, mels=32)


def frames_at(path, times):
    with data.Media(path, ("video",)) as m:
        return media.times_of(np.stack(list(m.frames(np.array(times), data.resizing(32, 32)))))


def sound_of(path, start, stop):
    with data.Media(path) as m:
        return m.samples(start, stop)


# ---------------------------------------------------------------------------------- reading by time


@pytest.mark.parametrize(
    "settings",
    [
        dict(fps=25), dict(fps=30000 / 1001), dict(fps=12.5), dict(fps=60),
        dict(fps=24, start=1.4, audio=False), dict(fps=25, audio_start=0.3),
        dict(fps=25, codec="mpeg4")],
    ids=str,
)
def test_the_frame_shown_at_a_time(tmp_path, settings):
    path, fps = media.write(tmp_path / "a.mp4", **settings), settings["fps"]
    times = np.array([0.0, 0.07, 0.16, 0.95, 1.61, 2.9, 3.5])
    expected = np.floor(times * fps + 1e-3) / fps
    assert np.abs(frames_at(path, times) - expected).max() < 0.6 / fps + 0.01
    for t, e in zip(times[::-1], expected[::-1]):  # each by its own seek
        assert abs(frames_at(path, [t])[0] - e) < 0.6 / fps + 0.01


def test_a_variable_frame_rate(tmp_path):
    stamps = np.cumsum(
        [0, 0.04, 0.04, 0.3, 0.04, 0.04, 0.6, 0.1, 0.04, 0.04, 0.5, 0.04, 0.04, 0.04])
    path = media.write(tmp_path / "a.mp4", times=stamps, seconds=2.0)
    times = [0.05, 0.37, 0.39, 1.0, 1.3, 1.6]
    expected = [stamps[stamps <= t + 1e-3].max() for t in times]
    assert np.abs(frames_at(path, times) - expected).max() < 0.06


def test_pictures_that_a_phone_turned_are_put_upright(tmp_path):
    path = media.write(tmp_path / "a.mp4", audio=False)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    upright = {}
    for turns, (a, b, c, d) in {
        0: (1, 0, 0, 1), 1: (0, -1, 1, 0), 2: (-1, 0, 0, -1), 3: (0, 1, -1, 0)}.items():
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], np.int32) << 16
        path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 36 :])
        with data.Media(path, ("video",)) as m:
            (picture,) = m.frames(np.array([3.5]), lambda height, width: (height, width))
        assert picture.shape == ((48, 64, 3) if turns % 2 == 0 else (64, 48, 3))
        upright[turns] = np.rot90(picture, -turns)
    for picture in upright.values():  # turned back, all are the same
        assert np.abs(picture.astype(int) - upright[0]).max() <= 2


@pytest.mark.parametrize(
    "settings",
    [
        dict(), dict(rate=16_000, layout="mono"), dict(rate=48_000, layout="5.1"),
        dict(rate=8_000, layout="mono"), dict(start=1.4, audio_codec="pcm_s16le"),
        dict(audio_start=0.4), dict(audio_codec="libmp3lame")],
    ids=str,
)
def test_the_samples_of_a_time(tmp_path, settings):
    path = media.write(tmp_path / ("a.mkv" if "start" in settings else "a.mp4"), **settings)
    found = media.clicks_of(sound_of(path, 0.0, 4.0))
    assert np.abs(found - [1.0, 2.5]).max() < 0.006
    assert np.abs(2.2 + media.clicks_of(sound_of(path, 2.2, 3.2)) - 2.5).max() < 0.006  # by a seek
    assert len(sound_of(path, 2.2, 3.2)) == 16_000


def test_sound_that_starts_first_is_in_step_with_the_picture(tmp_path):
    path = media.write(tmp_path / "a.mkv", start=0.5, audio_start=-0.3)
    assert np.abs(media.clicks_of(sound_of(path, 0.0, 3.0)) - [1.3, 2.8]).max() < 0.006
    assert np.abs(frames_at(path, [1.32, 2.82]) - [1.0, 2.5]).max() < 0.03


def test_an_index_that_leads_too_far(tmp_path):
    path = media.write(tmp_path / "a.mp4")

    class Late:
        def __init__(self, container):
            self.container, self.decode = container, container.decode

        def seek(self, offset, stream, **how):
            self.container.seek(offset + round(1.0 / stream.time_base), stream=stream, **how)

    with data.Media(path, ("video",)) as m:
        m.container = Late(m.container)  # 1.5 s lead to the keyframe at 2 s
        shown = media.times_of(np.stack(list(m.frames(np.array([1.5]), data.resizing(32, 32)))))
        m.container = m.container.container
    assert abs(shown[0] - 1.48) < 0.03


def test_samples_after_a_seek_are_those_of_the_whole(tmp_path):
    path = media.write(tmp_path / "a.mp4", rate=16_000, clicks=np.arange(1000) / 250)  # a tone
    whole = sound_of(path, 0.0, 4.0)
    for start in 0.777, 1.0, 1.51, 2.49:  # AAC's first samples need those before
        part = sound_of(path, start, start + 0.2)
        assert np.abs(part - whole[round(start * 16_000) :][:3200]).max() < 1e-3


def test_sound_that_ends_early_repeats_and_a_gap_is_bad(tmp_path):
    clicks = np.arange(30) / 10
    path = media.write(tmp_path / "a.mp4", audio_seconds=1.5, clicks=clicks)
    with data.Media(path) as m:
        sound = data.read_audio(m, 0.0, 0.0, 4.0, 4.0)
    assert len(sound) == 64_000 and np.abs(sound.reshape(-1, 3200)).max(1).min() > 0.25
    path = media.write(tmp_path / "b.mkv", gap=0.6, clicks=clicks, audio_codec="pcm_s16le")
    with pytest.raises(data.ClipError, match="a gap in the sound at 1.6"):
        sound_of(path, 0.0, 3.0)


def test_sound_that_starts_late_is_missing_before(tmp_path):
    path = media.write(
        tmp_path / "a.mkv", audio_start=0.5, audio_seconds=3.0, audio_codec="pcm_s16le")
    missing = np.isnan(sound_of(path, 0.0, 4.0))
    assert missing[:7900].all() and not missing[8100:55_900].any() and missing[56_100:].all()


def test_windows_wrap_round_the_end(tmp_path):
    path = media.write(tmp_path / "a.mkv", seconds=2.0, clicks=(0.5,), audio_codec="pcm_s16le")
    with data.Media(path) as m:
        shown = media.times_of(data.read_video(m, 1.5, 0.0, 2.0, SMALL, data.resizing(32, 32)))
        sound = data.read_audio(m, 1.5, 0.0, 2.0, 4.0)
    expected = np.floor(((1.5 + np.arange(8) * 0.16) % 2.0) * 25 + 1e-3) / 25
    assert np.abs(shown - expected).max() < 0.03
    assert np.abs(media.clicks_of(sound) - [1.0, 3.0]).max() < 0.01  # at 0.5 of each turn of 2 s
    assert len(sound) == 64_000 and np.isfinite(sound).all()


def test_sound_and_picture_of_a_training_clip_are_of_the_same_moment(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=6.0, clicks=(2.0, 3.0, 4.0))
    clips = Clips(data.find_clips(tmp_path), SMALL, augment=Augment(flip=False), seed=3)
    starts = set()
    for epoch in range(12):
        clip = clips[epoch, 0]
        times = media.times_of(clip["video"])
        assert (np.diff(times) > 0).all()  # a file that is long enough has no end in a window
        start = times[0]
        loud = (clip["audio"].amax(1) > 0).nonzero().flatten() / 100
        onsets = [t.item() for t in loud if t - 0.05 not in loud]
        starts.add(round(float(start), 2))
        for click in (2.0, 3.0, 4.0):
            if 0.1 < click - start < 1.1:
                assert min(abs(start + o - click) for o in onsets) < 0.08
    assert len(starts) > 3


def test_test_windows_are_evenly_spaced(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=6.0, clicks=(5.0,))
    clip = Clips(data.find_clips(tmp_path), SMALL, views=4)[0, 0]
    assert clip["video"].shape == (4, 8, 32, 32, 3) and clip["audio"].shape == (4, 128, 32)
    starts = [media.times_of(v)[0] for v in clip["video"]]
    assert np.abs(np.array(starts) - np.linspace(0, 6.0 - 1.28, 4)).max() < 0.06
    last = (clip["audio"][3].amax(1) > 0).nonzero()[
        0
    ].item() / 100  # audio of the last: 4.72 to 6 s
    assert abs(4.72 + last - 5.0) < 0.04


def test_segments_are_cut(tmp_path):
    media.write(tmp_path / "long.mp4", seconds=8.0, clicks=(3.5,))
    (tmp_path / "a.csv").write_text("long.mp4,3.0,5.0,x\n")
    index = data.read_annotations(tmp_path / "a.csv", tmp_path)
    for epoch in range(4):
        shown = media.times_of(Clips(index, SMALL, augment=Augment())[epoch, 0]["video"])
        assert shown.min() > 2.9 and shown.max() < 5.05
    with data.Media(index.path(0)) as m:
        assert data.segment_of(m, 3.0, 5.0) == (3.0, 5.0)
        start, end = data.segment_of(m, 6.0, 9.0)
        assert start == 6.0 and abs(end - 8.0) < 0.1
        assert data.segment_of(m, 30.0, 40.0)[0] == 0.0  # of about this length: already cut
        with pytest.raises(data.ClipError, match="starts at 20.00 s"):
            data.segment_of(m, 20.0, 24.0)


# ---------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return media.write(tmp_path_factory.mktemp("good") / "good.mp4", seconds=3.0).read_bytes()


def zoo(folder, good):
    """A folder of files that are bad, each for its reason, and three good ones."""
    for name in "a_good", "m_good", "z_good":
        (folder / f"{name}.mp4").write_bytes(good)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    media.write(folder / "mute.mp4", audio=False)
    media.write(folder / "blind.mp4", video=False)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    # playlists, which would show another file under their own name
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile a_good.mp4\n")
    (folder / "stream.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\na_good.mp4\n#EXT-X-ENDLIST\n")
    return {f"{n}.mp4" for n in ("empty", "text", "cut", "mute", "blind", "pipe", "list", "stream")}


def test_bad_files_are_named_and_replaced_by_the_next(tmp_path, good):
    bad = zoo(tmp_path, good)
    index = data.find_clips(tmp_path)
    assert len(index) == len(bad) + 3
    clips = Clips(index, SMALL, augment=Augment())
    named = {}
    for i in range(len(index)):
        clip = clips[0, i]
        named.update(clip["bad"])
        assert clip["video"].shape == (8, 32, 32, 3) and index.name(clip["index"]).endswith(
            "good.mp4")
        again = clips[0, i]
        assert (
            again["index"] == clip["index"]
            and again["video"].equal(clip["video"])
            and again["audio"].equal(clip["audio"]))
        own = clips[0, clip["index"]]  # what stands in is a clip as it is, not a mixture
        if clip["index"] == i:
            assert own["video"].equal(clip["video"]) and not clip["bad"]
    assert set(named) == bad
    assert (
        named["mute.mp4"] == "no audio track"
        and named["blind.mp4"] == "no picture"
        and "cannot be opened" in named["list.mp4"]
        and named["pipe.mp4"] == "not a file")


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
    own = {i: clips.read(i, np.random.default_rng([0, 0, i]))["audio"] for i in grey}
    for batch in torch.utils.data.DataLoader(
        clips, batch_sampler=data.Batches(12, 6, 0, 0, 2), collate_fn=data.collate, num_workers=2
    ):
        for row, i in enumerate(batch["index"].tolist()):
            assert abs(batch["video"][row].float().mean() - grey[i]) < 3
            assert batch["audio"][row].equal(own[i])
        assert all(int(name[:2]) % 2 for name, _ in batch["bad"])


def test_a_corpus_of_damaged_files():
    stress.corpus(per_kind=1)


def test_in_evaluation_nothing_takes_the_place_of_a_bad_file(tmp_path, good):
    bad = zoo(tmp_path, good)
    clips = Clips(data.find_clips(tmp_path), SMALL)
    batch = data.collate([clips[0, i] for i in range(len(clips))])
    assert len(batch["video"]) == len(batch["index"]) == 3 and {n for n, _ in batch["bad"]} == bad


def test_one_modality_needs_one_stream(tmp_path):
    media.write(tmp_path / "mute.mp4", audio=False)
    assert "video" in Clips(data.find_clips(tmp_path), SMALL, ("video",))[0, 0]


def test_a_folder_of_bad_files_is_an_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="none of 1 clips"):
        Clips(data.find_clips(tmp_path), SMALL, augment=Augment())[0, 0]


def test_a_file_that_takes_too_long_is_bad(tmp_path, good, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(good)
    monkeypatch.setattr(data, "TIME_LIMIT", -1.0)
    with pytest.raises(data.ClipError, match="takes longer|cannot be opened"):
        Clips(data.find_clips(tmp_path), SMALL).read(0, None)


def test_a_picture_that_the_decoder_had_to_guess_is_bad(tmp_path, good):
    rng, said = np.random.default_rng(0), set()
    for _ in range(60):
        damaged = bytearray(good)
        for at in rng.integers(len(good) // 10, len(good) * 9 // 10, 3):
            damaged[at] ^= 1 << rng.integers(8)
        (tmp_path / "a.mp4").write_bytes(damaged)
        said.update(reason for _, reason in Clips(data.find_clips(tmp_path), SMALL)[0, 0]["bad"])
    assert "a damaged picture" in said


def test_a_picture_that_ends_early_is_bad_where_it_is_missing(tmp_path):
    path = media.write(tmp_path / "a.mkv", seconds=3.0, audio_codec="pcm_s16le", audio_seconds=8.0)
    with data.Media(path) as m:
        with pytest.raises(data.ClipError, match="the picture ends at"):
            list(m.frames(np.array([1.0, 6.0]), data.resizing(32, 32)))
        assert len(list(m.frames(np.array([1.0, 2.9]), data.resizing(32, 32)))) == 2


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, data.__file__, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_check_says_what_training_does(tmp_path, good):
    bad = zoo(tmp_path, good)
    media.write(tmp_path / "short.mp4", seconds=0.5)
    media.write(tmp_path / "silent.mp4", seconds=9.0, clicks=())
    media.write(tmp_path / "still.mp4", seconds=9.0, times=[0, 8.9])
    ran = run("check", tmp_path, "--seconds", 1, cwd=tmp_path)
    assert ran.returncode == 1 and f"{len(bad)} bad" in ran.stdout and "Traceback" not in ran.stderr
    said = {
        line.split(": ")[1]: line
        for line in ran.stdout.splitlines()
        if line.startswith(("bad", "warning"))}
    assert {n for n in said if said[n].startswith("bad")} == bad
    for name, word in (
        ("short", "shorter than a window"), ("silent", "silent"), ("still", "still picture")):
        assert word in said[f"{name}.mp4"] and said[f"{name}.mp4"].startswith("warning")


@pytest.mark.parametrize(
    "args, words",
    [
        (["check", "nowhere"], "there is no folder"), (["check", "."], "no video files"),
        (["prepare", "."], "no video files")],
)
def test_mistakes_end_in_a_sentence(tmp_path, args, words):
    ran = run(*args, cwd=tmp_path)
    assert (
        ran.returncode == 1
        and ran.stderr.startswith("error: ")
        and words in ran.stderr
        and ran.stderr.count("\n") == 1)


def test_prepared_clips_show_the_same(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "cat").mkdir(parents=True)
    media.write(source / "cat" / "a.mp4", seconds=5.0, fps=25, size=(640, 360), audio_start=0.2)
    (source / "bad.mp4").write_bytes(b"nothing")
    ran = run("prepare", source, target, cwd=tmp_path)
    assert ran.returncode == 1 and "bad: bad.mp4" in ran.stdout and "1 of 2 clips" in ran.stdout, (
        ran.stderr)
    path = target / "cat" / "a.mkv"
    made = path.stat()
    again = run("prepare", source, target, cwd=tmp_path)
    assert "1 of 2 clips" in again.stdout
    assert path.stat().st_mtime_ns == made.st_mtime_ns  # what is there is not made again
    window = Window(frames=8, step=0.16, size=224, seconds=4.0)
    with data.Media(source / "cat" / "a.mp4") as raw, data.Media(path) as prepared:
        assert (prepared.video.height, prepared.video.width) == (256, 456)
        for start in 0.0, 0.48, 2.4:
            old, new = (
                data.read_video(m, start, 0.0, 5.0, window, lambda *_: (256, 456))
                for m in (raw, prepared))
            error = np.square(old.astype(float) - new).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > 38
        old, new = (
            media.clicks_of(data.read_audio(m, 0.5, 0.0, 5.0, 4.0)) for m in (raw, prepared))
        assert np.abs(old - new).max() < 0.003


def test_quality_of_prepared_clips(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    media.write(tmp_path / "a.mp4", seconds=1.0, picture=lambda t: noise)
    index = data.find_clips(tmp_path)
    fine, coarse = (data.prepare_one(0, index, tmp_path / f"{q}", q)[0] for q in (3, 31))
    assert coarse < 0.5 * fine


def test_prepare_applies_segments_and_annotations_still_fit(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    media.write(source / "P01_01.mp4", seconds=6.0)
    (tmp_path / "EPIC_100_train.csv").write_text(
        EPIC.format(start="00:00:02.00", stop="00:00:04.50"))
    assert (
        run(
            "prepare", source, target, "--annotations", tmp_path / "EPIC_100_train.csv",
            cwd=tmp_path).returncode
        == 0
    )
    index = data.read_annotations(tmp_path / "EPIC_100_train.csv", target)
    assert index.name(0) == "P01_01_2000_4500.mkv"
    shown = media.times_of(Clips(index, SMALL)[0, 0]["video"])
    assert abs(shown[0] - 2.0) < 0.05


# -------------------------------------------------------------------------------------- annotations

EPIC = textwrap.dedent("""\
    narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,\
start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes
    P01_01_0,P01,P01_01,00:00:01.089,{start},{stop},8,202,open door,open,3,door,3,['door'],[3]
    """)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "name",
    [
        "--0PQM4-hqg_000030.mp4", "--0PQM4-hqg_30.MP4", "--0PQM4-hqg_30000_40000.mkv",
        "--0PQM4-hqg.webm", "sub/Y--0PQM4-hqg.mp4", "a/b/Y--0PQM4-hqg_30000_40000.mp4"],
)
def test_vggsound_and_how_its_files_are_named(tmp_path, name, capsys):
    touch(tmp_path, name)
    (tmp_path / "vggsound.csv").write_text(
        '--0PQM4-hqg,30,"waterfall, burbling",train\n---g-f_I2yQ,1,male singing,test\n'
        "--missing0_x,2,bagpipes,train\n")
    index = data.read_annotations(tmp_path / "vggsound.csv", tmp_path, "train")
    assert index.classes == (
        "bagpipes", "male singing", "waterfall, burbling") and index.labels.tolist() == [[2]]
    assert np.isnan(index.start[0]) == ("_30" in name or "_000030" in name)
    assert (
        "1 of 2 rows found their file" in (said := capsys.readouterr().out)
        and "--missing0_x" in said)


def test_audioset(tmp_path):
    touch(tmp_path, "Yaaaaaaaaaaa.mp4", "bbbbbbbbbbb_20000_30000.mp4")
    file = tmp_path / "eval_segments.csv"
    file.write_text(
        "# Segments csv created\n# num_ytids=2\n# YTID, start_seconds, positive_labels\n"
        'aaaaaaaaaaa, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n'
        'bbbbbbbbbbb, 20.000, 30.000, "/m/09x0r"\n'
    )
    with pytest.raises(UserError, match="class_labels_indices.csv"):
        data.read_annotations(file, tmp_path)
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n')
    index = data.read_annotations(file, tmp_path)
    assert index.labels.tolist() == [[0, 1], [0, -1]] and index.task == "many"
    assert (
        index.classes == ("Speech", "Male speech, man speaking")
        and index.start[0] == 30
        and np.isnan(index.start[1]))
    (tmp_path / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n')
    with pytest.raises(UserError, match="/m/05zppz"):
        data.read_annotations(file, tmp_path)


@pytest.mark.parametrize("name", ["P01_01.MP4", "P01/P01_01.MP4", "P01/videos/P01_01.MP4"])
def test_epic_kitchens(tmp_path, name):
    touch(tmp_path, name)
    (tmp_path / "EPIC_100_train.csv").write_text(
        EPIC.format(start="00:01:02.50", stop="00:01:03.75"))
    index = data.read_annotations(tmp_path / "EPIC_100_train.csv", tmp_path)
    assert (
        index.segment(0) == (62.5, 63.75)
        and index.labels.tolist() == [[3, 3]]
        and index.task == "epic")
    assert [len(c) for c in index.classes] == [97, 300]


def test_ave(tmp_path):
    touch(tmp_path, "abc.mp4", "def.mp4")
    (tmp_path / "Annotations.txt").write_text(
        "Category&VideoID&Quality&StartTime&EndTime\nBark&abc&good&2&5\nAxe&def&good&0&10\n")
    (tmp_path / "trainSet.txt").write_text("Bark&abc&good&2&5\n")
    index = data.read_annotations(tmp_path / "trainSet.txt", tmp_path)
    assert index.classes == ("Axe", "Bark", "background")
    assert index.labels.tolist() == [[2, 2, 1, 1, 1, 2, 2, 2, 2, 2]]
    assert len(data.read_annotations(tmp_path / "Annotations.txt", tmp_path)) == 2


def test_plain_csv(tmp_path):
    touch(tmp_path, "x/a.mp4", "b.mp4")
    (tmp_path / "a.csv").write_text("path,start,end,label\nx/a.mp4,1,2.5,dog\nb.mp4,0,1,cat\n")
    index = data.read_annotations(tmp_path / "a.csv", tmp_path)
    assert index.segment(0) == (1.0, 2.5) and index.labels.tolist() == [[1], [0]]
    (tmp_path / "b.csv").write_text("x/a.mp4,dog,loud\nb.mp4,cat\n")
    index = data.read_annotations(tmp_path / "b.csv", tmp_path)
    assert (
        index.task == "many"
        and index.labels.tolist() == [[1, 2], [0, -1]]
        and np.isnan(index.start).all())


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/secret.mp4", "link.mp4"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    touch(tmp_path, "secret.mp4", "data/a.mp4")
    os.symlink(tmp_path / "secret.mp4", tmp_path / "data" / "link.mp4")
    (tmp_path / "a.csv").write_text(f"{name},x\n")
    with pytest.raises(UserError, match="leads out of"):
        data.read_annotations(tmp_path / "a.csv", tmp_path / "data")
    if not name.startswith("/"):  # of which there is none
        index = data.read_annotations(tmp_path / "a.csv", tmp_path / "data", allow_outside=True)
        assert os.path.samefile(index.path(0), tmp_path / "secret.mp4")


def test_unknown_annotations(tmp_path):
    touch(tmp_path, "a.mp4")
    for text, words in (
        ("foo bar\nbaz\n", "no known format"), ("", "no rows"), ("z.mp4,x\n", "found its file")):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            data.read_annotations(tmp_path / "a.csv", tmp_path)


def test_folders_as_labels(tmp_path):
    touch(tmp_path, "train/cat/a.mp4", "train/dog/b.mp4", "test/dog/c.mp4")
    parts = data.labelled_clips(tmp_path)
    assert parts["train"].classes == parts["test"].classes == ("cat", "dog")
    assert parts["train"].labels.tolist() == [[0], [1]] and parts["test"].labels.tolist() == [[1]]
    touch(tmp_path, "test/fox/c.mp4")
    with pytest.raises(UserError, match="fox"):
        data.labelled_clips(tmp_path)
    other = tmp_path / "other"
    touch(other, *(f"{c}/{i}.mp4" for c in ("cat", "dog") for i in range(100)))
    parts = data.labelled_clips(other)
    assert len(parts["train"]) + len(parts["test"]) == 200 and 5 < len(parts["test"]) < 40


def test_held_out_and_fraction(tmp_path):
    touch(tmp_path, *(f"{i}.mp4" for i in range(2000)))
    index = data.find_clips(tmp_path)
    mask = data.held_out(index)
    assert 20 < mask.sum() < 65
    fewer = index.subset(np.arange(0, 2000, 2))
    assert (data.held_out(fewer) == mask[::2]).all()  # whatever other clips there are
    quarter, half = (set(data.fraction_of(index, f).names) for f in (0.25, 0.5))
    assert quarter < half and 0.45 < len(half) / 2000 < 0.55


# ------------------------------------------------------------------------------------------ sampler


@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8), (1, 4), (64, 64)])
def test_every_epoch_has_each_clip_once(count, batch):
    keys = sum(Batches(count, batch, 5, 0, 3 * count), [])
    first, second = ([i for e, i in keys if e == epoch] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second or count < 10
    assert [e for e, _ in keys] == sorted(e for e, _ in keys)


def test_processes_and_resuming_change_nothing():
    whole = list(Batches(50, 12, 7, 0, 20))
    assert list(Batches(50, 12, 7, 13, 20)) == whole[13:]
    for world in 2, 3, 4:
        parts = zip(*(Batches(50, 12, 7, 0, 20, rank, world) for rank in range(world)))
        assert [sum(p, []) for p in parts] == whole
    assert list(Batches(50, 12, 8, 0, 20)) != whole


# ----------------------------------------------------------------------------- sound and transforms


def test_log_mel():
    t = torch.arange(16_000 * 2) / 16_000
    wave = torch.where(t < 1, 0.0, 1.0) * torch.sin(2 * torch.pi * 1000 * t)
    mel = data.log_mel(wave)
    assert mel.shape == (200, 128) and mel.dtype == torch.float32
    assert abs(mel[:95] - np.log(0.01)).max() < 1e-3  # silence is log(offset)
    peak = mel[150].argmax().item()
    highest = 2595 * np.log10(1 + 8000 / 700)
    assert abs((peak + 1) * highest / 129 - 2595 * np.log10(1 + 1000 / 700)) < highest / 129
    onset = (mel[:, peak] > mel[150, peak] - 1).nonzero()[0].item()
    assert abs(onset - 100) <= 1
    louder = data.log_mel(2 * wave)[150, peak] - mel[150, peak]
    assert louder.item() == pytest.approx(np.log(2), abs=1e-3)  # magnitudes, not powers


def test_crops_and_flips_of_training_and_evaluation(tmp_path):
    y, x = np.mgrid[:64, :96]
    ramp = (20 + 100 * y / 64 + 100 * x / 96)[..., None].repeat(3, 2).astype(np.uint8)
    media.write(tmp_path / "a.mp4", seconds=1.0, size=(96, 64), picture=lambda t: ramp)
    index = data.find_clips(tmp_path)
    y, x = np.mgrid[:32, :32].reshape(2, -1)

    def plane(clip):  # level, slope down and slope to the right
        grey = clip["video"][0].float().mean(-1).flatten().numpy()
        return np.linalg.lstsq(np.stack([np.ones_like(x), y, x], 1), grey, rcond=None)[0]

    still = plane(Clips(index, SMALL)[0, 0])  # the short side is 32
    assert np.abs(still - [20 + 100 / 6, 100 / 32, 100 / 48]).max() < 2
    assert abs(still[1] - 100 / 32) < 0.1
    level, down, right = np.array(
        [plane(Clips(index, SMALL, augment=Augment())[epoch, 0]) for epoch in range(24)]).T
    assert np.abs(down - 100 / 36).max() < 0.1  # 32 of 36, as 224 of 256
    assert np.abs(np.abs(right) - 100 / 54).max() < 0.1 and 4 < (right < 0).sum() < 20
    assert level[right > 0].std() > 5


def test_augmentation_is_the_same_for_all_frames_and_repeats(tmp_path):
    media.write(tmp_path / "a.mp4", times=[0, 1.9], seconds=2.0)
    strong = Augment(jitter=(0.9, 1.33), colour=True)
    clips = Clips(data.find_clips(tmp_path), SMALL, augment=strong, seed=1)
    seen = []
    for epoch in range(8):
        video = clips[epoch, 0]["video"]
        assert video.equal(clips[epoch, 0]["video"])
        assert (video.float().std((1, 2, 3)) < 3).all() and (
            video[1:7].float() - video[:1].float()).abs().max() <= 2
        seen.append(video[0].float().mean((0, 1)))
    assert torch.stack(seen).std(0).max() > 5


def test_colour_jitter_stays_in_range_and_sometimes_is_gray():
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    results = [data.colour_jitter(video, np.random.default_rng(i)) for i in range(200)]
    gray = np.mean([(r[..., 0] == r[..., 1]).all() for r in results])
    untouched = np.mean([(r == video).all() for r in results])
    assert 0.03 < gray < 0.2 and 0.1 < untouched < 0.28


def test_crop_reaches_every_corner():
    video = np.arange(5 * 6).reshape(1, 5, 6, 1).repeat(3, 3)
    corners = {int(data.crop(video, 4, np.random.default_rng(i))[0, 0, 0, 0]) for i in range(100)}
    assert corners == {0, 1, 2, 6, 7, 8}
    assert data.crop(video, 4)[0, 0, 0, 0] == 1


def test_spec_augment():
    mel, rng, first = torch.rand(100, 32) + 1, np.random.default_rng(0), set()
    for _ in range(50):
        masked = data.spec_augment(mel, Augment(frequency_masks=(2, 8), time_masks=(1, 20)), rng)
        assert (masked == 0).all(0).sum() <= 16 and (masked == 0).all(1).sum() <= 20
        assert ((masked == mel) | (masked == 0)).all()
        first.add((masked == 0).all(1).float().argmax().item())
    assert len(first) > 20
    shifted = data.spec_augment(mel, Augment(time_shift=True), rng)
    assert shifted.sort(0).values.equal(mel.sort(0).values) and not shifted.equal(mel)


# ----------------------------------------------------------------------------------- built-in clips


def test_built_in_clips_are_deterministic():
    window = Window(8, 0.32, 32, 2.56, 32)
    a, b, c = data.Builtin(8, window, 1), data.Builtin(8, window, 1), data.Builtin(8, window, 2)
    assert a[0, 5]["video"].equal(b[3, 5]["video"]) and a[0, 5]["audio"].equal(b[0, 5]["audio"])
    assert not a[0, 5]["video"].equal(c[0, 5]["video"])
    assert a[0, 5]["video"].shape == (8, 32, 32, 3) and a[0, 5]["audio"].shape == (256, 32)


def test_a_bounce_is_heard_where_it_is_seen_and_height_is_pitch():
    for i in range(12):
        world = data.scene(0, i)
        wave = data.sound(world, 4.0)
        for bounce in world.bounces(4.0):
            before, after = world.position([bounce - 0.02, bounce, bounce + 0.02])[
                [0, 2]] - world.position([bounce])
            assert (before * after > 0).any()  # it turns round in x or in y
            if 0.05 < bounce < 3.9 and not any(0 < bounce - o < 0.15 for o in world.bounces(4.0)):
                envelope = np.abs(np.diff(wave))  # hits are noise: large from sample to sample
                at = round(bounce * 16_000)
                assert envelope[at : at + 160].mean() > 1.3 * envelope[at - 480 : at - 160].mean()
        spectrum = np.abs(np.fft.rfft(wave[16_000:18_048] * np.hanning(2048)))
        quiet = not ((world.bounces(4.0) > 0.85) & (world.bounces(4.0) < 1.13)).any()
        if quiet:
            height = 1 - world.position([1.064])[0, 1]
            low, high = (2595 * np.log10(1 + f / 700) for f in (180, 1600))
            pitch = 700 * (10 ** ((low + (high - low) * height) / 2595) - 1)
            assert spectrum[
                round(pitch / 7.8125) - 2 : round(pitch / 7.8125) + 3
            ].max() > 20 * np.median(spectrum)


def test_shape_and_voice_are_independent():
    worlds = [data.scene(0, i) for i in range(1600)]
    table = np.zeros((4, 4))
    for world in worlds:
        table[world.shape, world.voice] += 1
    assert (table == 100).all()


def test_the_shape_is_where_the_scene_says():
    for i in range(8):
        world = data.scene(1, i)
        picture = data.render(world, [0.7], 64)[0].astype(float)
        ground = data.render(dataclasses.replace(world, radius=1e-3), [0.7], 64)[0]
        cover = np.abs(picture - ground).sum(-1)
        y, x = (np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64
        centre = np.array([(cover.sum(0) * x).sum(), (cover.sum(1) * y).sum()]) / cover.sum()
        assert np.abs(centre - world.position([0.7])[0]).max() < 0.06
