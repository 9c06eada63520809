"""Small models of the PixelCNN family, and rows of images for them."""

import math

import torch

from lmtrain import models
from lmtrain.protocol import Cond, Spec

SMALL = {
    "pixelcnn": {"kind": "pixelcnn", "blocks": 2, "width": 12, "head_width": 8},
    "gated_pixelcnn": {"kind": "gated_pixelcnn", "layers": 3, "width": 7, "head_width": 8},
    "pixelcnn_pp": {"kind": "pixelcnn_pp", "scales": 3, "layers": 1, "width": 8, "components": 3},
}


def spec_of(grid, *, alphabet=4, labels=0):
    return Spec(alphabet=alphabet, context=math.prod(grid), bos=alphabet, grid=grid, labels=labels)


def make(kind, grid, *, alphabet=4, labels=0, seed=0, push=0.3, **keys):
    torch.manual_seed(seed)
    spec = spec_of(grid, alphabet=alphabet, labels=labels)
    model = models.build(models.parse({**SMALL[kind], **keys}), spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=push / max(1, p[0].numel()) ** 0.5)
    return model.eval()


def rows(grid, batch=3, *, alphabet=4, labels=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randint(alphabet, (batch, math.prod(grid)), generator=generator)
    label_B = torch.randint(labels, (batch,), generator=generator) if labels else None
    return x_BT, Cond(torch.full((batch,), alphabet), label_B=label_B)


def every_row(grid, *, alphabet):
    T = math.prod(grid)
    x_NT = torch.cartesian_prod(*[torch.arange(alphabet)] * T).view(-1, T)
    return x_NT, Cond(torch.full((len(x_NT),), alphabet))
