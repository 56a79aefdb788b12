"""scripts/*: what they do before anything is installed, with stand-ins for Python and pip on PATH.

A stand-in `python3` logs its calls. `-m venv` makes a .venv whose python logs too and whose pip does what the file
`pip` in the log folder says. So set-up is tested whole, in milliseconds, without a network.
"""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").glob("*")
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)
TOOLS = ["bash", "env", "basename", "dirname", "cat", "cksum", "mkdir", "mktemp", "rm", "mv", "sed", "head"]

PYTHON = """#!/usr/bin/env bash
log='{log}'
printf '%s\\n' "${{0##*/}} $*" >>"$log/calls"
case "$*" in
    --version) echo Python 3.11.9 ;;
    *'sys.version_info'*) [[ ! -e $log/old ]] ;;
    *ensurepip*) [[ ! -e $log/no_venv ]] ;;
    '-m venv'*)
        mkdir -p "${{@: -1}}/bin"
        echo 'version = 3.11.9' >"${{@: -1}}/pyvenv.cfg"
        cat "$0" >"${{@: -1}}/bin/python"
        chmod +x "${{@: -1}}/bin/python"
        ;;
    '-m pip'*) source "$log/pip" ;;
    '-m pytest'*) source "$log/pytest" ;;
    *torch*) echo 8 ;;
esac
"""


