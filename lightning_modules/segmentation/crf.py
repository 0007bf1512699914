"""The dense conditional random field: Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
Edge Potentials", NIPS 2011, which DeepLab puts behind its networks.

Every pixel is joined to every other one: two that are near and of like color should have the same class. A step of
mean-field inference is then a Gaussian filter over all pixels, in place and color, which the permutohedral lattice
approximates in linear time: Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError

Normalization = Literal["after", "symmetric"]

# --- permutohedral lattice ------------------------------------------------------------------------------------------

#: Rows of a product that are made at a time on a CPU. What is new stays in the cache, and the system need not find and
#: clear pages for a whole one, which takes longer than the product itself where a lattice is large.
BLOCK = 32768


class Sparse(NamedTuple):
    """A sparse matrix (R,K), row by row.

    Attributes:
        columns: int32 (E,), of the elements, row after row.
        weights: float32 (E,), the elements.
        starts: int32 (R+1,), where in them the rows begin, and E.
    """

    columns: Tensor
    weights: Tensor
    starts: Tensor

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def __matmul__(self, values: Tensor) -> Tensor:
        """Times a dense matrix float32 (K,C): float32 (R,C)."""
        # A bag of embeddings is the same sum, in the order of the elements and without atomics; on a CPU it takes half
        # the time of torch.sparse and less than a tenth of that of index_add.
        return F.embedding_bag(
            self.columns, values, self.starts, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )

    def blocks(self) -> list[Sparse]:
        """Its rows, `BLOCK` by `BLOCK` on a CPU, else all of them."""
        size = BLOCK if self.columns.device.type == "cpu" else self.rows
        edges = [*self.starts[:-1:size].tolist(), len(self.columns)]
        blocks = []
        for i, (first, last) in enumerate(itertools.pairwise(edges)):
            starts = self.starts[i * size : (i + 1) * size + 1] - first
            blocks.append(Sparse(self.columns[first:last], self.weights[first:last], starts))
        return blocks


class Lattice(NamedTuple):
    """A Gaussian filter of N values by their features: out_i = sum_j exp(-|f_i - f_j|^2 / 2) in_j, nearly.

    The space of features is divided into simplices. Each value is laid down on the d+1 corners of its simplex, the
    corners are blurred with (1/2, 1, 1/2) along each of the lattice's d+1 directions, and each value is read off its
    corners again. Corners next to no value do not exist, and what would be blurred onto them is lost. All of it is
    linear in the values and made once for the features.

    Of images' features, the sums come out too small, by an eighth in two dimensions and by about a half in five. With
    rows that sum to 1, the matrix differs from the exact one by a tenth of its norm, or a fifth where few colors are
    alike.

    Attributes:
        splat: (M,N), for M corners.
        blurs: d+1 of (M,M), in the order in which they are applied.
        read: (N,M), the paper's slicing.
    """

    splat: Sparse
    blurs: tuple[Sparse, ...]
    read: Sparse

    @classmethod
    def of(cls, features: Tensor) -> Lattice:
        """The filter for features float32 (d,N), each over the standard deviation that it is to be filtered with.

        Raises:
            ValueError: the features span more corners than an int64 can number.
        """
        d, n = features.shape
        base, rank, weights = simplices(features)
        # A corner's coordinates x are equal modulo d+1 and add up to 0, so that the whole numbers (x_i - x_0) / (d+1),
        # i = 1..d, say all. They become the digits of one number, to which a step on the lattice adds a constant.
        digits = base[1:] - base[:1]
        low = digits.amin(1)
        # A corner's digits are at most 1 from its base's, and a step goes 1 further.
        spans = [span + 5 for span in (digits.amax(1) - low).tolist()]
        if math.prod(spans) >= 2**62:
            raise UserError(
                f"dense CRF: expected features that span fewer than 2^62 corners, found {math.prod(spans):.1e}: take "
                "larger standard deviations"
            )
        # The first digit goes with the first feature alone and the second one with the first two. Where these are x and
        # y, sorting by the second, then the first keeps together in memory what is together in the image.
        factors, factor = [0] * d, 1
        for i in reversed([*range(d)[1::-1], *range(2, d)]):
            factors[i] = factor
            factor *= spans[i]
        keys = features.new_empty((n, d + 1), dtype=torch.int64)
        keys[:, 0] = sum((digits[i] - low[i] + 2) * factors[i] for i in range(d))
        # From corner r-1 to r, the coordinate with rank d+1-r loses d, the others gain 1.
        steps = digits.new_tensor([sum(factors), *(-f for f in factors)])
        by_rank = torch.empty_like(rank).scatter_(0, rank, steps[:, None].expand(-1, n))
        for r in range(1, d + 1):
            keys[:, r] = keys[:, r - 1] + by_rank[d + 1 - r]
        keys, order = keys.flatten().sort(stable=True)
        keys, number, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
        corners = torch.empty_like(number).scatter_(0, order, number)
        weights = weights.T.flatten()
        splat = Sparse((order // (d + 1)).int(), weights[order], F.pad(counts.cumsum(0), (1, 0)).int())
        every = torch.arange(0, n * (d + 1) + 1, d + 1, dtype=torch.int32, device=keys.device)
        # The paper leaves a constant factor open; this one is that of Krähenbühl's code.
        read = Sparse(corners.int(), weights / (1 + 2.0**-d), every)
        # A step along direction j adds d to x_j and -1 to the others.
        return cls(splat, tuple(_blur(keys, step) for step in (-sum(factors), *factors)), read)

    def __call__(self, values: Tensor) -> Tensor:
        """Values float32 (N,C), filtered: float32 (N,C)."""
        for matrix in (self.splat, *self.blurs, self.read):
            values = matrix @ values
        return values

    def normalized(self, normalization: Normalization, weight: float = 1.0) -> Lattice:
        """This filter K, normalized by its row sums D = diag(K 1) and times a weight; it takes no longer than K.

        Args:
            normalization: ``after`` is D^-1 K, whose rows sum to 1; ``symmetric`` is D^-1/2 K D^-1/2.
            weight: of the whole.
        """
        n = self.read.rows
        norm = self(self.read.weights.new_ones(n, 1))[:, 0]
        splat, scale = self.splat, norm.reciprocal()
        if normalization == "symmetric":
            scale = norm.rsqrt()
            splat = splat._replace(weights=splat.weights * scale[splat.columns])
        read = (self.read.weights.view(n, -1) * (weight * scale)[:, None]).flatten()
        return Lattice(splat, self.blurs, self.read._replace(weights=read))


def _blur(keys: Tensor, step: int) -> Sparse:
    """(1/2, 1, 1/2) over every corner and its two neighbors along one direction, where they exist: (M,M).

    Args:
        keys: int64 (M,), of the corners, ascending.
        step: what a step along the direction adds to a key.
    """
    m = len(keys)
    wanted = keys + step
    found = torch.searchsorted(keys, wanted).clamp_max(m - 1)
    here = torch.arange(m, device=keys.device)
    after = torch.where(keys[found] == wanted, found, m)
    # Who has a corner after it is the one before that corner. Those without one all write to a place that is cut off.
    before = after.new_full((m + 1,), m).scatter_(0, after, here)[:m]
    columns = torch.stack([here, after, before], 1)
    exists = columns < m
    weights = torch.tensor([1.0, 0.5, 0.5], device=keys.device).expand(m, 3)
    return Sparse(columns[exists].int(), weights[exists], F.pad(exists.sum(1).cumsum(0), (1, 0)).int())


def simplices(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex that each feature lies in (Adams et al. 2010, section 3; the lattice is their A*_d).

    The features' space is laid upon the hyperplane of d+1 coordinates x with sum 0, scaled so that the blur of the
    lattice has a standard deviation of 1. The lattice's points have whole coordinates that are equal modulo d+1.

    Args:
        features: float32 (d,N).

    Returns:
        - base int64 (d+1,N): the corner whose coordinates are multiples of d+1, divided by that.
        - rank int64 (d+1,N): of the coordinates by how far they lie above the base's, 0 for the farthest.
        - weights float32 (d+1,N): barycentric coordinates of the feature, by corner. Corner r is r more than the base,
          but r-d-1 more in the coordinates with the r last ranks.
    """
    d, n = features.shape
    # Rounded to float32 where Krähenbühl's code does it: near a border, the last bit decides which corners exist.
    deviation = features.new_tensor(math.sqrt(2 / 3) * (d + 1)).item()
    scaled = features * features.new_tensor([deviation / math.sqrt(i * (i + 1)) for i in range(1, d + 1)])[:, None]
    elevated = features.new_zeros(d + 1, n)
    for i in range(d, 0, -1):
        elevated[i] = elevated[0] - i * scaled[i - 1]
        elevated[0] += scaled[i - 1]
    base = (elevated * (1 / (d + 1))).round()
    rest = elevated - base * (d + 1)
    # The nearest multiples need not have the sum 0. By their sum the ranks are off, and who leaves 0..d moves the base.
    rank = base.sum(0).long().repeat(d + 1, 1)
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            less = rest[i] < rest[j]
            rank[i] += less
            rank[j] += ~less
    wrap = (rank < 0).long() - (rank > d).long()
    rank += wrap * (d + 1)
    base += wrap
    ascending = torch.empty_like(rest).scatter_(0, d - rank, (elevated - base * (d + 1)) * (1 / (d + 1)))
    weights = torch.cat([ascending[:1] + (1 - ascending[-1:]), ascending[1:] - ascending[:-1]])
    return base.long(), rank, weights


