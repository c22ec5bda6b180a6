import pytest
import torch

from llmkern import machine
from llmkern.ceilings import Ceilings
from llmkern.diagnose import Diagnosis, diagnose
from llmkern.diagnose.profile import Profile
from llmkern.models import GPT, GPTConfig

RATE, BANDWIDTH, LAUNCH = 1e11, 1e10, 1e-5


def make_profile() -> Profile:
    """A machine of round figures, so that nothing has to be measured."""
    dtypes = ("float32", "bfloat16", "float16")
    ceilings = Ceilings({dtype: {"matmul": RATE} for dtype in dtypes}, {2**19: {"copy": BANDWIDTH}})
    return Profile(machine.describe("cpu"), "cpu", ceilings, LAUNCH)


def make_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=101, block_size=32, n_layer=2, n_head=2, n_embd=32), kernels=False)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(101, (3, 32))
    return tokens, tokens


@pytest.fixture
def profile() -> Profile:
    return make_profile()


@pytest.fixture
def gpt() -> GPT:
    return make_gpt()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return make_batch()


@pytest.fixture(scope="session")
def diagnosed() -> Diagnosis:
    """The small GPT, plain and swapped; it takes seconds, and is not to be changed."""
    return diagnose(make_gpt(), make_batch(), apply=True, profile=make_profile())
