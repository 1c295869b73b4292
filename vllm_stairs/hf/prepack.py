"""Matrix weights in the layout that the CPU's kernels like, for any model.

PyTorch's float32 ``Linear`` packs its weight anew at every call with more than one row, so
that checking a staircase of few rows costs about twice one row. oneDNN's packed weights
make a few rows cost what one row costs, and one row less than before. The arithmetic is the
same up to the order of summation. Both the target alone and stairs gain; measure both with it
or both without.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A `Linear` layer over a packed float32 weight; for inference only.

    Args:
        linear: the layer whose weight is packed. Its own weight is kept (tied embeddings
            read it), so packing takes as much memory again.
        rows: the number of rows the packing is made for.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight ``[out, in]``."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[out]``, if any."""
        return self.linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` float32 ``[..., in]`` to ``[..., out]``."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._packed, self.linear.bias, "none", [], ""
        )
        return result


def can_prepack(model: nn.Module) -> bool:
    """Whether the model is on a CPU, in float32, and PyTorch has the packed kernels."""
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextmanager
def prepacked(*models: nn.Module, rows: int = 8) -> Iterator[None]:
    """Run the models with packed weights inside the ``with`` block.

    Args:
        *models: models on a CPU in float32.
        rows: the number of rows the packing is made for; others work as well.
    """
    places: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        for model in models:
            if not can_prepack(model):
                raise ValueError("prepacked weights need a float32 model on a CPU with oneDNN")
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is nn.Linear and child.weight.numel() >= 1 << 16:
                        places.append((parent, name, child))
                        setattr(parent, name, PackedLinear(child, rows))
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