# --- mean field -----------------------------------------------------------------------------------------------------


def mean_field(unary: Tensor, kernels: Sequence[Lattice], iterations: int) -> Tensor:
    """Algorithm 1 with Potts' compatibility: Q <- softmax(-unary + sum_m K_m Q), from Q = softmax(-unary).

    A class costs a pixel what the others say of all other classes. As the softmax takes no notice of a constant, that
    is to gain what they say of the same class.

    Args:
        unary: float32 (N,C), minus the logarithm of the network's probabilities.
        kernels: normalized and weighted, of N values each.
        iterations: of the mean field.

    Returns:
        Q, float32 (N,C).
    """
    n, classes = unary.shape
    sizes = [kernel.splat.rows for kernel in kernels]
    # The kernels' corners and -unary below each other, so that one product reads and adds them all.
    table = torch.cat([unary.new_zeros(sum(sizes), classes), -unary])
    *corners, q = table.split([*sizes, n])
    every = torch.arange(sum(sizes), len(table), dtype=torch.int32, device=unary.device)[:, None]
    above = [sum(sizes[:m]) for m in range(len(sizes))]
    columns = torch.cat([*(k.read.columns.view(n, -1) + a for k, a in zip(kernels, above, strict=True)), every], 1)
    weights = torch.cat([*(k.read.weights.view(n, -1) for k in kernels), unary.new_ones(n, 1)], 1)
    starts = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32, device=unary.device)
    read = Sparse(columns.flatten(), weights.flatten(), starts).blocks()
    spread = [[matrix.blocks() for matrix in (kernel.splat, *kernel.blurs)] for kernel in kernels]
    spare = unary.new_empty(max(sizes, default=0), classes)
    q = q.softmax(1)
    for _ in range(iterations):
        for matrices, last in zip(spread, corners, strict=True):
            values = q
            for i, matrix in enumerate(matrices, start=1):
                # To and fro, so that the last product ends in the table.
                out = spare[: len(last)] if (len(matrices) - i) % 2 else last
                for block, rows in zip(matrix, out.split(matrix[0].rows), strict=True):
                    rows.copy_(block @ values)
                values = out
        for block, rows in zip(read, q.split(read[0].rows), strict=True):
            torch.softmax(block @ table, 1, out=rows)
    return q


