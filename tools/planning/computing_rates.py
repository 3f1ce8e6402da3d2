"""Measures what a process computes and copies, at the shapes of one rank."""

import torch

from model.activation_memory.settings import MemorySettings
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import PackedDocuments, pack_documents
from model.gpt import GPTStage
from model.loss import LossSettings, fused_loss
from parallel.layout import single_process_layout
from tools.planning.clock import Clock
from tools.planning.rank_work import LAYERS

PLAIN_SIZE = 1024
"""Rows, columns and depth of a plain product."""


class Computing(Clock):
    """Measures products, attention, layers, the loss, copies and the update."""

    def plain_flops(self) -> float:
        """Measure a square product."""
        left = self.random(PLAIN_SIZE, PLAIN_SIZE)
        right = self.random(PLAIN_SIZE, PLAIN_SIZE)
        return 2 * PLAIN_SIZE**3 / self.seconds_of(lambda: torch.mm(left, right))

    def product_seconds(self, tokens: int) -> float:
        """Measure the products of a layer, each alone: output, and both gradients."""
        total = 0.0
        for rows, columns in self.work.layer_shapes:
            weight = self.random(rows, columns)
            given = self.random(tokens, columns)
            gradient = self.random(tokens, rows)
            total += self.seconds_of(
                lambda x=given, w=weight, g=gradient: (x @ w.T, g @ w, g.T @ x)
            )
        return total

    def attention(self, tokens: int) -> tuple[float, str]:
        """Measure the attention's forward and backward -> seconds, and the backend."""
        config = self.work.config
        attend, chosen = choose_attention(self.work.attention_backend, self.device, self.dtype)
        q = self.random(tokens, config.num_attention_heads, config.head_size).requires_grad_()
        k = self.random(tokens, config.num_kv_heads, config.head_size).requires_grad_()
        v = self.random(tokens, config.num_kv_heads, config.head_size).requires_grad_()
        (documents,) = self._documents(tokens)
        gradient = self.random(tokens, config.num_attention_heads, config.head_size)

        def step() -> None:
            out = attend(q, k, v, documents)
            torch.autograd.grad(out, (q, k, v), gradient)

        return self.seconds_of(step), chosen

    def _documents(self, tokens: int) -> list[PackedDocuments]:
        """Describe the documents, in one attention call."""
        bounds = torch.from_numpy(self.work.bounds(tokens))
        return pack_documents(bounds, [(0, tokens)], self.device)

    def make_stage(self) -> GPTStage:
        """Make some layers with small random weights."""
        attend, _ = choose_attention(self.work.attention_backend, self.device, self.dtype)
        layout = single_process_layout(self.device)
        stage = GPTStage(self.work.config, self.work.vocabulary_rows, layout, attend)
        stage = stage.to_empty(device=self.device).to(self.dtype)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.normal_(0.0, 0.02)
        return stage

    def layer_seconds(self, stage: GPTStage, tokens: int) -> float:
        """Measure a layer's forward and backward."""
        config = self.work.config
        numbers = torch.arange(tokens, device=self.device)
        positions = stage.make_positions(numbers, self._documents(tokens), self.dtype)
        given = self.random(tokens, config.hidden_size)
        gradient = self.random(tokens, config.hidden_size)

        def step() -> None:
            stage.zero_grad(set_to_none=True)
            x = given.clone().requires_grad_()
            for layer in stage.layers.values():
                x = layer(x, positions, MemorySettings(), None)
            x.backward(gradient)

        return self.seconds_of(step) / LAYERS

    def loss_flops(self) -> float:
        """Measure the loss of a sample, forward and backward."""
        work = self.work
        rows = work.vocabulary_rows
        x = self.random(work.tokens, work.hidden_size).requires_grad_()
        weight = self.random(rows, work.hidden_size).requires_grad_()
        labels = torch.arange(work.tokens, device=self.device) % rows
        tp = single_process_layout(self.device).tp
        settings = LossSettings(tp, rows, work.loss_tokens)

        def step() -> None:
            torch.autograd.grad(fused_loss(x, weight, labels, 1.0, settings), (x, weight))

        return 6 * work.tokens * rows * work.hidden_size / self.seconds_of(step)

    def copy_rate(self) -> float:
        """Measure what a copy reads and writes in a second."""
        source = torch.ones(self.work.buffer_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds_of(lambda: target.copy_(source))

    def weights_rate(self) -> float:
        """Measure what copies of weights into new memory read and write in a second.

        On a CPU a large tensor's pages are made when they are first written.
        """
        work = self.work
        seconds = 0.0
        moved = 0
        for elements, times in work.units:
            source = torch.ones(elements, device=self.device)
            seconds += times * self.seconds_of(source.clone)
            moved += times * 2 * source.nbytes
        return moved / seconds

    def update_rate(self) -> float:
        """Measure how many parameters are clipped and updated in a second."""
        stage = self.make_stage().float()
        parameters = list(stage.parameters())
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-4)
        # As pretrain/optimizer.py, whose parameters are shards.
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return sum(parameter.numel() for parameter in parameters) / self.seconds_of(update)
