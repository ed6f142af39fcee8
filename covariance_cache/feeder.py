"""Windows in, sums out: forwards that stop at the last layer, and their keys added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covariance_cache.accumulator import first_bad_row
from covariance_cache.capture import capture_inputs, captured_inputs
from covariance_cache.corpus import Documents, Window
from covariance_cache.errors import CorpusError, NonFiniteActivations
from covariance_cache.layer import LayerSums


@dataclass(frozen=True, eq=False)
class _Sent:
    """A batch whose keys are on their way into the sums."""

    batch: list[Window]
    finite: list[Tensor]
    """For each layer, on the CPU; valid once `done`."""
    done: list[torch.cuda.Event]


class Feeder:
    """Runs batches through a model and adds their keys to the layers' sums.

    On a GPU nothing waits for the products: they are queued beside the forward, and
    whether a batch's keys were finite is looked at after the next batch was queued.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        sums: Mapping[int, LayerSums],
        documents: Documents,
    ) -> None:
        self._model = model
        self._layers = {name: layer for layer, name in names.items()}
        self._sums = sums
        self._documents = documents
        self._device = input_device(model)
        self._vocabulary = _vocabulary(model)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._sent: _Sent | None = None

    def feed(self, batch: list[Window]) -> None:
        """Adds the keys of windows of one length.

        Raises:
            NonFiniteActivations: in the batch before, with layer and place in the text.
            CorpusError: a token id that the model does not have.
        """
        ids = self._ids(batch)
        finite: list[Tensor] = []
        events: list[torch.cuda.Event] = []

        def add(name: str, keys: Tensor) -> None:
            with self._beside(keys):
                answer = self._sums[self._layers[name]].add(keys)
                if keys.is_cuda:
                    waiting = torch.empty((), dtype=torch.bool, pin_memory=True)
                    answer = waiting.copy_(answer, non_blocking=True)
                    events.append(torch.cuda.current_stream(keys.device).record_event())
                finite.append(answer)

        with capture_inputs(self._model, self._layers, add):
            run(self._model, ids)
        before, self._sent = self._sent, _Sent(batch, finite, events)
        self._verify(before)

    def settle(self) -> None:
        """Waits until all keys are in the sums.

        Raises:
            NonFiniteActivations: as `feed` does.
        """
        sent, self._sent = self._sent, None
        self._verify(sent)

    def _verify(self, sent: _Sent | None) -> None:
        if sent is None:
            return
        for event in sent.done:
            event.synchronize()
        if not all(bool(each) for each in sent.finite):
            self._locate(sent.batch)

    def _locate(self, batch: list[Window]) -> None:
        """Runs a batch once more, to say where its keys are not finite."""
        ids = self._ids(batch)

        def check(name: str, keys: Tensor) -> None:
            found = first_bad_row(keys.flatten(0, -2))
            if found is None:
                return
            row, position = divmod(found, ids.shape[1])
            end = batch[row].end
            raise NonFiniteActivations(
                f"layer {self._layers[name]} ({name}): the first key that is not "
                f"finite is at token {position} of the window of {ids.shape[1]} that "
                f"ends {end.token} tokens into {self._documents.where(end.opened - 1)};"
                " check the model's weights, or load it in a wider dtype",
                found,
            )

        with capture_inputs(self._model, self._layers, check):
            run(self._model, ids)
        raise NonFiniteActivations(
            "a key of the windows that end at "
            f"{self._documents.where(batch[-1].end.opened - 1)} was not finite, but is "
            "so when they are run again: the device's results are not reproducible"
        )

    def _ids(self, batch: list[Window]) -> Tensor:
        ids = torch.tensor([window.ids for window in batch])
        largest = int(ids.max())
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise CorpusError(
                f"the tokenizer made token id {largest}, but "
                f"{type(self._model).__name__} has {self._vocabulary} embeddings; is "
                "it this model's tokenizer?"
            )
        return ids.to(self._device)

    @contextmanager
    def _beside(self, keys: Tensor) -> Iterator[None]:
        """On a GPU, a stream of its own for what is done with some keys."""
        if not keys.is_cuda:
            yield
            return
        if keys.device not in self._streams:
            stream = torch.cuda.Stream(keys.device)  # type: ignore[no-untyped-call]
            self._streams[keys.device] = stream
        stream = self._streams[keys.device]
        stream.wait_stream(torch.cuda.current_stream(keys.device))
        keys.record_stream(stream)
        with torch.cuda.stream(stream):
            yield


def sample_keys(model: nn.Module, names: Mapping[int, str]) -> dict[int, Tensor]:
    """One key of each layer, [1, 1, d_key]: width, dtype and device, whatever the
    module's type. Also finds out, before the long pass, what is never reached."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    inputs = captured_inputs(model, names.values(), lambda: run(model, ids))
    return {layer: inputs[name] for layer, name in names.items()}


def run(model: nn.Module, ids: Tensor) -> None:
    """One forward over windows without pads."""
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: of its first weight that is on a device, as
    accelerate keeps offloaded ones on none."""
    for each in model.parameters():
        if each.device.type != "meta":
            return each.device
    return torch.device("cpu")


def _vocabulary(model: nn.Module) -> int | None:
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    return size if isinstance(size, int) else None
