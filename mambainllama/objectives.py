"""What a step minimises: language modelling with or without a teacher, and alignment with a teacher's layers. Preference is its own file.

Alignment (MOHAWK, arXiv 2408.10189; RADLADS, arXiv 2505.03005): the teacher's hidden state before a converted layer goes into the
student's layer and the teacher's, and their outputs are compared, all layers in one pass and no gradient from one to another:
  error = mean over layers l of  sum |student's output - teacher's|^2 / (tokens · V_l)
V_l is the teacher's variance: of what its mixer ("mixer") or its whole layer ("hidden") adds to the hidden state, summed over channels, on
the first rows of the data; so 1 is a layer that adds the mean, and 0 the teacher's. Every token of a document with an answer counts.
on_policy: the student's own hidden state goes in instead. At the stage's end the layers take over what they have learned one after the
other; one with which the KL to the teacher rises gets its weights of before back, and is named in the stage's record ("rolled_back")."""
import numpy as np

from .cache import Cache, CachedBatches
from .data import START, Batches, read
from .model import fits
from .parallel import ranks
from .weights import replacing

LEAST = 1e-6  # of the largest variance of a layer: a layer that adds nothing has none
SAMPLE = 32  # rows that a stage's variances and rollbacks are measured on


class LanguageModelling:
    """ce · cross-entropy to the targets + kl · KL to the teacher of a batch (ids, targets, prev). teacher: a model, or a Cache, which has
    nothing of eval_data, so that its metrics lack kl, or None.

    With kl_kind "paper" and temperature 1 it is a batch's loss in the original code (jxiw/MambaInLlama, train_mamba2/train_hybrid.py), ce and
    kl its ce_weight and kl_weight. That averages the cross-entropies of its micro-batches; here every token that counts weighs the same.
    An objective has these methods, and `reference`, the model that it measures by (or None); its metrics are what `counts` names.
    answers: as read in data.py."""

    def __init__(self, model, teacher, recipe, answers=False):
        self.model, self.reference, self.recipe, self.answers = model, teacher, recipe, answers

    def stage(self, recipe):
        """The objective of a stage of this recipe, settings()."""
        return Alignment(self.model, self.reference, recipe) if recipe["align"] else LanguageModelling(self.model, self.reference, recipe)

    def read(self, data, name, progress=None, **options):
        """data's rows as batches."""
        documents = read(data, self.model.tokenizer, self.model.config["vocab_size"], name, self.answers, progress)
        packed = documents, self.recipe["length"], self.recipe["batch"], self.recipe["seed"]
        if isinstance(self.reference, Cache) and name == "data":
            return CachedBatches(self.reference, *packed, name=name, **options)
        return Batches(*packed, name=name, **options)

    def prepare(self, batches, path=None, reference=None):
        """Before the first step, the model being as it came; path: a file to keep what it takes, or None; reference: the reference's
        fingerprint, if there is a path."""

    def start(self, data, path=None, fresh=True):
        """Before a stage's first step, its layers being converted, and, fresh=False, when a run goes on in it; path: as for prepare."""

    def finish(self, data):
        """After a stage's last step; → what its record says of it."""
        return {}

    def counts(self, batch):
        """{metric: over how much it is a mean}: the positions that count, or for kl_kind "paper" the rows."""
        tokens = int(np.count_nonzero(batch[1] >= 0))
        if isinstance(self._teacher(batch), Cache):
            return {"ce": tokens}
        return {"ce": tokens, "kl": len(batch[1]) if self.recipe["kl_kind"] == "paper" else tokens}

    def loss(self, batch, share, backward=False):
        """{"loss", metric…}: the metrics' means, and the loss that weighs each by share[metric]; backward: adds its gradient."""
        r = self.recipe
        teacher = self._teacher(batch) if r["kl"] and "kl" in share else None
        return self.model.loss(batch[0], batch[1], teacher=teacher, ce=r["ce"] * share["ce"], kl=r["kl"] * share.get("kl", 0),
                               temperature=r["temperature"], kind=r["kl_kind"], prev=batch[2], backward=backward,
                               recompute=backward and r["recompute"])

    def _teacher(self, batch):
        return batch[3] if len(batch) > 3 else self.reference


