"""What every test stands on: the CPU, a cache of its own, no network, and the shared data where it is present."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

# Most of a test's time is the compiler's, for programs that run a few times on few numbers. Without any optimisation (level 0)
# it is a third, but then products and sums are rounded one by one; tests that don't mind ask for `unoptimised`. Processes that
# tests start inherit this. The older emitters, which compile in half the time, went with jax 0.11. Splitting a program so that
# threads compile its parts side by side is work in vain where another test has the other core.
_QUICK = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

# Read by jax, matplotlib, tokenizers and the BLAS when they are first imported, so they are set before any test module is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "2")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# A first call compiles, so its time says nothing about the code under test.
hypothesis.settings.register_profile("gptjax", deadline=None)
hypothesis.settings.load_profile("gptjax")


# Files of several minutes: begun first, so that no process is left alone with one at the end.
LONGEST = ("test_pairs.py", "test_pairs_others.py", "test_hosts.py", "test_plan.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        skip = pytest.mark.skip(reason=f"{' and '.join(missing)} not installed (extra: parity)")
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def compiled_functions():
    """Nothing compiled outlives a file of tests: a process would grow to gigabytes, and files may differ in how they compile."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def unoptimised(compiled_functions: None):
    """This file's programs are compiled at level 0, also in processes that it starts."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory):
    """Tokenized data goes into a folder of this test session, so that no test sees what an earlier one left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data: $GPTJAX_SHARED_DATA, or ../shared/data beside the repository. Skips where there is none."""
    folder = pathlib.Path(os.environ.get("GPTJAX_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set GPTJAX_SHARED_DATA to the folder of shared test data")
    return folder


@pytest.fixture
def eight_devices():
    """Eight CPU devices of one process, for sharded code; they exist only where XLA was told so before its first use."""
    import jax

    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return jax.devices()[:8]
