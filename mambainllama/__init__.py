"""mambainllama: pretrained Transformers into fast hybrid Mamba models (The Mamba in the Llama, arXiv 2408.15237)."""
from . import evaluate, ops
from .ablate import ablate
from .answers import answer
from .cache import cache
from .checkpoint import load, save
from .convert import convert
from .export import export
from .generate import generate
from .hub import push
from .model import Model, State, random
from .parity import parity
from .pipeline import run
from .plan import plan
from .recall import recall
from .train import distill, dpo, sft, train

__all__ = ["Model", "State", "ablate", "answer", "cache", "convert", "distill", "dpo", "evaluate", "export", "generate", "load", "ops", "parity",
           "plan", "push", "random", "recall", "run", "save", "sft", "train"]
__version__ = "0.1.0"
