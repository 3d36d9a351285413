"""
Poses: the files, a skeleton whose features are known, the store and a run made of them, and what is wrong with a file.

    python -m pytest tests/test_poses.py
"""
import json
import os
import re
import shlex
import shutil
import struct
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL

import data
import eval as evaluation
import train
from lib.configurator import configure
from lib.extract import choose_backbone
from lib.features import Store
from lib.poses import Poses, read
from lib.program import BadInput
from scripts.toy import write_mp4

HANDS = {"LEFT_HAND_LANDMARKS": 21, "RIGHT_HAND_LANDMARKS": 21}
HOLISTIC = {"POSE_LANDMARKS": 33, "FACE_LANDMARKS": 468, **HANDS, "POSE_WORLD_LANDMARKS": 33}
OPENPOSE = dict(pose_keypoints_2d=25, face_keypoints_2d=70, hand_left_keypoints_2d=21, hand_right_keypoints_2d=21)
COCO = {"body": 17, "feet": 6, "face": 68, "left": 21, "right": 21}
# where a joint stands: among the 76; as component and number in MediaPipe's, OpenPose's and COCO-WholeBody's
JOINTS = {
    "nose": (0, (0, 0), (0, 0), (0, 0)),
    "right ear": (2, (0, 8), (0, 17), (0, 4)),
    "left shoulder": (3, (0, 11), (0, 5), (0, 5)),
    "right shoulder": (4, (0, 12), (0, 2), (0, 6)),
    "left elbow": (5, (0, 13), (0, 6), (0, 7)),
    "right wrist": (8, (0, 16), (0, 4), (0, 10)),
    "middle of the upper lip": (11, (1, 13), (1, 62), (2, 62)),
    "right end of the jaw": (17, (1, 162), (1, 0), (2, 0)),
    "chin": (21, (1, 152), (1, 8), (2, 8)),
    "inner end of the left brow": (28, (1, 336), (1, 22), (2, 22)),
    "upper lid of the right eye": (30, (1, 160), (1, 37), (2, 37)),
    "tip of the left thumb": (38, (2, 4), (2, 4), (3, 4)),
    "tip of the right little finger": (75, (3, 20), (3, 20), (4, 20)),
}


def bad(*words):
    """What is raised is one line, with these words in it."""
    return pytest.raises(BadInput, match=r"(?s)\A(?!.*\n)" + "".join(f"(?=.*{w})" for w in words))


def body(sizes, shoulders, T=3, seed=0):
    """Random points of somebody whose shoulders, at these two numbers, are at (140, 100) and (100, 100) pixels."""
    rng = np.random.default_rng(seed)
    parts = {c: np.dstack([rng.uniform(0, 200, (T, n, 2)), np.ones((T, n))]) for c, n in sizes.items()}
    next(iter(parts.values()))[:, shoulders, :2] = (140, 100), (100, 100)
    return parts


def text(s):
    return struct.pack("<H", len(s)) + s.encode()


def write_pose(path, parts, fps=25, version=0.2, people=1, dims="XYZC"):
    """A .pose file of {component: (T, points, 3)}; its depth is not to be read."""
    head = struct.pack("<f4H", version, 200, 200, 0, len(parts))
    for name, x in parts.items():
        head += text(name) + text(dims) + struct.pack("<3H", x.shape[1], 1, 1)
        head += b"".join(text(str(n)) for n in range(x.shape[1])) + struct.pack("<5H", 0, 1, 255, 0, 0)
    T = len(next(iter(parts.values())))
    head += struct.pack("<fIH" if version > 0.15 else "<3H", fps, T, people)
    x = np.concatenate([*parts.values()], 1)
    depth = [np.full(x.shape[:2], 7.0)] * ("Z" in dims)
    path.write_bytes(head + np.dstack([x[..., 0], x[..., 1], *depth]).astype("<f4").tobytes()
                     + x[..., 2].astype("<f4").tobytes())
    return str(path)


