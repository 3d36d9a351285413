"""
Poses in, features out: where a signer's joints are, in the place of what a CNN sees. docs/poses.md makes them.

Read are .pose files (pose-format's), folders of OpenPose's JSON, a file a frame, and .npy of keypoints. Of each the
same 76 points are taken, in the same order: 9 of the body, 8 of the mouth, 17 of the face, 21 of either hand.
"""
import contextlib
import itertools
import os
import struct

import numpy as np

from lib.features import NO_ARRAY, files_of, half
from lib.files import load_json
from lib.program import BadInput
from lib.video import MAX_FRAMES, other_rate, resampled, visible

# nose, ears, shoulders, elbows, wrists, the left one first; the shoulders are points 3 and 4 of those taken
HOLISTIC, BODY_25, COCO = (0, 7, 8, *range(11, 17)), (0, 18, 17, 5, 2, 6, 3, 7, 4), (0, *range(3, 11))
# inner lips; jaw, two points of each brow, two lids of each eye: numbers in MediaPipe's mesh and among iBUG's 68
MESH = (78, 82, 13, 312, 308, 317, 14, 87,
        162, 93, 172, 149, 152, 378, 397, 323, 389, 105, 107, 336, 334, 160, 144, 387, 373)
IBUG = (*range(60, 68), *range(0, 17, 2), 19, 21, 22, 24, 37, 41, 44, 46)
HAND = 21, range(21)
# whose points they are -> component, in the order of a .npy file -> (how many points it has, those taken)
LAYOUTS = {
    "MediaPipe Holistic": {"POSE_LANDMARKS": (33, HOLISTIC), "FACE_LANDMARKS": (468, MESH),
                           "LEFT_HAND_LANDMARKS": HAND, "RIGHT_HAND_LANDMARKS": HAND},
    "OpenPose": {"pose_keypoints_2d": (25, BODY_25), "face_keypoints_2d": (70, IBUG),
                 "hand_left_keypoints_2d": HAND, "hand_right_keypoints_2d": HAND},
    "COCO-WholeBody": {"body": (17, COCO), "feet": (6, ()), "face": (68, IBUG), "left": HAND, "right": HAND},
}
MAX_BYTES = 5e8  # 20,000 frames of MediaPipe's 586 points have 188 MB
DIMENSIONS = "x y seen"  # what a feature has of each point

# ---------------------------------------------------------------------------------------------------------------------
# Files -> {component: (T, points, 3) of x, y and a confidence, 0 where a point is missing}, frames a second or 0

def read_pose(path):
    """A .pose file of version 0.1 or 0.2: https://github.com/sign-language-processing/pose/tree/master/docs/specs."""
    raw, at = open(path, "rb").read(), 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return values

    def text():
        return take(f"{take('H')[0]}s")[0].decode()

    try:
        version, *_, components = take("f4H")
        sizes, dims = {}, 0
        for _ in range(components):
            name, dimensions = text(), text()
            points, limbs, colors = take("3H")
            sizes[name] = len([text() for _ in range(points)])
            take(f"{4 * limbs + 6 * colors}x")
            dims = max(dims, len(dimensions) - 1)  # x, y and perhaps z, before the C of the confidence
        old = version < 0.15
        rate, promised, people = take("3H" if old else "fIH")
    except (struct.error, UnicodeDecodeError):
        raise BadInput(f"{path}: is no .pose file, or cut off in its header") from None
    if people != 1 or dims < 2:
        raise BadInput(f"{path}: shows {people} people in {dims} dimensions, read is one in 2 or 3")
    P = sum(sizes.values())
    frames, rest = divmod(len(raw) - at, 4 * P * (dims + 1) or 1)
    if rest or promised != (frames % 2**16 if old else frames):  # version 0.1 counts frames in 16 bits
        raise BadInput(f"{path}: its header promises {promised} frames, {frames} are there: is it cut off?")
    xyz, confidence = np.split(np.frombuffer(raw[at:at + 4 * P * (dims + 1) * frames], "<f4"), [frames * P * dims])
    body = np.concatenate([xyz.reshape(frames, P, dims)[..., :2], confidence.reshape(frames, P, 1)], 2)
    return dict(zip(sizes, np.split(body, [*itertools.accumulate(sizes.values())], 1))), rate


def pose_files(folder):
    """OpenPose's JSON files in a folder, under the names that it gives them, in natural order."""
    return [f"{folder}/{f}" for f in visible(folder) if f.endswith("_keypoints.json")]


