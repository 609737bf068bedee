"""What `torch.save` writes for a float32 matrix, without PyTorch: vLLM takes embeddings over HTTP as such files.

The format (PyTorch >= 1.6, `torch/serialization.py`) is a zip archive with stored entries: a pickle that names the
storage, and the storage's bytes. It is read back with `torch.load(file, weights_only=True)`.
"""

from __future__ import annotations

import io
import zipfile

import numpy as np

_PROTOCOL, _MARK, _TUPLE, _TUPLE2, _REDUCE, _PERSID, _FALSE, _STOP = (
    *(b"\x80\x02", b"(", b"t", b"\x86", b"R", b"Q", b"\x89", b"."),
)


def torch_file(matrix: np.ndarray) -> bytes:
    """A file from which PyTorch loads a contiguous CPU tensor equal to `matrix`.

    Args:
        matrix: float32 `(n, d)`.

    Raises:
        ValueError: another dtype or number of dimensions.
    """
    if matrix.dtype != np.float32 or matrix.ndim != 2:
        raise ValueError(f"a float32 matrix is needed, not {matrix.dtype} of {matrix.ndim} dimensions")
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (
            ("data.pkl", _pickle(*matrix.shape)),
            ("byteorder", b"little"),
            ("data/0", np.ascontiguousarray(matrix, dtype="<f4").data),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return target.getvalue()


def _pickle(rows: int, columns: int) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, with storage 0 kept outside."""
    storage = (_text("storage"), _name("torch", "FloatStorage"), _text("0"), _text("cpu"), _number(rows * columns))
    size = _number(rows) + _number(columns) + _TUPLE2
    stride = _number(columns) + _number(1) + _TUPLE2
    hooks = _name("collections", "OrderedDict") + _MARK + _TUPLE + _REDUCE
    kept_outside = _MARK + b"".join(storage) + _TUPLE + _PERSID
    arguments = _MARK + kept_outside + _number(0) + size + stride + _FALSE + hooks + _TUPLE
    return _PROTOCOL + _name("torch._utils", "_rebuild_tensor_v2") + arguments + _REDUCE + _STOP


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _number(value: int) -> bytes:
    """LONG1: any size, so that large matrices need no second case."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data