def write_openpose(path, parts):
    path.mkdir()
    for t in range(len(next(iter(parts.values())))):
        person = {c: x[t].ravel().tolist() for c, x in parts.items()}
        (path / f"clip_{t}_keypoints.json").write_text(json.dumps({"version": 1.3, "people": [person]}))
    return str(path)


def write_npy(path, parts):
    np.save(path, np.concatenate([*parts.values()], 1))
    return str(path)


@pytest.fixture
def clip(tmp_path):
    """A clip of MediaPipe's points."""
    return write_pose(tmp_path / "clip.pose", body(HOLISTIC, [11, 12], 10))

# ---------------------------------------------------------------------------------------------------------------------
# A skeleton whose features are known

WRITERS = [(write_pose, "a.pose", HOLISTIC, [11, 12], 1, "MediaPipe Holistic"),
           (write_pose, "a.pose", OPENPOSE, [5, 2], 2, "OpenPose"),
           (write_openpose, "a", OPENPOSE, [5, 2], 2, "OpenPose"),
           (write_npy, "a.npy", OPENPOSE, [5, 2], 2, "OpenPose"),
           (write_npy, "a.npy", COCO, [5, 6], 3, "COCO-WholeBody")]


@pytest.mark.parametrize("write, name, sizes, shoulders, column, whose", WRITERS)
def test_every_joint_is_where_it_belongs(tmp_path, write, name, sizes, shoulders, column, whose):
    """Measured from the middle between the shoulders, (120, 100), in their distance, 40; and 1, since it is seen."""
    parts = body(sizes, shoulders)
    features = Poses(whose)(write(tmp_path / name, parts))
    assert features.shape == (3, 228) and features.dtype == np.float16
    arrays = [*parts.values()]
    for joint, (place, *found) in JOINTS.items():
        component, number = found[column - 1]
        x, y, _ = arrays[component][:, number].T
        want = np.stack([(x - 120) / 40, (y - 100) / 40, np.ones(3)], 1)
        assert features.reshape(3, 76, 3)[:, place] == pytest.approx(want, abs=2e-3), joint
    assert features.reshape(3, 76, 3)[:, 3:5, :2].tolist() == [[[0.5, 0], [-0.5, 0]]] * 3


def test_another_camera_makes_no_difference(tmp_path):
    """Nearer, and elsewhere in the picture. A frame in which the signer leans far does not move the others."""
    parts = body(HOLISTIC, [11, 12], 5)
    near = {c: x * (3, 3, 1) + (50, -20, 0) for c, x in parts.items()}
    files = [write_pose(tmp_path / "a.pose", parts), write_pose(tmp_path / "b.pose", near)]
    one, two = map(Poses("MediaPipe Holistic"), files)
    assert two == pytest.approx(one, abs=4e-3)
    parts["POSE_LANDMARKS"][2, [11, 12], 0] += 60
    leaning = Poses("MediaPipe Holistic")(write_pose(tmp_path / "c.pose", parts))
    assert np.array_equal(np.delete(leaning, 2, 0), np.delete(one, 2, 0))
    assert leaning[2].reshape(76, 3)[3:5, 0].tolist() == [2, 1]


@pytest.mark.parametrize("how", ["no confidence", "not a number"])
def test_a_missing_point_is_marked(tmp_path, how):
    parts = body(OPENPOSE, [5, 2])
    parts["hand_right_keypoints_2d"][1] = 0 if how == "no confidence" else np.nan
    parts["pose_keypoints_2d"][2, [5, 2], 2] = 0  # without shoulders a frame is measured by those of the others
    features = Poses("OpenPose")(write_npy(tmp_path / "a.npy", parts)).reshape(3, 76, 3)
    assert not features[1, 55:].any() and features[[0, 2], 55:, 2].all() and features[1, :55, 2].all()
    assert not features[2, 3:5].any() and features[2, :3, 2].all()


