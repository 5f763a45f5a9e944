"""Windows of clips, augmentation, and the built-in clips."""

import copy

import numpy as np
import pytest
import torch
import torchaudio
from torchvision.transforms.v2 import functional

import data
import media
import stress
from data import Augment, Clips, Window

SMALL = Window(frames=8, step=0.16, size=32, seconds=1.28, mels=32)


def clips_in(folder, *modalities, **how):
    return Clips(data.find_clips(folder), SMALL, modalities or data.MODALITIES, **how)


def test_sound_and_picture_of_a_training_clip_are_of_the_same_moment(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=6.0, clicks=(2.0, 3.0, 4.0))
    clips, starts = clips_in(tmp_path, augment=Augment(flip=False), seed=3), set()
    for epoch in range(12):
        clip = clips[epoch, 0, 0]
        times = media.times_of(clip["video"])
        assert (np.diff(times) > 0).all()  # a file that is long enough has no end in a window
        starts.add(round(float(times[0]), 2))

        loud = (clip["audio"].amax(1) > 0).nonzero().flatten() / 100
        onsets = [times[0] + t.item() for t in loud if t - 0.05 not in loud]
        for click in (2.0, 3.0, 4.0):
            if 0.1 < click - times[0] < 1.1:
                assert min(abs(onset - click) for onset in onsets) < 0.08
    assert len(starts) > 3


def test_test_windows_are_evenly_spaced(tmp_path):
    media.write(tmp_path / "a.mp4", seconds=6.0, clicks=(5.0,))
    clip = clips_in(tmp_path, views=4)[0, 0, 0]
    assert clip["video"].shape == (4, 8, 32, 32, 3) and clip["audio"].shape == (4, 128, 32)
    starts = [media.times_of(v)[0] for v in clip["video"]]
    assert np.abs(np.array(starts) - np.linspace(0, 6.0 - 1.28, 4)).max() < 0.06

    last = (clip["audio"][3].amax(1) > 0).nonzero()[0].item() / 100  # of 4.72 to 6 s
    assert abs(4.72 + last - 5.0) < 0.04


def test_segments_are_cut(tmp_path):
    media.write(tmp_path / "long.mp4", seconds=8.0, clicks=(3.5,))
    (tmp_path / "a.csv").write_text("path,start,end,label\nlong.mp4,3.0,5.0,x\n")
    index = data.read_clips(tmp_path / "a.csv", tmp_path)
    for epoch in range(4):
        shown = media.times_of(Clips(index, SMALL, augment=Augment())[epoch, 0, 0]["video"])
        assert shown.min() > 2.9 and shown.max() < 5.05
    with data.open_media(index.path(0)) as m:
        assert m.clip_bounds(3.0, 5.0) == (3.0, 5.0)
        start, end = m.clip_bounds(6.0, 9.0)
        assert start == 6.0 and abs(end - 8.0) < 0.1
        assert m.clip_bounds(30.0, 40.0)[0] == 0.0  # of about this length: already cut
        with pytest.raises(data.ClipError, match="starts at 20.00 s"):
            m.clip_bounds(20.0, 24.0)


def test_a_corpus_of_damaged_files():
    stress.corpus(per_kind=1)


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
    # the window is Hamming's: with Hann's, the bins beside a tone's are much lower
    frame = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    window = torch.from_numpy(np.hamming(401)[:400]).float()
    spectrum = torch.fft.rfft(frame[8000 - 200 : 8200] * window, 1024).abs()
    bank = torchaudio.functional.melscale_fbanks(513, 0.0, 8000.0, 128, 16_000)
    expected = (spectrum @ bank + 0.01).log()
    assert (data.log_mel(frame)[50] - expected).abs().max() < 2e-3
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

    still = plane(Clips(index, SMALL)[0, 0, 0])  # the short side is 32
    assert np.abs(still - [20 + 100 / 6, 100 / 32, 100 / 48]).max() < 2
    assert abs(still[1] - 100 / 32) < 0.1
    level, down, right = np.array(
        [plane(Clips(index, SMALL, augment=Augment())[epoch, 0, 0]) for epoch in range(24)]).T
    assert np.abs(down - 100 / 36).max() < 0.1  # 32 of 36, as 224 of 256
    assert np.abs(np.abs(right) - 100 / 54).max() < 0.1 and 4 < (right < 0).sum() < 20
    assert level[right > 0].std() > 5


def test_augmentation_is_the_same_for_all_frames_and_repeats(tmp_path):
    media.write(tmp_path / "a.mp4", times=[0, 1.9], seconds=2.0)
    strong = Augment(jitter=(0.9, 1.33), color=True)
    clips = clips_in(tmp_path, augment=strong, seed=1)
    seen = []
    for epoch in range(8):
        (batch,), (again,) = (list(data.Loader(clips, [[(epoch, 0, 0)]])) for _ in range(2))
        video = batch["video"][0]
        assert video.equal(again["video"][0]) and "color" not in batch
        assert (video.float().std((1, 2, 3)) < 3).all() and (
            video[1:7].float() - video[:1].float()).abs().max() <= 2
        seen.append(video[0].float().mean((0, 1)))
    assert torch.stack(seen).std(0).max() > 5


