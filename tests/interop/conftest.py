"""Everything here runs on the CPU, without a network, and leaves nothing behind."""

import atexit
import os
import shutil
import sys
import tempfile

# Set before torch and transformers are imported. The environment's torch has no working GPU libraries (see venv.sh), and
# transformers copies the Python files of a model folder under HF_HOME.
_home = tempfile.mkdtemp(prefix="deltapipe-interop-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(
    CUDA_VISIBLE_DEVICES="", HF_HOME=_home, HF_MODULES_CACHE=f"{_home}/modules", HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error",
)  # fmt: skip
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(__file__))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings, most of all on a busy machine


@pytest.fixture(scope="session")
def deltapipe():
    """Runs the trainer binary: deltapipe("logits", folder, ...) -> its stdout."""
    import support

    if "DELTAPIPE_BIN" not in os.environ:
        pytest.skip("DELTAPIPE_BIN is not set")
    return support.run_deltapipe
