"""The reader of pickles: what paddle and torch wrote comes back, and nothing but tensors is ever made."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sft
from sft.models.pickles import read_pickled

MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4) / 8


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_comes_back(paddle: Any, tmp_path: Path, protocol: int) -> None:
    """State dicts, plain arrays and nested tensors (which paddle writes as a name and an array)."""
    expected = {"a": MATRIX, "b": np.asfortranarray(MATRIX[:2]), "c": np.arange(5), "d": np.zeros((0, 3), np.float16)}
    state = {name: paddle.to_tensor(value) for name, value in expected.items()}
    half = paddle.to_tensor(MATRIX).astype("bfloat16")
    for number, saved in enumerate((expected, state, {**expected, "a": state["a"]}, {"half": half})):
        path = tmp_path / f"{number}.pdparams"
        paddle.save(saved, str(path), protocol=protocol)
        found = read_pickled(path)
        assert list(found) == list(saved)
        if "half" in saved:
            assert np.array_equal(found["half"].view(ml_dtypes.bfloat16).astype(np.float32), MATRIX)
            continue
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert np.array_equal(found[name], value)


def test_tensors_that_paddle_cut_into_parts_are_whole_again(tmp_path: Path) -> None:
    """As ``paddle.save`` writes tensors of a gibibyte in protocols 2 and 3."""
    cut = {"OriginShape": (3, 4), "slices": ["w@@.0", "w@@.1"]}
    flat = MATRIX.reshape(-1)
    saved = {"b": flat, "w@@.0": flat[:7], "w@@.1": flat[7:], "UnpackBigParamInfor@@": {"w": cut}}
    (tmp_path / "cut.pdparams").write_bytes(pickle.dumps(saved, 2))
    found = read_pickled(tmp_path / "cut.pdparams")
    assert set(found) == {"b", "w"}
    assert np.array_equal(found["w"], MATRIX)


def test_what_torch_saves_comes_back() -> None:
    """A file that torch itself wrote; see ``fixtures/pickles/make_pickles.py``."""
    found = read_pickled(Path(__file__).parent / "fixtures" / "pickles" / "torch.bin")
    expected = {
        "float32": MATRIX,
        "transposed": MATRIX.T,
        "row": MATRIX[1],
        "parameter": MATRIX * 2,
        "bfloat16": MATRIX.astype(ml_dtypes.bfloat16).view(np.uint16),
        "float16": MATRIX.astype(np.float16),
        "int64": np.arange(5),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(1.5, np.float32),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert np.array_equal(found[name], value), name


def torch_zip(path: Path, pickled: bytes, content: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", content)


STORAGE = b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"
"""Protocol 0 for the persistent id of four floats."""


def tensor(shape: str, strides: str, offset: int = 0) -> bytes:
    return (
        b"(dVw\nctorch._utils\n_rebuild_tensor_v2\n" + STORAGE + f"I{offset}\n{shape}{strides}I00\n".encode() + b"NtRs."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(pickle.dumps({"w": eval})), r"calls builtins\.eval"),
        (lambda path: path.write_bytes(pickle.dumps({"w": print}, 2)), r"calls __builtin__\.print"),
        (lambda path: path.write_bytes(pickle.dumps({"w": np.array([None])})), r"holds numpy arrays of dtype 'O8'"),
        (lambda path: path.write_bytes(pickle.dumps({"w": np.zeros(1, [("a", "f4")])})), r"arrays of dtype 'V4'"),
        (lambda path: path.write_bytes(pickle.dumps({"w": "text"})), r"holds str under 'w'"),
        (lambda path: path.write_bytes(pickle.dumps([MATRIX])), r"holds list in place of tensors by name"),
        (lambda path: path.write_bytes(pickle.dumps({"w": MATRIX})[:60]), r"not a readable file of weights"),
        (lambda path: path.write_bytes(b""), r"not a readable file of weights"),
        (lambda path: path.write_bytes(b"cos\x1b[31m\nsystem\n."), r"calls os\?\[31m\.system"),
        (lambda path: path.write_bytes(b"N\x51."), r"not a readable file of weights"),  # a persistent id
        (lambda path: torch_zip(path, pickle.dumps({"w": os.system})), r"calls posix\.system"),
        (lambda path: torch_zip(path, tensor("(I3\nI2\nt", "(I2\nI1\nt")), r"reaches beyond its storage"),
        (lambda path: torch_zip(path, tensor("(I2\nt", "(I1\nt", offset=-1)), r"not a whole number of 0 or more"),
        (lambda path: torch_zip(path, tensor("(I2\nt", "(I-1\nt")), r"not a whole number of 0 or more"),
        (lambda path: torch_zip(path, tensor("(I2\nt", "(I1\nt"), compression=8), r"its tensors are compressed"),
    ],
)
def test_anything_but_tensors_is_refused_by_name(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "model_state.pdparams"
    make(path)
    with pytest.raises(sft.UsageError, match=message) as caught:
        read_pickled(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
ZERO_D = (
    REBUILD + STORAGE.replace(b"Float", b"Long").replace(b"V0", b"Vnumber").replace(b"I4", b"I1") + b"I0\n(t(tI00\nNtR"
)
"""Protocol 0 for a tensor without dimensions that holds one int64."""
NESTED = b"(" * 200_000 + b"t" * 200_000


def forged(storage: bytes, offset: bytes, shape: bytes, strides: bytes) -> bytes:
    return b"(dVw\n" + REBUILD + storage + offset + b"(" + shape + b"t(" + strides + b"tI00\nNtRs."


@pytest.mark.parametrize(
    ("pickled", "number", "answer"),
    [
        pytest.param(forged(STORAGE, ZERO_D, b"I2\n", b"I1\n"), 2**63 - 1, "not a whole number", id="offset"),
        pytest.param(
            forged(STORAGE, b"I0\n", b"I5\nI2\n", ZERO_D + b"I1\n"),
            2**62 - 1024,
            "not a whole number",
            id="stride",
        ),
        pytest.param(forged(STORAGE, b"I0\n", ZERO_D, b"I1\n"), 2**62, "not a whole number", id="shape"),
        pytest.param(forged(STORAGE, b"I01\n", b"I2\n", b"I1\n"), 0, "not a whole number", id="bool"),
        pytest.param(
            forged(STORAGE, b"I0\n", b"I1000000000000\n", b"I0\n"),
            0,
            "beyond its storage",
            id="more values than are stored",
        ),
        pytest.param(forged(STORAGE, b"I0\n", b"I0\nI%d\n" % 2**70, b"I1\nI1\n"), 0, "", id="huge beside none"),
        pytest.param(
            forged(STORAGE.replace(b"I4", b"I5"), b"I0\n", b"I1\n", b"I1\n"), 0, "shorter than it says", id="count"
        ),
        pytest.param(
            forged(STORAGE.replace(b"I4", b"I-1"), b"I0\n", b"I1\n", b"I1\n"),
            0,
            "not a whole number",
            id="negative count",
        ),
        pytest.param(
            forged(STORAGE.replace(b"V0", b"Varchive"), b"I0\n", b"I1\n", b"I1\n"),
            0,
            "no item named",
            id="no such storage",
        ),
        pytest.param(forged(b"(Vabc\n", b"I0\n", b"I1\n", b"I1\n"), 0, "has no storage", id="no storage"),
        pytest.param(b"(d" + NESTED + b"I1\ns.", 0, "names something by a tuple", id="a key that is nested deep"),
        pytest.param(b"ccollections\nOrderedDict\n(((" + NESTED + b"I1\ntttR.", 0, "", id="in pairs"),
        pytest.param(b"\x80\x04\x8f(" + NESTED + b"\x90.", 0, "holds a set", id="in a set"),
        pytest.param(b"(dr\xff\xff\xff\xff.", 0, "read {}", id="a memo of 64 GiB"),
    ],
)
def test_no_forged_number_or_nesting_reaches_memory(tmp_path: Path, pickled: bytes, number: int, answer: str) -> None:
    """In a process of its own, as what went wrong before took the whole process down."""
    path = tmp_path / "forged.bin"
    torch_zip(path, pickled)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/number", number.to_bytes(8, "little"))
    reads = (
        "import resource, sys\nfrom pathlib import Path\nfrom sft import UsageError\n"
        "from sft.models.pickles import read_pickled\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n    found = read_pickled(Path(sys.argv[1]))\n"
        "except UsageError as error:\n    print('refused:', error)\n"
        "else:\n    print('read', {name: bytes(value)[:9] for name, value in found.items()})"
    )
    done = subprocess.run([sys.executable, "-c", reads, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") != answer.startswith("read")
    assert answer in done.stdout


def test_the_tensor_of_the_hostile_zips_is_read_where_it_fits(tmp_path: Path) -> None:
    torch_zip(tmp_path / "fits.bin", tensor("(I2\nI2\nt", "(I2\nI1\nt"), MATRIX[0].tobytes())
    assert read_pickled(tmp_path / "fits.bin")["w"].tolist() == [[0, 0.125], [0.25, 0.375]]
