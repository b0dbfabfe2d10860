import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lethe.errors import PatchError
from lethe.system import tensor_file


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    with tensor_file.reading(path, PatchError) as parts:
        return parts


def test_tensors_and_header_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a/b": torch.arange(6.0).reshape(2, 3).T, "c\td": torch.tensor([math.nan, -0.0, math.inf])}
    tensor_file.save(tmp_path / "file", tensors, {"z": [math.nan, 0.1], "a": {"ü": None}})
    found, header = read(tmp_path / "file")
    assert all(
        torch.equal(found[name].view(torch.uint8), tensors[name].contiguous().view(torch.uint8)) for name in found
    )
    assert found.keys() == tensors.keys()
    assert header["a"] == {"ü": None}
    assert math.isnan(header["z"][0])  # type: ignore[index]


def test_equal_content_gives_equal_bytes_whatever_the_order_of_the_header(tmp_path: Path) -> None:
    for name, header in (("one", {"a": 1, "b": 2}), ("other", {"b": 2, "a": 1})):
        tensor_file.save(tmp_path / name, {"t": torch.ones(3)}, header)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_without_a_header_has_an_empty_one(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "file", metadata={"format": "pt"})
    assert read(tmp_path / "file")[1] == {}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "it lacks 'step'"),
        ({"lethe": "{"}, "Expecting property name"),
        ({"lethe": json.dumps(3)}, "'int' object"),
    ],
)
def test_what_goes_wrong_while_it_is_taken_apart_is_damage(
    tmp_path: Path, metadata: dict[str, str] | None, reason: str
) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "file", metadata=metadata)
    with pytest.raises(PatchError) as error, tensor_file.reading(tmp_path / "file", PatchError) as (_, header):
        header["step"]
    assert str(error.value).startswith(reason)


def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    tensor_file.save(tmp_path / "file", {"t": torch.ones(3)}, {})
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(PatchError):
        read(tmp_path / "file")
