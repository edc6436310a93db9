import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ttt_lit.checkpoint.headers import MAX_HEADER_BYTES, read_header
from ttt_lit.checkpoint.tensor_files import read_tensor


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        raw({}, length=2**63),
        raw({}, length=100),
        raw(b"[]"),
        raw(b"{"),
        raw(b"\xff\xfe"),
        raw(b"[" * 100_000),
        raw(b'{"a": ' + b"9" * 5000 + b"}"),
        raw({"a": 5}),
        raw({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"),
        raw({"a": entry(0, 8) | {"extra": 1}}, b"12345678"),
        raw({"a": entry(0, 8, dtype="F33")}, b"12345678"),
        raw({"a": entry(0, 8, dtype=["F32"])}, b"12345678"),
        raw({"a": entry(0, 8, shape=[-2])}, b"12345678"),
        raw({"a": entry(0, 8, shape=[2.0])}, b"12345678"),
        raw({"a": entry(0, 8, shape=[True, 2])}, b"12345678"),
        raw(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', b"12345678"),
        raw({"a": entry(0, 8, shape=[1] * 9 + [2])}, b"12345678"),
        raw({"a": entry(0, 8, shape=[3])}, b"12345678"),
        raw({"a": entry(0, 8, shape=[2**61, 2**61])}, b"12345678"),
        raw({"a": entry(8, 0)}, b"12345678"),
        raw({"a": entry(-8, 0)}, b"12345678"),
        raw({"a": entry(0, 8)}, b"1234567"),
        raw({"a": entry(0, 8)}, b"123456789"),
        raw({"a": entry(4, 12)}, b"123456789012"),
        raw({"a": entry(0, 8), "b": entry(4, 12)}, b"123456789012"),
        raw({"a": entry(0, 8), "b": entry(0, 8)}, b"12345678"),
        raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', b"12345678"),
    ],
)
def test_malformed_files_end_in_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a usable safetensors file") as error:
        read_header(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


def test_a_header_beyond_the_cap_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(ValueError, match="claims 100000001 bytes"):
        read_header(path)


def test_tensors_are_read_as_safetensors_wrote_them(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "single": torch.randn(2, 2, 2),
        "double": torch.randn(1).double(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        assert header[name].shape == tuple(tensor.shape)
        assert torch.equal(read_tensor(header[name]), tensor)
        assert read_tensor(header[name]).dtype == tensor.dtype


def test_data_that_is_not_aligned_is_read_all_the_same(tmp_path):
    path = tmp_path / "odd.safetensors"
    values = torch.tensor([1.5, -2.0])
    path.write_bytes(raw({"a": entry(0, 1, [1], "U8"), "b": entry(1, 9)}, b"\0" + values.numpy().tobytes()))
    assert torch.equal(read_tensor(read_header(path)["b"]), values)


def test_changing_a_tensor_never_changes_the_file(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    read_tensor(header["a"]).zero_()
    assert torch.equal(read_tensor(header["a"]), torch.ones(4))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_bytes_never_escape_as_another_error(tmp_path_factory, data):
    """Flip, cut or insert anywhere: the header is read, or the error is ours."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    content = bytearray(raw({"a": entry(0, 8), "b": entry(8, 10, [1], "BF16")}, b"1234567890"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(max_size=3))
        content[at : at + data.draw(st.integers(0, 3))] = piece
        if not content:
            break
    path.write_bytes(bytes(content))
    try:
        header = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        assert sum(tensor.end - tensor.begin for tensor in header.values()) <= len(content)
