"""
lib/pickles.py: what a pickle may call, to the last name. How it reads the files that there are: test_readers.py.

    python -m pytest tests/test_pickles.py
"""
import pickle

import pytest

from lib.pickles import Counted, Unpickler, read_pickle
from lib.program import BadInput

# what plain containers, numpy's arrays of both its generations and torch's tensors are made of
ALLOWED = {
    "builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset", "collections.OrderedDict",
    "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes", "_codecs.encode",
}
# each of them would be a way out: to other names, to files, to modules, or to any amount of memory
FORBIDDEN = """
    operator.attrgetter operator.itemgetter operator.methodcaller functools.partial functools.reduce
    builtins.getattr builtins.eval builtins.exec builtins.open builtins.compile builtins.__import__ builtins.map
    builtins.type builtins.object builtins.range builtins.bytearray builtins.bytes builtins.list builtins.dict
    builtins.str builtins.print builtins.globals __builtin__.eval __builtin__.getattr os.system posix.system
    os.remove subprocess.Popen importlib.import_module runpy.run_path pickle.loads _pickle.loads
    collections.defaultdict collections.Counter collections.deque collections.namedtuple copyreg._reconstructor
    codecs.encode codecs.decode codecs.open _codecs.decode numpy.load numpy.fromfile numpy.memmap numpy.zeros
    numpy.ones numpy.arange numpy.save numpy.core.multiarray.zeros numpy.float64
    numpy.core._multiarray_umath._reconstruct numpy.core.multiarray.fromfile numpy.rec.recarray torch.load
    torch.save torch.Tensor torch.zeros torch.FloatStorage torch._utils._rebuild_parameter
    torch._utils._rebuild_sparse_tensor torch._tensor._rebuild_from_type_v2 torch.storage.UntypedStorage
    torch.serialization.load torch.hub.load
""".split()


def test_allowed_is_this_and_nothing_else(tmp_path):
    path = tmp_path / "a.pickle"
    path.write_bytes(pickle.dumps([1]))
    assert Unpickler(Counted(str(path)), True).allowed.keys() == ALLOWED


@pytest.mark.parametrize("protocol", [0, 4])
def test_no_other_name_can_be_called_or_taken(tmp_path, protocol):
    path = tmp_path / "a.pickle"
    for name in FORBIDDEN:
        module, attribute = name.rsplit(".", 1)
        text = lambda s: b"\x8c" + bytes([len(s)]) + s.encode()
        taken = b"\x80\x04" + text(module) + text(attribute) + b"\x93"
        if protocol == 0:
            taken = f"c{module}\n{attribute}\n".encode()
        for rest in (b".", b"(tR.", b")\x81."):  # as it is, called, made by its __new__
            path.write_bytes(taken + rest)
            with pytest.raises(BadInput, match="nothing of it was run") as e:
                read_pickle(str(path))
            assert repr(name) in str(e.value)


@pytest.mark.parametrize("encoding", ["latin1", "utf-8", "rot13", "idna", "punycode", "zip", "hex"])
def test_text_is_encoded_as_protocol_2_writes_bytes_and_in_no_other_way(tmp_path, encoding):
    path = tmp_path / "a.pickle"
    path.write_bytes(f"c_codecs\nencode\n(Va\\u00e9\nV{encoding}\ntR.".encode())
    if encoding == "latin1":
        assert read_pickle(str(path)) == b"a\xe9"
    else:
        with pytest.raises(BadInput, match="cannot be read"):
            read_pickle(str(path))
