"""What a pass over a text keeps of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from covariance_cache.accumulator import SecondMomentAccumulator, is_finite
from covariance_cache.adequacy import Adequacy, Half, measure
from covariance_cache.errors import NonFiniteActivations
from covariance_cache.ranks import Ranks


class LayerSums:
    """The second moment of a layer's keys; the share of it that the windows' first
    positions hold; and some keys, with the solutions for them at half the tokens."""

    def __init__(self, sample: Tensor, probes: int, name: str = "a layer") -> None:
        """
        Args:
            sample: a key of the layer, for its width, dtype and device.
            probes: keys to keep, for the adequacy report; 0 for no report.
            name: of the layer, for messages.
        """
        self.name = name
        self.key_dtype = sample.dtype
        self.moment = SecondMomentAccumulator(
            sample.shape[-1],
            torch.promote_types(sample.dtype, torch.float32),
            sample.device,
        )
        self._squares = torch.zeros((), dtype=torch.float64, device=sample.device)
        self._wanted = probes
        self._probes: Tensor | None = None
        self._half: Half | None = None

    @torch.no_grad()
    def add(self, keys: Tensor) -> Tensor:
        """Adds the keys of a batch of windows, [windows, positions, d_key]. Whether
        all are finite comes back as a tensor on their device: if not, the sums are
        spoilt. On a GPU it only queues the work."""
        rows = keys.flatten(0, -2)
        self.moment.add(rows)
        self._squares += keys[..., 0, :].double().square().sum()
        if self._wanted and self._probes is None:
            count = min(self._wanted, len(rows))
            every = torch.arange(count, device=rows.device) * len(rows) // count
            self._probes = rows[every].clone()
        return is_finite(rows)

    def gather(self, ranks: Ranks) -> None:
        """Moves all processes' sums into the first one's; the others go on from
        nothing."""
        total = self.moment.state()["total"]
        count = torch.tensor(self.moment.count, device=total.device)
        for part in (total, count, self._squares):
            ranks.reduce(part)
        if ranks.first:
            self.moment.count = int(count)
        else:
            self.moment.clear()
            self._squares.zero_()

    def share(self, ranks: Ranks) -> None:
        """Gives every process the first one's sums."""
        total = self.moment.state()["total"]
        count = torch.tensor(self.moment.count, device=total.device)
        for part in (total, count, self._squares):
            ranks.broadcast(part)
        self.moment.count = int(count)

    def halve(self) -> None:
        """Keeps the solutions for the probe keys as they are now."""
        if self._probes is not None:
            with self._named():
                mean, count = self.moment.freeze()
            self._half = Half.of(mean, count, self._probes)

    def finish(self) -> tuple[Tensor, int]:
        """Mean and count; the sums are lost."""
        with self._named():
            return self.moment.finish()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteActivations as error:
            raise NonFiniteActivations(f"{self.name}: {error}", error.row) from error

    def measure(self, mean: Tensor, count: int) -> Adequacy | None:
        """Adequacy of what `finish` gave; None without probe keys."""
        if self._probes is None:
            return None
        trace = float(mean.diagonal().sum(dtype=torch.float64)) * count
        share = float(self._squares) / trace if trace else None
        return measure(mean, count, first_position_share=share, half=self._half)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here; live buffers, not copies."""
        state = {**self.moment.state(), "squares": self._squares}
        if self._probes is not None:
            state["probes"] = self._probes
        if self._half is not None:
            state["half_count"] = torch.tensor(self._half.count)
            if self._half.solutions is not None:
                state["half_solutions"] = self._half.solutions
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes the place of the sums that `state` was taken from."""
        here = {name: each.to(self._squares.device) for name, each in state.items()}
        self.moment.load_state(here)
        self._squares.copy_(here["squares"])
        self._probes = here.get("probes")
        if self._probes is not None and "half_count" in here:
            count, solutions = int(here["half_count"]), here.get("half_solutions")
            self._half = Half(count, self._probes, solutions)
