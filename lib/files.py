"""
Files read safely and written whole: what stands in one comes from anybody, and a reader never sees half of one.
"""
import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
from itertools import pairwise

from lib.program import BadInput, warn

# bytes of a JSON file; the largest real ones, indexes of shards, have some 100 kB
MAX_JSON = 100e6


def load_json(path):
    """The object that stands in a JSON file."""
    try:
        if os.path.getsize(path) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON / 1e6:.0f} MB, files.MAX_JSON")
        value = json.load(open(path, encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is not a JSON object")
    return value


NPY = "a .npy file"
# how files begin that are given for others, as patterns
KINDS = {b"\x89HDF": "HDF5", b"PK\3\4": "a zip archive, as torch.save, .npz and .xlsx are", b"<": "a web page or XML",
         b"\x80\2\x8a\nl\xfc": "a file of torch.save", rb"[{\[]": "JSON", b"\x93NUMPY": NPY,
         b"version https://git-lfs": "a Git LFS pointer, git lfs pull fetches the file itself"}


def kind_of(path, kinds=KINDS):
    """What a file is, of the kinds that are given for others; "" for the rest."""
    start = open(path, "rb").read(1000).lstrip()
    return next((kind for pattern, kind in kinds.items() if re.match(pattern, start)), "")


def read_text(path):
    """What stands in a text file: UTF-8, with a byte order mark or without, or UTF-16 with one."""
    raw = open(path, "rb").read()
    try:
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}:{raw[:e.start].count(10) + 1}: is not UTF-8 ({kind_of(path) or e.reason} "
                       f"at byte {e.start}); save it as UTF-8, which Excel calls CSV UTF-8") from None


def read_jsonl(path, what, take):
    """take(row) for each line of a file of JSON lines; what it raises names the line, and says that it is no `what`."""
    found = []
    for number, line in enumerate(io.StringIO(read_text(path)), 1):  # not splitlines: a sentence may hold U+2028
        try:
            found += [take(json.loads(line))] if line.strip() else []
        except BadInput as e:
            raise BadInput(f"{path}:{number}: {e}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path}:{number}: is not {what} ({e})") from None
    if not found:
        raise BadInput(f"{path}: has no lines, each {what}")
    return found


def sync(path):
    """A file's bytes, or a folder's names, onto the disk itself: after this they outlive a power cut."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)


@contextlib.contextmanager
def whole(path, mode="w"):
    """
    Open path for writing, in full or not at all.
    The file is path.part until its last byte is on the disk, and then takes the place of the old one.
    """
    try:
        with open(path + ".part", mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
        sync(path + ".part")
        os.replace(path + ".part", path)
        sync(os.path.dirname(path) or ".")
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")  # a full disk gets its room back
        if isinstance(e, OSError):
            e.filename = e.filename or path  # a full disk does not say where
        raise


@contextlib.contextmanager
def whole_folder(folder, keep=1):
    """
    A folder in full or not at all: folder.part is given to be filled, and takes its name once all is on the disk.
    keep: of the earlier ones stay keep - 1, as folder.1, folder.2, ...
    """
    part = folder + ".part"
    ages = [folder] + [f"{folder}.{n}" for n in range(1, max(keep, 1) + 1)]  # the last of them is one too old
    try:
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        yield part
        readers = os.stat(part).st_mode & 0o666  # as the umask has it: safetensors lets nobody but its owner read
        for name in os.listdir(part):
            os.chmod(f"{part}/{name}", readers)
            sync(f"{part}/{name}")
        sync(part)
        if os.path.exists(folder):  # else a kill has left the newest under another age: it must not be the one to go
            shutil.rmtree(ages[-1], ignore_errors=True)
            for younger, older in reversed([*pairwise(ages)]):
                if os.path.exists(younger):
                    os.rename(younger, older)  # a kill here leaves folder.1: readers look there too
        os.rename(part, folder)
        sync(os.path.dirname(folder) or ".")
        shutil.rmtree(ages[-1], ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def hold(path, what):
    """
    Hold a file for this process alone, until it ends in whatever way. -> the open file, to be kept
    BadInput says who holds `what` already. Between machines it works as far as their file system locks for all of them
    (NFS does, Lustre where it is mounted with flock); where it cannot lock at all, one line says so.
    """
    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise BadInput(f"{what}: is held by {file.read() or 'another process'}; wait for it or end it") from None
    except OSError as e:
        warn(f"{path}: cannot be locked ({e.strerror}), a second writer would not be noticed")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def fingerprint(path):
    """Changes when a file does, or one of the files in a folder of frames."""
    stats = [f.stat() for f in os.scandir(path)] if os.path.isdir(path) else [os.stat(path)]
    newest = max((s.st_mtime_ns for s in stats), default=0)
    return f"{os.path.abspath(path)} {len(stats)} {sum(s.st_size for s in stats)} {newest}"


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
