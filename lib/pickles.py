"""
Pickles of labels and features, read without running them. A pickle is a program: it may call anything that it can name.
Here it can name what builds plain containers, numpy arrays and torch tensors, and nothing else.
Anything more is an error that says what it was.

    read_pickle("phoenix14t.pami0.train")   # gzip or not -> lists, dicts, texts, numbers and `Array`s
"""
import codecs
import collections
import functools
import gzip
import io
import math
import os
import pickle
import re
import sys
import zipfile

import numpy as np
import torch

from lib.files import kind_of
from lib.program import BadInput

MAX_PICKLE = 8 << 30  # bytes that a pickle may take when unpacked

# ---------------------------------------------------------------------------------------------------------------------
# What is built

class Array:
    """
    An array in a pickle: .shape and .data (None where only the shape was asked for).
    Not numpy's own: that believes whatever a file says of memory.
    """

    def __init__(self, keep, shape=(), data=None):
        self.keep = keep
        self.shape = shape
        self.data = data

    def __setstate__(self, state):  # numpy: (version, shape, dtype, is Fortran's order, bytes)
        _, shape, dtype, fortran, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw, dtype, shape, order="C"):
        # fails unless the bytes are there: a shape alone allocates nothing
        data = np.frombuffer(raw, dtype.value).reshape(shape, order=order)
        self.shape = data.shape
        self.data = data if self.keep else None
        return self


class Dtype:
    """A numpy dtype of plain numbers or texts."""

    def __init__(self, spec, *_):
        if not re.fullmatch(r"[<>=|]?[biufSU]\d{1,6}", spec):
            raise ValueError(f"an array of dtype {spec}")
        self.value = np.dtype(spec)

    def __setstate__(self, state):  # (version, byte order, no fields, ...)
        if any(state[2:5]):
            raise ValueError("an array with fields")
        self.value = self.value.newbyteorder(state[1])


def numpy_of(x):
    """A tensor as a numpy array, which knows neither bfloat16 nor anything smaller."""
    return (x.float() if x.is_floating_point() and x.dtype != torch.float64 else x).numpy()


def latin1(text, encoding):
    """Bytes, as protocol 2 writes them."""
    return codecs.encode(text, {"latin1": "latin1"}[encoding])

# ---------------------------------------------------------------------------------------------------------------------
# Who builds it

class Memo(dict):
    """
    What the unpickler may be asked for again.
    Not the bytes of an array, nor the arguments that hold them: they would stay in memory beside the array.
    """

    def __setitem__(self, key, value):
        parts = value if isinstance(value, tuple) else (value,)
        super().__setitem__(key, None if sum(map(sys.getsizeof, parts)) > 1 << 16 else value)


class Counted:
    """A pickle file, unzipped as it is read, that ends with an error before more than `limit` bytes are in memory."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")
        self.limit = os.path.getsize(path)
        self.zipped = self.file.peek().startswith(b"\x1f\x8b")
        if self.zipped:
            self.file = gzip.open(self.file)
            # labels shrink to a fifteenth at best, features hardly; a bomb shrinks to a thousandth
            self.limit = min(MAX_PICKLE, max(1 << 28, 100 * self.limit))
        self.left = self.limit

    def read(self, n):
        self.left -= n
        if self.left < 0 and self.zipped:
            raise BadInput(f"{self.path}: unpacks to more than {self.limit / 1e9:.1f} GB "
                           "(a hundred times its size or pickles.MAX_PICKLE); trusted, gunzip it")
        if self.left < 0:
            raise EOFError("it is cut off")
        return self.file.read(n)

    def readline(self):
        line = self.file.readline(1 << 20)
        self.left -= len(line)
        return line


class Unpickler(pickle._Unpickler):  # the one in Python: in the one in C a few bytes can ask for a memo of 64 GB
    """It can build plain containers, numbers, texts and `Array`s."""

    def __init__(self, file, values):
        super().__init__(file)
        self.path = file.path
        self.values = values
        self.memo = Memo()
        self.allowed = {"collections.OrderedDict": collections.OrderedDict,
                        "numpy.ndarray": "ndarray",
                        "numpy.dtype": Dtype,
                        "_codecs.encode": latin1,
                        "torch.storage._load_from_bytes": self.storage,
                        "torch._utils._rebuild_tensor": self.tensor,
                        "torch._utils._rebuild_tensor_v2": self.tensor}
        for module in ("builtins", "__builtin__"):  # Python 3, Python 2
            self.allowed |= {module + ".set": set, module + ".frozenset": frozenset}
        for core in ("numpy._core", "numpy.core"):  # numpy 2, numpy 1
            self.allowed |= {core + ".multiarray._reconstruct": lambda *_: Array(values),  # BUILD fills it
                             core + ".multiarray.scalar": lambda dtype, raw: np.frombuffer(raw, dtype.value)[0].item(),
                             core + ".numeric._frombuffer": lambda *parts: Array(values).fill(*parts)}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.allowed:
            raise BadInput(f"{self.path}: wants to call {(module + '.' + name)[:200]!r}, "
                           "which neither labels nor features need; nothing of it was run")
        return self.allowed[f"{module}.{name}"]

    def storage(self, raw):
        if not self.values:
            return None
        if raw[:2] == b"PK" and any(f.compress_type for f in zipfile.ZipFile(io.BytesIO(raw)).infolist()):
            raise ValueError("a tensor in a compressed zip")
        return torch.load(io.BytesIO(raw), "cpu", weights_only=True)  # torch's own function of this name loads anything

    def tensor(self, storage, offset, size, stride, *_):
        size = tuple(map(int, size))
        if not self.values:
            return Array(False, size)
        flat = torch.empty(0, dtype=storage.dtype).set_(storage)
        # a stride of 0 would make a petabyte out of one number
        if math.prod(size) > len(flat):
            raise ValueError(f"a tensor of {size} from {len(flat)} numbers")
        x = numpy_of(flat.as_strided(size, stride, offset))
        return Array(True, size, x)

# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_pickle(path, values=True):
    """
    What a pickle holds (gzip or not), arrays as `Array`.
    values=False: arrays without their numbers, which are read and not kept.
    """
    if kind := kind_of(path):
        raise BadInput(f"{path}: is {kind}; read are pickles, of features also .safetensors and .npy")
    try:
        file = Counted(path)
        with file.file:
            content = Unpickler(file, values).load()
            file.file.read(1)  # gzip compares its checksum at the end
        return content
    except BadInput:
        raise
    except Exception as e:  # a broken pickle can raise anything
        raise BadInput(f"{path}: cannot be read as a pickle "
                       f"({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None


@functools.lru_cache
def outline(path):
    """A pickle without the numbers in its arrays, kept: labels and shapes are asked for one after the other."""
    return read_pickle(path, values=False)
