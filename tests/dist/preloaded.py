"""What every worker of the pool needs: imported once, by the process that the workers are forks
of."""

import torch.distributed.checkpoint  # noqa: F401
import torch.distributed.pipelining  # noqa: F401
import torch.distributed.tensor  # noqa: F401

import pretrain.train  # noqa: F401
from parallel.layout import import_parallel_state

import_parallel_state()
