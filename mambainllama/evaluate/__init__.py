"""How good is a model? AlpacaEval, MT-Bench and lm-evaluation-harness by the field's own tools and files, probes of long contexts, and what multiple
choice hides. Each function takes a Model, writes a folder (run.py says what is in it), goes on in it when called again, and returns its results."""
from .alpaca import alpaca
from .compare import compare, report
from .gap import gap
from .lm import harness_model, lm, log_likelihoods
from .mtbench import mtbench
from .needle import needle

__all__ = ["alpaca", "compare", "gap", "harness_model", "lm", "log_likelihoods", "mtbench", "needle", "report"]
