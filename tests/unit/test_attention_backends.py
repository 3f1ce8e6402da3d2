"""Attention backends of a GPU, on a CPU."""

import sys

import pytest
import torch

from model import kernels
from model.kernels import BACKENDS

GPU = torch.device("cuda")


@pytest.mark.parametrize("capability, expected", [((8, 0), None), ((9, 0), 4), ((10, 0), 4)])
def test_flash_attention_4_alone_is_not_taken_for_2(tmp_path, monkeypatch, capability, expected):
    """Its package is a folder in a folder without code, which `import flash_attn` takes for a package."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    try:
        assert kernels.installed_flash_version(GPU) == expected
        reason = BACKENDS["flash"].missing(GPU, torch.bfloat16)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]
    assert reason == (None if expected else "the release of flash-attn that is installed is not for this GPU")
