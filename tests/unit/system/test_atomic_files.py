import json
import math
from pathlib import Path

import pytest

from lethe.system.atomic_files import as_json, read_number, write_json, write_private

ODD = {"a": math.nan, "b": (1.5, -math.inf), 3: {"c": Path("d/e")}, "ü": [True, None, "\ud800"]}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_json_does_not_have_is_null(tmp_path: Path) -> None:
    text = write_json(tmp_path / "file", ODD).read_text(encoding="ascii")
    assert json.loads(text, parse_constant=refuse) == {
        "a": None, "b": [1.5, None], "3": {"c": "d/e"}, "ü": [True, None, "\ud800"],
    }  # fmt: skip
    assert text.startswith('{\n "a": null')
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [0.1, -1e-300, 5e-324, math.inf, -math.inf, math.nan])
def test_a_number_comes_back_bit_for_bit_where_infinity_is_text(value: float) -> None:
    back = read_number(json.loads(as_json(value, with_infinity=True), parse_constant=refuse))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_what_is_no_json_is_an_error() -> None:
    with pytest.raises(TypeError):
        as_json({"a": {1, 2}})


def test_private_rows_hold_no_nan(tmp_path: Path) -> None:
    path = write_private(tmp_path / "rows", [{"ü": math.nan}])
    assert path.read_text(encoding="utf-8") == '{"ü": null}\n'