def test_a_frame_in_which_openpose_sees_nobody(tmp_path):
    folder = write_openpose(tmp_path / "a", body(OPENPOSE, [5, 2], 12))
    (tmp_path / "a" / "clip_3_keypoints.json").write_text('{"people": []}')
    features = Poses("OpenPose")(folder)
    assert [n for n, x in enumerate(features) if not x.any()] == [3] and len(features) == 12  # 3 before 10


@pytest.mark.parametrize("version, dims", [(0.1, "XYZC"), (0.2, "XYC")])
def test_versions_and_dimensions(tmp_path, version, dims):
    parts = body(HOLISTIC, [11, 12])
    want = read(write_pose(tmp_path / "a.pose", parts))
    whose, points, rate = read(write_pose(tmp_path / "b.pose", parts, 30, version, dims=dims))
    assert (whose, rate) == ("MediaPipe Holistic", 30) and np.array_equal(points, want[1])


def test_the_package_reads_the_same(tmp_path):
    """pose-format, where it is installed: its files are read, with the same numbers."""
    package = pytest.importorskip("pose_format")
    parts = body(HOLISTIC, [11, 12], 4)
    parts["LEFT_HAND_LANDMARKS"][1] = 0
    pose = package.Pose.read(open(write_pose(tmp_path / "a.pose", parts, 29.97), "rb").read())
    xy, confidence = pose.body.data.data[:, 0, :, :2], pose.body.confidence[:, 0, :, None]
    want = np.split(np.concatenate([xy, confidence], 2), [33, 501, 522, 543], 1)
    assert all(np.array_equal(x, parts[c].astype("f4")) for x, c in zip(want, HOLISTIC))
    with open(tmp_path / "b.pose", "wb") as f:
        pose.write(f)
    ours, theirs = (read(str(tmp_path / n)) for n in ("a.pose", "b.pose"))
    assert np.array_equal(ours[1], theirs[1]) and ours[2] == theirs[2] == pytest.approx(29.97)


def test_resampled_by_their_rate(tmp_path):
    """Ten frames at 25 a second are five at 12.5: every second one. Where nobody knows a rate they stay."""
    parts = body(OPENPOSE, [5, 2], 10)
    path = write_pose(tmp_path / "a.pose", parts)
    whole, half = Poses("OpenPose")(path), Poses("OpenPose", 12.5)
    assert np.array_equal(half(path), whole[::2]) and half.rate_of(path) == 25
    folder = write_openpose(tmp_path / "a", parts)
    whole = Poses("OpenPose")(folder)
    assert np.array_equal(half(folder), whole) and half.rate_of(folder) == 12.5
    assert np.array_equal(Poses("OpenPose", 12.5, rate=25.0)(folder), whole[::2])

# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a file

def test_components_that_are_not_there(tmp_path, clip):
    parts = body(HOLISTIC, [11, 12])
    with bad("no-hands.pose", "21 points LEFT_HAND_LANDMARKS", "none"):
        read(write_pose(tmp_path / "no-hands.pose", {c: x for c, x in parts.items() if "HAND" not in c}))
    reduced = parts | {"FACE_LANDMARKS": parts["FACE_LANDMARKS"][:, :128]}
    with bad("reduced.pose", "468 points FACE_LANDMARKS it has 128"):
        read(write_pose(tmp_path / "reduced.pose", reduced))
    with bad("other.pose", "has joints", "MediaPipe Holistic, OpenPose"):
        read(write_pose(tmp_path / "other.pose", {"joints": parts["POSE_LANDMARKS"]}))
    with bad("empty.pose", "0 dimensions"):
        write_pose(tmp_path / "empty.pose", parts)
        (tmp_path / "empty.pose").write_bytes(struct.pack("<f4HfIH", 0.2, 200, 200, 0, 0, 25, 3, 1))
        read(str(tmp_path / "empty.pose"))
    with bad("clip.pose", "of MediaPipe Holistic", "of OpenPose"):
        Poses("OpenPose")(clip)


