"""Check the clips of a folder before training: python tools/check_clips.py clips/

Each clip is read by the code that training uses. A line is printed for a clip that is

    bad      its first window cannot be read: evaluation leaves the clip out, training replaces it
    warning  it is used, but it is shorter than a window, silent, a still picture, or damaged after
             its first window (training replaces it if it draws such a window), or its picture and
             sound end early or do not cover the same time

The last lines count the clips, and give the mean and std of their first windows for --norm. The
exit status is 1 if a clip is bad.
"""

import argparse
import collections
import math
import os
import sys
from dataclasses import dataclass

import av
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402

TOLERANCE = 0.25  # s by which the times of tracks may differ from each other and the stated end


@dataclass
class Check:
    """Maps i to (verdict, reasons, statistics) of clip i; "bad", "warning" or "" (fine)."""

    clips: data.Clips

    def __getitem__(self, i):
        index, modalities, reasons = self.clips.index, self.clips.modalities, []
        try:
            clip = self.clips.read(i)
        except data.ClipError as error:
            return "bad", str(error), [0.0] * 4

        if "audio" in clip and (clip["audio"] <= math.log(2 * data.MEL_OFFSET)).all():
            reasons.append("silent")
        if "video" in clip and (clip["video"] == clip["video"][:1]).all():
            reasons.append("still picture")
        try:
            with data.open_media(index.path(i), modalities, index.segment(i), math.inf) as media:
                reasons += check_times(media, self.clips.window, *index.segment(i)[:2])
                data.verify_clip(media)
        except data.ClipError as error:
            reasons.append(f"damaged after its first window: {error}")
        return "warning" if reasons else "", "; ".join(reasons), statistics(clip)


def check_times(media, window, start, end):
    """Yield what is unusual about the length of a clip, and about the times of its tracks."""
    seconds = {"video": window.video_seconds, "audio": window.seconds}
    length = media.end - media.begin
    if length < max(seconds[m] for m in media.modalities) - 1e-3:
        yield f"shorter than a window ({length:.2f} s)"

    # The stated end may be counted from 0 or from the first time stamp.
    stated, last = media.container.duration, max(map(media.length, media.streams))
    early = (stated or 0) / av.time_base - last - max(0.0, media.origin)
    if math.isnan(start) and early > TOLERANCE:
        yield f"ends at {last:.2f} s, {early:.2f} s before its stated end"

    start, end = (0.0, math.inf) if math.isnan(start) else (start, end)
    spans = {data.NOUNS[s.type]: np.clip(media.spans[s.index], start, end) for s in media.streams}
    if np.ptp(list(spans.values()), axis=0).max() > TOLERANCE:
        yield ", ".join(f"{noun} from {b:.2f} to {e:.2f} s" for noun, (b, e) in spans.items())


def statistics(clip):
    """Return mean and mean square of the video in [-1, 1], then of the log-mel."""
    video = clip["video"] / 127.5 - 1 if "video" in clip else torch.zeros(1)
    video, audio = video.double(), clip.get("audio", torch.zeros(1)).double()
    return [x.mean().item() for x in (video, video.square(), audio, audio.square())]


def check_all(clips, workers):
    """Check all clips, print the odd ones and a summary, and return the number of bad ones."""
    counts, totals = collections.Counter(), np.zeros(4)
    results = DataLoader(Check(clips), None, sampler=range(len(clips)), num_workers=workers)
    for i, (verdict, reasons, means) in enumerate(tqdm(results, unit="clip", disable=None)):
        counts[verdict] += 1
        totals += means
        if verdict:
            tqdm.write(f"{verdict}: {clips.name(i)}: {reasons}")

    bad, used = counts["bad"], len(clips) - counts["bad"]
    print(f"{len(clips)} clips: {counts['']} fine, {counts['warning']} with a warning, {bad} bad",
          flush=True)
    if used:
        mean, square = (totals / used).reshape(2, 2).T
        norm = zip(mean, np.sqrt(square - mean**2))
        norm = " ".join(f"{m:.4g} {std or 1:.4g}" for m, std in norm)
        print(f"mean and std of the first windows of {used} clips: --norm {norm}", flush=True)
    return bad


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="folder of video files, or one file")
    add("--clips", default="", help="csv that lists the clips of the folder to check")
    add("--modalities", nargs="+", choices=data.MODALITIES, default=data.MODALITIES,
        help="what clips must have; audio alone also takes sound files")
    add("--frame-step", type=float, default=0.16, help="s between frames of a window [0.16]")
    add("--seconds", type=float, default=8.0, help="s of audio of a window [8]")
    add("--workers", type=int, default=data.cpu_count(), help="processes [one per CPU]")

    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # for any file name
    modalities = [m for m in data.MODALITIES if m in args.modalities]
    index = (data.read_clips(args.clips, args.folder, modalities) if args.clips
             else data.find_clips(args.folder, modalities))
    window = data.Window(step=args.frame_step, seconds=args.seconds)
    return int(check_all(data.Clips(index, window, modalities), args.workers) > 0)


if __name__ == "__main__":
    sys.excepthook = data.excepthook
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
