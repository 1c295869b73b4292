"""Options, the contract with vLLM, and the entry point."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_stairs import config
from vllm_stairs.engine import contract


def test_options() -> None:
    assert config.parse_options({}).layout == "packed"
    assert config.parse_options({"stairs_layout": "expanded"}).layout == "expanded"
    with pytest.raises(ValueError, match="Unknown option 'stairs_hight'.*stairs_layout"):
        config.parse_options({"stairs_hight": 3})
    with pytest.raises(ValueError, match="stairs_layout='spiral'.*'packed' or 'expanded'"):
        config.parse_options({"stairs_layout": "spiral"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"CPU": 2}, {"CPU": 2.0}),
        ('{"GPU": 1, "fast": 0.5}', {"GPU": 1.0, "fast": 0.5}),
        (None, None),
    ],
)
def test_draft_resources(value: object, expected: dict[str, float] | None) -> None:
    assert config.parse_options({"stairs_draft_resources": value}).draft_resources == expected


@pytest.mark.parametrize(
    "value", ["GPU", "[1]", "3", {"GPU": -1}, {"GPU": True}, {"GPU": "1"}, {"": 1}, '{"CPU": NaN}']
)
def test_draft_resources_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match="stairs_draft_resources=.*must be a JSON object"):
        config.parse_options({"stairs_draft_resources": value})


def test_placements() -> None:
    options = config.parse_options({"stairs_placement": "dedicated"})
    assert (options.overlap, options.draft_node, options.ray_address) == ("auto", None, None)
    with pytest.raises(ValueError, match="stairs_overlap='on'.*'auto' or 'off'"):
        config.parse_options({"stairs_overlap": "on"})
    with pytest.raises(ValueError, match="stairs_draft_node=''"):
        config.parse_options({"stairs_draft_node": ""})


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (3, 3), (3.0, 3), ("2", 2)])
def test_request_height(value: object, expected: int) -> None:
    assert config.request_max_height({"stairs_max_height": value}) == expected
    assert config.request_max_height({"other": 1}) is None
    assert config.request_max_height(None) is None


@pytest.mark.parametrize("value", [-1, 1.5, "many", None, [1], True, float("inf"), float("nan")])
def test_request_height_that_is_none(value: object) -> None:
    with pytest.raises(ValueError, match="stairs_max_height.*whole number"):
        config.request_max_height({"stairs_max_height": value})


def test_installed_vllm_keeps_the_contract() -> None:
    assert list(contract.find_problems()) == []


def source_with(tmp_path: Path, code: str) -> Path:
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(code)
    return tmp_path / "vllm"


HOOK = contract.Hook("vllm.engine.arg_utils", "EngineArgs.create", ("self", "model"), "wrapped", ())


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("class EngineArgs:\n  def create(self, model): ...", None),
        ("class EngineArgs:\n  def create(self, model, extra=1): ...", None),
        ("class EngineArgs:\n  def create(self, model, extra): ...", "takes"),
        ("class EngineArgs:\n  def create(self): ...", "takes"),
        ("class EngineArgs:\n  create = 1", "not a function"),
        ("class EngineArgs: ...", "missing"),
        ("", "missing"),
    ],
)
def test_contract_check(tmp_path: Path, code: str, problem: str | None) -> None:
    found = contract.check(HOOK, source_with(tmp_path, code))
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_broken_contract_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contract, "HOOKS", (HOOK,))
    monkeypatch.setattr(contract, "installed_source", lambda: source_with(tmp_path, ""))
    with pytest.raises(ValueError, match=r"EngineArgs.create is missing.*0\.32.*doctor") as error:
        contract.require()
    assert "\n" not in str(error.value)
    monkeypatch.setenv(contract.OVERRIDE, "1")
    monkeypatch.setattr(contract, "installed_source", lambda: tmp_path / "vllm")
    contract.require()


def test_untested_version_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contract, "installed_version", lambda: "0.99.1")
    with caplog.at_level("WARNING"):
        contract.require()
    assert [r for r in caplog.records if "0.99.1" in r.getMessage()]


def test_registering_is_light_and_idempotent() -> None:
    code = (
        "import sys\n"
        "from vllm_stairs.engine.plugin import register\n"
        "register(); register()\n"
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "assert EngineArgs.create_speculative_config.__vllm_stairs__\n"
        "inner = EngineArgs.create_speculative_config.__wrapped__\n"
        "assert not hasattr(inner, '__vllm_stairs__')\n"
        "register()\n"
        "assert EngineArgs.create_speculative_config.__wrapped__ is inner\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_doctor_finds_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_stairs.cli import main

    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "FAIL" not in report
    assert "hooks: all" in report


@pytest.mark.parametrize(
    ("version", "is_fine"), [("2.48.0", False), (None, False), ("2.52.1", True)]
)
def test_doctor_on_ray(monkeypatch: pytest.MonkeyPatch, version: str | None, is_fine: bool) -> None:
    from vllm_stairs import doctor

    monkeypatch.setattr(doctor, "distribution_version", lambda name: version)
    (finding,) = doctor._ray()
    assert ("pip install 'ray>=2.52'" in finding.remedy) != is_fine


def test_doctor_on_other_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_stairs.cli import main

    assert main(["doctor", "--vllm-source", str(tmp_path)]) == 2
    assert main(["doctor", "--vllm-source", str(source_with(tmp_path, ""))]) == 1
    assert "EngineArgs.add_cli_args is missing" in capsys.readouterr().out