@pytest.mark.parametrize("people", [0, 2])
def test_one_person(tmp_path, people):
    with bad("a.pose", f"shows {people} people"):
        read(write_pose(tmp_path / "a.pose", body(HOLISTIC, [11, 12]), people=people))
    folder = write_openpose(tmp_path / "a", body(OPENPOSE, [5, 2]))
    file = tmp_path / "a" / "clip_1_keypoints.json"
    file.write_text(json.dumps({"people": json.loads(file.read_text())["people"] * 2}))
    with bad("clip_1_keypoints.json", "one person"):
        read(folder)


def test_cut_off_anywhere(tmp_path, clip):
    whole = open(clip, "rb").read()
    for size in (0, 3, 40, 3000, len(whole) // 2, len(whole) - 1, len(whole) - 576 * 16):
        (tmp_path / "cut.pose").write_bytes(whole[:size])
        with bad("cut.pose", "cut off"):
            read(str(tmp_path / "cut.pose"))
    (tmp_path / "cut.pose").write_bytes(np.random.default_rng(0).bytes(5000))
    with bad("cut.pose", "is no .pose file"):
        read(str(tmp_path / "cut.pose"))


def test_no_frames(tmp_path):
    with bad("a.pose", "has 0 frames"):
        read(write_pose(tmp_path / "a.pose", body(HOLISTIC, [11, 12], 0)))
    with bad("a.npy", "has 0 frames"):
        read(write_npy(tmp_path / "a.npy", body(COCO, [5, 6], 0)))
    (tmp_path / "a").mkdir()
    with bad("/a: is no pose"):
        read(str(tmp_path / "a"))


def test_a_file_of_two_gigabytes(tmp_path):
    for name in ("a.pose", "a.npy"):
        with open(tmp_path / name, "wb") as f:
            f.truncate(2 * 10**9)
        with bad(name, "2.0 GB", "MAX_BYTES"):
            read(str(tmp_path / name))


def test_nobody_is_seen(tmp_path):
    parts = {c: x * (1, 1, 0) for c, x in body(HOLISTIC, [11, 12]).items()}
    with bad("a.pose", "both shoulders"):
        Poses("MediaPipe Holistic")(write_pose(tmp_path / "a.pose", parts))


@pytest.mark.parametrize("x, words", [
    (np.zeros((5, 76, 3)), [r"\(5, 76, 3\)", "543 or 137 or 133"]),
    (np.zeros((5, 133, 2)), [r"\(5, 133, 2\)"]),
    (np.random.default_rng(0).uniform(0, 1, (5, 133, 3)), ["pixels"]),  # shares of the picture
    (np.random.default_rng(0).normal(0, 100, (5, 133, 3)), ["depth"]),
    (np.array(["a"]), ["numbers"]),
    (np.full((5, 133, 3), 1e30), ["both shoulders"]),
])
def test_arrays_that_are_no_keypoints(tmp_path, x, words):
    np.save(tmp_path / "a.npy", x)
    with bad("a.npy", *words):
        Poses("COCO-WholeBody")(str(tmp_path / "a.npy"))


def test_json_that_is_not_openpose(tmp_path):
    folder = write_openpose(tmp_path / "a", body(OPENPOSE, [5, 2]))
    for wrong in ('{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}', '{"people": 3}', "{}", '{"people": ["a"]}', "[]"):
        (tmp_path / "a" / "clip_2_keypoints.json").write_text(wrong)
        with bad("clip_2_keypoints.json"):
            read(folder)

# ---------------------------------------------------------------------------------------------------------------------
# From the folder to the sentence

def call(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *map(str, words)])
    main()


def clips(root, suffix=".pose", n=4):
    """A folder of own clips that are poses."""
    root.mkdir()
    for i in range(n):
        write_pose(root / f"c{i}{suffix}", body(HOLISTIC, [11, 12], 9, i))
    table = "".join(f"c{i}{suffix}\tsatz {i}\t{'train' if i < 2 else 'dev'}\n" for i in range(n))
    (root / "clips.tsv").write_text("file\ttext\tsplit\n" + table)
    return root


