"""What texts leave at the input of a linear module: sums over tokens, which add up and merge.

x [tokens, in_features] are the activations. `Moments` has sum x_j^2, sum |x_j| and max |x_j| of each channel. `Hessian` has
sum x x^T besides, whose half the squared error of the outputs is measured by: for an error E of the weight, [out_features,
in_features], the outputs are off by ||E x||^2, which sums up to tr(E H E^T). `Sample` keeps the magnitudes of some tokens.

Threads bring the tokens of batches. A sum is added to in the order of the batches, panel after panel, so that the same bits come
out for any number of threads. The batches of a text are divided into SEGMENTS of neighbours. Each is summed by itself, with a
Hessian of its own, and the sums are added in their order. So machines that take a segment each give the same bits, too.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from qcli.calibration.outlier_columns import choose
from qcli.calibration.settings import SEGMENTS
from qcli.methods._factors import Inputs
from qcli.methods._gptq import Factor, factorized

_GOLDEN = 0.6180339887498949
PANEL = 256  # rows of a Hessian that are added at a time
SAMPLE = 2048  # tokens that a sample has at most


def segment_of(batch: int, batches: int) -> int:
    """The segment of a batch, of so many in all."""
    return batch * min(SEGMENTS, batches) // batches


class Statistics:
    """Sums over the tokens that a linear module has seen. `tokens` counts them.

    square, magnitude float64 [in_features], absmax float32 [in_features]; hessian float32 [in_features, in_features], of which only
    the blocks on and above the diagonal are summed until `symmetric` fills the rest; None without `with_hessian`. Of each batch
    `kept_tokens` are kept as they are, evenly spaced, each batch with other distances from its start. magnitudes: see Sample; None
    without `with_sample`.
    """

    def __init__(
        self,
        in_features: int,
        with_hessian: bool,
        device: torch.device,
        kept_tokens: int = 0,
        with_sample: bool = False,
        segments: int = 1,
    ):
        self.tokens = 0
        self._kept_tokens, self._kept = kept_tokens, [torch.empty(0, in_features, device=device)]
        self.square = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.magnitude = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.absmax = torch.zeros(in_features, device=device)
        self.hessian = torch.zeros(in_features, in_features, device=device) if with_hessian else None
        self.magnitudes = Sample(in_features, device, SAMPLE // segments) if with_sample else None
        self._at: dict[int, int] = {}  # the segment that is summed, by panel
        self._part: Statistics | None = None  # the sums of that segment, but for the first, which are the whole
        self._chosen: dict[int, torch.Tensor] = {}
        self._factors: dict[float, Factor] = {}
        self._expected: Counter[float] = Counter()
        self._choosing = threading.Lock()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, by name. The Hessian must be symmetric already."""
        found = {"tokens": torch.tensor(self.tokens), "square": self.square, "magnitude": self.magnitude, "absmax": self.absmax}
        found["sample"] = self.sample
        if self.hessian is not None:
            found["hessian"] = self.hessian
        if self.magnitudes is not None:
            found["magnitudes"] = self.magnitudes.magnitude
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Statistics":
        """What `tensors` gave, on their device."""
        square, magnitudes = tensors["square"], tensors.get("magnitudes")
        made = cls(len(square), False, square.device)
        made.tokens, made.square, made.magnitude, made.absmax = (
            int(tensors["tokens"]),
            square,
            tensors["magnitude"],
            tensors["absmax"],
        )
        made._kept, made.hessian = [tensors["sample"]], tensors.get("hessian")
        if magnitudes is not None:
            made.magnitudes = Sample(len(square), square.device)
            made.magnitudes.take(magnitudes)
        return made

    def merge(self, other: "Statistics") -> None:
        """Adds the sums of a later segment. The Hessians of both must be symmetric already."""
        self.tokens += other.tokens
        self.square, self.magnitude = self.square + other.square, self.magnitude + other.magnitude
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self._kept.append(other.sample)
        if self.hessian is not None and other.hessian is not None:
            self.hessian += other.hessian
        if self.magnitudes is not None and other.magnitudes is not None:
            self.magnitudes.take(other.magnitudes.magnitude)

    @property
    def panels(self) -> int:
        """Into how many parts `add` is divided."""
        return -(-len(self.hessian) // PANEL) if self.hessian is not None else 1

    def add(self, x: torch.Tensor, panel: int, weighted: torch.Tensor | None = None, batch: int = 0, segment: int = 0) -> None:
        """Counts activations x float32 [tokens, in_features] of a batch in: the rows of one panel of the Hessian, and with the
        first panel all the rest. `weighted` is x times the square root of what each token counts in sums of squares; None is x.
        Segments come in their order."""
        weighted = x if weighted is None else weighted
        sums = self._sums(panel, segment)
        if panel == 0:
            self.tokens += len(x)
            sums.square += weighted.square().sum(0)
            magnitude = x.abs()
            sums.magnitude += magnitude.sum(0)
            if len(x):
                self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
            if count := min(self._kept_tokens, len(x)):
                start = (batch + 1) * _GOLDEN % 1
                self._kept.append(x[[int((place + start) * len(x) / count) for place in range(count)]])
            if self.magnitudes is not None:
                self.magnitudes.add(magnitude)
        if sums.hessian is not None:
            first, last = panel * PANEL, (panel + 1) * PANEL
            sums.hessian[first:last, first:].addmm_(weighted[:, first:last].t(), weighted[:, first:])

    def _sums(self, panel: int, segment: int) -> "Statistics":
        """Where a panel of a segment is added to. What was there of the segment before is added to the whole."""
        before = self._at.setdefault(panel, segment)
        if before != segment:
            self._at[panel] = segment
            self._add_part(panel)
            if panel == 0 and self.magnitudes is not None:
                self.magnitudes.begin_segment()
            with self._choosing:
                if self._part is None:
                    self._part = Statistics(len(self.square), self.hessian is not None, self.square.device)
                self._part._at[panel] = segment
        part = self._part
        return part if part is not None and panel in part._at else self

    def _add_part(self, panel: int) -> None:
        """Adds a panel of the segment that was summed to the whole."""
        part = self._part
        if part is None or panel not in part._at:
            return
        if panel == 0:
            self.square += part.square
            self.magnitude += part.magnitude
            part.square.zero_()
            part.magnitude.zero_()
        if self.hessian is not None and part.hessian is not None:
            first, last = panel * PANEL, (panel + 1) * PANEL
            self.hessian[first:last, first:] += part.hessian[first:last, first:]
            part.hessian[first:last, first:] = 0

    def end(self) -> None:
        """Adds the last segment to the whole: nothing is added after it."""
        for panel in range(self.panels):
            self._add_part(panel)
        self._part = None

    def symmetric(self) -> torch.Tensor:
        """The whole Hessian float32 [in_features, in_features]."""
        assert self.hessian is not None
        for panel in range(1, self.panels):
            first, last = panel * PANEL, (panel + 1) * PANEL
            self.hessian[first:last, :first] = self.hessian[:first, first:last].t()
        return self.hessian

    def chosen(self, count: int) -> torch.Tensor:
        """The columns int32 [count] that are to stay in 16 bits, by the sample. The first call makes the choice for all modules
        that share these statistics."""
        assert self.magnitudes is not None
        with self._choosing:
            if count not in self._chosen:
                self._chosen[count] = choose(self.magnitudes.magnitude, count)
            return self._chosen[count]

    def expect_factor(self, damping: float) -> None:
        """Says that one more module will ask for the factor of this damping."""
        self._expected[damping] += 1

    def factor(self, damping: float) -> Factor:
        """The factor of the Hessian, which must be symmetric already and may not change any more. The first call makes it for all
        modules that are expected to ask; after the last of them it is kept no longer. Raises NonFiniteError as `factorized`."""
        assert self.hessian is not None
        with self._choosing:
            found = self._factors.get(damping) or factorized(self.hessian, damping)
            self._expected[damping] -= 1
            self._factors[damping] = found
            if self._expected[damping] <= 0:
                del self._factors[damping]
            return found

    @property
    def mean_square(self) -> torch.Tensor:
        """E[x_j^2] float32 [in_features]."""
        return (self.square / max(self.tokens, 1)).float()

    @property
    def sample(self) -> torch.Tensor:
        """The tokens that were kept, float32 [tokens, in_features]."""
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    @property
    def inputs(self) -> Inputs:
        """What methods that change inputs ask. The Hessian must be symmetric already."""
        magnitude = (self.magnitude / max(self.tokens, 1)).float()
        return Inputs(magnitude, self.absmax, self.mean_square, self.sample, self.hessian)

    def divide(self, scale: torch.Tensor) -> None:
        """Makes them those of x / scale, float32 [in_features]. The Hessian must be symmetric already."""
        wide = scale.double()
        self.square, self.magnitude, self.absmax = self.square / wide.square(), self.magnitude / wide, self.absmax / scale
        self._kept = [self.sample / scale]
        if self.hessian is not None:
            self.hessian /= scale
            self.hessian /= scale.unsqueeze(1)

    @property
    def is_finite(self) -> bool:
        """Whether no activation was NaN or infinite."""
        return bool(self.square.isfinite().all())


class Sample:
    """Magnitudes of tokens at even distances: of all of a segment at first, and of every second one that is kept whenever there are
    more than `most` of it.

    Bfloat16, since they are compared with each other alone.
    """

    def __init__(self, in_features: int, device: torch.device, most: int = SAMPLE):
        self._kept = torch.empty(0, in_features, dtype=torch.bfloat16, device=device)
        self._most, self._before = most, [self._kept]
        self.begin_segment()

    def begin_segment(self) -> None:
        """The tokens that come are of a new segment."""
        self._before.append(self._kept)
        self._kept, self._distance, self._seen = self._kept[:0], 1, 0

    def take(self, magnitudes: torch.Tensor) -> None:
        """Takes what `magnitude` gave of a whole segment."""
        self._before.append(magnitudes)

    def add(self, magnitude: torch.Tensor) -> None:
        """Takes tokens of magnitude float32 [tokens, in_features], in their order."""
        some = magnitude[-self._seen % self._distance :: self._distance]
        self._seen += len(magnitude)
        self._kept = torch.cat((self._kept, some.to(torch.bfloat16)))
        while len(self._kept) > self._most:
            self._kept = self._kept[::2].clone()
            self._distance *= 2

    @property
    def magnitude(self) -> torch.Tensor:
        """bfloat16 [at most SAMPLE, in_features]."""
        return torch.cat((*self._before, self._kept))


class Turns:
    """Lets batches, each in a thread, add to the same sums in their order. Batches are numbered from 0."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._added: dict[int, set[object]] = {}  # by the batches under way: what they have added to
        self._ended: set[int] = set()
        self._first = 0  # the earliest batch that has not ended

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """While this lasts, the batch `number` may add. It is held up by no batch that has failed."""
        with self._changed:
            self._added[number] = set()
        try:
            yield
        finally:
            with self._changed:
                del self._added[number]
                self._ended.add(number)
                while self._first in self._ended:
                    self._ended.remove(self._first)
                    self._first += 1
                self._changed.notify_all()

    def wait(self, number: int, key: object) -> None:
        """Returns once every earlier batch has added to `key`, or has ended."""

        def ready() -> bool:
            return all(n in self._ended or key in self._added.get(n, ()) for n in range(self._first, number))

        with self._changed:
            self._changed.wait_for(ready)

    def pass_on(self, number: int, key: object) -> None:
        """Says that the batch `number` has added to `key`."""
        with self._changed:
            self._added[number].add(key)
            self._changed.notify_all()
