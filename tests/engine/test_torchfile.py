"""The files are what PyTorch writes: PyTorch itself reads them back, without being allowed to run code."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from service.engine.torchfile import torch_file

SHAPES = [(1, 1), (8, 576), (32, 1_536), (300, 896), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_reads_the_same_values(shape):
    torch = pytest.importorskip("torch")
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    loaded = torch.load(io.BytesIO(torch_file(matrix)), weights_only=True)
    assert loaded.dtype is torch.float32
    assert loaded.is_contiguous()
    assert not loaded.requires_grad
    np.testing.assert_array_equal(loaded.numpy(), matrix)


def test_special_values_and_views_survive():
    torch = pytest.importorskip("torch")
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    base[0, 0], base[1, 1], base[2, 2] = np.nan, np.inf, -0.0
    for view in (base.T, base[::2, ::3], base[:, 1:]):
        loaded = torch.load(io.BytesIO(torch_file(view)), weights_only=True).numpy()
        np.testing.assert_array_equal(loaded, view)
        np.testing.assert_array_equal(np.signbit(loaded), np.signbit(view))


def test_the_archive_has_the_entries_that_pytorch_writes():
    torch = pytest.importorskip("torch")
    matrix = np.ones((3, 5), dtype=np.float32)
    theirs = io.BytesIO()
    torch.save(torch.from_numpy(matrix), theirs)

    def entries(data: io.BytesIO) -> dict[str, bytes]:
        archive = zipfile.ZipFile(data)
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}

    ours, wanted = entries(io.BytesIO(torch_file(matrix))), entries(theirs)
    assert ours.keys() <= wanted.keys()
    for name in ("data/0", "version", "byteorder"):
        assert ours[name].strip() == wanted[name].strip()


def test_the_same_values_give_the_same_bytes():
    matrix = np.ones((3, 5), dtype=np.float32)
    assert torch_file(matrix) == torch_file(matrix.copy())


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros(4, np.float32), np.zeros((1, 2, 3), np.float32)])
def test_other_arrays_are_refused(wrong):
    with pytest.raises(ValueError, match="float32 matrix"):
        torch_file(wrong)