def test_from_poses_to_a_sentence(home, tmp_path, monkeypatch, capsys):
    """.pose files in the table are taken as such; a run knows what it has learnt from, and takes nothing else."""
    root, places = clips(tmp_path / "clips"), [f"data_dir={tmp_path}/data", f"out_dir={tmp_path}/out"]
    call(monkeypatch, data.main, "dataset=mine", f"root={root}", places[0])
    assert "backbone=poses: the clips are poses" in capsys.readouterr().out
    store = Store(f"{tmp_path}/data/mine/poses/train.safetensors")
    assert store.settings == {"backbone": "poses", "weights": "", "fps": 25.0, "components": "MediaPipe Holistic",
                              "dimensions": "x y seen"}
    assert np.array_equal(store["c1"].numpy(), Poses("MediaPipe Holistic")(f"{root}/c1.pose"))
    call(monkeypatch, data.main, "dataset=mine", f"root={root}", places[0])
    assert "4 of 4 clips are there already" in capsys.readouterr().out

    llm = f"llm={home}/data/toy/llm"
    config = str(ROOT / "config" / "clips.py")  # whose backbone is the only one that is there
    call(monkeypatch, train.main, config, "dataset=mine", llm, *SMALL, "epochs=1", "eval_every=-1", *places)
    run = f"ckpt={tmp_path}/out/mine/align"
    capsys.readouterr()
    call(monkeypatch, evaluation.main, run, f"video={root}/c3.pose", "max_new_tokens=4")
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "resampled" not in said.err
    write_pose(root / "fast.pose", body(HOLISTIC, [11, 12], 20), 50)
    call(monkeypatch, evaluation.main, run, f"video={root}/fast.pose", "max_new_tokens=4")
    assert "fast.pose: its 50.0 frames a second are resampled to 25" in capsys.readouterr().err
    with bad("a.pose", "of OpenPose", "of MediaPipe Holistic"):
        call(monkeypatch, evaluation.main, run, f"video={write_pose(tmp_path / 'a.pose', body(OPENPOSE, [5, 2]))}")
    write_mp4(str(tmp_path / "film.mp4"), np.zeros((3, 16, 16, 3), np.uint8))
    with bad("film.mp4", "is no pose", "docs/poses.md"):
        call(monkeypatch, evaluation.main, run, f"video={tmp_path}/film.mp4")
    capsys.readouterr()
    call(monkeypatch, evaluation.main, run, f"videos={root}", "max_new_tokens=4")
    said = capsys.readouterr()
    assert [line.split("\t")[0] for line in said.out.splitlines()] == [*(f"c{i}.pose" for i in range(4)), "fast.pose"]
    assert "clips.tsv: passed over, its ending is none of .pose .npy" in said.err
    monkeypatch.setattr("lib.poses.DIMENSIONS", "x y z seen")
    with bad("poses", "learnt from as x y seen", "x y z seen"):
        call(monkeypatch, evaluation.main, run, f"video={root}/c3.pose")


def test_poses_beside_the_videos(tmp_path, monkeypatch):
    """features= with {name}.pose: the poses take the place of the videos, wherever those are."""
    root = clips(tmp_path / "clips", ".mp4")
    for i in range(4):
        folder = tmp_path / "poses" / ("train" if i < 2 else "val")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(root / f"c{i}.mp4", folder / f"c{i}.pose")
    words = ["dataset=mine", f"root={root}", f"data_dir={tmp_path}/data"]
    call(monkeypatch, data.main, *words, f"features={tmp_path}/poses/{{split}}/{{name}}.pose")
    assert Store(f"{tmp_path}/data/mine/poses/dev.safetensors").shape("c2") == (9, 228)
    row = json.loads(open(f"{tmp_path}/data/mine/dev.jsonl").readline())
    assert row["video"] == f"{tmp_path}/poses/val/c2.pose" and row["frames"] == 9
    with bad("{name}"):
        call(monkeypatch, data.main, *words, f"features={tmp_path}/poses/c1.pose")
    os.remove(tmp_path / "poses" / "train" / "c1.pose")
    with bad("1 clip.s. with problems"):
        call(monkeypatch, data.main, *words, f"features={tmp_path}/poses/{{split}}/{{name}}.pose")
    assert "c1.pose does not exist" in open(f"{tmp_path}/data/mine/problems.txt").read()


