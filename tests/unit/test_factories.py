"""What makes a tensor in the source names a device, or takes that of another tensor.

A tensor that is made without one is on the CPU, and a GPU meets it in the middle of a step.
"""

import ast
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ("model", "parallel", "pretrain")
FACTORIES = set(
    "arange as_tensor asarray empty empty_permuted empty_strided eye frombuffer from_numpy full "
    "Generator linspace logspace normal ones rand randint randn randperm scalar_tensor tensor "
    "Tensor tril_indices triu_indices zeros".split()
)
"""What makes a tensor (or draws one) on the default device, the CPU, unless it is told another."""
TAKE_NO_DEVICE = {"from_numpy", "frombuffer", "Tensor"}
ALLOWED = {
    "model/attention_backends/documents.py: _on_device: from_numpy": (
        "found on the host; sent on in the same line"
    ),
    "pretrain/checkpointing/late_tensors.py: lookup_object: frombuffer": (
        "pages of the host's memory, on their way to a file"
    ),
    "pretrain/checkpointing/state_copy.py: _address: frombuffer": "only asked for its address",
    "pretrain/checkpointing/state_copy.py: _lay_out: frombuffer": (
        "the copy of the state is in the host's memory on purpose"
    ),
    "pretrain/evaluation/validation_loss.py: _keep_samples: from_numpy": (
        "the batch is on the host until its targets are taken out"
    ),
}
"""`file: function: factory` -> why it may leave the device out."""


def factories_without_a_device(root: Path, folder: str) -> list[tuple[str, int]]:
    """Find the factory calls of a folder that name no device.

    Returns:
        (`file: function: factory`, line) of each.
    """
    found = []

    def visit(node: ast.AST, file: str, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        factory = _factory(node)
        if factory and (factory in TAKE_NO_DEVICE or not _names_device(node)):
            found.append((f"{file}: {function}: {factory}", node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, file, function)

    for path in sorted((root / folder).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), file, "module")
    return found


def _factory(node: ast.AST) -> str | None:
    """The factory that is called as torch.NAME, or imported from torch, which hides its calls."""
    if isinstance(node, ast.ImportFrom) and node.module == "torch":
        return next(
            (alias.name for alias in node.names if alias.name in FACTORIES - {"Tensor"}), None
        )
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    owner = node.func.value
    is_torchs = isinstance(owner, ast.Name) and owner.id == "torch"
    return node.func.attr if is_torchs and node.func.attr in FACTORIES else None


def _names_device(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(keyword.arg == "device" for keyword in node.keywords)


@pytest.mark.parametrize("folder", CHECKED)
def test_factories_name_a_device(folder):
    found = [
        f"{place} (line {line})"
        for place, line in factories_without_a_device(ROOT, folder)
        if place not in ALLOWED
    ]
    assert not found, f"made on the CPU, whatever the layout's device: {found}. Fix: give device="


def test_every_allowed_factory_still_exists():
    places = {place for folder in CHECKED for place, _ in factories_without_a_device(ROOT, folder)}
    gone = sorted(set(ALLOWED) - places)
    assert not gone, f"no longer there: {gone}. Fix: remove them from ALLOWED"


def test_a_factory_without_a_device_is_noticed(tmp_path):
    source = """
        import torch
        from torch import zeros
        one = torch.ones(2)
        def good(x):
            a = torch.zeros_like(x) + x.new_empty(2) + torch.eye(2, device=x.device)
        def bad(x):
            return [torch.arange(3) for _ in x] + [torch.from_numpy(x)], lambda: torch.Tensor(3)
    """
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "part.py").write_text(textwrap.dedent(source))
    assert factories_without_a_device(tmp_path, "model") == [
        ("model/part.py: module: zeros", 3),
        ("model/part.py: module: ones", 4),
        ("model/part.py: bad: arange", 8),
        ("model/part.py: bad: from_numpy", 8),
        ("model/part.py: bad: Tensor", 8),
    ]
