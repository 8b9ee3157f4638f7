"""What all tests share."""

import gc
import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings
from packaging.requirements import Requirement

# One thread: models this small are slower on several, and sums of floats depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"

# No timed tests: machines differ, and a test run may share one with other work. The same examples in every run.
settings.register_profile("dinotile", deadline=None, max_examples=60, derandomize=True)
# pytest tests/test_bad_input.py --hypothesis-profile=thorough: over 10,000 others each time, some 10 minutes.
settings.register_profile(
    "thorough",
    deadline=None,
    max_examples=2600,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("dinotile")


def pins() -> dict[str, str]:
    """Versions by package, as the WebUI pins them whose environment this is; none in any other."""
    file = os.environ.get("DINOTILE_PINS")
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else ()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: str(each.specifier)[2:] for each in found if not each.marker or each.marker.evaluate()}


def import_of_webuis(module: str) -> ModuleType:
    """A module that the WebUIs have: the test is skipped without it, but not beside what they pin."""
    if pins():
        return importlib.import_module(module)
    return pytest.importorskip(module, reason=f"no {module} here, beside the WebUIs' packages there is one")


def _found(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def pytest_configure(config: pytest.Config) -> None:
    """What the tests need must not have changed what the WebUI pins."""
    wrong = [
        f"{package} is {_found(package)}, not {pinned}"
        for package, pinned in pins().items()
        if not f"{_found(package)}+".startswith((f"{pinned}+", f"{pinned}.0+"))  # a build's own name comes after a +
    ]
    if wrong:
        raise pytest.UsageError(f"not what {os.environ['DINOTILE_PINS']} pins: {'; '.join(wrong)}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports made is there to stay: the garbage collector need not look at it again and again."""
    gc.freeze()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that share all tests, none where only some are asked for: each takes 2 GB and some seconds to start."""
    return min(os.cpu_count() or 1, 4) if config.args_source == config.ArgsSource.TESTPATHS else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = [
        f"{package} {_found(package)}" for package in pins() or ("torch", "numpy", "pillow", "transformers", "timm")
    ]
    terminalreporter.write_line(f"beside Python {platform.python_version()}, {', '.join(told)}")