def test_a_broken_clip_among_them(tmp_path, monkeypatch):
    """It may be the first, which says whose points they are: the next one says it."""
    root, words = clips(tmp_path / "clips"), ["dataset=mine", f"root={tmp_path}/clips", f"data_dir={tmp_path}/data"]
    (root / "c0.pose").write_bytes(open(root / "c0.pose", "rb").read()[:-7])
    with bad("c0.pose", "cut off"):
        call(monkeypatch, data.main, *words)
    call(monkeypatch, data.main, *words, "strict=false")
    assert Store(f"{tmp_path}/data/mine/poses/train.safetensors").names == {"c1"}
    write_pose(root / "c0.pose", body(OPENPOSE, [5, 2]))
    write_pose(root / "c1.pose", body(HOLISTIC, [11, 12]))
    with bad("c1.pose", "of MediaPipe", "of OpenPose"):
        call(monkeypatch, data.main, *words)


def test_the_best_backbone_that_is_there(tmp_path, monkeypatch, capsys):
    """Poses, then GoogLeNet's weights, then what timm has; never the random one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", f"{tmp_path}/torch")
    monkeypatch.setenv("HF_HUB_CACHE", f"{tmp_path}/hub")
    with bad("no poses", "docs/poses.md", "googlenet", "torch/hub/checkpoints", "timm has no weights", "toycnn"):
        choose_backbone(["a.mp4"])
    for age, name in enumerate(("resnet34.a1_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k")):
        place = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / "0"
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"")
        os.utime(place / "model.safetensors", (age, age))
    if shutil.which("python"):
        assert choose_backbone(["a.mp4"]) == ("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "")
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    for place in ("torch/hub/checkpoints", "."):
        (tmp_path / place / "googlenet-1378be20.pth").write_bytes(b"")
        assert choose_backbone(["a.mp4"]) == ("googlenet", os.path.join(*(
            [str(tmp_path), place] if place != "." else ["."]), "googlenet-1378be20.pth"))
    assert choose_backbone(["a.POSE", "b.pose"]) == ("poses", "") and "the clips are poses" in capsys.readouterr().out
    assert choose_backbone(["a.pose", "b.mp4"])[0] == "googlenet"
    with bad("weights=a.pth", "of which backbone"):
        choose_backbone(["a.mp4"], "a.pth")


def test_the_page(monkeypatch):
    """Of docs/poses.md: the lines on what is refused stand in the code, and the commands are understood."""
    page = (ROOT / "docs" / "poses.md").read_text(encoding="utf-8")
    source = (ROOT / "lib" / "poses.py").read_text(encoding="utf-8")
    for said in ("the clips that are learnt from are of ", "is no pose: a .pose, a .npy or a folder of OpenPose's JSON",
                 "of the {n} points {component} it has {found}", "{frames} are there: is it cut off?",
                 "read is one in 2 or 3", "frames, read are 1 to ",
                 "shows nowhere both shoulders, by which a pose is measured",
                 "is not x and y in pixels and a confidence: it has shares of the picture, or a depth"):
        assert said in source
        assert all(part in page for part in re.split(r"\{\w+\}", said)), said
    monkeypatch.chdir(ROOT)
    for block in re.findall(r"```sh\n(.*?)```", page, re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "python":
                configure(words[1], words[2:], stages=("align", "sft") if words[1] == "train.py" else ())
