"""The table of hardware, a user's own file, and names that are nearly right."""

from pathlib import Path

import pytest

from qcompiler.advisor import find_hardware, known_hardware, measure_machine
from qcompiler.advisor.hardware import own_file
from qcompiler.errors import InputError

ASKED = (
    *("A100 40", "a100-80gb", "H100 SXM", "h100-pcie", "H200", "B200", "B300", "GB200", "L4", "L40S", "RTX 3090"),
    *("rtx_4090", "RTX 5090", "RTX PRO 6000", "MI300X", "MI325X", "MI355X", "Grace CPU", "a100", "h100", "4090"),
)
OWN = """
[mine]
name = "My card"
kind = "workstation"
memory_gb = 16
bandwidth_gb_s = 500
types = ["float16"]
rates = { float16 = 50 }
source = "the box"
"""


@pytest.fixture(autouse=True)
def nobodys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_for_is_there(name: str) -> None:
    known = known_hardware()
    if name == "A100 40":
        with pytest.raises(InputError, match="unknown hardware") as caught:
            find_hardware(name, known)
        assert "a100-40gb" in str(caught.value.remedy)
    else:
        assert find_hardware(name, known).source


def test_rates_are_dense_and_of_types_that_are_taken() -> None:
    for item in known_hardware().values():
        assert set(item.rates) <= item.types
        if "float16" in item.rates and "float8" in item.rates:
            assert item.rates["float8"] / item.rates["float16"] == pytest.approx(2, rel=0.02)
        assert item.capability is None or item.vendor == "nvidia"
    h100 = find_hardware("h100", known_hardware())
    assert (h100.memory, h100.bandwidth, h100.rate("float8"), h100.rate("float4")) == (80e9, 3.35e12, 1978.9e12, None)
    assert "float8" not in find_hardware("a100", known_hardware()).types


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("h10", "h100"),
        ("mi300", "mi300x"),
        ("rtx4090", "rtx-4090"),
        ("pro 6000 black", "pro-6000"),
        ("instinct", "mi300x"),
    ],
)
def test_the_nearest_names_are_offered(name: str, near: str) -> None:
    with pytest.raises(InputError, match="unknown hardware") as caught:
        find_hardware(name, known_hardware())
    assert near in str(caught.value.remedy)
    assert "did you mean" in str(caught.value.remedy)


def test_nothing_near_says_how_to_add() -> None:
    with pytest.raises(InputError) as caught:
        find_hardware("abacus", known_hardware())
    assert "--hardware FILE" in str(caught.value.remedy)


def test_own_files_add_and_replace(tmp_path: Path) -> None:
    own_file().parent.mkdir(parents=True)
    own_file().write_text(OWN)
    assert known_hardware()["mine"].memory == 16e9
    named = tmp_path / "more.toml"
    named.write_text(OWN.replace("memory_gb = 16", "memory_gb = 12").replace("[mine]", "[h100-sxm]"))
    known = known_hardware(named)
    assert known["h100-sxm"].memory == 12e9
    assert known["h100-sxm"].float_type == "float16"
    assert "mine" in known


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("memory_gb = 16", "memory_gb = 0"), "no figure of hardware"),
        (("memory_gb = 16", "memory_gb = -1"), "no figure of hardware"),
        (("memory_gb = 16", "memory_gb = inf"), "no figure of hardware"),
        (("memory_gb = 16", "memory_gb = true"), "no figure of hardware"),
        (("bandwidth_gb_s = 500", "bandwidth_gb_s = 5e9"), "no figure of hardware"),
        (("rates = { float16 = 50 }", "rates = { float16 = nan }"), "no figure of hardware"),
        (("rates = { float16 = 50 }", "rates = { float7 = 50 }"), "unknown type of operands"),
        (("rates = { float16 = 50 }", "rates = 50"), "types are an array"),
        (("memory_gb", "memory"), "no such field"),
        (('source = "the box"', ""), "lacks a field"),
        (('source = "the box"', "source = 1"), "this field is text"),
        (('kind = "workstation"', 'kind = "toaster"'), "unknown kind"),
        (('kind = "workstation"', 'kind = "cpu"\ncapability = 9000'), "no CUDA capability"),
        (('kind = "workstation"', 'kind = "cpu"\naliases = "x"'), "aliases are an array"),
        (("[mine]", "mine = 1\n[other]"), "hardware is a table"),
        (("[mine]", "[mine"), "not TOML"),
    ],
)
def test_bad_files_name_the_field(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(OWN.replace(*change))
    with pytest.raises(InputError, match=said) as caught:
        known_hardware(file)
    assert str(file) in str(caught.value.where)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        known_hardware(tmp_path / "none.toml")


def test_this_machine_is_measured() -> None:
    found = measure_machine(copied=1 << 20, sides=(64,))
    assert found.key == "this"
    assert found.memory > 1e8
    assert found.bandwidth > 1e7
    assert all(rate > 1e5 for rate in found.rates.values())
    assert found.rate(found.float_type) == max(found.rates.values())
    assert "measured" in found.to_dict()["source"]