def test_color_jitter_is_the_recipe_of_each_clip():
    video = torch.randint(0, 256, (40, 2, 16, 16, 3), dtype=torch.uint8)
    with data.seeded(3):
        color = torch.stack([data.draw_color() for _ in range(400)])
    for column, low, high in (1, -32 / 255, 32 / 255), (2, 0.6, 1.4), (3, 0.6, 1.4), (4, -0.2, 0.2):
        assert low <= color[:, column].min() < low + 0.02 * (high - low)
        assert high >= color[:, column].max() > high - 0.02 * (high - low)
    assert 0.74 < color[:, 0].mean() < 0.86 and 0.05 < color[:, 5].mean() < 0.15

    color[0], color[1] = torch.tensor([[0.0, 0.1, 1.4, 1.4, 0.2, 0], [1, 0.1, 1.3, 0.7, 0.2, 1]])
    found = data.color_jitter(video, color[:40])
    assert found.dtype == torch.uint8 and found[0].equal(video[0])
    for clip, result, (jittered, brightness, saturation, contrast, hue, gray) in zip(
        video, found, color.tolist()):
        x = clip.permute(0, 3, 1, 2) / 255.0
        if jittered:
            x = functional.adjust_saturation((x + brightness).clamp(0, 1), saturation)
            x = functional.adjust_hue(functional.adjust_contrast(x, contrast), hue).clamp(0, 1)
        if gray:
            x = functional.rgb_to_grayscale(x, 3)
        assert (x.permute(0, 2, 3, 1) * 255 - result).abs().max() < 0.51


def test_crops_without_jitter_are_cut_and_reach_every_corner():
    video = torch.arange(5 * 6, dtype=torch.uint8).reshape(1, 5, 6, 1).expand(-1, -1, -1, 3)
    corners = set()
    for draw in range(100):
        with data.seeded(draw):
            crop = data.random_crop(video, 4, Augment(flip=False))[0, :, :, 0].int()
        corners.add(int(crop[0, 0]))
        assert crop.equal(crop[0, 0] + torch.arange(4)[:, None] * 6 + torch.arange(4))
    assert corners == {0, 1, 2, 6, 7, 8}
    assert data.center_crop(video, 4)[0, 0, 0, 0] == 1


def test_jitter_scales_height_and_width_independently():
    y, x = np.mgrid[:256, :400]
    video = torch.from_numpy(np.stack([y * 0.9, x * 0.6, 0 * x], -1).astype(np.uint8)[None])
    scales = []
    for draw in range(200):
        with data.seeded(draw):
            crop = data.random_crop(video, 224, Augment(False, (0.9, 1.33)))[0].float().numpy()
        assert crop.shape == (224, 224, 3)
        down, right = np.diff(crop[..., 0].mean(1)), np.diff(crop[..., 1].mean(0))
        scales.append((0.9 / down[5:-5].mean(), 0.6 / right[5:-5].mean()))
    scales = np.array(scales)
    assert (scales > 0.86).all() and (scales < 1.36).all() and np.ptp(scales, 0).min() > 0.38
    assert abs(scales.mean() - 1.115) < 0.03 and abs(np.corrcoef(scales.T)[0, 1]) < 0.2


def test_spec_augment():
    mel, first, widths = torch.rand(100, 32) + 1, set(), [set(), set()]
    for draw in range(400):
        with data.seeded(draw):
            masked = data.spec_augment(mel, Augment(frequency_masks=(1, 8), time_masks=(1, 20)))
        zero = masked == 0
        assert ((masked == mel) | zero).all()
        first.add(zero.all(1).float().argmax().item())
        for axis in 0, 1:
            widths[axis].add(int(zero.all(1 - axis).sum()))
    assert len(first) > 60 and widths == [set(range(21)), set(range(9))]
    with data.seeded(0):
        masked = data.spec_augment(mel, Augment(frequency_masks=(2, 500), time_masks=(4, 48)))
        shifted = data.spec_augment(mel, Augment(time_shift=True))
    assert masked.shape == mel.shape
    assert shifted.sort(0).values.equal(mel.sort(0).values) and not shifted.equal(mel)


def test_random_numbers_are_left_alone_outside():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with data.seeded(1, 2):
        a = torch.rand(3)
    assert torch.rand(3).equal(expected)
    for numbers in (1, 2, 0), (1, 3), (12,):
        with data.seeded(*numbers):
            assert not torch.rand(3).equal(a)


