"""What holds for every test: the same random numbers, one thread, and nothing left behind in the process."""

import os

import pytest
import torch
from helpers.demo_record import demo
from hypothesis import settings

# The same examples on every machine, and no database beside the tests: a red test is red for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# Set by the test runner, by torch at first use, and by Lightning when it is imported and when it seeds.
OWNED_BY_LIBRARIES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
OWNED_BY_LIBRARIES |= {"PYTORCH_NVML_BASED_CUDA_CHECK", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tiny tensors: threads cost more than they bring, and the order of sums would depend on the machine.
    torch.set_num_threads(1)


def _process_state():
    environment = {name: value for name, value in os.environ.items() if name not in OWNED_BY_LIBRARIES}
    return {
        "environment": environment,
        "working directory": os.getcwd(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _restore(state):
    os.environ.clear()
    os.environ.update(state["environment"])
    os.chdir(state["working directory"])
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad mode"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """Seed before the test; fail one that changes what the tests after it would see, and undo the change."""
    torch.manual_seed(0)
    before = _process_state()
    yield
    after = _process_state()
    leaked = [name for name, value in before.items() if after[name] != value]
    if leaked:
        _restore(before)
        names = sorted(dict(before["environment"].items() ^ after["environment"].items()))
        pytest.fail(f"the test leaks: {', '.join(leaked)} {names or ''}")


@pytest.fixture
def make_record():
    """A function that makes a finished run of two stages: B1 (sliding window) and C (TTT)."""
    return demo
