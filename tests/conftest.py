"""Which tests run where: a test that needs hardware says so by a marker and is skipped with a reason where it is missing.

Programs compiled by one test are kept for the others, in this process, its siblings and its children, until the tests end.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

import pytest

# Read by JAX at import: tests share machines, and a GPU's memory must not be taken whole by each worker.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Forked workers must not inherit the tokenizers library's threads (it hangs when told to keep them).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set where this process is the child of one that came by here
    compiled = tempfile.mkdtemp(prefix="compiled-for-tests-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

MULTIDEVICE = pathlib.Path(__file__).parent / "multidevice"
FAKE_DEVICES = 8


def _has(platform: str) -> bool:
    """Whether JAX sees a device of this platform (asked only when a collected test needs to know)."""
    import jax

    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for platform in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(platform)]
        if marked and not _has(platform):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs a {platform.upper()}; JAX sees none here"))
    several = [item for item in items if MULTIDEVICE in item.path.parents]
    if several:
        import jax

        if jax.device_count() < FAKE_DEVICES:
            reason = f"needs {FAKE_DEVICES} devices: `make test` runs these with --xla_force_host_platform_device_count={FAKE_DEVICES}"
            for item in several:
                item.add_marker(pytest.mark.skip(reason=reason))