def read_openpose(folder):
    """A folder of OpenPose's JSON files. Where nobody is seen all points are missing."""
    layout = LAYOUTS["OpenPose"]
    frames = []
    for file in pose_files(folder):
        people = load_json(file).get("people")
        try:
            (person,) = people if people != [] else [{c: [0.0] * 3 * n for c, (n, _) in layout.items()}]
            frames.append([np.array(person[c], float).reshape(n, 3) for c, (n, _) in layout.items()])
        except (KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{file}: is not one person of OpenPose's BODY_25, with face and hands ({e})") from None
    return dict(zip(layout, map(np.array, zip(*frames)))), 0.0


def read_npy(path):
    """A .npy file of the shape (frames, all points of a layout, 3), in pixels."""
    try:
        x = np.load(path, allow_pickle=False).astype(float)
    except NO_ARRAY:
        raise BadInput(f"{path}: cannot be read as an array of numbers") from None
    sizes = {sum(n for n, _ in layout.values()): layout for layout in LAYOUTS.values()}
    if x.ndim != 3 or x.shape[1] not in sizes or x.shape[2] != 3:
        raise BadInput(f"{path}: has the shape {x.shape}, keypoints are (frames, {' or '.join(map(str, sizes))}, 3)")
    if (x[..., 2] < 0).any() or len(x) and not (x[..., :2] > 2).any():
        raise BadInput(f"{path}: is not x and y in pixels and a confidence: it has shares of the picture, or a depth")
    layout = sizes[x.shape[1]]
    return dict(zip(layout, np.split(x, [*itertools.accumulate(n for n, _ in layout.values())], 1))), 0.0


READ = {".pose": read_pose, ".npy": read_npy}


def is_pose(path):
    """Whether a clip is of poses, by its ending or as a folder of OpenPose's files."""
    return path.lower().endswith((*READ,)) or os.path.isdir(path) and bool(pose_files(path))


def read(path):
    """A clip -> (whose points they are, those taken (T, 76, 3), frames a second, 0 where it does not say)."""
    if not is_pose(path):
        raise BadInput(f"{path}: is no pose: a .pose, a .npy or a folder of OpenPose's JSON; docs/poses.md makes them")
    if os.path.getsize(path) > MAX_BYTES:
        raise BadInput(f"{path}: has {os.path.getsize(path) / 1e9:.1f} GB, poses.MAX_BYTES = {MAX_BYTES:g}")
    parts, rate = READ.get(os.path.splitext(path)[1].lower(), read_openpose)(path)
    whose = next((name for name, layout in LAYOUTS.items() if parts.keys() & layout.keys()), None)
    if not whose:
        raise BadInput(f"{path}: has {', '.join(parts) or 'no points'}; read are the points of {', '.join(LAYOUTS)}")
    for component, (n, _) in LAYOUTS[whose].items():
        if component not in parts or parts[component].shape[1] < n:
            found = parts[component].shape[1] if component in parts else "none"
            raise BadInput(f"{path}: of the {n} points {component} it has {found}")
    points = np.concatenate([parts[c][:, list(taken)] for c, (_, taken) in LAYOUTS[whose].items()], 1)
    if not 0 < len(points) <= MAX_FRAMES:
        raise BadInput(f"{path}: has {len(points)} frames, read are 1 to {MAX_FRAMES}")
    return whose, points, rate if 1 <= rate <= 240 else 0.0

# ---------------------------------------------------------------------------------------------------------------------
# Features

def normalised(points, path):
    """
    Points (T, 76, 3) in pixels -> features (T, 228): of each point x, y, and 1 where it is seen; all 0 where it is not.
    The middle of the shoulders is 0 and their distance 1, both the clip's median: a signer may lean and turn, but
    where the camera stood does not matter.
    """
    points = points.astype(float)
    seen = np.isfinite(points).all(2) & (points[..., 2] > 0)
    shoulders = points[seen[:, 3:5].all(1), 3:5, :2]  # (T', 2, 2), of the frames that show both
    breadth = np.median(np.linalg.norm(shoulders[:, 0] - shoulders[:, 1], axis=1)) if len(shoulders) else 0
    if not breadth:
        raise BadInput(f"{path}: shows nowhere both shoulders, by which a pose is measured")
    xy = (points[..., :2] - np.median(shoulders.mean(1), 0)) / breadth
    return np.where(seen[..., None], np.dstack([xy, seen]), 0).reshape(len(points), -1)


def whose_points(paths):
    """Whose points these clips have: those of the first that can be read, since what is wrong with it is said later."""
    for path in paths:
        with contextlib.suppress(BadInput):
            return read(path)[0]
    return read(paths[0])[0]


def in_place(splits, pattern):
    """{split: [row]} with poses in the place of the videos; pattern: their path, with {name} and perhaps {split}."""
    if "{name}" not in pattern or "," in pattern:
        raise BadInput(f"features={pattern}: of poses it is one path with {{name}} in it")
    files = {s: files_of(pattern, s, [row["name"] for row in rows]) for s, rows in splits.items()}
    return {s: [row | {"video": files[s][row["name"]]} for row in rows] for s, rows in splits.items()}


class Poses:
    """An Extractor of clips that are poses. Called with a path -> float16 (T, 228)."""

    endings = (*READ,)
    workers = 0  # nothing here takes long

    def __init__(self, whose, fps=0.0, rate=0.0):
        """whose: points of whom, of LAYOUTS. fps: clips are resampled to it, 0 = as they are. rate: where unknown."""
        self.whose, self.fps, self.rate = whose, fps, rate
        self.settings = {"backbone": "poses", "weights": "", "fps": fps, "components": whose, "dimensions": DIMENSIONS}

    def take(self, path):
        """A clip -> (features, its own frame rate, 0 where nobody knows it)."""
        whose, points, rate = read(path)
        rate = rate or self.rate
        if whose != self.whose:
            raise BadInput(f"{path}: has points of {whose}, the clips that are learnt from are of {self.whose}")
        if rate and other_rate(rate, self.fps):
            timed = ((n / rate, frame) for n, frame in enumerate(points))
            points = np.stack([frame for _, frame in resampled(timed, self.fps, path)])
        return half(normalised(points, path), path), rate

    def __call__(self, path):
        return self.take(path)[0]

    def rate_of(self, path):
        """Frames a second of a clip that is to be translated; one that cannot say has the rate of the others."""
        return read(path)[2] or self.rate or self.fps

    def describe(self):
        return f"backbone poses: 76 points of {self.whose}"

    def stream(self, paths, workers=0):
        """As Extractor's: yields (number of the clip, features, its own frame rate or the BadInput of a broken one)."""
        for i, path in enumerate(paths):
            try:
                yield i, *self.take(path)
            except BadInput as e:
                yield i, None, e
