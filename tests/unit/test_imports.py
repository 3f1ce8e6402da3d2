"""What a process of a run imports before it can train: each second counts in every process."""

import subprocess
import sys

SCRIPT = """
import sys
import pretrain.train
from parallel.layout import import_parallel_state
groups = import_parallel_state()
slow = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx", "wandb", "megatron.core")
print(*[name for name in slow if name in sys.modules])
# Whoever wants the whole package gets it, with the same groups in it.
import megatron.core
print(megatron.core.parallel_state is groups, hasattr(megatron.core, "ModelParallelConfig"))
"""


def test_a_trainer_imports_neither_a_compiler_nor_all_of_megatron():
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    slow, package = found.stdout.splitlines()
    assert slow == ""
    assert package == "True True"