class Alignment(LanguageModelling):
    """error of a batch: the page at the top."""

    def start(self, data, path=None, fresh=True):
        self.layers = [i for i, (a, b) in enumerate(zip(self.model.layer_kinds, self.reference.layer_kinds)) if a != b]
        if not self.layers:
            raise ValueError("recipe: a stage aligns, and no layer of the student differs in kind from the teacher's")
        self.variance = self._variance(data)
        if not self.recipe["on_policy"]:
            return
        if fresh:
            self.before = {name: self.model.raw(name) for layer in self.layers for name in self._names(layer)}
            if path and ranks().first:
                with replacing(path) as file:
                    np.savez(file, **self.before)
        else:
            try:
                with np.load(path) as file:
                    self.before = dict(file)
            except OSError as error:
                raise ValueError(f"{path}: the weights from before the stage cannot be read: {error}") from None

    def counts(self, batch):
        return {"error": int(_in_use(batch).sum())}

    def loss(self, batch, share, backward=False):
        mask, r = _in_use(batch), self.recipe
        tokens = max(int(mask.sum()), 1)
        weights = share["error"] / (len(self.layers) * tokens * self.variance)
        errors = self.model.align(batch[0], self.reference, r["align"], layers=self.layers, prev=batch[2], mask=mask,
                                  weights=weights.astype(np.float32), own_prefix=r["on_policy"], backward=backward)
        error = float((errors.sum(axis=(1, 2), dtype=np.float64) / (tokens * self.variance)).mean())
        return {"loss": share["error"] * error, "error": error}

    def finish(self, data):
        return {"rolled_back": self._roll_back(data)} if self.recipe["on_policy"] else {}

    def _variance(self, data):
        """Of what the teacher adds in each layer, summed over channels, (layers) float64."""
        count, total, squares = 0, 0.0, 0.0
        for batch in _some(data):
            use = _in_use(batch)
            before = self.reference.hidden(batch[0], self.layers, prev=batch[2])
            after = (self.reference.hidden(batch[0], self.layers, prev=batch[2], mid=True) if self.recipe["align"] == "mixer" else
                     self.reference.hidden(batch[0], [i + 1 for i in self.layers], prev=batch[2]))
            added = (after - before)[:, use].astype(np.float64)
            count, total, squares = count + use.sum(), total + added.sum(axis=1), squares + (added * added).sum(axis=1)
        variance = (squares / count - (total / count) ** 2).sum(axis=1)
        return np.maximum(variance, LEAST * variance.max() or 1.0)

    def _names(self, layer):
        return [name for name in self.model.names if name.startswith(f"model.layers.{layer}.") and fits(name, self.recipe["train"])]

    def _roll_back(self, data):
        """From the weights of before on, each layer in turn gets what it has learned, and keeps it unless the KL rises; → those that did not."""
        judge = LanguageModelling(self.model, self.reference, {**self.recipe, "ce": 0.0, "kl": 1.0, "kl_kind": "forward"})
        learned = {name: self.model.raw(name) for name in self.before}
        self._set(self.before)
        best, rolled_back = evaluate(judge, lambda: _some(data))["kl"], []
        for layer in self.layers:
            self._set({name: learned[name] for name in self._names(layer)})
            kl = evaluate(judge, lambda: _some(data))["kl"]
            if kl <= best:
                best = kl
            else:
                rolled_back.append(layer)
                self._set({name: self.before[name] for name in self._names(layer)})
        return rolled_back

    def _set(self, weights):
        for name, value in weights.items():
            self.model.set(name, value)


def _some(data):
    """The first batches of data's pass, until they have SAMPLE rows."""
    count = 0
    for batch in data.once():
        yield batch
        count += len(batch[0])
        if count >= SAMPLE:
            return


def _in_use(batch):
    """(B,T) bool: tokens of documents in which a target counts; padding is a document in which none does."""
    _, targets, prev = batch
    starts = prev.ravel() == START
    starts[::prev.shape[1]] = True
    counted = np.add.reduceat((targets.ravel() >= 0).astype(np.int64), np.flatnonzero(starts)) > 0
    return counted[np.cumsum(starts) - 1].reshape(prev.shape)


def evaluate(objective, batches):
    """{"loss", metric…} over all that batches() yields, as if it were one batch; the ranks of a job share the work."""
    total, sums = {}, {}
    for batch in batches():
        total = plus(total, objective.counts(batch))
    for batch in ranks().part(batches()):
        sums = plus(sums, share_of(objective, batch, total))
    return ranks().sum(sums)


def share_of(objective, batch, total, backward=False):
    """What the batch adds to loss and metrics of a larger batch whose counts are total."""
    share = {metric: count / total[metric] for metric, count in objective.counts(batch).items()}
    values = objective.loss(batch, share, backward)
    return {"loss": values["loss"], **{metric: share[metric] * values[metric] for metric in share}}


def plus(a, b):
    return {key: a.get(key, 0) + b[key] for key in b}