def test_built_in_clips_are_deterministic():
    window = Window(8, 0.32, 32, 2.56, 32)
    a, b, c = data.Builtin(8, window, 1), data.Builtin(8, window, 1), data.Builtin(8, window, 2)
    one, same, other = a[0, 5, 0], b[3, 5, 1], c[0, 5, 0]

    assert one["video"].equal(same["video"]) and one["audio"].equal(same["audio"])
    assert not one["video"].equal(other["video"]) and not one["audio"].equal(other["audio"])
    assert one["video"].shape == (8, 32, 32, 3) and one["audio"].shape == (256, 32)
    assert one["video"].dtype == torch.uint8 and one["audio"].dtype == torch.float32
    assert one["label"].tolist() == [5] and one["index"] == 5 and a.classes[5] == "striped diamond"
    assert set(data.Builtin(8, window, 1, ["audio"])[0, 5, 0]) == {"audio", "label", "index", "bad"}
    one.clear()  # what is given is not what is kept
    assert a[0, 5, 0].keys() == other.keys()


def scenes(seed, count, **only):
    """The scenes of a seed that are so."""
    made = (data.Scene(seed, i) for i in range(count))
    return [s for s in made if all(getattr(s, k) == v for k, v in only.items())]


def as_another(scene, class_id):
    other = copy.copy(scene)
    other.class_id = class_id
    return other


def test_bayes_rates():
    """Who knows all of a scene but the thing, and compares what comes with each thing's look or
    voice, is right as often as the docstring says: what is there tells, nothing else does."""
    found = []
    for scene in scenes(4, 400):
        others = [as_another(scene, class_id) for class_id in range(8)]
        look, voice = scene.pictures([1.0], 32), scene.sound(0.1)
        guesses = {  # the first of equals
            "visible": np.argmin([np.abs(o.pictures([1.0], 32) - look * 1.0).sum() for o in others]),
            "audible": np.argmin([np.abs(o.sound(0.1) - voice).sum() for o in others])}
        right = [guesses[sense] == scene.class_id for sense in ("visible", "audible")]
        assert right == [getattr(scene, sense) or scene.class_id == 0 for sense in ("visible", "audible")]
        found.append([*right, any(right)])
    assert np.abs(np.mean(found, 0) - (0.7375, 0.7375, 0.92125)).max() < 0.05


def test_things_are_equally_many_and_missing_equally_often():
    made = scenes(5, 4000)
    assert np.bincount([s.class_id for s in made]).tolist() == [500] * 8
    for class_id in range(8):
        senses = np.array([(s.visible, s.audible) for s in made if s.class_id == class_id])
        assert np.abs(senses.mean(0) - 0.7).max() < 0.08
        assert np.abs((senses[:, 0] & senses[:, 1]).mean() - 0.49) < 0.08


def test_a_bounce_is_heard_where_it_is_seen():
    clear = heard = 0
    for scene in scenes(0, 12, audible=True):
        times = np.arange(0.2, 3.8, 0.01)
        path = scene.position(times)
        turned = np.diff(np.sign(np.diff(path, axis=0)), axis=0).any(1).nonzero()[0] + 1
        bounces = times[turned]

        rough = np.abs(np.diff(scene.sound(4.0)))  # hits are noise: large from sample to sample
        for bounce in bounces:
            if not any(0 < bounce - other < 0.15 for other in bounces):
                at = round(bounce * 16_000)
                clear += 1
                heard += rough[at : at + 480].mean() > 1.3 * rough[at - 640 : at - 160].mean()
    assert heard == clear > 10


def test_height_is_pitch_and_loud_partials_tell_the_thing():
    for scene in scenes(1, 24, audible=True):
        scene.start[:], scene.speed[:] = 0.3, 1e-9  # it stands still: no hits, one pitch
        wave = scene.sound(0.5) / (0.15 * scene.loudness)
        height = 1 - scene.position([0.0])[0, 1]
        pitch = 700 * (10 ** ((data.LOWEST + (data.HIGHEST - data.LOWEST) * height) / 2595) - 1)
        times = np.arange(len(wave)) / 16_000
        levels = [
            2 * np.abs((wave * np.exp(-2j * np.pi * k * pitch * times)).mean())
            for k in range(1, 5)]
        expected = [1.0, *(1.0 if scene.class_id >> bit & 1 else data.SOFT for bit in range(3))]
        assert np.abs(np.array(levels) - expected).max() < 0.05


def test_the_thing_is_where_the_scene_says():
    for scene in scenes(1, 16, visible=True):
        nowhere = copy.copy(scene)
        nowhere.visible = False
        scene.class_id %= 4  # stripes shift the center of what is bright
        picture = scene.pictures([0.7], 64)[0].astype(float)
        cover = np.abs(picture - nowhere.pictures([0.7], 64)[0]).sum(-1)

        y, x = (np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64
        center = np.array([(cover.sum(0) * x).sum(), (cover.sum(1) * y).sum()]) / cover.sum()
        assert np.abs(center - scene.position([0.7])[0]).max() < 0.06