class House:
    """A copy of the scripts in a folder with spaces in its name, and a PATH that holds only stand-ins and `TOOLS`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.path, self.log = folder / "a house", folder / "bin", folder / "log"
        for made in (self.root, self.path, self.log):
            made.mkdir()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)
        for name in (*TOOLS, "chmod"):
            (self.path / name).symlink_to(shutil.which(name) or f"/bin/{name}")
        self.add("python3", PYTHON.format(log=self.log))
        self.add("gcc", "#!/usr/bin/env bash\n")
        (self.log / "pip").touch()

    def add(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def set_up(self, kind: str = "base") -> subprocess.CompletedProcess[str]:
        """What every script does first, and nothing after it."""
        probe = self.root / "scripts" / "probe"
        probe.write_text(
            f'set -euo pipefail\nsource "$(dirname -- "${{BASH_SOURCE[0]}}")/setup_venv"\nsetup_venv {kind}\n'
        )
        return self.run("probe")

    def run(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a script from the root folder, which is not ours; the calls it makes are logged."""
        (self.log / "calls").write_text("")
        command = ["bash", str(self.root / "scripts" / script), *words]
        environment = {"PATH": str(self.path), "HOME": str(self.log)}
        return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)

    def installs(self) -> list[str]:
        """The pip commands of the last run."""
        return [line for line in (self.log / "calls").read_text().splitlines() if "-m pip install" in line]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize(
    "script", [*SCRIPTS, ROOT / "scripts" / "setup_venv", ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_script_is_well_formed(script: Path) -> None:
    """Bash can parse it, it stops at the first failure, and it can be executed."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name != "setup_venv":
        assert "\nset -euo pipefail\n" in script.read_text()
        assert os.access(script, os.X_OK)


def test_first_set_up_installs_once_and_the_second_nothing(house: House) -> None:
    """From another folder, into a path with spaces; the second call runs neither pip nor Python."""
    assert house.set_up().returncode == 0
    (install,) = house.installs()
    assert install.endswith("--constraint scripts/constraints.txt --editable .")
    assert house.set_up().returncode == 0
    assert (house.log / "calls").read_text() == ""


def test_dev_adds_to_base_and_base_is_content_with_dev(house: House) -> None:
    """scripts/test upgrades what scripts/quickstart made; quickstart then has nothing to do."""
    house.set_up("base")
    house.set_up("dev")
    assert [line.rpartition(" ")[2] for line in house.installs()] == [".[dev]"]
    assert "-m venv" not in (house.log / "calls").read_text()
    house.set_up("base")
    assert not house.installs()


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "scripts/constraints.txt", ".venv/pyvenv.cfg"])
def test_change_installs_again(house: House, name: str) -> None:
    """Requirements, pins or the interpreter changed: the same .venv is brought up to date."""
    house.set_up()
    with (house.root / name).open("a") as file:
        file.write("\n# changed\n")
    house.set_up()
    assert len(house.installs()) == 1
    assert "-m venv" not in (house.log / "calls").read_text()


def test_interrupted_set_up_is_thrown_away(house: House) -> None:
    """Killed while pip installs, the half-filled .venv is not used; the next call starts from an empty one."""
    (house.log / "pip").write_text(f": >'{house.root}/.venv/half'; kill -9 $PPID $$")
    assert house.set_up().returncode != 0
    assert (house.root / ".venv" / "half").exists()
    (house.log / "pip").write_text("")
    assert house.set_up().returncode == 0
    assert not (house.root / ".venv" / "half").exists()
    assert "-m venv" in (house.log / "calls").read_text()


def test_moved_house_makes_its_environment_anew(house: House) -> None:
    """The commands of a .venv name the folder it was made in."""
    house.set_up()
    house.root = house.root.rename(house.root.with_name("another house"))
    house.set_up()
    assert "-m venv" in (house.log / "calls").read_text()


def test_environment_made_by_hand_is_kept(house: House) -> None:
    """A .venv without our stamp is somebody's: it is installed into, not removed."""
    house.set_up()
    (house.root / ".venv" / ".frugal-moe").unlink()
    (house.root / ".venv" / "theirs").touch()
    assert house.set_up().returncode == 0
    assert (house.root / ".venv" / "theirs").exists()
    assert len(house.installs()) == 1


def test_failing_pip_is_heard(house: House) -> None:
    """pip's own words come first, and the set-up does not count as done."""
    (house.log / "pip").write_text("echo 'ERROR: No matching distribution found' >&2; exit 1")
    result = house.set_up()
    assert result.returncode == 1
    assert "ERROR: No matching distribution found\nscripts/probe: pip failed" in result.stderr
    assert not (house.root / ".venv" / ".frugal-moe").exists()


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    return result.stderr.strip()


def test_missing_venv_module_names_the_package(house: House) -> None:
    """Debian's python3 comes without ensurepip: one line with the command that adds it."""
    (house.log / "no_venv").touch()
    expected = "scripts/quickstart: python3-venv is missing; run: sudo apt-get install -y python3-venv"
    assert one_line(house.run("quickstart")) == expected
    assert not (house.root / ".venv").exists()


def test_missing_compiler_names_the_package(house: House) -> None:
    """Tests compile; training does not ask for a compiler."""
    (house.path / "gcc").unlink()
    assert one_line(house.run("test")) == "scripts/test: gcc is missing; run: sudo apt-get install -y gcc"
    assert house.set_up("base").returncode == 0


def test_missing_python_is_one_line(house: House) -> None:
    """Neither an old Python nor none at all ends in a trace."""
    (house.log / "old").touch()
    assert "Python 3.11 or newer is missing" in one_line(house.run("quickstart"))
    (house.path / "python3").unlink()
    assert "Python 3.11 or newer is missing" in one_line(house.run("quickstart"))


@pytest.mark.parametrize("script", ["quickstart", "check"])
def test_unknown_argument_is_one_line(house: House, script: str) -> None:
    """A misspelt option is named before anything is installed."""
    assert "unknown argument '--fats'" in one_line(house.run(script, "--fats"))
    assert (house.log / "calls").read_text() == ""


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_help_installs_nothing(house: House, script: str) -> None:
    """--help answers on a bare machine."""
    result = house.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: scripts/{script}")
    assert (house.log / "calls").read_text() == ""


LAUNCH = (
    "accelerate launch --config_file scripts/one_process.yaml --num_processes 1 --num_machines 1"
    " --mixed_precision no --dynamo_backend no recipes/quickstart"
)


@pytest.mark.parametrize(("option", "prefix"), [([], "quickstart"), (["--fast"], "quickstart_fast")])
def test_quickstart_trains_both_and_compares(house: House, option: list[str], prefix: str) -> None:
    """Two launches, then the table with the report, then the same as JSON; --fast only adds words."""
    for name in ("accelerate", "moe"):
        house.add(name, f'#!/usr/bin/env bash\necho "{name} $*" >>"{house.log}/calls"; echo "{{}}"\n')
    result = house.run("quickstart", *option)
    assert result.returncode == 0, result.stderr
    calls = [line for line in (house.log / "calls").read_text().splitlines() if line.startswith(("accelerate", "moe"))]
    moe, dense, table, machine = calls
    assert moe.startswith(f"{LAUNCH}_moe.py run.name={prefix}_moe")
    assert ("train.max_steps=" in moe) == bool(option)
    assert dense == moe.replace("_moe", "_dense")
    compare = f"moe compare runs/{prefix}_moe --baseline runs/{prefix}_dense"
    assert [table, machine] == [f"{compare} --html runs/quickstart/report.html", f"{compare} --json"]
    assert (house.root / "runs" / "quickstart" / "compare.json").read_text() == "{}\n"
    assert result.stdout.splitlines()[-1] == f"report: {house.root}/runs/quickstart/report.html"


def test_quickstart_stops_when_training_fails(house: House) -> None:
    """No comparison of runs that are not there."""
    house.add("accelerate", "#!/usr/bin/env bash\nexit 1\n")
    assert house.run("quickstart").returncode == 1
    assert not (house.root / "runs").exists()


# A stand-in for pytest: $4 is the marker expression, $5 the report it is asked for.
PYTEST = """
echo "$4 ${TRITON_INTERPRET-compiled}" >>"$log/modes"
case $4 in
    interpreter) numbers='errors="0" failures="2" skipped="1" tests="10"' code=1 ;;
    aot) exit 5 ;;
    *) numbers='errors="0" failures="0" skipped="3" tests="40"' code=0 ;;
esac
echo "<testsuites name=\\"all\\"><testsuite name=\\"pytest\\" $numbers time=\\"1\\">" >"${5#--junitxml=}"
exit $code
"""


def test_totals_cover_all_processes(house: House) -> None:
    """All run although one fails; a process that finds no test counts as a failure; the totals come last."""
    (house.log / "pytest").write_text(PYTEST)
    result = house.run("test")
    trainings, main, interpreter, aot, total = result.stdout.splitlines()[-5:]
    assert result.returncode == 1
    assert trainings.startswith("trainings: ok, 37 passed, 0 failed, 3 skipped")
    assert main.startswith("main: ok, 37 passed, 0 failed, 3 skipped")
    assert interpreter.startswith("interpreter: FAILED (pytest exit 1), 7 passed, 2 failed, 1 skipped")
    assert aot.startswith("aot: FAILED (no test was selected), 0 passed, 1 failed")
    assert total.startswith("81 passed, 3 failed, 7 skipped")
    modes = (house.log / "modes").read_text().splitlines()
    assert [mode for mode in modes if "not" not in mode] == ["interpreter 1", "aot compiled"]
    assert len(modes) == 4


@pytest.mark.parametrize(("words", "name"), [(["--soak"], "soak"), (["-k", "router"], "main")])
def test_one_process_with_arguments(house: House, words: list[str], name: str) -> None:
    """--soak and pytest's own arguments run one process and pass through."""
    (house.log / "pytest").write_text(PYTEST)
    result = house.run("test", *words)
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].startswith(f"{name}: ok, 37 passed")
    assert (house.log / "calls").read_text().count("-m pytest") == 1
    assert ("-k router" in (house.log / "calls").read_text()) == (name == "main")


def test_constraints_pin_what_is_required() -> None:
    """Each dependency has one exact tested version within its range, without a local suffix such as +cpu."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.]+", line) for line in pinned)
    versions = dict(line.split("==") for line in pinned)
    assert list(versions) == sorted(versions)
    assert len(versions) == len(pinned)
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["hf"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(versions[requirement.name]), text
