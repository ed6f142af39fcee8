"""The keys of a sequence's earlier edits, and the factorization that knows them.

A key is added in O(m d), m of them there already, and nothing is factored anew for it:
the factorization is extended. Once the extension is so wide that using it costs what
factoring costs, its keys are folded into their second moment, and the whole is factored
once. So a key costs O(d²) in the long run, whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unified_edit.algebra.factorization import Factorization, factorize
from unified_edit.algebra.objective import Preservation, PreviousKeys

_WIDEST = 0.4
"""Extension's width over the free directions' at which keys are folded: with m keys an
edit costs 4 m r more, folding r³/3; their sum is least at m = r/√6."""


@dataclass(frozen=True, eq=False)
class EarlierKeys:
    """A preservation, the earlier keys beside it, and the factorization of both. Never
    changed: `added` gives another."""

    preservation: Preservation
    """Without earlier keys."""
    weight: float
    """Of an earlier edit, in units of the present ones; 0 forgets them."""
    factorization: Factorization
    folded: Tensor | None = None
    """[d_key, d_key] the sum of k kᵀ over folded keys, or None."""
    recent: tuple[Tensor, ...] = ()
    """[n, d_key] of each addition since, in float64."""

    @classmethod
    def of(
        cls,
        preservation: Preservation,
        weight: float,
        *,
        factorization: Factorization | None = None,
        folded: Tensor | None = None,
        recent: tuple[Tensor, ...] = (),
    ) -> EarlierKeys:
        """From its parts: what was saved gives the same numbers again.

        Args:
            factorization: of the preservation, if it was factored already.
        """
        if folded is not None:
            earlier = PreviousKeys(folded, weight=weight)
            factorization = factorize(preservation + earlier)
        elif factorization is None:
            factorization = factorize(preservation)
        made = cls(preservation, weight, factorization, folded)
        for keys in recent:
            made = made._extended(keys)
        return made

    @property
    def count(self) -> int:
        """Keys that are held one by one."""
        return sum(map(len, self.recent))

    @torch.no_grad()
    def added(self, keys: Tensor) -> EarlierKeys:
        """With the keys [n, d_key] of one more step."""
        if not self.weight:
            return self
        keys = keys.to(self.factorization.factor)
        if self.count + len(keys) <= _WIDEST * self.factorization.rank:
            return self._extended(keys)
        held = torch.cat([*self.recent, keys])
        folded = held.T @ held
        if self.folded is not None:
            folded += self.folded
        return EarlierKeys.of(self.preservation, self.weight, folded=folded)

    def _extended(self, keys: Tensor) -> EarlierKeys:
        term = PreviousKeys(keys=keys, weight=self.weight)
        return replace(
            self,
            factorization=self.factorization.extended(term),
            recent=(*self.recent, keys),
        )
