"""The dense conditional random field: Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
Edge Potentials", NIPS 2011, which DeepLab puts behind its networks.

Every pixel pulls at every other one, the more the nearer and the more alike in colour they are. One step of mean-field
inference is then a blur in five dimensions, of place and colour; the permutohedral lattice (Adams, Baek and Davis,
"Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010) makes it cheap.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Normalisation = Literal["after", "symmetric"]

# --- lattice --------------------------------------------------------------------------------------------------------


class Bags(NamedTuple):
    """A sparse matrix, row by row.

    Attributes:
        columns: int32 (K,), of the elements.
        weights: float32 (K,), the elements.
        starts: int32 (rows,), where in them each row begins.
    """

    columns: Tensor
    weights: Tensor
    starts: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """float32 (columns,C) to float32 (rows,C)."""
        # What is called embedding here is by far the fastest product of this kind, on CPUs and GPUs.
        return F.embedding_bag(self.columns, values, self.starts, mode="sum", per_sample_weights=self.weights)

    @classmethod
    def regular(cls, columns: Tensor, weights: Tensor) -> Bags:
        """Rows of equal length: columns and weights (rows,k)."""
        starts = torch.arange(0, columns.numel(), columns.shape[1], device=columns.device, dtype=torch.int32)
        return cls(columns.flatten().int(), weights.flatten(), starts)


class Lattice:
    """A Gaussian filter of N values by their features: sum over j of exp(-1/2 |f_i - f_j|^2) v_j, approximately.

    Each value is spread over the d+1 corners of the simplex that its features lie in; what comes to lie on the lattice
    is blurred along its d+1 directions with weights 1/2, 1, 1/2; and each value is read again from its corners. What
    depends on the features alone is done once.

    Args:
        features: float32 (N,d), each divided by the standard deviation of the filter along it.

    Raises:
        ValueError: they span more cells than can be numbered.
    """

    def __init__(self, features: Tensor) -> None:
        d = features.shape[1]
        keys, weights = corners(features)
        halves = weights.new_tensor([1.0, 0.5, 0.5])
        # A key's coordinates become the digits of one number, with room for the neighbours of the outermost.
        low = keys.amin((0, 1)) - (d + 1)
        extent = keys.amax((0, 1)) + (d + 1) - low + 1
        if extent.double().log2().sum() > 62:
            raise ValueError(f"dense CRF: expected larger deviations, found a lattice of {extent.tolist()} cells")
        radix = torch.cat([extent.new_ones(1), extent.cumprod(0)[:-1]])
        packed, order = ((keys - low) * radix).sum(2).flatten().sort(stable=True)
        packed, number, counts = packed.unique_consecutive(return_inverse=True, return_counts=True)
        corner = torch.empty_like(number).scatter_(0, order, number)
        self.slice = Bags.regular(corner.view_as(weights), weights / (1 + 2.0**-d))
        self.splat = Bags((order // (d + 1)).int(), weights.flatten()[order], (counts.cumsum(0) - counts).int())
        self.blurs = []
        here = torch.arange(len(packed), device=packed.device)
        for j in range(d + 1):
            # One step along the j-th direction: d there, -1 in all others, of which the last is not stored.
            wanted = packed + ((d + 1) * radix[j] - radix.sum() if j < d else -radix.sum())
            place = torch.searchsorted(packed, wanted).clamp_max(len(packed) - 1)
            there = packed[place] == wanted
            # Who has a neighbour is that one's neighbour the other way; those without one come to lie behind the last.
            back = here.new_full((len(packed) + 1,), -1).scatter_(0, torch.where(there, place, len(packed)), here)[:-1]
            columns = torch.stack([here, place, back.clamp_min(0)], 1)
            self.blurs.append(Bags.regular(columns, torch.stack([there | True, there, back >= 0], 1) * halves))

    def __call__(self, values: Tensor) -> Tensor:
        """Values float32 (N,C), filtered."""
        values = self.splat(values)
        for blur in self.blurs:
            values = blur(values)
        return self.slice(values)


def corners(features: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of the simplices that features lie in: keys int64 (N,d+1,d) and their weights float32 (N,d+1).

    The lattice is that of the points of a hyperplane in d+1 dimensions whose coordinates are whole, equal modulo d+1,
    and add up to 0, so that the last need not be stored (Adams et al., section 3).

    Args:
        features: float32 (N,d).
    """
    d = features.shape[1]
    number = torch.arange(d + 1, device=features.device)
    # Onto the hyperplane, and so large that the blur has a variance of 1.
    deviation = torch.tensor(math.sqrt(2 / 3) * (d + 1)).item()
    scale = [deviation / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    scaled = features * features.new_tensor(scale)
    elevated = F.pad(scaled.flip(1).cumsum(1).flip(1), (0, 1))
    elevated[:, 1:] -= scaled * number[1:]
    # The nearest point with coordinates that are multiples of d+1, which may not add up to 0: then some move.
    nearest = (elevated * (1 / (d + 1))).round()
    excess = nearest.sum(1, keepdim=True).long()
    nearest *= d + 1
    rest = (elevated - nearest)[:, None]
    # How many are greater, or as great and earlier: much faster than sorting rows of six.
    earlier = number[:, None] > number
    rank = ((rest > rest.mT) | ((rest == rest.mT) & earlier)).sum(2) + excess
    wrap = (rank < 0).long() - (rank > d).long()
    rank, nearest = rank + (d + 1) * wrap, nearest + (d + 1) * wrap
    # Barycentric coordinates are the differences of what is left, in order.
    ordered = torch.empty_like(elevated).scatter_(1, rank, (elevated - nearest) / (d + 1))
    weights = ordered.flip(1) - torch.cat([ordered[:, :1] - 1, ordered[:, 1:].flip(1)], 1)
    canonical = torch.where(number[:, None] + number <= d, number[:, None], number[:, None] - (d + 1))
    return nearest[:, None, :d].long() + canonical[:, rank[:, :d]].permute(1, 0, 2), weights


# --- mean field -----------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """One of the Gaussians that pixels pull at each other with.

    Attributes:
        weight: w.
        xy: standard deviation of the place, in pixels.
        rgb: of the colour, on a scale of 0..255; None for a kernel of the place alone.
    """

    weight: float
    xy: float
    rgb: float | None = None


#: What DeepLab's authors found for their networks: the bilateral kernel and the one of the place alone.
DEEPLAB = {
    "largefov": (Kernel(4, 121, 5), Kernel(3, 3)),
    "vgg16": (Kernel(4, 65, 3), Kernel(2, 2)),
    "resnet101": (Kernel(4, 67, 3), Kernel(3, 1)),
}


def features_of(image: Tensor, kernel: Kernel) -> Tensor:
    """Place, and colour where the kernel has it, over the deviations: float32 (H*W,2 or 5) of uint8 (3,H,W)."""
    height, width = image.shape[-2:]
    y, x = (torch.arange(n, device=image.device, dtype=torch.float32) for n in (height, width))
    features = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1) / kernel.xy
    if kernel.rgb is None:
        return features
    return torch.cat([features, image.flatten(1).T.float() / kernel.rgb], 1)


def normalised(lattice: Lattice, weight: float, normalisation: Normalisation) -> tuple[Bags, list[Bags], Bags]:
    """The filter's three steps with norm and weight within: splat, blurs, slice."""
    splat, blurs, read = lattice.splat, lattice.blurs, lattice.slice
    count = len(read.starts)
    norm = lattice(splat.weights.new_ones(count, 1))[:, 0] + 1e-20
    each = read.weights.view(count, -1)
    if normalisation == "after":
        return splat, blurs, read._replace(weights=(each * (weight / norm)[:, None]).flatten())
    root = norm.rsqrt()
    splat = splat._replace(weights=splat.weights * root[splat.columns])
    return splat, blurs, read._replace(weights=(each * (weight * root)[:, None]).flatten())


class DenseCRF:
    """Mean-field inference (algorithm 1) with Potts' compatibility: what differs costs the same whatever it is.

    Each step: what the others say, filtered by every kernel, is added to the logarithm of the network's probabilities,
    and a softmax follows.

    Args:
        kernels: see `Kernel`; or a name of `DEEPLAB`.
        iterations: 10 in DeepLab.
        normalisation: of the filters: ``after`` divides what comes out of one by what comes out of ones, as DeepLab's
            code; ``symmetric`` divides by the root of it before and after, as the authors' of the CRF by default.
    """

    def __init__(
        self,
        kernels: tuple[Kernel, ...] | str = "resnet101",
        iterations: int = 10,
        normalisation: Normalisation = "after",
    ) -> None:
        if isinstance(kernels, str):
            if kernels not in DEEPLAB:
                raise ValueError(f"crf: expected one of {', '.join(DEEPLAB)}, found {kernels}")
            kernels = DEEPLAB[kernels]
        deviations = [value for k in kernels for value in (k.xy, k.rgb) if value is not None]
        if min(deviations) <= 0 or iterations < 0:
            raise ValueError(f"crf: expected deviations above 0 and iterations, found {kernels} and {iterations}")
        if normalisation not in ("after", "symmetric"):
            raise ValueError(f"crf: normalisation: expected after or symmetric, found {normalisation}")
        self.kernels, self.iterations = kernels, iterations
        self.normalisation: Normalisation = normalisation

    @torch.no_grad()
    def __call__(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Probabilities float (C,H,W) of the classes of an image uint8 (3,H,W), refined: float32 (C,H,W).

        Raises:
            ValueError: they differ in size.
        """
        if probabilities.shape[1:] != image.shape[1:]:
            sizes = f"{tuple(probabilities.shape[1:])} and {tuple(image.shape[1:])}"
            raise ValueError(f"crf: expected probabilities and image of one size, found {sizes}: resize the former")
        unary = probabilities.float().flatten(1).T.contiguous().clamp_min(1e-5).log()
        filters = [normalised(Lattice(features_of(image, k)), k.weight, self.normalisation) for k in self.kernels]
        q = unary.softmax(1)
        for _ in range(self.iterations):
            logits = unary
            for splat, blurs, read in filters:
                values = splat(q)
                for blur in blurs:
                    values = blur(values)
                logits = logits + read(values)
            q = logits.softmax(1)
        return q.T.reshape(probabilities.shape)