@dataclass(frozen=True)
class DenseCRF:
    """Refines a network's class probabilities by place and color of the image's pixels (equation 3).

    The pixels i and j with places p in pixels and colors I in 0..255 are joined by

    - bilateral: exp(-|p_i - p_j|^2 / (2 theta_alpha^2) - |I_i - I_j|^2 / (2 theta_beta^2)),
    - gaussian: exp(-|p_i - p_j|^2 / (2 theta_gamma^2)),

    each normalized and times its weight. The defaults are `DEEPLAB`'s for ResNet-101. Nothing is drawn at random, and
    no gradient is kept.

    Args:
        bilateral_weight: of the bilateral kernel; 0 leaves it out.
        theta_alpha: its standard deviation in place, pixels.
        theta_beta: its standard deviation in color, units of 0..255.
        gaussian_weight: of the kernel of place alone; 0 leaves it out.
        theta_gamma: its standard deviation, pixels.
        iterations: of the mean field.
        normalization: of the kernels, see `Lattice.normalized`; ``after`` is DeepLab's, ``symmetric`` is the default of
            pydensecrf.

    Raises:
        ValueError: a standard deviation is not above 0, a weight or the iterations are below, or the normalization is
            neither.
    """

    bilateral_weight: float = 4.0
    theta_alpha: float = 67.0
    theta_beta: float = 3.0
    gaussian_weight: float = 3.0
    theta_gamma: float = 1.0
    iterations: int = 10
    normalization: Normalization = "after"

    def __post_init__(self) -> None:
        if not all(theta > 0 for theta in (self.theta_alpha, self.theta_beta, self.theta_gamma)):
            raise UserError(f"dense CRF: expected standard deviations above 0, found {self}")
        if min(self.bilateral_weight, self.gaussian_weight, self.iterations) < 0:
            raise UserError(f"dense CRF: expected weights and iterations of 0 or more, found {self}")
        if self.normalization not in ("after", "symmetric"):
            raise UserError(f"dense CRF: expected the normalization after or symmetric, found {self.normalization}")

    def __call__(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Refined probabilities.

        Args:
            probabilities: float (C,H,W) in 0..1 at the image's own size, or (B,C,H,W). None counts as below 1e-5.
            image: uint8 (3,H,W), the image itself, or (B,3,H,W).

        Returns:
            float32 of the probabilities' shape; they add up to 1 over the classes.

        Raises:
            ValueError: the two differ in height or width, or are not of these shapes and types.
        """
        if probabilities.ndim == image.ndim == 4 and len(probabilities) == len(image):
            return torch.stack([self(p, i) for p, i in zip(probabilities, image, strict=True)])
        return self.infer(-probabilities.float().clamp_min(1e-5).log(), image)

    @torch.no_grad()
    def infer(self, unary: Tensor, image: Tensor) -> Tensor:
        """As a call for one image, but from energies float (C,H,W): softmax(-unary) are the probabilities."""
        if unary.ndim != 3 or image.ndim != 3 or unary.shape[1:] != image.shape[1:]:
            raise UserError(
                f"dense CRF: expected classes (C,H,W) and an image (3,H,W) of one size, found {tuple(unary.shape)} "
                f"and {tuple(image.shape)}: resize the classes to the image"
            )
        if len(image) != 3 or image.dtype != torch.uint8:
            raise UserError(f"dense CRF: expected an image uint8 (3,H,W), found {image.dtype} {tuple(image.shape)}")
        energies = unary.float().flatten(1).T.contiguous()
        return mean_field(energies, self.kernels(image), self.iterations).T.reshape(unary.shape)

    def kernels(self, image: Tensor) -> list[Lattice]:
        """The kernels of an image uint8 (3,H,W), normalized and weighted."""
        y, x = torch.meshgrid(*(torch.arange(s, device=image.device) for s in image.shape[1:]), indexing="ij")
        place, color = torch.stack([x, y]).flatten(1).float(), image.flatten(1).float()
        kernels = []
        if self.gaussian_weight:
            near = Lattice.of(place / self.theta_gamma)
            kernels.append(near.normalized(self.normalization, self.gaussian_weight))
        if self.bilateral_weight:
            alike = Lattice.of(torch.cat([place / self.theta_alpha, color / self.theta_beta]))
            kernels.append(alike.normalized(self.normalization, self.bilateral_weight))
        return kernels


#: What DeepLab's authors found on VOC for their networks: v1 LargeFOV, v2 on VGG16 and v2 on ResNet-101.
DEEPLAB = {
    "largefov": DenseCRF(4.0, 121.0, 5.0, 3.0, 3.0),
    "vgg16": DenseCRF(4.0, 65.0, 3.0, 2.0, 2.0),
    "resnet101": DenseCRF(4.0, 67.0, 3.0, 3.0, 1.0),
}
