import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ttt_lit.checkpoint.tensors import read_headers


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(raw({}, length=2**63), id="a header longer than the file"),
        pytest.param(raw({}, b" " * 100_000_001, length=100_000_001), id="a header beyond the cap"),
        pytest.param(raw(b"{"), id="no JSON"),
        pytest.param(raw(b"[" * 100_000), id="nested too deeply"),
        pytest.param(raw({"a": entry(0, 8, dtype="F33")}, b"12345678"), id="an unknown dtype"),
        pytest.param(raw({"a": entry(0, 8, shape=[-2])}, b"12345678"), id="an impossible shape"),
        pytest.param(raw({"a": entry(0, 8, shape=[3])}, b"12345678"), id="a shape that does not fill its bytes"),
        pytest.param(raw({"a": entry(0, 8, shape=[2**61, 2**61])}, b"12345678"), id="a size that overflows"),
        pytest.param(raw({"a": entry(8, 0)}, b"12345678"), id="offsets backwards"),
        pytest.param(raw({"a": entry(0, 8)}, b"1234567"), id="a short file"),
        pytest.param(raw({"a": entry(0, 8)}, b"123456789"), id="trailing bytes"),
        pytest.param(raw({"a": entry(4, 12)}, b"123456789012"), id="a gap"),
        pytest.param(raw({"a": entry(0, 8), "b": entry(4, 12)}, b"123456789012"), id="an overlap"),
    ],
)
def test_a_malformed_file_ends_in_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a usable safetensors file") as error:
        read_headers([path])
    assert "\n" not in str(error.value)


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"same": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="another file.*same"):
        read_headers([tmp_path / "a", tmp_path / "b"])


def test_tensors_are_read_as_they_were_written_and_changing_them_never_changes_the_file(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "single": torch.randn(2, 2, 2),
        "double": torch.randn(1).double(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_headers([tmp_path / "x.safetensors"])
    assert {name: stored.shape for name, stored in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert header[name].read().dtype == tensor.dtype
        header[name].read().zero_()
        assert torch.equal(header[name].read(), tensor)


def test_data_that_is_not_aligned_is_read_all_the_same(tmp_path):
    path = tmp_path / "odd.safetensors"
    values = torch.tensor([1.5, -2.0])
    path.write_bytes(raw({"a": entry(0, 1, [1], "U8"), "b": entry(1, 9)}, b"\0" + values.numpy().tobytes()))
    assert torch.equal(read_headers([path])["b"].read(), values)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_bytes_never_escape_as_another_error(tmp_path_factory, data):
    """Flip, cut or insert anywhere: the file is read, or the error is ours."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    content = bytearray(raw({"a": entry(0, 8), "b": entry(8, 10, [1], "BF16")}, b"1234567890"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not content:
            break
    path.write_bytes(bytes(content))
    try:
        header = read_headers([path])
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        for stored in header.values():
            assert tuple(stored.read().shape) == stored.shape
