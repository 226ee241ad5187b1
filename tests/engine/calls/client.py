"""A client of models that are trained by calls, in the engine's process."""

import itertools
from pathlib import Path

import jax
import numpy as np

from flexllm_jax import LLM
from flexllm_jax.engine.calls.models import TrainingModels
from flexllm_jax.finetune.calls.data import GivenDatum
from flexllm_jax.finetune.calls.source import AsideCall, StepCall
from flexllm_jax.peft.bank import from_row

_names = itertools.count()


class Client:
    """Makes models and hands over their calls; answers are futures."""

    def __init__(self, llm: LLM):
        self.llm, self.call = llm, llm._loop.call
        self.models = self.call(TrainingModels, llm.engine)

    def create(self, rank=4, seed=1, name=None, weight=1.0, **choices):
        """A fresh model without LoRA on the head, as the small engine has none; its name."""
        start = self.models.fresh(rank, seed, **({"train_unembed": False} | choices))
        return self._create(start, name, weight)

    def create_from(self, folder: Path, optimizer: bool, name=None):
        return self._create(self.models.read(Path(folder), optimizer=optimizer), name, 1.0)

    def _create(self, start, name, weight):
        name = name or f"client/{next(_names)}:train:0"
        self.call(self.models.create, name, self.models.ready(start), weight)
        return name

    def add(self, name, call):
        self.call(self.models.add, name, call)
        return call.future

    def forward(self, name, data, loss="cross_entropy", backward=True, **settings):
        return self.add(name, self.models.forward_call(data, loss, settings, backward=backward))

    def step(self, name, **fields):
        return self.add(name, StepCall(**fields))

    def save_state(self, name, folder):
        return self.add(name, self.models.save_state_call(folder))

    def save_adapter(self, name, folder, serve_as=None):
        return self.add(name, self.models.save_adapter_call(folder, serve_as))

    def load(self, name, folder, optimizer):
        call = self.models.load_call()
        self.call(self.models.add, name, call)
        state = self.models.ready(self.models.read(Path(folder), optimizer=optimizer))
        self.call(self.models.loaded, name, call, state)
        return call.future

    def delete(self, name):
        self.call(self.models.delete, name)

    def weights(self, name, folder: Path):
        """A model's weights as it is now, by (layer, site) and factor."""
        self.save_adapter(name, folder).result(60)
        return self.models.read(folder, optimizer=False).adapter.weights

    def gradient(self, name):
        """The sum since the last step, when all before it is done, by (layer, site) and factor."""
        call, stacks = AsideCall(), self.llm.engine.runner.sizes.stacks

        def read(job):
            values = jax.tree.map(np.asarray, job.state["gradients"])
            call.answer(from_row(values, job.peft, job.shapes, stacks).weights)
            return lambda: None

        call.do = read
        return self.add(name, call).result(60)


def datum(tokens, **inputs):
    """A datum whose targets are its next tokens, unless others are given."""
    tokens = np.asarray(tokens)
    if "target_tokens" not in inputs:
        inputs["target_tokens"], tokens = tokens[1:], tokens[:-1]
    return GivenDatum(tokens, {name: np.asarray(value) for name, value in inputs.items()})


def random_data(lengths, seed=0, weights=True):
    """Data for cross-entropy."""
    random = np.random.default_rng(seed)
    data = []
    for length in lengths:
        own = {"weights": random.choice([0.0, 1.0, 0.5], length)} if weights else {}
        data.append(datum(random.integers(3, 260, length + 1), **own))
    return data


def distance(one, other):
    """Norm of the difference of two adapters' weights, and of the first."""
    pairs = [(one[s][f], other[s][f]) for s in one for f in one[s]]
    assert pairs and one.keys() == other.keys()
    difference = np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs))
    return difference, np.sqrt(sum((a**2).sum() for a, _ in pairs))
